# From notebooks/24_parallel.ipynb by scripts/export.py: edit the notebook.
"""Parallel: train a model that is too large for one device.

Letters: B batch, T time, D hidden_size, I intermediate_size, V vocabulary,
H heads, W ranks, L layers, N parameters.
"""

import logging
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from llama_tut.distributed import Layout, micro_step_sync
from llama_tut.mlp import LlamaMLP
from llama_tut.tools.deferred import build_deferred, draw
from llama_tut.tools.files import require
from llama_tut.tools.options import extra_options
from llama_tut.tools.parallel_config import (
    ParallelOptions,
    check_divisible,
    check_layout,
)

# FSDP2: the same with fewer messages


def shard(model, mesh, dtype=None, reshard_after_forward=True):
    """FSDP2, in place: each rank of `mesh` keeps a piece of each parameter.

    Args:
        mesh: one axis of a DeviceMesh; its ranks read different rows.
        dtype: in which weights travel and multiply; None: as they are.
        reshard_after_forward: whether a layer's weights are freed between
            its forward and its backward pass.

    Returns: the model. Build its optimizer afterwards.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=dtype and torch.float32,
        cast_forward_inputs=False,
    )
    for layer in model.model.layers:
        fully_shard(
            layer,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.model.register_forward_pre_hook(refuse_generation, with_kwargs=True)
    return model


def refuse_generation(body, inputs, options):
    """Refuse to generate with a model in pieces.

    FSDP2 gathers nothing for the body alone, and a cache expects all heads,
    of which a rank of a cut model has only some.

    Raises: InputError.
    """
    mesh = getattr(body.embed_tokens.weight, "device_mesh", None)
    in_pieces = mesh is not None and "dp" in mesh.mesh_dim_names
    cache = options.get("cache", inputs[3] if len(inputs) > 3 else None)
    require(
        not in_pieces and cache is None,
        "this model lies in pieces on many ranks and generates no text: "
        "gather it (parallel.whole_model), and generate on rank 0",
    )


@contextmanager
def sync_gradients(model, last):
    """Sum gradients over ranks in the last micro batch of a step only.

    Forward and backward belong inside. Until then a rank holds the whole
    gradient. Takes models of `shard`, of DDP, or of one process.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    else:
        with micro_step_sync(model, last):
            yield


def clip_gradients(parameters, max_norm):
    """Clip to `max_norm` over all ranks; the norm before it, [].

    Pieces must be DTensors, which know what the other ranks hold.
    """
    norm = clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gather_weights(model):
    """The whole state dict on the CPU of rank 0; empty on other ranks.

    All ranks have to call it.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=whole)


def whole_model(model, build):
    """A whole copy of the model on rank 0; on other ranks the pieces.

    Args:
        build: makes a model with any weights; called on rank 0 only.
    """
    weights = gather_weights(model)
    if dist.get_rank() != 0:
        return model
    whole = build()
    whole.load_state_dict(weights)
    return whole


# What is left: activations


def recompute(model):
    """Keep only each layer's input for backward, in place; same results.

    Call it before `cut` and `shard`. Source: Chen et al., 2016 (arXiv
    1604.06174).
    """
    for layer in model.model.layers:
        layer.forward = partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here is random
        )
    return model


# Tensor parallel: cut the matrices


class CopyToRanks(torch.autograd.Function):
    """Megatron's f: nothing forward; backward sums over the ranks."""

    @staticmethod
    def forward(ctx, x, group):
        """x, equal on all ranks of the group -> x."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        """What this rank found -> the sum of what all have found."""
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class ReduceFromRanks(torch.autograd.Function):
    """Megatron's g: forward sums over the ranks; nothing backward."""

    @staticmethod
    def forward(ctx, x, group):
        """This rank's term -> the sum over the ranks of the group."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        """gradient, equal on all ranks of the group -> the same."""
        return gradient, None


def vocabulary_loss(hidden, weight, targets, mesh):
    """`next_token_loss` of chapter 8 with a head cut over its words.

    Args:
        hidden: [B, T, D], equal on all ranks of `mesh`.
        weight: the head, a DTensor [V, D] of which this rank has rows.
        targets: [B, T], equal on all ranks; -100 does not count.
    """
    group, rows = mesh.get_group(), weight.to_local()
    start = mesh.get_local_rank() * -(-len(weight) // mesh.size())
    x = CopyToRanks.apply(hidden.flatten(0, -2), group)
    logits = F.linear(x, rows).float()
    top = logits.detach().amax(-1, keepdim=True)
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    column = targets.flatten()[:, None] - start
    here = (column >= 0) & (column < len(rows))
    right = logits.gather(-1, column.clamp(0, len(rows) - 1)) * here
    sums = (logits - top).exp().sum(-1, keepdim=True)
    both = ReduceFromRanks.apply(torch.cat((sums, right), -1), group)
    losses = top[:, 0] + both[:, 0].log() - both[:, 1]
    counts = targets.flatten() != -100
    return (losses * counts).sum() / counts.sum()


def cut(model, mesh):
    """Tensor parallelism, in place: each rank has slices of all matrices.

    Call it before `shard`. All ranks of `mesh` must read the same rows.

    Args:
        model: a LLaMA with dense MLPs; its `compute_loss` and `head` are
            replaced.
        mesh: one axis of a DeviceMesh.

    Raises:
        InputError: heads, kv heads or width cannot be divided by the ranks.
    """
    check_cut(model, mesh.size())
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = {"self_attn": once(5), "mlp": once(1)}
    plan |= {f"self_attn.{name}_proj": columns for name in "qkv"}
    plan |= {f"mlp.{name}_proj": columns for name in ("gate", "up")}
    plan |= {"self_attn.o_proj": rows, "mlp.down_proj": rows}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
        replicate(layer.input_layernorm, mesh)
        replicate(layer.post_attention_layernorm, mesh)
    replicate(model.model.norm, mesh)
    words = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    if model.lm_head is not None:
        words["lm_head"] = columns
    parallelize_module(model, mesh, words)
    model.compute_loss = partial(vocabulary_loss, mesh=mesh)
    model.head = partial(whole_logits, model, mesh)
    model.model.register_forward_pre_hook(refuse_generation, with_kwargs=True)
    return model


def replicate(module, mesh):
    """Make a module's parameters DTensors of which each rank has all."""

    def enter(module, inputs, mesh):
        whole = [Replicate()]
        return DTensor.from_local(inputs[0], mesh, whole, run_check=False)

    def leave(module, output, mesh):
        return output.to_local()

    distribute_module(module, mesh, None, enter, leave)


def once(count):
    """Prepare the first of `count` inputs once for all who read it.

    In backward its gradient is then summed over ranks once, too.
    """
    layouts = (Replicate(), *[None] * (count - 1))
    return PrepareModuleInput(
        input_layouts=layouts, desired_input_layouts=layouts
    )


def whole_logits(model, mesh, hidden):
    """`model.head` after `cut`: [..., D] -> all logits [..., V]."""
    hidden = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
    return F.linear(hidden, model.output_weight).full_tensor()


def check_cut(model, W):
    """Raise InputError, in one line, if W ranks cannot cut this model."""
    dense = all(isinstance(part.mlp, LlamaMLP) for part in model.model.layers)
    require(
        dense and hasattr(model.config, "num_key_value_heads"),
        "--tensor-parallel cuts LLaMAs with dense MLPs only: use --parallel "
        "fsdp for this model",
    )
    check_divisible(model.config, W)


# Both at once: a mesh of two axes


def build_mesh(device_type, world_size, tensor_parallel=1):
    """The ranks as an array with the axes dp and tp, tp neighbours.

    Raises:
        InputError: the ranks cannot be divided into such groups.
    """
    W, tp = world_size, tensor_parallel
    require(
        tp > 0 and W % tp == 0,
        f"--tensor-parallel {tp} does not divide the {W} ranks of this run: "
        f"start a multiple of {tp} ranks, or choose another number",
    )
    # DTensor warns that it sums a norm along dp and then along tp.
    quiet = logging.getLogger("torch.distributed.tensor._redistribute")
    quiet.setLevel(logging.ERROR)
    names = ("dp", "tp")
    return init_device_mesh(device_type, (W // tp, tp), mesh_dim_names=names)


# The trainer takes it from outside


class ParallelLayout(Layout):
    """A model that is recomputed, cut and sharded as the options say.

    Raises: InputError when the ranks or the optimizer cannot do that.
    """

    sync, clip = staticmethod(sync_gradients), staticmethod(clip_gradients)

    def __init__(self, config, ranks):
        super().__init__(config, ranks)
        options = extra_options(config, ParallelOptions)
        W, self.tp = ranks.world_size, options.tensor_parallel
        self.recompute, self.mesh, self.draws = options.recompute, None, None
        self.memory = {"recompute": self.recompute}
        if self.tp == 1 and (W == 1 or options.parallel == "ddp"):
            return
        self.mesh = build_mesh(ranks.device.type, W, self.tp)
        check_layout(options, config.optimizer, W)
        dp = self.mesh["dp"]
        here = {"rank": dp.get_local_rank(), "world_size": dp.size()}
        self.readers = replace(ranks, **here)
        self.memory |= {"shards": dp.size(), "tensor_parallel": self.tp}

    def build(self, build):
        if self.mesh is None:
            return build()
        model, self.draws = build_deferred(build)
        return model

    def place(self, model, dtype):
        if self.recompute:
            recompute(model)
        if self.mesh is not None and self.tp > 1:
            cut(model, self.mesh["tp"])
        if self.mesh is not None and self.readers.world_size > 1:
            half = dtype if dtype == torch.bfloat16 else None
            shard(model, self.mesh["dp"], half)
        return draw(model, self.draws, self.ranks.device)

    def wrap(self, model):
        return super().wrap(model) if self.mesh is None else model

    def whole(self, model, build):
        whole = model if self.mesh is None else whole_model(model, build)
        return whole.to(self.ranks.device)
