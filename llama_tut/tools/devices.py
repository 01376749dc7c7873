"""Devices: what a chip can do, by its data sheet.

Area Trainer: `choose_device`, dtypes of products and autocast belong here too.
"""

import torch

# FLOPs a second of dense bfloat16 products, from NVIDIA's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}


def peak_flops(device):
    """FLOPs a second of a GPU in bfloat16; None when it is not in PEAKS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
