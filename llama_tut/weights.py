# From notebooks/09_weights.ipynb by scripts/export.py: edit the notebook.
"""Weights: a model from a Hugging Face folder and back, by name.

Letters: N parameters, V vocab_size, D hidden_size.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.devices import without_memory
from llama_tut.tools.files import read_json, require, write_json
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.tools.safetensors_folder import (
    WHOLE,
    read_tensors,
    shorten,
    tensor_table,
    written_whole,
)

# Every tensor, and no other


def empty_model(config):
    """A `LlamaForCausalLM` on the device meta: shapes without memory."""
    with without_memory():
        return LlamaForCausalLM(config)


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check_table(table, model):
    """Refuse by name whatever in a checkpoint does not fit the model.

    Args:
        table: {name: Stored}, what the checkpoint has.
        model: a `LlamaForCausalLM`.
    """
    state, tied = model.state_dict(), model.config.tie_word_embeddings
    known = state.keys() | ({HEAD} if tied else set())
    extra = [
        name
        for name in table
        if name not in known and not name.endswith("rotary_emb.inv_freq")
    ]
    missing = [name for name in state if name not in table]
    require(not missing, f"the checkpoint lacks {shorten(missing)}")
    require(not extra, f"the model has no place for {shorten(extra)}")
    for name, here in state.items():
        there = table[name].tensor
        require(
            there.shape == here.shape,
            f"{name} is {list(there.shape)} in the checkpoint and "
            f"{list(here.shape)} in the model",
        )
        require(
            there.dtype in FLOATS,
            f"{name} is stored as {there.dtype}, which is not built",
        )
    if tied and HEAD in table:
        require(
            torch.equal(table[HEAD].tensor, table[EMBEDDING].tensor),
            f"config says tie_word_embeddings, but {HEAD} differs from "
            f"{EMBEDDING}",
        )


# No silent cast


@torch.no_grad()
def load_state(model, table, dtype=None, device="cpu"):
    """Fill a model with the weights of a checkpoint, by name.

    Args:
        model: a `LlamaForCausalLM`. On the device meta it takes the stored
            tensors as its own; with memory it is filled in place.
        table: {name: Stored}, from `tensor_table`.
        dtype, device: for a model on meta; None keeps the stored dtype.

    Raises:
        InputError: a tensor is missing, unknown, misshapen or of another
            dtype than the model. The model is then unchanged.
    """
    check_table(table, model)
    state = model.state_dict()
    kinds = {str(table[name].tensor.dtype) for name in state}
    if any(tensor.is_meta for tensor in state.values()):
        mixed = f"the checkpoint mixes {shorten(sorted(kinds))}"
        require(dtype or len(kinds) == 1, f"{mixed}: say which dtype to use")
        cast = dtype is not None and kinds != {str(dtype)}
        if cast or torch.device(device).type != "cpu":
            found = dict(read_tensors(table, state, dtype, device))
        else:
            found = {name: table[name].tensor for name in state}
        modules = dict(model.named_modules())
        for name, tensor in found.items():
            path, _, last = name.rpartition(".")
            setattr(modules[path], last, nn.Parameter(tensor))
        return model
    for name, here in state.items():
        there = table[name].tensor.dtype
        require(
            there == here.dtype,
            f"{name} is {there} in the checkpoint, {here.dtype} in the model",
        )
    for name, tensor in read_tensors(table, state):
        state[name].copy_(tensor)
    return model


# model_type: (class of the config, load(folder, dtype, device)); llama_tut.moe
# (chapter 26) adds "mixtral" and "glm4_moe" when it is imported
FAMILIES = {}


def read_config(folder):
    """The LlamaConfig of a Hugging Face folder. Raises InputError."""
    hf = read_json(Path(folder) / "config.json")
    kind, _ = FAMILIES.get(hf.get("model_type"), (LlamaConfig, None))
    return kind.from_hf(hf)


def load_pretrained(name=None, dtype=None, device="cpu"):
    """A model with real weights.

    Args:
        name: as for `find_pretrained`: None for the default model, a folder,
            a GGUF file, or a name on the Hugging Face hub.
        dtype: cast to it; None keeps the dtype in which they are stored.
        device: where the parameters shall be.

    Raises:
        InputError: there is no such model, or it cannot be built.
    """
    folder = find_pretrained(name)
    kind = read_json(folder / "config.json").get("model_type")
    if kind in FAMILIES:
        _, load = FAMILIES[kind]
        return load(folder, dtype, device)
    config, table = read_config(folder), tensor_table(folder)
    # Before anything is built: a wrong number of layers might take for ever.
    blocks = [x.split(".")[2] for x in table if x.startswith("model.layers.")]
    here, there = config.num_hidden_layers, len(set(blocks))
    require(
        here == there,
        f"config has num_hidden_layers {here}, the checkpoint has {there}",
    )
    return load_state(empty_model(config), table, dtype, device)


# The way back


def save_pretrained(model, folder, tokenizer=None):
    """Write a Hugging Face folder, atomically.

    Args:
        model: a `LlamaForCausalLM`.
        folder: is made with its parents; if it exists, its files of the same
            names are replaced.
        tokenizer: a tokenizer of transformers, or None.

    Raises:
        InputError: the disk is full, or `folder` cannot be written.
    """
    named = getattr(model, "hf_tensors", model.state_dict)()
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in named.items()
    }
    hf = model.config.to_hf()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    ends = {name: hf.get(name) for name in ("bos_token_id", "eos_token_id")}
    ends = {name: id for name, id in ends.items() if id is not None}
    with written_whole(folder) as new:
        write_json(new / "config.json", hf | {"torch_dtype": dtype})
        write_json(new / "generation_config.json", ends)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        save_file(tensors, new / WHOLE, {"format": "pt"})
