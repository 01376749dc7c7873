# From notebooks/17_checkpoint.ipynb by scripts/export.py: edit the notebook.
"""Checkpoints: all or nothing on disk, and everything an exact resume needs.

Letters: W ranks, N parameters.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
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
from llama_tut.tools.ranks import Ranks, own_part, shared_errors
from llama_tut.tools.tensor_files import (
    read_tensors,
    tensor_shapes,
    write_tensors,
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


def optimizer_tensors(model, optimizer, make=False):
    """{"PARAMETER/KEY": tensor} of all the optimizer's state, Adam's `step`
    among it; a plain number becomes a tensor. `make`: make it if there is
    none yet, by torch's step of length 0."""
    if not (optimizer.state or make):
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


def step_name(step):
    """Name of the folder of one step; names sort as steps do."""
    return f"step_{step:08d}"


def names_of_parts(manifest):
    """The files that a checkpoint of so many ranks must have."""
    if manifest["format"] == 1:  # of earlier versions: rank 0 wrote all
        return [
            "model.safetensors", "optimizer.safetensors",
            "random.safetensors", "state.json",
        ]  # fmt: skip
    ranks = range(1, manifest["ranks"] + 1)
    tail = "model-00001-of-00001.safetensors"  # as the writer names them
    return [*(f"shard-{rank:05d}-{tail}" for rank in ranks), "state.json"]


def verify_checkpoint(path):
    """What is wrong with the checkpoint at `path`; None when it is valid.

    Raises: InputError when it may not be read, or is of a newer version.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        version, files = manifest["format"], manifest["files"]
        if isinstance(version, int) and version > 2:
            raise InputError(f"{path} was written by a newer llama_tut")
        ours = version in (1, 2) and step_name(manifest["step"]) == path.name
        if not ours:
            return "manifest.json belongs to another checkpoint"
        for name in names_of_parts(manifest):
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
        tensor = own_part(tensor)  # a cut tensor: this rank's piece
        require(
            not tensor.is_floating_point() or tensor.isfinite().all(),
            f"{name} is not finite at step {step}, so nothing is saved: go "
            "on from the checkpoint before, with --resume and a smaller "
            "--learning-rate",
        )


def seal(folder, step, state, world_size):
    """Add the plain values and the manifest, and flush all files."""
    write_json(folder / "state.json", {"step": step, **state})
    files = {path.name: fingerprint(path) for path in folder.iterdir()}
    write_json(
        folder / "manifest.json",
        {"format": 2, "step": step, "ranks": world_size, "files": files},
    )
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


@contextmanager
def in_one_line(final, half):
    """A disk that is full, on any rank, is bad input. Raises: InputError."""
    try:
        yield
    except OSError as error:
        remove(half)
        raise InputError(
            f"cannot write the checkpoint {final}: {error.strerror or error}; "
            "earlier checkpoints are intact: mend that and go on with --resume"
        ) from error


def save_checkpoint(folder, step, model, optimizer, state, keep=3, ranks=None):
    """Save all of a run as folder/step_XXXXXXXX, or nothing of it.

    All ranks call it; `ranks` says who this one is (None: alone). `step`
    counts the steps taken, `state` holds plain values for JSON, `keep`
    checkpoints stay. Returns the checkpoint's path.

    Raises: InputError, on all ranks, when it cannot be written, as on a full
        disk, or when a number in it is not finite.
    """
    folder, ranks = Path(folder), ranks or Ranks()
    final = folder / step_name(step)
    half = folder / f".tmp-{final.name}"
    tensors = model.state_dict() | optimizer_tensors(model, optimizer)
    with shared_errors(ranks.gloo_group), in_one_line(final, half):
        require_finite(tensors, step)
        if ranks.rank == 0:
            remove(*folder.glob(".tmp-*"))
    for device, drawn in random_states().items():
        tensors[f"{ranks.rank}/{device}"] = drawn
    with in_one_line(final, half):
        write_tensors(half, tensors, ranks)
    with shared_errors(ranks.gloo_group), in_one_line(final, half):
        if ranks.rank == 0:
            seal(half, step, state, ranks.world_size)
            remove(final)
            half.rename(final)
            flush(folder)
            found = checkpoints(folder)
            upto = [path for path in found if path.name <= final.name]
            remove(*upto[:-keep], *found[len(upto) :])
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
    """Refuse a checkpoint whose weights do not fit the model.

    Returns: {name: shape} of all its tensors.
    Raises: InputError naming the first tensor that differs.
    """
    ours = {n: list(t.shape) for n, t in model.state_dict().items()}
    shapes = tensor_shapes(path)
    theirs = {n: s for n, s in shapes.items() if "/" not in n}
    for name in sorted(ours.keys() | theirs.keys()):
        require(name in ours, f"{path}: {name} is not in the model")
        require(name in theirs, f"{path}: {name} is not in the checkpoint")
        require(
            ours[name] == theirs[name],
            f"{path}: {name} has the shape {theirs[name]}, the model's is "
            f"{ours[name]}: resume with the options the run was started with",
        )
    return shapes


def load_checkpoint(path, model, optimizer=None, ranks=None):
    """Load what `save_checkpoint` wrote into `model` and `optimizer`.

    All ranks call it; they may be more or fewer than those that saved. Random
    states come back too, if this rank had some then.

    Returns: the dictionary `state`, with `step` in it.
    Raises: InputError when shapes differ; then nothing was changed.
    """
    path, ranks = Path(path), ranks or Ranks()
    shapes = check_shapes(path, model)
    drawn = {
        name: torch.empty(shape, dtype=torch.uint8)
        for name, shape in shapes.items()
        if name.startswith(f"{ranks.rank}/")
    }
    averages = {}
    if optimizer is not None:
        averages = optimizer_tensors(model, optimizer, make=True)
        averages = {n: t for n, t in averages.items() if n in shapes}
    read_tensors(path, {**model.state_dict(), **averages, **drawn}, ranks)
    if optimizer is not None:
        set_optimizer_tensors(model, optimizer, averages)
    if drawn:
        set_random_states({n.split("/")[1]: t for n, t in drawn.items()})
    return read_json(path / "state.json")
