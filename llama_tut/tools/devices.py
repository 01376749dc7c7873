"""Devices: which dtype is fast here, and what a GPU could do at best."""

from contextlib import nullcontext

import torch


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


# Dense products in bfloat16, FLOPs a second, by NVIDIA's data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}


def peak_flops(device):
    """FLOPs a second of a GPU in bfloat16; None when it is not in PEAKS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
