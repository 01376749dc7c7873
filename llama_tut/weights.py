# From notebooks/09_weights.ipynb by scripts/export.py: edit the notebook.
"""Weights: load and save Hugging Face folders, by name and without copies.

Letters: N parameters, V vocab_size, D hidden_size.
"""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.files import (
    InputError,
    flush,
    read_json,
    require,
    write_json,
)
from llama_tut.tools.pretrained import find_pretrained

# Which file holds which tensor

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """Where a tensor is, and what it is, before it is read."""

    path: Path
    shape: tuple
    dtype: str  # safetensors' name: F32, BF16, ...


def open_tensors(path):
    """Open a safetensors file without reading it. Raises InputError."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}): get it again"
        ) from error


def weight_files(folder):
    """The safetensors files of a Hugging Face folder: one, or the shards."""
    if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        files = [folder / WHOLE]
    else:
        shards = set(read_json(folder / INDEX).get("weight_map", {}).values())
        files = [folder / shard for shard in sorted(shards)]
    absent = [path.name for path in files if not path.is_file()]
    require(
        files and not absent,
        f"{folder} lacks {shorten(absent)} ({len(absent)} of {len(files)} "
        "weight files): get it again",
    )
    return files


def tensor_table(folder):
    """{name: Stored} of all tensors in a Hugging Face folder; none is read.

    Raises:
        InputError: weights are absent, incomplete or damaged.
    """
    table = {}
    for path in weight_files(Path(folder)):
        with open_tensors(path) as file:
            for name in file.keys():
                view = file.get_slice(name)
                shape = tuple(view.get_shape())
                table[name] = Stored(path, shape, view.get_dtype())
    return table


def shorten(names, most=3):
    """The first few of some names, in one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# Every tensor, and no other

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check_table(table, state, tied):
    """Refuse by name whatever does not fit the model.

    Args:
        table: {name: Stored}, what the checkpoint has.
        state: {name: tensor}, what the model has.
        tied: whether the head is the embedding.
    """
    known = state.keys() | ({HEAD} if tied else set())
    extra = [
        name
        for name in table
        if name not in known and not name.endswith("rotary_emb.inv_freq")
    ]
    missing = [name for name in state if name not in table]
    require(not missing, f"the checkpoint lacks {shorten(missing)}")
    require(not extra, f"the model has no place for {shorten(extra)}")
    for name, tensor in state.items():
        there, here = list(table[name].shape), list(tensor.shape)
        require(
            there == here,
            f"{name} is {there} in the checkpoint and {here} in the model",
        )
        require(
            table[name].dtype in DTYPES,
            f"{name} is stored as {table[name].dtype}, which is not built",
        )


# No silent cast


def read_tensor(stored, name, dtype=None, device=None):
    """One tensor of a checkpoint: mapped, or a copy if cast or moved."""
    with open_tensors(stored.path) as file:
        return file.get_tensor(name).to(device=device, dtype=dtype)


def choose_dtype(table, names):
    """The one dtype of a checkpoint's tensors. Raises InputError if mixed."""
    kinds = sorted({table[name].dtype for name in names})
    require(
        len(kinds) == 1,
        f"the checkpoint mixes {' and '.join(kinds)}: say which dtype to use",
    )
    return DTYPES[kinds[0]]


def check_tied_head(table):
    """Refuse a tied checkpoint whose head is not its embedding."""
    if HEAD in table:
        head = read_tensor(table[HEAD], HEAD)
        require(
            torch.equal(head, read_tensor(table[EMBEDDING], EMBEDDING)),
            f"config says tie_word_embeddings, but {HEAD} differs from "
            f"{EMBEDDING}",
        )


# An empty model


class SkipInit(TorchFunctionMode):
    """While this is active, `torch.nn.init` leaves tensors as they are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Answer for `torch.nn.init`; pass on everything else."""
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_model(config):
    """A `LlamaForCausalLM` on the device meta: shapes without memory."""
    with torch.device("meta"), SkipInit():
        return LlamaForCausalLM(config)


# Load


@torch.no_grad()
def load_state(model, folder, dtype=None, device=None):
    """Fill a model with the weights of a Hugging Face folder, by name.

    Args:
        model: a `LlamaForCausalLM`. On the device meta it takes the stored
            tensors as its own; with memory it is filled in place.
        folder: holds model.safetensors, or its shards and their index.
        dtype, device: for a model on meta; None leaves them as stored.

    Raises:
        InputError: a tensor is missing, unknown, misshapen or of another
            dtype than the model. The model is then unchanged.
    """
    table, state = tensor_table(folder), model.state_dict()
    tied = model.config.tie_word_embeddings
    check_table(table, state, tied)
    if tied:
        check_tied_head(table)
    if any(tensor.is_meta for tensor in state.values()):
        dtype = dtype or choose_dtype(table, state)
        tensors = {
            name: read_tensor(table[name], name, dtype, device)
            for name in state
        }
        model.load_state_dict(tensors, assign=True)
        return model
    for name, tensor in state.items():
        there, here = DTYPES[table[name].dtype], tensor.dtype
        require(
            there == here,
            f"{name} is {there} in the checkpoint and {here} in the model",
        )
    for name, tensor in state.items():
        tensor.copy_(read_tensor(table[name], name))
    return model


def read_config(folder):
    """The LlamaConfig of a Hugging Face folder. Raises InputError."""
    return LlamaConfig.from_hf(read_json(Path(folder) / "config.json"))


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
    model = empty_model(read_config(folder))
    return load_state(model, folder, dtype, device)


# Save


def write_model(model, folder, tokenizer):
    """Write config, weights and tokenizer into an empty folder."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    hf = model.config.to_hf() | {"torch_dtype": dtype}
    write_json(folder / "config.json", hf)
    ends = {name: hf[name] for name in ("bos_token_id", "eos_token_id")}
    ends = {name: value for name, value in ends.items() if value is not None}
    write_json(folder / "generation_config.json", ends)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    save_file(tensors, folder / WHOLE, {"format": "pt"})


def move_into_place(new, folder):
    """Give the finished folder `new` its name, or its files theirs."""
    new.chmod(0o755)
    for path in new.iterdir():
        path.chmod(0o644)  # safetensors makes it private
        flush(path)
    if not folder.exists():
        new.rename(folder)
    else:
        for path in new.iterdir():
            path.replace(folder / path.name)
    flush(folder)
    flush(folder.parent)


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
    folder = Path(folder).absolute()
    require(
        not (folder / INDEX).exists(),
        f"{folder} holds a model in shards: choose another folder",
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
        try:
            write_model(model, new, tokenizer)
            move_into_place(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write a model to {folder}: {error}"
        ) from error
