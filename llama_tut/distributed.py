# From notebooks/14_distributed.ipynb by scripts/export.py: edit the notebook.
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

from llama_tut.config import InputError

# Start and stop


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the W that train together."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    patient: object = None  # a gloo group that waits half an hour


def choose_device(name, local_rank=0, ranks_here=1):
    """The device called auto, cpu, cuda or mps for this rank.

    Raises:
        InputError: this machine lacks the device, or one for each rank.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        mps = torch.backends.mps.is_available() and ranks_here == 1
        name = "cuda" if gpus else "mps" if mps else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps" and torch.backends.mps.is_available():
        if ranks_here > 1:
            raise InputError("mps serves one rank: start one, or use cpu")
        return torch.device("mps")
    if name == "cuda" and gpus:
        if gpus < ranks_here:
            raise InputError(
                f"{ranks_here} ranks need {ranks_here} GPUs, found {gpus}: "
                "start fewer ranks, or use device cpu"
            )
        return torch.device("cuda", local_rank)
    if name in ("cuda", "mps"):
        raise InputError(f"device {name}: not found here, use cpu or auto")
    raise InputError(f"device {name!r} is none of auto, cpu, cuda, mps")


def start(device="auto", timeout_s=20):
    """Join the other ranks that torchrun started; alone, just pick a device.

    Args:
        device: auto, cpu, cuda or mps.
        timeout_s: how long a collective waits for a rank before it raises.

    Raises:
        InputError: the device is not here, on every rank alike.
    """
    environment = os.environ
    rank = int(environment.get("RANK", 0))
    world_size = int(environment.get("WORLD_SIZE", 1))
    local_rank = int(environment.get("LOCAL_RANK", 0))
    ranks_here = int(environment.get("LOCAL_WORLD_SIZE", 1))
    device = choose_device(device, local_rank, ranks_here)
    if "LOCAL_RANK" in environment:
        die_with_parent()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # On a timeout NCCL would wait another minute to write a trace.
        environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    patient = None
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        patient = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
    return Ranks(rank, world_size, local_rank, device, patient)


def stop():
    """Leave the group; nothing to do for a process that is alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def die_with_parent():
    """End this process as soon as its parent ends, however that happens."""
    parent = os.getppid()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# Agree


def mean_over_ranks(tensor):
    """The mean of a tensor over all ranks; the tensor itself when alone."""
    if not dist.is_initialized():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)  # a sum: gloo has no average
    return total / dist.get_world_size()


def any_rank(flag, device="cpu"):
    """Whether `flag` is true on at least one rank; all ranks must ask."""
    if not dist.is_initialized():
        return bool(flag)
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count)
    return count.item() > 0


def from_rank_zero(value):
    """What rank 0 passed; the others' values are ignored."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all(ranks):
    """Wait, up to half an hour, until every rank has come here."""
    if ranks.patient is not None:
        dist.barrier(group=ranks.patient)


@contextmanager
def shared_errors():
    """Raise an InputError of any rank on every rank.

    The body must not talk to other ranks: one that fails never answers.
    """
    text = None
    try:
        yield
    except InputError as error:
        text = str(error)
    texts = [text]
    if dist.is_initialized():
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, text)
    for text in texts:
        if text is not None:
            raise InputError(text)


# Gradients


def wrap(model, ranks):
    """The model as DDP when there are other ranks, else the model itself."""
    if ranks.world_size == 1:
        return model
    on_gpu = ranks.device.type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[ranks.device] if on_gpu else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


@contextmanager
def micro_step_sync(model, last):
    """Send gradients in the last micro step of a step only.

    Forward AND backward belong inside: DDP decides in the forward pass.
    """
    no_sync = getattr(model, "no_sync", nullcontext)
    with nullcontext() if last else no_sync():
        yield


def inner(model):
    """The model inside DDP and torch.compile."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = getattr(model, "module", None) or model._orig_mod
    return model


def parameter_hash(model):
    """Hex SHA-256 of all parameters by name: equal only if every bit is."""
    digest = hashlib.sha256()
    for name, p in inner(model).named_parameters():
        digest.update(name.encode())
        data = p.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(data.numpy())
    return digest.hexdigest()
