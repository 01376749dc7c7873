# From notebooks/09_weights.ipynb by scripts/export.py: edit the notebook.
"""Weights: load and save Hugging Face folders, by name and lazily.

Letters: N parameters.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llama_tut.config import (
    InputError,
    LlamaConfig,
    find_pretrained,
    require,
)
from llama_tut.model import LlamaForCausalLM

# Which file holds which tensor

INDEX = "model.safetensors.index.json"


def read_json(path):
    """The dictionary in a JSON file. Raises InputError by name."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error


def open_tensors(path):
    """Open a safetensors file; no tensor is read. Raises InputError."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is no whole safetensors file: {error}"
        ) from error


def tensor_files(folder):
    """{tensor name: file} of a Hugging Face folder, one file or several.

    Raises:
        InputError: no safetensors here, or one of the files is missing.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file() and not (
        folder / "model.safetensors"
    ).is_file():
        named = set(read_json(folder / INDEX)["weight_map"].values())
        files = [folder / name for name in sorted(named)]
    else:
        files = [folder / "model.safetensors"]
    missing = [path.name for path in files if not path.is_file()]
    require(
        not missing,
        f"{folder} lacks {len(missing)} of {len(files)} weight files: "
        + ", ".join(missing[:3]),
    )
    table = {}
    for path in files:
        with open_tensors(path) as tensors:
            table |= dict.fromkeys(tensors.keys(), path)
    return table


# By name, or not at all


def check_names(have, need, tied):
    """Refuse a file whose tensors are not exactly those of the model."""
    allowed = {"lm_head.weight"} if tied else set()
    missing = sorted(need - have)
    extra = sorted(n for n in have - need - allowed if not is_derived(n))
    for word, names in (("lacks", missing), ("has unknown", extra)):
        require(
            not names,
            f"the checkpoint {word} {len(names)} tensors: "
            + ", ".join(names[:3]),
        )


def is_derived(name):
    """Whether old files hold this tensor though the config determines it."""
    return name.endswith("rotary_emb.inv_freq")


@torch.no_grad()
def load_state(model, folder, dtype=None, device=None):
    """Put the tensors of a Hugging Face folder into a model, by name."""
    files = tensor_files(folder)
    state = model.state_dict()
    tied = model.config.tie_word_embeddings
    check_names(set(files), set(state), tied)
    for name, parameter in state.items():
        with open_tensors(files[name]) as tensors:
            shape = tensors.get_slice(name).get_shape()
        require(
            shape == list(parameter.shape),
            f"{name} is {shape} in the checkpoint and "
            f"{list(parameter.shape)} in the model",
        )
    new = {}
    for name, parameter in state.items():
        with open_tensors(files[name]) as tensors:
            tensor = tensors.get_tensor(name).to(device=device, dtype=dtype)
        if parameter.is_meta:
            new[name] = tensor
            continue
        require(
            tensor.dtype == parameter.dtype,
            f"{name} is {tensor.dtype} in the checkpoint and "
            f"{parameter.dtype} in the model: pass dtype to cast",
        )
        parameter.copy_(tensor)
    model.load_state_dict(new, strict=False, assign=True)
    return model


def load_pretrained(name=None, dtype=None, device="cpu"):
    """The model of a Hugging Face folder, hub id, or the default model."""
    folder = find_pretrained(name)
    config = LlamaConfig.from_hf(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return load_state(model, folder, dtype, device)


# Saving


def write_json(path, dictionary):
    """Write a dictionary as indented JSON."""
    path.write_text(json.dumps(dictionary, indent=2) + "\n")


def write_files(model, folder, tokenizer):
    """Write config, weights and tokenizer into an existing folder."""
    config = model.config
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    hf = config.to_hf()
    write_json(folder / "config.json", hf | {"torch_dtype": dtype})
    special = {k: hf[k] for k in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", special)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_pretrained(model, folder, tokenizer=None):
    """Write a Hugging Face folder, atomically."""
    folder = Path(folder).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
        try:
            write_files(model, new, tokenizer)
            for path in new.iterdir():
                path.chmod(0o644)
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            new.chmod(0o755)
            if folder.exists():
                for path in sorted(new.iterdir()):
                    path.replace(folder / path.name)
            else:
                new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write the model to {folder}: {error}"
        ) from error
