"""Folders of safetensors: strange indexes, other formats, tensors read one by one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama_tut.tools.files import InputError
from llama_tut.tools.safetensors_folder import (
    INDEX,
    WHOLE,
    read_tensors,
    shorten,
    tensor_table,
    written_whole,
)

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.arange(5).bfloat16(),
    "none": torch.zeros(0, 4),
    "c": torch.arange(12, dtype=torch.float16).view(3, 2, 2),
}


def test_offsets_shapes_and_types(tmp_path):
    save_file(TENSORS, tmp_path / WHOLE, {"format": "pt"})
    table = tensor_table(tmp_path)
    assert table.keys() == TENSORS.keys()
    names = [name for name in TENSORS if TENSORS[name].numel()]
    assert all(torch.equal(table[n].tensor, TENSORS[n]) for n in names)
    for name, tensor in read_tensors(table, names):
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
        assert table[name].tensor.is_meta  # the map is given up
    for name, tensor in read_tensors(table, names, dtype=torch.float64):
        assert torch.equal(tensor, TENSORS[name].double())


@pytest.mark.parametrize(
    "shards",
    [None, [], ["a"], {}, {"a": 1}, {"a": None}, {"a": ""}, "x", 3],
    ids=str,
)
def test_an_index_that_names_no_files(shards, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(InputError, match="weight_map must name") as error:
        tensor_table(tmp_path)
    assert "\n" not in str(error.value)


def test_an_index_does_not_lead_outside(tmp_path):
    inside = tmp_path / "m"
    inside.mkdir()
    save_file(TENSORS, tmp_path / "outside.safetensors")
    for name in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "..",
    ):
        shards = {"a": name, "b": name}
        (inside / INDEX).write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(InputError, match="a file of this folder"):
            tensor_table(inside)


def test_an_index_that_is_no_dictionary(tmp_path):
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(InputError, match="holds no JSON object"):
        tensor_table(tmp_path)


def test_a_pickle_is_named_with_the_way_to_convert_it(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin; convert") as e:
        tensor_table(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.slow
def test_the_conversion_that_is_advised_works(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError) as error:
        tensor_table(tmp_path)
    command = "python -c " + str(error.value).split("python -c ")[1]
    here = Path(sys.executable).parent  # `python` is this environment's
    subprocess.run(
        command,
        shell=True,
        check=True,
        capture_output=True,
        env={**os.environ, "PATH": f"{here}:{os.environ['PATH']}"},
    )
    for name, stored in tensor_table(tmp_path).items():
        assert torch.equal(stored.tensor, model.state_dict()[name])


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="LoRA adapter"):
        tensor_table(tmp_path)


def test_many_names_are_shortened():
    assert shorten(["a", "b", "c"]) == "a, b, c"
    assert shorten(list("abcde")) == "a, b, c and 2 more"


def test_files_are_readable_by_all_and_new_ones_replace_old_ones(tmp_path):
    folder = tmp_path / "deep" / "m"
    for text in ("one", "two"):
        with written_whole(folder) as new:
            (new / "x").write_text(text)
        assert (folder / "x").read_text() == text
    assert os.stat(folder / "x").st_mode & 0o777 == 0o644
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def test_what_fails_in_between_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with written_whole(tmp_path / "m") as new:
            (new / "x").write_text("half")
            1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
