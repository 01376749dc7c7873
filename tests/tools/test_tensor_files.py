"""Tensors of all ranks in one folder."""

import pytest
import torch

from llama_tut.tools.ranks import Ranks
from llama_tut.tools.tensor_files import (
    read_tensors,
    tensor_shapes,
    write_tensors,
)

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.weight/step": torch.tensor(3.0),
    "0/cpu": torch.arange(5, dtype=torch.uint8),
    "half": torch.ones(4, dtype=torch.bfloat16),
}


def test_written_tensors_come_back_in_place(tmp_path):
    write_tensors(tmp_path, TENSORS, Ranks())
    shapes = {name: list(t.shape) for name, t in TENSORS.items()}
    assert tensor_shapes(tmp_path) == shapes
    found = {name: torch.zeros_like(t) for name, t in TENSORS.items()}
    read_tensors(tmp_path, found, Ranks())
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_a_part_may_be_read_alone(tmp_path):
    write_tensors(tmp_path, TENSORS, Ranks())
    found = {"a.weight": torch.zeros(2, 3)}
    read_tensors(tmp_path, found, Ranks())
    assert torch.equal(found["a.weight"], TENSORS["a.weight"])


def test_what_fails_on_the_disk_is_an_os_error(tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(OSError):
        write_tensors(tmp_path / "a file", TENSORS, Ranks())
    with pytest.raises(OSError):
        read_tensors(tmp_path, {"a.weight": torch.zeros(2, 3)}, Ranks())
