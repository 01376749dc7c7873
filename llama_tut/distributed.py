# From notebooks/16_distributed.ipynb by scripts/export.py: edit the notebook.
"""Ranks: several processes that train one model.

Letters: B batch, T time, W ranks, N parameters.
"""

import ctypes
import hashlib
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from llama_tut.tools.files import InputError

# How do we know that all copies are equal?


def inner(model):
    """The model itself, without the wrappers of DDP and torch.compile."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = getattr(model, "module", None) or model._orig_mod
    return model


def parameter_hash(model):
    """SHA-256 of all parameters by name, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, p in inner(model).named_parameters():
        digest.update(name.encode())
        bits = p.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(bits.numpy())
    return digest.hexdigest()


# Start and stop


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the W that train together."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    patient: object = None  # a gloo group that waits for half an hour


def choose_device(name, local_rank=0, ranks_here=1):
    """The device of this rank: auto, cpu, cuda or mps (Apple's GPU).

    Raises:
        InputError: this machine has no such device, or too few of them.
    """
    gpus = torch.cuda.device_count()
    mps = torch.backends.mps.is_available()
    if name == "auto":
        alone = mps and ranks_here == 1
        name = "cuda" if gpus else "mps" if alone else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r}: take auto, cpu, cuda or mps")
    found = {"cpu": ranks_here, "cuda": gpus, "mps": int(mps)}[name]
    if found < ranks_here:
        raise InputError(
            f"device {name}: {ranks_here} wanted, {found} found; "
            "take device cpu, or start fewer ranks"
        )
    return torch.device(name, local_rank if name == "cuda" else None)


# When a rank is lost


def die_with_parent():
    """End this process as soon as its parent ends, however that happens."""
    parent = os.getppid()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch():
        # On Linux too: the parent may have died just before prctl.
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def start(device="auto", timeout_s=20):
    """Join the ranks that torchrun started; alone, only choose a device.

    Args:
        device: auto, cpu, cuda or mps.
        timeout_s: how long a rank waits for the others before it raises.

    Raises:
        InputError: the device is not here.
    """

    def number(name, default):
        return int(os.environ.get(name, default))

    rank, world_size = number("RANK", 0), number("WORLD_SIZE", 1)
    local_rank = number("LOCAL_RANK", 0)
    ranks_here = number("LOCAL_WORLD_SIZE", 1)
    device = choose_device(device, local_rank, ranks_here)
    if "LOCAL_RANK" in os.environ:  # torchrun is the parent
        die_with_parent()
    if world_size == 1:
        return Ranks(rank, world_size, local_rank, device)
    patient = connect(device, timedelta(seconds=timeout_s))
    return Ranks(rank, world_size, local_rank, device, patient)


PATIENCE = timedelta(minutes=30)


def connect(device, timeout):
    """Connect to the other ranks; returns the patient group."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # After a timeout NCCL would take a minute more to write a trace.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    store, rank, world_size = next(dist.rendezvous("env://", timeout=PATIENCE))
    if store.add("arrived", 1) >= world_size:
        store.set("all arrived", "yes")
    store.wait(["all arrived"], PATIENCE)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store, rank=rank, world_size=world_size, timeout=timeout,
    )  # fmt: skip
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def stop():
    """Leave the other ranks; nothing to do for a process that is alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


# Agreeing on small things


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
    if ranks.patient is not None:
        dist.barrier(group=ranks.patient)


@contextmanager
def shared_errors(group=None):
    """Raise an InputError of any rank on every rank.

    The body must not talk to other ranks: one that fails never answers. If
    it takes ranks unequally long, pass the patient group.
    """
    text = None
    try:
        yield
    except InputError as error:
        text = str(error)
    for one in gather_objects(text, group):
        if one is not None:
            raise InputError(one)


# DDP: buckets that leave early


def wrap(model, ranks):
    """The model as DDP if there are other ranks, else the model itself."""
    if ranks.world_size == 1:
        return model
    on_gpu = ranks.device.type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[ranks.device] if on_gpu else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,  # no second copy of the gradients
    )


# Send once a step


@contextmanager
def micro_step_sync(model, last):
    """Send gradients in the last micro step of a step only.

    Forward AND backward belong inside: DDP decides in the forward pass.
    """
    no_sync = getattr(model, "no_sync", nullcontext)  # alone: no DDP
    with nullcontext() if last else no_sync():
        yield


# The last bits of a sum


def rehearse(model, inputs, targets, cast=nullcontext):
    """Let DDP settle its buckets, so that all steps sum in one order.

    Args:
        inputs, targets: any micro batch, [B, T]; it leaves no trace.
        cast: the context of the forward pass, such as autocast.
    """
    if isinstance(model, DistributedDataParallel):
        with cast():
            loss = model(inputs, targets=targets)
        loss.backward()
        model.zero_grad()
