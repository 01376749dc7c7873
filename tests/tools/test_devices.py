"""Devices, dtypes, peaks, and models without memory: no drawing, no compiler."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llama_tut.tools.devices import (
    autocast,
    choose_device,
    matmul_dtype,
    peak_flops,
    without_memory,
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


COUNT = """
import sys, torch
from llama_tut.tools.devices import without_memory
for line in sys.argv[1:]:
    before = len(sys.modules)
    exec(line)
    print(len(sys.modules) - before)
"""


def modules_imported(*lines):
    """How many modules each line makes a fresh process import, in turn."""
    run = [sys.executable, "-c", COUNT, *lines]
    said = subprocess.run(run, capture_output=True, text=True).stdout
    return list(map(int, said.split()))


def test_nothing_is_drawn():
    state = torch.get_rng_state()
    with without_memory():
        layer = nn.Embedding(10**6, 10**6)
    assert layer.weight.is_meta and layer.weight.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert nn.Linear(2, 2).weight.any()  # as ever afterwards


@pytest.mark.slow
def test_the_compiler_stays_out():
    """The first normal_ on meta imports hundreds of modules."""
    plain = "torch.empty(1, device='meta').normal_()"
    ours = "with without_memory(): torch.nn.Embedding(3, 3)"
    few, many = modules_imported(ours, plain)
    assert few < 10 and many > 200
