# From notebooks/16_distributed.ipynb by scripts/export.py: edit the notebook.
"""DDP: several processes, the ranks, train one model.

Letters: B batch, T time, W ranks, N parameters.
"""

import hashlib
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from llama_tut.tools.compilation import try_one_pass

# How do we know that all copies are equal?


def inner(model):
    """The model itself, without the wrappers of DDP and torch.compile."""
    for name in ("module", "_orig_mod") * 2:  # either may be outside
        model = getattr(model, name, model)
    return model


def parameter_hash(model):
    """SHA-256 of all parameters by name, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, p in inner(model).named_parameters():
        digest.update(name.encode())
        bits = p.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(bits.numpy())
    return digest.hexdigest()


# DDP: buckets that leave early


def wrap(model, ranks):
    """The model as DDP if there are other ranks, else the model itself.

    Args:
        ranks: who this process is, as `tools.ranks.start` returns it.
    """
    if ranks.world_size == 1:
        return model
    on_gpu = ranks.device.type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[ranks.device] if on_gpu else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,  # no second copy of the gradients
    )


# Send once a step


@contextmanager
def micro_step_sync(model, last):
    """Send gradients in the last micro step of a step only.

    Forward AND backward belong inside: DDP decides in the forward pass.
    """
    no_sync = getattr(model, "no_sync", nullcontext)  # alone: no DDP
    with nullcontext() if last else no_sync():
        yield


# The last bits of a sum


def warm_up_ddp_buckets(model, *batch, cast=nullcontext):
    """Let DDP settle its buckets, so that all steps sum in one order.

    Args:
        batch: any micro batch, inputs and then targets; it leaves no trace.
        cast: the context of the forward pass, such as autocast.
    """
    if isinstance(model, DistributedDataParallel):
        try_one_pass(model, batch, cast)


# Where the model lives


class Layout:
    """Where the model lives: all of it on each rank.

    Attributes: `ranks` is who this process is; `readers` is who it is among
    those that read different rows; `memory` is what a rank's memory plan has
    to know, as keywords of `tools.memory.plan`.
    """

    def __init__(self, config, ranks):
        self.config, self.ranks, self.readers = config, ranks, ranks
        self.memory = {}

    def build(self, build):
        """The model of a run, as `build()` makes it."""
        return build()

    def place(self, model, dtype):
        """The model where it will train, before its optimizer is built."""
        return model.to(self.ranks.device)

    def wrap(self, model):
        """What a training step calls."""
        return wrap(model, self.ranks)

    def sync(self, model, last):
        """The context of a micro batch, the last of its step or not."""
        return micro_step_sync(model, last)

    def clip(self, parameters, max_norm):
        """Clip the gradient in place; its norm before, over all ranks."""
        return clip_grad_norm_(parameters, max_norm)

    def whole(self, model, build):
        """The whole model on rank 0; all ranks call it. `build()` makes a
        new one where there is none."""
        return model
