# From notebooks/17_checkpoint.ipynb by scripts/export.py: edit the notebook.
"""Checkpoints: all or nothing on disk, and everything an exact resume needs.

Letters: W ranks, N parameters.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from llama_tut.tools.files import InputError, flush, write_json

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


def parameter_names(model, optimizer):
    """Names of the optimizer's parameters, in its own order."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.param_groups
    return [names[id(p)] for group in groups for p in group["params"]]


def optimizer_tensors(model, optimizer):
    """{"PARAMETER/KEY": tensor} of all the optimizer's state, Adam's `step`
    among it; a plain number becomes a tensor."""
    names = parameter_names(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {
        f"{names[i]}/{key}": torch.as_tensor(value)
        for i, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def set_optimizer_tensors(model, optimizer, tensors):
    """Put back what `optimizer_tensors` gave."""
    number = {n: i for i, n in enumerate(parameter_names(model, optimizer))}
    state = {}
    for full, tensor in tensors.items():
        name, key = full.rsplit("/", 1)
        state.setdefault(number[name], {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# Was it written, and is it still that?


def checksum(path):
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder, step):
    """Write manifest.json: what belongs to this checkpoint."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"format": 1, "step": step, "files": files}
    write_json(folder / "manifest.json", manifest)


def step_name(step):
    """Name of the folder of one step; names sort as steps do."""
    return f"step_{step:08d}"


def damage(path):
    """What is wrong with the checkpoint at `path`; None when it is valid."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = manifest["files"]
        if (manifest["format"], step_name(manifest["step"])) != (1, path.name):
            return "manifest.json belongs to another checkpoint"
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has another size"
            if checksum(file) != expected["sha256"]:
                return f"{name} has another checksum"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    return None


# Save


def write_checkpoint(folder, step, model, optimizer, state, random):
    """Write and flush the files of one checkpoint into the new `folder`."""
    folder.mkdir(parents=True)
    weights = {n: t.contiguous() for n, t in model.state_dict().items()}
    tensors = optimizer_tensors(model, optimizer)
    drawn = {
        f"{rank}/{device}": value
        for rank, states in enumerate(random or [random_states()])
        for device, value in states.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_file(tensors, folder / "optimizer.safetensors")
    save_file(drawn, folder / "random.safetensors")
    write_json(folder / "state.json", {"step": step, **state})
    write_manifest(folder, step)
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def save_checkpoint(
    folder, step, model, optimizer, state, keep=3, random=None
):
    """Save all of a run as folder/step_XXXXXXXX, or nothing of it.

    `step` counts the steps taken, `state` holds plain values for JSON, `keep`
    checkpoints stay, `random` lists the `random_states` of the ranks (None:
    those of this process). Returns the checkpoint's path.

    Raises: InputError when it cannot be written, as on a full disk.
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
    except (OSError, SafetensorError) as error:
        remove(half)
        raise InputError(refusal(final, error)) from error
    make_room(folder, final.name, keep)
    return final


def refusal(path, error):
    """The line that says why nothing was written to `path`."""
    reason = getattr(error, "strerror", None) or str(error).split(": ")[-1]
    return (
        f"cannot write the checkpoint {path}: {reason}; earlier checkpoints "
        "are intact: make room and go on with --resume"
    )


def make_room(folder, newest, keep):
    """Keep `keep` checkpoints up to `newest`, none behind it."""
    found = checkpoints(folder)
    upto = [path for path in found if path.name <= newest]
    remove(*upto[:-keep], *found[len(upto) :])


def checkpoints(folder):
    """Paths of all checkpoints in `folder`, valid or not, oldest first."""
    return sorted(Path(folder).glob("step_" + 8 * "[0-9]"))


def remove(*folders):
    """Delete folders; one cut off in the middle is no checkpoint any more."""
    for path in folders:
        if not path.exists():
            continue
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".tmp-old-{path.name}"))
        shutil.rmtree(path, ignore_errors=True)


# Find the newest valid one


def warn(line):
    """One line to stderr."""
    print(line, file=sys.stderr)


def latest_checkpoint(folder, say=warn):
    """The newest valid checkpoint in `folder`; None when there is none.

    Args:
        say: called with one line for each damaged checkpoint.

    Raises: InputError when there are checkpoints and all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        reason = damage(path)
        if reason is None:
            return path
        say(f"damaged checkpoint: {path}: {reason}; trying the one before it")
    if found:
        raise InputError(
            f"all {len(found)} checkpoints in {folder} are damaged: "
            "start anew with another --out"
        )
    return None


# Load


def compare_shapes(path, expected):
    """Refuse the file at `path` unless it holds `expected` {name: shape}.

    Raises: InputError naming the first tensor that differs.
    """
    with safe_open(path, framework="pt") as file:
        stored = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}
    for name in sorted(stored.keys() | expected.keys()):
        theirs, ours = stored.get(name), expected.get(name)
        if theirs == ours:
            continue
        if theirs is None or ours is None:
            side = "checkpoint" if theirs is None else "model"
            raise InputError(f"{path}: {name} is not in the {side}")
        raise InputError(
            f"{path}: {name} has the shape {list(theirs)}, the model's is "
            f"{list(ours)}: resume with the options the run was started with"
        )


def check_optimizer(path, model):
    """Refuse optimizer state that does not fit the model's parameters."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    with safe_open(path, framework="pt") as file:
        for full in file.keys():
            name = full.rsplit("/", 1)[0]
            shape = tuple(file.get_slice(full).get_shape())
            if name not in shapes:
                raise InputError(f"{path}: {full} is not in the model")
            if shape not in ((), shapes[name]):
                raise InputError(
                    f"{path}: {full} has the shape {list(shape)}, "
                    f"its parameter has {list(shapes[name])}"
                )


def load_checkpoint(path, model, optimizer=None, rank=0):
    """Load what `save_checkpoint` wrote into `model` and `optimizer`.

    Random states come back too, if this rank had some when it was saved.

    Returns: the dictionary `state`, with `step` in it.
    Raises: InputError when shapes differ; then nothing was changed.
    """
    path = Path(path)
    weights = path / "model.safetensors"
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    compare_shapes(weights, expected)
    if optimizer is not None:
        file = path / "optimizer.safetensors"
        check_optimizer(file, model)
        set_optimizer_tensors(model, optimizer, load_file(file))
    model.load_state_dict(load_file(weights))
    random = load_file(path / "random.safetensors")
    if f"{rank}/cpu" in random:
        own = {k: v for k, v in random.items() if k.startswith(f"{rank}/")}
        set_random_states({k.split("/")[1]: v for k, v in own.items()})
    return json.loads((path / "state.json").read_text())
