"""A notebook's function on several processes."""

import math as numbers
import os
from collections import Counter as Count

import pytest
import torch
import torch.distributed as dist
from torch import nn

from llama_tut.tools.on_ranks import on_ranks, script_of, source_of

SHARE = {"factor": 10}
rank = torch.zeros(3)  # names that are local below, or attributes, stay here
most_common = torch.zeros(3)


class Twice(nn.Module):
    """A class of the notebook."""

    def forward(self, x):
        return 2 * x


def share():
    count = Count("a" * SHARE["factor"])
    return count.most_common()[0][1] * (1 + dist.get_rank())


def total():
    """Names a module, a constant, a function, a class and an inner function."""
    dist.init_process_group("gloo")

    def inner(x):
        dist.all_reduce(x)
        return Twice()(x)

    x = inner(torch.tensor([float(share()), numbers.pi]))
    rank = dist.get_rank()
    dist.destroy_process_group()
    return {"x": x, "who": [rank, os.environ["WORLD_SIZE"]]}


def fails():
    raise SystemExit(3 * (os.environ["RANK"] == "1"))


class Borrows:
    """Its first function belongs to another place."""

    share = staticmethod(share)

    def own(self):
        return 1


def test_a_class_that_borrows_a_function_is_found():
    assert source_of(Borrows).startswith("class Borrows:")


def test_each_rank_returns_its_own_result():
    first, second = on_ranks(2, total)
    assert first["who"] == [0, "2"] and second["who"] == [1, "2"]
    expected = 2 * torch.tensor([10 + 20, 2 * numbers.pi])
    torch.testing.assert_close(first["x"], expected)
    torch.testing.assert_close(second["x"], expected)


def test_a_rank_that_fails_is_reported():
    with pytest.raises(RuntimeError, match=r"codes \[0, 3\]"):
        on_ranks(2, fails)


def test_the_script_has_what_the_function_names_once():
    text = script_of(total)
    for line in (
        "import math as numbers",
        "import torch.distributed as dist",
        "SHARE = {'factor': 10}",
        "def share():",
        "class Twice(nn.Module):",
        "import torch.nn as nn",
        "from collections import Counter as Count",
    ):
        assert text.count(line) == 1, line
