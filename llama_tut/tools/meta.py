"""Meta: build a model from shapes alone, without memory and without drawing."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode


class NoInit(TorchFunctionMode):
    """While this is active, the functions of `torch.nn.init` do nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Leave out `torch.nn.init`; pass on everything else."""
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_memory():
    """Modules that are built in here are on the device meta.

    There is nothing to initialise there, and yet the first `normal_` on meta
    makes PyTorch import its compiler: 800 modules, 60 MB, half a second.
    """
    with torch.device("meta"), NoInit():
        yield
