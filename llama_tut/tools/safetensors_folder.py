"""Safetensors folders: which file holds which tensor, and writing all or none."""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from llama_tut.tools.files import InputError, flush, read_json, require

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor of a file: mapped into memory, but not read."""

    tensor: torch.Tensor
    path: Path
    offset: int  # where its bytes begin in the file


def shorten(names, most=3):
    """The first few of some names, in one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def weight_files(folder):
    """The safetensors files of a Hugging Face folder: one, or the shards.

    Raises:
        InputError: weights are absent, incomplete, or in another format.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        refuse_other_formats(folder)
    shards = read_json(folder / INDEX).get("weight_map")
    require(
        isinstance(shards, dict)
        and shards
        and all(
            isinstance(shard, str)
            and Path(shard).name == shard
            and shard.endswith(".safetensors")
            for shard in shards.values()
        ),
        f"{folder / INDEX}: weight_map must name, for each tensor, a file of "
        "this folder that ends in .safetensors",
    )
    files = [folder / shard for shard in sorted(set(shards.values()))]
    absent = [path.name for path in files if not path.is_file()]
    require(
        not absent,
        f"{folder} lacks {shorten(absent)} ({len(absent)} of {len(files)} "
        "weight files): get it again",
    )
    return files


def refuse_other_formats(folder):
    """Say what a folder without safetensors holds, and what to do."""
    require(
        not (folder / "adapter_config.json").is_file()
        and not list(folder.glob("adapter_model.*")),
        f"{folder} holds a LoRA adapter, not a model: merge it into its base "
        "model first (peft: merge_and_unload, then save_pretrained)",
    )
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    require(
        not pickles,
        f"{folder} holds its weights as {shorten(pickles, 1)}; convert them: "
        'python -c "from transformers import AutoModelForCausalLM as A; '
        f"A.from_pretrained('{folder}').save_pretrained('{folder}')\"",
    )
    raise InputError(f"{folder} holds no {WHOLE}: get it again")


def tensor_table(folder):
    """{name: Stored} of all tensors in a Hugging Face folder; none is read.

    Each file is opened once and mapped: its numbers come from the disk when
    they are first used.

    Raises:
        InputError: weights are absent, incomplete or damaged.
    """
    table = {}
    for path in weight_files(Path(folder)):
        try:
            opened = safe_open(path, framework="pt")  # checks the header
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is not a whole safetensors file ({error}): get it "
                "again"
            ) from error
        with opened as file:
            names = file.offset_keys()  # in the order of their bytes
            tensors = [file.get_tensor(name) for name in names]
        # The data begins where the header ends, and it has no gaps.
        offset = path.stat().st_size - sum(x.nbytes for x in tensors)
        for name, tensor in zip(names, tensors, strict=True):
            table[name] = Stored(tensor, path, offset)
            offset += tensor.nbytes
    return table


def read_tensors(table, names, dtype=None, device=None):
    """Yield (name, tensor) for tensors that must be cast, moved or copied.

    They are read in pieces of 1 MiB: casting them out of the map would keep
    the pages of the original beside the result. What the map already has in
    memory goes first: afterwards the table's tensors have no numbers.
    """
    for name, stored in table.items():
        table[name] = stored._replace(tensor=stored.tensor.to("meta"))
    piece = torch.empty(2**20, dtype=torch.uint8, device="cpu")
    for path in {table[name].path: None for name in names}:
        with open(path, "rb") as file:
            for name in names:
                stored, where, offset = table[name]
                if where != path:
                    continue
                file.seek(offset)
                result = torch.empty(
                    stored.shape, dtype=dtype or stored.dtype, device=device
                )
                size = stored.dtype.itemsize
                for part in result.view(-1).split(len(piece) // size):
                    numbers = piece[: len(part) * size]
                    file.readinto(numbers.numpy())
                    part.copy_(numbers.view(stored.dtype))
                yield name, result


@contextlib.contextmanager
def written_whole(folder):
    """An empty folder to write to; its files replace those of `folder`.

    A new folder appears at once and complete. In one that exists each file is
    replaced as a whole, and files of other names stay. If anything fails,
    `folder` is as it was.

    Raises:
        InputError: the disk is full, `folder` cannot be written, or it holds
            a model in shards, whose index would be wrong afterwards.
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
            yield new
            new.chmod(0o755)
            for path in new.iterdir():
                path.chmod(0o644)  # safetensors makes it private
                flush(path)
            if folder.exists():
                for path in new.iterdir():
                    path.replace(folder / path.name)
            else:
                new.rename(folder)
            flush(folder)
            flush(folder.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write a model to {folder}: {error}"
        ) from error
