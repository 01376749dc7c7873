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


def renamed(config, change):
    """The table with other names; None drops one."""
    pairs = [(change(name), shape) for name, shape in table(config).items()]
    return {name: shape for name, shape in pairs if name}


def replaced(**fields):
    """The table of a config with these fields."""
    return lambda config: table(dataclasses.replace(config, **fields))


def one_up(name):
    """Blocks counted from 1."""
    parts = name.split(".")
    return ".".join(str(int(x) + 1) if x.isdigit() else x for x in parts)


for hint, mistake in {
    "every name ends in .weight": lambda c: renamed(
        c, lambda name: name.removesuffix(".weight")
    ),
    "a tied model has no": replaced(tie_word_embeddings=False),
    "that is not tied has": replaced(tie_word_embeddings=True),
    "the last norm": lambda c: renamed(
        c, lambda name: name * (name != "model.norm.weight")
    ),
    "numbered from 0": lambda c: renamed(c, one_up),
    "two norms": lambda c: renamed(
        c, lambda name: name * ("post_attention" not in name)
    ),
    "K heads": lambda c: replaced(num_key_value_heads=c.num_attention_heads)(
        c
    ),
    "need not be D / H": replaced(head_dim=None),
    "stored as [out, in]": lambda c: {
        k: s if "embed" in k or "lm_head" in k else s[::-1]
        for k, s in table(c).items()
    },
}.items():
    wrong("config.table", hint)(mistake)


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


for hint, start, whole in (
    ("from the end of the header", lambda path: 0, True),
    ("8 bytes as well", lambda path: header(path)[0] - 8, True),
    ("not the shape", lambda path: header(path)[0], False),
):
    wrong("config.read_tensor", hint)(
        lambda path, name, start=start, whole=whole: numbers(
            path, name, start(path), whole
        ).numpy()
    )


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


for hint, field, value in (
    ("numbered from 0", "num_hidden_layers", lambda right, _: right - 1),
    (
        "there may be a block 11",
        "num_hidden_layers",
        lambda _, stored: len({n[13] for n in stored if ".layers." in n}),
    ),
    (
        "*without* lm_head.weight",
        "tie_word_embeddings",
        lambda right, _: not right,
    ),
    (
        "a weight is stored as",
        "intermediate_size",
        lambda _, stored: stored["model.layers.0.mlp.down_proj.weight"][0],
    ),
    (
        "stored as [out, in]",
        "vocab_size",
        lambda _, stored: stored["model.embed_tokens.weight"][1],
    ),
    ("rows of q_proj divided", "group", lambda right, _: 1 / right),
):
    wrong("config.from_table", hint)(
        lambda stored, field=field, value=value: (
            read(stored) | {field: value(read(stored)[field], stored)}
        )
    )
