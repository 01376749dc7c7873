"""Deferred initialisation: first the shapes of a model, later its numbers.

A rank that is to keep one piece of each weight must not hold all of them
before. So the model is built on the device meta, which has no memory; what
would have filled its tensors is written down, and done after they are cut.
"""

from itertools import groupby

import torch
from torch.distributed.tensor._utils import (
    compute_local_shape_and_global_offset,
)
from torch.utils._python_dispatch import TorchDispatchMode

from llama_tut.tools.ranks import own_part

aten = torch.ops.aten
FILLS = {aten.normal_, aten.uniform_, aten.fill_, aten.zero_}


class Notes(TorchDispatchMode):
    """Writes down what is done in place on meta, and does nothing of it.

    Attributes: notes, a list of (tensor, operation, arguments, options).
    """

    def __init__(self):
        super().__init__()
        self.notes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """One operation: a note, or the operation itself."""
        kwargs = kwargs or {}
        if func._schema.is_mutable and getattr(args[0], "is_meta", False):
            self.notes.append((args[0], func, args[1:], kwargs))
            return args[0]
        return func(*args, **kwargs)


def tensors_of(model):
    """{name: tensor} of all parameters and buffers."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def build_deferred(build):
    """A model on meta, and what `draw` has to do to it: (model, draws).

    A model that does not fill each of its tensors in place and from scratch,
    as `torch.nn.init.normal_` and its sisters do, is built as
    usual, with its numbers: (model, None). What a function does that looks at
    the numbers while it draws, as `trunc_normal_`, cannot be written down.

    Args:
        build: makes the model.
    """
    with torch.device("meta"), Notes() as found:
        model = build()
    names = {id(tensor): name for name, tensor in tensors_of(model).items()}
    draws, filled = [], set()
    for key, notes in groupby(found.notes, lambda note: id(note[0])):
        notes = list(notes)
        tensor, functions = notes[0][0], {note[1] for note in notes}
        fills = {function._overloadpacket for function in functions} <= FILLS
        if tensor._is_view() or not fills:
            return build(), None
        draws.append((names.get(key), tensor, [note[1:] for note in notes]))
        filled.add(key)
    return (model, draws) if names.keys() <= filled else (build(), None)


def draw(model, draws, device):
    """Fill a model of `build_deferred`, whole or cut, one tensor at a time.

    All is drawn on the CPU and in the order of `build`, so the numbers are
    those of one process, and so is the state of the generator afterwards.

    Args:
        draws: None: the model has its numbers, and only goes to the device.
    """
    if draws is None:
        return model.to(device)
    model.to_empty(device=device)
    tensors = tensors_of(model)
    with torch.no_grad():
        for name, like, steps in draws:
            whole = torch.empty(like.shape, dtype=like.dtype)
            for func, args, kwargs in steps:
                func(whole, *args, **kwargs)
            if name is not None:  # else it was replaced while building
                mine = tensors[name]
                own_part(mine).copy_(piece_like(mine, whole))
            del whole  # before the next one is made
    return model


def piece_like(tensor, whole):
    """What this rank keeps of `whole` if it is cut as `tensor` is."""
    if not hasattr(tensor, "placements"):
        return whole
    sizes, starts = compute_local_shape_and_global_offset(
        whole.shape, tensor.device_mesh, tensor.placements
    )
    pairs = zip(starts, sizes, strict=True)
    return whole[tuple(slice(start, start + size) for start, size in pairs)]
