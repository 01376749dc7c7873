"""Ranks: how a process joins the others, agrees with them, and ends with them.

torchrun starts W processes and tells each its number in RANK. Chapter 16 says
what they do together; this file is what surrounds it.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from llama_tut.tools.devices import choose_device
from llama_tut.tools.files import InputError, require

PATIENCE = timedelta(minutes=30)  # for work that one rank does alone
SILENCE_S = 10  # a wait that is longer is announced


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the W that train together.

    `gloo_group` is a second group of all ranks. Its operations run on the CPU
    and wait for half an hour, so one rank may work while the others wait.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    gloo_group: object = None


def start(device="auto", timeout_s=20):
    """Join the ranks that torchrun started; alone, only choose a device.

    Args:
        device: auto, cpu, cuda or mps.
        timeout_s: how long a rank waits for the others before it raises.

    Raises:
        InputError: the device is not here, or RANK and its like make no sense.
    """
    world_size = whole_number("WORLD_SIZE", 1, least=1)
    ranks_here = whole_number("LOCAL_WORLD_SIZE", 1, least=1)
    if world_size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            require(name in os.environ, f"WORLD_SIZE={world_size}, {ADVICE}")
    rank = whole_number("RANK", 0, most=world_size - 1)
    local_rank = whole_number("LOCAL_RANK", 0, most=ranks_here - 1)
    whole_number("MASTER_PORT", 1, least=1, most=65535)
    device = choose_device(device, local_rank, ranks_here)
    if "LOCAL_RANK" in os.environ:  # torchrun is the parent
        die_with_parent()
    group = None
    if world_size > 1:
        group = connect(device, timedelta(seconds=timeout_s))
    return Ranks(rank, world_size, device, group)


ADVICE = (
    "but RANK, MASTER_ADDR or MASTER_PORT is not set: start several ranks "
    "with scripts/train_ddp.sh, or unset WORLD_SIZE to train alone"
)


def whole_number(name, default, least=0, most=2**31):
    """A whole number from the environment. Raises InputError."""
    text = os.environ.get(name, str(default))
    digits = text.isascii() and text.isdigit() and len(text) < 11
    require(
        digits and least <= int(text) <= most,
        f"the environment has {name}={text}, which must be a whole number "
        f"from {least} to {most}: unset RANK, WORLD_SIZE and their like to "
        "train alone, or start ranks with scripts/train_ddp.sh",
    )
    return int(text)


def die_with_parent():
    """End this process as soon as its parent ends, however that happens.

    torchrun runs each rank in a session of its own, so no signal of the
    terminal reaches a rank. If torchrun is killed, the ranks would train on.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # man page prctl(2)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch():
        # On Linux too: the parent may have died just before prctl.
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def connect(device, timeout):
    """Connect to the other ranks; returns the group that is patient.

    Importing PyTorch from a slow disk can take one machine a minute longer
    than another, so the ranks first wait for each other at the store, which
    is a table of keys and values. The short timeout counts from there.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # After a timeout NCCL would take a minute more to write a trace.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    with signals_end_us(), announced_wait():
        store, rank, world_size = next(
            dist.rendezvous("env://", timeout=PATIENCE)
        )
        if store.add("arrived", 1) == world_size:
            store.set("all arrived", "yes")
        store.wait(["all arrived"], PATIENCE)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return dist.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def announced_wait():
    """Rank 0 says that it waits for the others, if that takes long."""

    def announce():
        where = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        count = os.environ["WORLD_SIZE"]
        print(f"waiting for all {count} ranks at {where}", file=sys.stderr)

    timer = threading.Timer(SILENCE_S, announce)
    timer.daemon = True
    if os.environ["RANK"] == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def signals_end_us():
    """Ctrl-C and SIGTERM end the process while it only waits.

    A handler of Python does not run while PyTorch waits in C++, and there is
    nothing to save yet.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop():
    """Leave the other ranks; nothing to do for a process that is alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_part(tensor):
    """What this rank holds of a tensor: all of it, unless it is cut."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def mean_over_ranks(tensor):
    """The mean of a tensor over all ranks; alone, the tensor itself."""
    if not dist.is_initialized():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)  # a sum: gloo has no mean
    return total / dist.get_world_size()


def any_rank(flag, device="cpu"):
    """Whether `flag` is true on any rank. All ranks have to ask."""
    flag = torch.tensor(float(flag), device=device)
    return mean_over_ranks(flag).item() > 0


def broadcast_object(value, group=None):
    """What rank 0 passed, whatever the others did."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_objects(value, group=None):
    """What each rank passed, as a list in their order, on all ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=group)
    return values


def wait_for_all(ranks):
    """Wait, up to half an hour, until every rank has come here."""
    if ranks.gloo_group is not None:
        dist.barrier(group=ranks.gloo_group)


@contextmanager
def shared_errors(group=None):
    """Raise an InputError of any rank on every rank.

    The body must not talk to other ranks: one that fails never answers. If
    it takes ranks unequally long, pass `Ranks.gloo_group`.
    """
    text = None
    try:
        yield
    except InputError as error:
        text = str(error)
    for one in gather_objects(text, group):
        if one is not None:
            raise InputError(one)


def on_rank_zero(ranks, function, *arguments, **options):
    """Call a function on rank 0; all ranks wait, and get its result.

    Raises:
        InputError: the function's, on all ranks.
    """
    answer = None
    with shared_errors(ranks.gloo_group):
        if ranks.rank == 0:
            answer = function(*arguments, **options)
    return broadcast_object(answer, ranks.gloo_group)
