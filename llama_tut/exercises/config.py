"""Checkers of chapter 2."""

import dataclasses
import json
import struct
import tempfile
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file

from llama_tut.config import LlamaConfig
from llama_tut.exercises import exercise, expect, expect_close, wrong

TIED = LlamaConfig(100, 64, 96, 3, 4, 2, head_dim=32, tie_word_embeddings=True)
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False)
EIGHT = LlamaConfig(128_256, 4096, 14_336, 32, 32, 8)


def count(c, head=True, norm=True, C=None, K=None, mlp=3):
    """Numbers in a model with config c; the options plant mistakes."""
    D, C = c.hidden_size, C or c.head_dim
    heads = c.num_attention_heads + (K or c.num_key_value_heads)
    block = 2 * D * C * heads + mlp * D * c.intermediate_size + 2 * D
    own = head and not c.tie_word_embeddings
    tables = 2 if own else 1
    return tables * c.vocab_size * D + c.num_hidden_layers * block + norm * D


@exercise("config.parameters")
def check_parameters(answer):
    """How many numbers does a model have?"""
    found = answer(TIED)
    expect(found != count(TIED, norm=False), "the last norm is missing")
    expect(
        found != count(TIED, C=16),
        "C is config.head_dim, which need not be D / H",
    )
    expect(
        found != count(TIED, K=4),
        "keys and values have K heads, fewer than the queries",
    )
    expect(
        found != count(TIED, mlp=2),
        "an MLP has three matrices: gate, up and down",
    )
    expect(
        found == count(TIED),
        f"{found} for a tied model of 3 blocks: it is {count(TIED)}",
    )
    expect(
        answer(UNTIED) != count(UNTIED, head=False),
        "a model that is not tied has a second matrix of V x D",
    )
    expect(
        answer(EIGHT) == 8_030_261_248,
        "right for small models, but Llama 3 8B has 8,030,261,248",
    )


@wrong("config.parameters", "the last norm")
def no_last_norm(config):
    return count(config, norm=False)


@wrong("config.parameters", "need not be D / H")
def width_of_a_head_by_division(config):
    return count(config, C=config.hidden_size // config.num_attention_heads)


@wrong("config.parameters", "K heads")
def every_head_has_keys(config):
    return count(config, K=config.num_attention_heads)


@wrong("config.parameters", "three matrices")
def two_matrices_in_the_mlp(config):
    return count(config, mlp=2)


@wrong("config.parameters", "a second matrix")
def always_tied(config):
    return count(config, head=False)


def header(path):
    """(bytes in front of the data, entries) of a safetensors file."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + length, json.loads(data[8 : 8 + length])


def numbers(path, name, start=0, whole=True):
    """One tensor, its bytes looked for from `start` on."""
    entry = header(path)[1][name]
    first, last = (start + offset for offset in entry["data_offsets"])
    data = Path(path).read_bytes()[first:last]
    found = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return found.view(entry["shape"]) if whole else found


@exercise("config.read_tensor")
def check_read_tensor(answer):
    """One float32 tensor out of a safetensors file."""
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.arange(10.0, 22.0).view(4, 3),
        "c": torch.arange(30.0, 34.0),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "three.safetensors"
        save_file(tensors, path)
        for name, right in tensors.items():
            found = torch.tensor(numpy.asarray(answer(path, name)))
            expect(found.numel(), "no numbers: where did you start to read?")
            size = header(path)[0]
            for start, hint in (
                (0, "the offsets are counted from the end of the header"),
                (size - 8, "the length itself takes 8 bytes as well"),
            ):
                there = numbers(path, name, start, whole=False)
                same = found.flatten().equal(there.flatten())
                expect(not same, hint)
            expect(
                found.shape == right.shape,
                f"{list(found.shape)} is not the shape of the entry, "
                f"{list(right.shape)}",
            )
            expect_close(found, right, f"these are not the numbers of {name}")


@wrong("config.read_tensor", "from the end of the header")
def from_the_start(path, name):
    return numbers(path, name).numpy()


@wrong("config.read_tensor", "8 bytes as well")
def without_the_length(path, name):
    return numbers(path, name, header(path)[0] - 8).numpy()


@wrong("config.read_tensor", "not the shape")
def not_in_shape(path, name):
    return numbers(path, name, header(path)[0], whole=False).numpy()


def table(c):
    """{name: shape} of the tensors that tell the sizes of config c."""
    D, C = c.hidden_size, c.head_dim
    found = {"model.embed_tokens.weight": [c.vocab_size, D]}
    for i in range(c.num_hidden_layers):
        block = {
            "self_attn.q_proj": [c.num_attention_heads * C, D],
            "self_attn.k_proj": [c.num_key_value_heads * C, D],
            "self_attn.v_proj": [c.num_key_value_heads * C, D],
            "self_attn.o_proj": [D, c.num_attention_heads * C],
            "mlp.gate_proj": [c.intermediate_size, D],
            "mlp.up_proj": [c.intermediate_size, D],
            "mlp.down_proj": [D, c.intermediate_size],
            "input_layernorm": [D],
            "post_attention_layernorm": [D],
        }
        for name, shape in block.items():
            found[f"model.layers.{i}.{name}.weight"] = shape
    found["model.norm.weight"] = [D]
    if not c.tie_word_embeddings:
        found["lm_head.weight"] = [c.vocab_size, D]
    return found


def sizes(c):
    """What the table of config c tells."""
    names = ("vocab_size", "hidden_size", "intermediate_size")
    names += ("num_hidden_layers", "tie_word_embeddings")
    group = c.num_attention_heads // c.num_key_value_heads
    return {name: getattr(c, name) for name in names} | {"group": group}


@exercise("config.from_table")
def check_from_table(answer):
    """The config back from names and shapes."""
    deep = dataclasses.replace(UNTIED, num_hidden_layers=12)
    for config in (TIED, deep):
        found, right = dict(answer(table(config))), sizes(config)
        missing = sorted(set(right) - set(found))
        expect(not missing, f"{', '.join(missing)} missing")
        layers = right["num_hidden_layers"]
        expect(
            found["num_hidden_layers"] != layers - 1,
            "blocks are numbered from 0: the last one of 3 is number 2",
        )
        expect(
            found["num_hidden_layers"] == layers,
            f"{found['num_hidden_layers']} blocks, not {layers}: numbers in "
            "names are not digits, there may be a block 11",
        )
        expect(
            found["tie_word_embeddings"] == right["tie_word_embeddings"],
            "a tied model is the one *without* lm_head.weight",
        )
        for name in ("vocab_size", "hidden_size", "intermediate_size"):
            expect(
                found[name] == right[name],
                f"{name} {found[name]}: a weight is stored as [out, in]",
            )
        expect(
            found["group"] == right["group"],
            "group is rows of q_proj by rows of k_proj",
        )


def read(stored):
    """A right answer, for the wrong ones to start from."""
    layers = {name.split(".")[2] for name in stored if ".layers." in name}
    first = "model.layers.0."
    queries = stored[first + "self_attn.q_proj.weight"][0]
    return {
        "vocab_size": stored["model.embed_tokens.weight"][0],
        "hidden_size": stored["model.embed_tokens.weight"][1],
        "intermediate_size": stored[first + "mlp.gate_proj.weight"][0],
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "group": queries // stored[first + "self_attn.k_proj.weight"][0],
    }


@wrong("config.from_table", "numbered from 0")
def last_number(stored):
    found = read(stored)
    return found | {"num_hidden_layers": found["num_hidden_layers"] - 1}


@wrong("config.from_table", "*without* lm_head.weight")
def tied_where_there_is_a_head(stored):
    return read(stored) | {"tie_word_embeddings": "lm_head.weight" in stored}


@wrong("config.from_table", "a weight is stored as")
def input_for_output(stored):
    rows = stored["model.layers.0.mlp.down_proj.weight"][0]
    return read(stored) | {"intermediate_size": rows}


@wrong("config.from_table", "there may be a block 11")
def one_digit(stored):
    layers = {name[13] for name in stored if ".layers." in name}
    return read(stored) | {"num_hidden_layers": len(layers)}
