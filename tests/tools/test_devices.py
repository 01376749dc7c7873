"""Devices, dtypes and peaks."""

from types import SimpleNamespace

import pytest
import torch

from llama_tut.tools.devices import (
    autocast,
    choose_device,
    matmul_dtype,
    peak_flops,
)
from llama_tut.tools.files import InputError

CPU = torch.device("cpu")


def test_a_named_dtype_is_taken():
    assert matmul_dtype("float32", CPU) == torch.float32
    assert matmul_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", None])
def test_auto_asks_the_processor(monkeypatch, unit):
    found = {} if unit is None else {unit: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    wanted = torch.float32 if unit is None else torch.bfloat16
    assert matmul_dtype("auto", CPU) == wanted


def test_autocast_is_of_the_products():
    a = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(CPU, dtype):
            assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


def test_peaks_go_by_the_name_of_the_gpu(monkeypatch):
    assert peak_flops(CPU) is None
    gpu = SimpleNamespace(type="cuda")
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d, n=name: n)
        assert peak_flops(gpu) == peak


def test_an_unknown_device_is_refused():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="take auto, cpu, cuda or mps"):
        choose_device("tpu")
