"""A model from shapes alone: no memory, no drawing, no compiler."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from llama_tut.tools.meta import without_memory

COUNT = """
import sys, torch
from llama_tut.tools.meta import without_memory
before = len(sys.modules)
{line}
print(len(sys.modules) - before)
"""


def modules_imported(line):
    """How many modules a line of Python makes a fresh process import."""
    run = [sys.executable, "-c", COUNT.format(line=line)]
    return int(subprocess.run(run, capture_output=True, text=True).stdout)


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
    assert modules_imported(plain) > 200 and modules_imported(ours) < 10
