# From notebooks/17_checkpoint.ipynb by scripts/export.py: edit the notebook.
"""Checkpoints: all or nothing on disk, and everything an exact resume needs.

Letters: W ranks, N parameters.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from llama_tut.tools.files import (
    InputError,
    fingerprint,
    flush,
    read_json,
    remove,
    require,
    write_json,
)

# Random states


def random_states():
    """This process's random states: {"cpu": [5056] uint8, "cuda": ...}."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states):
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# The optimizer's state, by name


def optimizer_tensors(model, optimizer):
    """{"PARAMETER/KEY": tensor} of all the optimizer's state, Adam's `step`
    among it; a plain number becomes a tensor."""
    if not optimizer.state:  # torch would take a step of length 0 to make one
        return {}
    state = get_optimizer_state_dict(model, optimizer)["state"]
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def set_optimizer_tensors(model, optimizer, tensors):
    """Put back what `optimizer_tensors` gave. Groups and options stay."""
    found = get_optimizer_state_dict(model, optimizer)
    found["state"] = {}
    for full, tensor in tensors.items():
        name, key = full.rsplit("/", 1)
        found["state"].setdefault(name, {})[key] = tensor
    lenient = StateDictOptions(strict=False)  # no gradient yet: no state
    set_optimizer_state_dict(model, optimizer, found, options=lenient)


# All or nothing

TENSORS = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
FILES = (*TENSORS, "state.json")


def step_name(step):
    """Name of the folder of one step; names sort as steps do."""
    return f"step_{step:08d}"


def verify_checkpoint(path):
    """What is wrong with the checkpoint at `path`; None when it is valid.

    Raises: InputError when it may not be read, or is of a newer version.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        version, files = manifest["format"], manifest["files"]
        if isinstance(version, int) and version > 1:
            raise InputError(f"{path} was written by a newer llama_tut")
        if (version, step_name(manifest["step"])) != (1, path.name):
            return "manifest.json belongs to another checkpoint"
        for name in FILES:
            if name not in files:
                return f"manifest.json does not list {name}"
            if fingerprint(path / name) != files[name]:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except PermissionError as error:
        raise InputError(f"{error.filename} may not be read") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "a file of it cannot be read"
    return None


# Save


def require_finite(tensors, step):
    """Refuse to save an infinity or a NaN. Raises: InputError."""
    for name, tensor in tensors.items():
        require(
            not tensor.is_floating_point() or tensor.isfinite().all(),
            f"weights are not finite at step {step} ({name}), so nothing is "
            "saved: go on from the checkpoint before, with --resume and a "
            "smaller --learning-rate",
        )


def write_checkpoint(folder, step, model, optimizer, state, random):
    """Write and flush the files of one checkpoint into the new `folder`."""
    weights = {n: t.contiguous() for n, t in model.state_dict().items()}
    averages = optimizer_tensors(model, optimizer)
    require_finite(weights | averages, step)
    drawn = {
        f"{rank}/{device}": value
        for rank, states in enumerate(random or [random_states()])
        for device, value in states.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_file(averages, folder / "optimizer.safetensors")
    save_file(drawn, folder / "random.safetensors")
    write_json(folder / "state.json", {"step": step, **state})
    files = {name: fingerprint(folder / name) for name in FILES}
    manifest = {"format": 1, "step": step, "files": files}
    write_json(folder / "manifest.json", manifest)
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def checkpoints(folder):
    """Paths of all checkpoints in `folder`, valid or not, oldest first.

    Raises: InputError when the folder may not be listed.
    """
    form = "step_" + 8 * "[0-9]"
    try:
        found = sorted(Path(folder).iterdir())
        return [path for path in found if path.match(form) and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(
            f"{folder} cannot be read: {error.strerror}"
        ) from error


def save_checkpoint(
    folder, step, model, optimizer, state, keep=3, random=None
):
    """Save all of a run as folder/step_XXXXXXXX, or nothing of it.

    `step` counts the steps taken, `state` holds plain values for JSON, `keep`
    checkpoints stay, `random` lists the `random_states` of the ranks (None:
    those of this process). Returns the checkpoint's path.

    Raises: InputError when it cannot be written, as on a full disk, or when a
        number in it is not finite.
    """
    folder = Path(folder)
    final = folder / step_name(step)
    half = folder / f".tmp-{final.name}"
    try:
        remove(*folder.glob(".tmp-*"))
        write_checkpoint(half, step, model, optimizer, state, random)
        remove(final)
        half.rename(final)
        flush(folder)
        found = checkpoints(folder)
        upto = [path for path in found if path.name <= final.name]
        remove(*upto[:-keep], *found[len(upto) :])
    except (OSError, SafetensorError) as error:
        remove(half)
        reason = getattr(error, "strerror", None) or str(error).split(": ")[-1]
        raise InputError(
            f"cannot write the checkpoint {final}: {reason}; earlier "
            "checkpoints are intact: mend that and go on with --resume"
        ) from error
    return final


# Find the newest valid one, and load it


def latest_checkpoint(folder, say=None):
    """The newest valid checkpoint in `folder`; None when there is none.

    Args:
        say: called with a line for each damaged checkpoint (None: stderr).

    Raises: InputError when there are checkpoints and all are damaged, or when
        they may not be read.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        reason = verify_checkpoint(path)
        if reason is None:
            return path
        line = f"damaged checkpoint {path}: {reason}; trying the one before it"
        print(line, file=sys.stderr) if say is None else say(line)
    require(
        not found,
        f"all {len(found)} checkpoints in {folder} are damaged: start again "
        "with another --out",
    )
    return None


def check_shapes(path, model):
    """Refuse weights at `path` that do not fit the model.

    Raises: InputError naming the first tensor that differs.
    """
    ours = {n: list(t.shape) for n, t in model.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        theirs = {n: file.get_slice(n).get_shape() for n in file.keys()}
    for name in sorted(ours.keys() | theirs.keys()):
        require(name in ours, f"{path}: {name} is not in the model")
        require(name in theirs, f"{path}: {name} is not in the checkpoint")
        require(
            ours[name] == theirs[name],
            f"{path}: {name} has the shape {theirs[name]}, the model's is "
            f"{ours[name]}: resume with the options the run was started with",
        )


def load_checkpoint(path, model, optimizer=None, rank=0):
    """Load what `save_checkpoint` wrote into `model` and `optimizer`.

    Random states come back too, if this rank had some when it was saved.

    Returns: the dictionary `state`, with `step` in it.
    Raises: InputError when shapes differ; then nothing was changed.
    """
    path = Path(path)
    check_shapes(path / "model.safetensors", model)
    model.load_state_dict(load_file(path / "model.safetensors"))
    if optimizer is not None:
        averages = load_file(path / "optimizer.safetensors")
        set_optimizer_tensors(model, optimizer, averages)
    random = load_file(path / "random.safetensors")
    if f"{rank}/cpu" in random:
        own = {k: v for k, v in random.items() if k.startswith(f"{rank}/")}
        set_random_states({k.split("/")[1]: v for k, v in own.items()})
    return read_json(path / "state.json")
