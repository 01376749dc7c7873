"""Devices: which one, which dtype is fast there, its peak, and models without memory."""

from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import nn

from llama_tut.tools.files import require


def matmul_dtype(name, device):
    """The dtype of matrix products on a device.

    Args:
        name: "float32", "bfloat16", or "auto" for what the processor does
            fast.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        fast = has.get("avx512_bf16") or has.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def autocast(device, dtype):
    """A context in which matrix products run in `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


# Dense products in bfloat16, FLOPs per second, by NVIDIA's data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}


def peak_flops(device):
    """FLOPs per second of a GPU in bfloat16; None when it is not in PEAKS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def choose_device(name="auto", local_rank=0, ranks_here=1):
    """The device of a rank: auto, cpu, cuda or mps (Apple's GPU).

    Raises:
        InputError: this machine has no such device, or too few of them.
    """
    gpus = torch.cuda.device_count()
    mps = torch.backends.mps.is_available()
    if name == "auto":
        alone = mps and ranks_here == 1
        name = "cuda" if gpus else "mps" if alone else "cpu"
    require(
        name in ("cpu", "cuda", "mps"),
        f"device {name!r}: take auto, cpu, cuda or mps",
    )
    found = {"cpu": ranks_here, "cuda": gpus, "mps": int(mps)}[name]
    require(
        found >= ranks_here,
        f"device {name}: {ranks_here} wanted, {found} found; take device cpu, "
        "or start fewer ranks",
    )
    return torch.device(name, local_rank if name == "cuda" else None)


@contextmanager
def without_memory():
    """Modules that are built in here are on the device meta.

    There is nothing to initialise there, so the functions of `torch.nn.init`
    do nothing. (The first `normal_` on meta would make PyTorch import its
    compiler: 800 modules, 60 MB, half a second.)
    """
    names = [name for name in nn.init.__all__ if name.endswith("_")]
    nothing = dict.fromkeys(names, lambda tensor, *args, **kwargs: tensor)
    with torch.device("meta"), patch.multiple(nn.init, **nothing):
        yield
