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


@exercise("config.table")
def check_table(answer):
    """{name: shape} of every tensor, from the config."""
    for config in (TIED, UNTIED, EIGHT):
        wanted = table(config)
        found = answer(config)
        filled = isinstance(found, dict) and found
        expect(filled, "return a dictionary {name: shape}")
        found = {name: list(shape) for name, shape in found.items()}
        expect(
            not all(f"{name}.weight" in wanted for name in found),
            "every name ends in .weight",
        )
        head = "lm_head.weight"
        expect(
            (head in found) <= (head in wanted),
            "a tied model has no lm_head.weight: it uses the embedding",
        )
        expect(
            (head in found) >= (head in wanted),
            "a model that is not tied has an lm_head.weight",
        )
        expect("model.norm.weight" in found, "the last norm is missing")
        check_names(found, wanted, config.num_hidden_layers)
        for name, shape in wanted.items():
            check_shape(config, name, found[name], shape)


def check_names(found, wanted, layers):
    """The hints about names that are missing or unknown."""
    extra, missing = sorted(set(found) - set(wanted)), set(wanted) - set(found)
    expect(
        not any(name.startswith(f"model.layers.{layers}.") for name in extra),
        f"blocks are numbered from 0: the last of {layers} is {layers - 1}",
    )
    expect(
        not any("layernorm" in name for name in missing),
        "a block has two norms, input_layernorm and post_attention_layernorm",
    )
    expect(not missing, f"{min(missing, default='')} is missing")
    expect(not extra, f"{extra[:1]} is not in such a file")


def check_shape(config, name, found, wanted):
    """The hint about one shape."""
    D, C, H = config.hidden_size, config.head_dim, config.num_attention_heads
    expect(
        "k_proj" not in name and "v_proj" not in name or found != [H * C, D],
        "keys and values have K heads, fewer than the queries",
    )
    narrow = [x * (D // H) // C if x != D else x for x in wanted]
    expect(
        found == wanted or "self_attn" not in name or found != narrow,
        "C is config.head_dim, which need not be D / H",
    )
    expect(
        found == wanted or found != wanted[::-1],
        f"{name} is {found}: a weight is stored as [out, in]",
    )
    expect(found == wanted, f"{name} is {found}, it must be {wanted}")


@wrong("config.table", "every name ends in .weight")
def without_weight(config):
    return {k.removesuffix(".weight"): s for k, s in table(config).items()}


@wrong("config.table", "a tied model has no")
def always_a_head(config):
    return table(dataclasses.replace(config, tie_word_embeddings=False))


@wrong("config.table", "that is not tied has")
def never_a_head(config):
    return table(dataclasses.replace(config, tie_word_embeddings=True))


@wrong("config.table", "the last norm")
def no_last_norm(config):
    found = table(config)
    del found["model.norm.weight"]
    return found


@wrong("config.table", "numbered from 0")
def blocks_from_one(config):
    return {
        ".".join(
            str(int(x) + 1) if x.isdigit() else x for x in k.split(".")
        ): s
        for k, s in table(config).items()
    }


@wrong("config.table", "two norms")
def one_norm_a_block(config):
    found = table(config).items()
    return {k: s for k, s in found if "post_attention" not in k}


@wrong("config.table", "K heads")
def every_head_has_keys(config):
    H = config.num_attention_heads
    return table(dataclasses.replace(config, num_key_value_heads=H))


@wrong("config.table", "need not be D / H")
def width_of_a_head_by_division(config):
    return table(dataclasses.replace(config, head_dim=None))


@wrong("config.table", "stored as [out, in]")
def in_before_out(config):
    return {
        k: s if "embed" in k or "lm_head" in k else s[::-1]
        for k, s in table(config).items()
    }


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
            f"group {found['group']}: it is the rows of q_proj divided by the "
            "rows of k_proj, a whole number",
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


@wrong("config.from_table", "rows of q_proj divided")
def keys_by_queries(stored):
    return read(stored) | {"group": 1 / read(stored)["group"]}


@wrong("config.from_table", "stored as [out, in]")
def embedding_the_other_way(stored):
    D, V = stored["model.embed_tokens.weight"]
    return read(stored) | {"vocab_size": V, "hidden_size": D}


@wrong("config.from_table", "there may be a block 11")
def one_digit(stored):
    layers = {name[13] for name in stored if ".layers." in name}
    return read(stored) | {"num_hidden_layers": len(layers)}
