# From notebooks/25_plan.ipynb by scripts/export.py: edit the notebook.
"""Plan: one step of one rank, rehearsed without weights and without GPUs.

Letters: B batch, T time, S time of the keys, V vocabulary, H heads, C
head_dim, W ranks.
"""

import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import (
    CollectiveOp,
    collective_ops,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import _sharding_prop as sharding
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llama_tut.fast import training as fast
from llama_tut.model import LlamaForCausalLM, flops_per_token
from llama_tut.parallel import build_mesh, cut, recompute, shard
from llama_tut.tools.devices import without_memory
from llama_tut.tools.timeline import thin

# Fake ranks


@contextmanager
def fake_ranks(world_size):
    """This process is rank 0 of `world_size` ranks that do not exist."""
    dist.init_process_group(
        "fake", rank=0, world_size=world_size, store=FakeStore()
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def local(x):
    """The part of a DTensor that lies on this rank; other tensors as is."""
    return x.to_local() if isinstance(x, DTensor) else x


# The meter, first half: what is alive


class Ledger:
    """Bytes alive by purpose, their history, and the highest total so far."""

    def __init__(self):
        self.alive, self.peak, self.timeline = Counter(), Counter(), []
        self.storages = {}

    def label(self, purpose, *tensors):
        """These tensors' storages are alive, for this purpose."""
        for x in tensors:
            storage = local(x).untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.storages:  # it gets another purpose
                self.forget(key)
            ref = weakref.ref(storage, lambda _, key=key: self.forget(key))
            self.storages[key] = purpose, size, ref
            self.alive[purpose] += size

    def add(self, purpose, *tensors):
        """Label the tensors whose storage is new."""
        for x in tensors:
            if x.untyped_storage()._cdata not in self.storages:
                self.label(purpose, x)

    def forget(self, key):
        """This storage is gone."""
        purpose, size, _ = self.storages.pop(key)
        self.alive[purpose] -= size

    def resize(self, storage, size):
        """FSDP empties the storage of gathered weights, and fills it again."""
        key = storage._cdata
        if key in self.storages:
            purpose, old, ref = self.storages[key]
            self.storages[key] = purpose, size, ref
            self.alive[purpose] += size - old

    def note(self):
        """Write down the present state."""
        self.timeline.append(self.alive.copy())
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()


# The meter, second half: every operation passes by

aten, c10d, fsdp = torch.ops.aten, torch.ops.c10d, torch.ops.fsdp
attention = aten._scaled_dot_product_flash_attention_for_cpu
attention_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_flops(q, k, *others, **options):
    """Two products over the half of [T, S] that is not in the future."""
    B, H, T, C = q.shape
    return 2 * B * H * T * k.shape[2] * C


def attention_backward_flops(gradient, q, k, *others, **options):
    """Five such products: the scores are computed again."""
    return attention_flops(q, k) * 5 // 2


FLOPS = {
    **flop_registry,
    attention: attention_flops,
    attention_backward: attention_backward_flops,
}


def tensors_in(*values):
    """All tensors in nested lists, tuples and dictionaries."""
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def bytes_of(tensors):
    """Bytes of all elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


def sharding_results(name, args, kwargs):
    """{purpose: tensors} that FSDP's operation of this name fills in."""
    if name is c10d._allgather_base_:
        return {"gathered": [args[0]]}
    if name is fsdp.split_with_sizes_copy:
        return {"gathered": kwargs["out"]}
    if name is c10d._reduce_scatter_base_:
        return {"gradients": [args[0]]}
    return {}


def message_of(func, args):
    """(operation, bytes of the whole tensor, ranks) of a collective."""
    group = CollectiveOp.get_process_group(func, args)
    whole = max(tensors_in(args), key=torch.numel)
    ranks = tuple(dist.get_process_group_ranks(group))
    return func._overloadpacket.__name__, bytes_of([whole]), ranks


class Meter(TorchDispatchMode):
    """Notes what the operations inside do: memory, work and messages.

    Attributes:
        ledger: bytes alive by purpose.
        work: {(FLOPs, bytes read and written): number of operations}.
        messages: {(operation, bytes, ranks): number}.
        purpose: of what is made while autograd records.
    """

    def __init__(self):
        super().__init__()
        self.ledger, self.purpose = Ledger(), "activations"
        self.work, self.messages = Counter(), Counter()
        self.mode = active_fake_mode()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run one operation, and take notes."""
        kwargs, name = kwargs or {}, func._overloadpacket
        if DTensor in types:
            return NotImplemented  # it comes back as operations on its parts
        if name is torch.ops._c10d_functional.wait_tensor:
            return args[0]  # the fake one would make a copy
        out = func(*args, **kwargs)
        made = tensors_in(out)
        mutable = func._schema.is_mutable
        if active_fake_mode() is not self.mode or not (made or mutable):
            return out  # DTensor has asked for a shape, or FSDP for a device
        before = len(self.ledger.storages)
        recording = torch.is_grad_enabled()
        purpose = self.purpose if recording else "temporary"
        self.ledger.add(purpose, *made)
        for purpose, filled in sharding_results(name, args, kwargs).items():
            self.ledger.label(purpose, *filled)
        if func in collective_ops:
            self.messages[message_of(func, args)] += 1
        elif len(self.ledger.storages) > before or mutable:
            count = FLOPS.get(name, lambda *a, **k: 0)
            flops = count(*args, **kwargs, out_val=out)
            self.work[flops, bytes_of(tensors_in(args, kwargs, out))] += 1
        self.ledger.note()
        return out


# A rehearsal


@dataclass(frozen=True)
class Setup:
    """How a model is trained; the names are those of the options."""

    gpus: int
    tensor_parallel: int = 1
    sequence_length: int = 8192
    micro_batch_size: int = 1
    recompute: bool = False
    plain: bool = False  # without chapter 19


def prepare(model, setup, change=None):
    """Cut and shard a model as the trainer does; `change` sees it first."""
    mesh = build_mesh("cpu", setup.gpus, setup.tensor_parallel)
    if not setup.plain:
        fast.speed_up(model, "cuda", torch.bfloat16)
    if change is not None:
        change(model)
    if setup.recompute:
        recompute(model)
    if setup.tensor_parallel > 1:
        cut(model, mesh["tp"])
    return shard(model, mesh["dp"], torch.bfloat16)


def adamw_state(model):
    """The tensors that AdamW keeps on this rank."""
    parts = [local(p) for p in model.parameters()]
    averages = [torch.zeros_like(p) for p in parts for _ in range(2)]
    return averages + [torch.zeros(()) for _ in parts]


@contextmanager
def follow_resizes(ledger):
    """Tell the ledger when FSDP empties a storage or fills it again."""
    original = torch.UntypedStorage.resize_

    def resize_(storage, size):
        original(storage, size)
        ledger.resize(storage, size)

    torch.UntypedStorage.resize_ = resize_
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original


def step(model, ids, state):
    """A Meter that has watched one forward and backward pass of ids [B, T]."""
    meter, loss_of = Meter(), model.compute_loss

    def compute_loss(*inputs):
        meter.purpose = "logits"
        loss = loss_of(*inputs)
        meter.purpose = "activations"
        return loss

    model.compute_loss = compute_loss
    meter.ledger.label("parameters", *model.parameters())
    meter.ledger.label("optimizer", *state)
    meter.ledger.label("inputs", ids)
    with follow_resizes(meter.ledger), meter:
        loss = model(ids, targets=ids)
        meter.turn = len(meter.ledger.timeline)  # here backward begins
        loss.backward()
    return meter


@contextmanager
def tiles_of_a_gpu():
    """The tiled loss takes the tiles of a GPU, wherever its tensors are."""
    original = fast.tile_size
    gpu = torch.device("cuda")
    fast.tile_size = lambda vocab_size, device: original(vocab_size, gpu)
    try:
        yield
    finally:
        fast.tile_size = original


@contextmanager
def shapes_apart():
    """DTensor asks for shapes in a fake mode of its own, not in ours."""
    original = sharding.detect_fake_mode
    sharding.detect_fake_mode = lambda *_: None
    try:
        yield
    finally:
        sharding.detect_fake_mode = original


def rehearse(config, setup, change=None):
    """The Meter of one step of rank 0, without weights and without GPUs.

    Args:
        config: a `LlamaConfig`; setup: a `Setup`.
        change: called with the model before it is cut and sharded.

    Raises:
        InputError: the ranks or the model cannot be divided so.
    """
    B, T = setup.micro_batch_size, setup.sequence_length
    with fake_ranks(setup.gpus), tiles_of_a_gpu(), shapes_apart():
        with without_memory():
            model = LlamaForCausalLM(config)
        prepare(model, setup, change)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            ids = torch.zeros(B, T, dtype=torch.long)
            return step(model, ids, adamw_state(model))


# Time: a roofline

GPUS_OF_A_NODE = 8


def message_seconds(name, size, ranks, gpu):
    """Seconds of a ring for `size` bytes over `ranks`, the rules 2 and 3."""
    W = len(ranks)
    node = ranks[0] // GPUS_OF_A_NODE
    here = sum(rank // GPUS_OF_A_NODE == node for rank in ranks)
    speed = gpu.nvlink
    if here < W:
        speed = min(gpu.nvlink, here * gpu.network)
    times = 1 if "gather" in name or "scatter" in name else 2
    return times * size * (W - 1) / W / speed


def roofline(meter, gpu):
    """{what: seconds} of one step, and "step": all together (rule 4)."""
    seconds = Counter()
    for (flops, moved), n in meter.work.items():
        compute, memory = flops / gpu.peak, moved / gpu.bandwidth
        what = "arithmetic" if compute > memory else "memory bandwidth"
        seconds[what] += n * max(compute, memory)
    for (name, size, ranks), n in meter.messages.items():
        what = "FSDP" if name.endswith("_base_") else "tensor parallel"
        seconds[what] += n * message_seconds(name, size, ranks, gpu)
    own = meter.ledger.timeline[0]["parameters"] / 4
    seconds["memory bandwidth"] += 7 * 4 * own / gpu.bandwidth  # AdamW
    waited = sum(s for what, s in seconds.items() if what != "FSDP")
    return {**seconds, "step": max(waited, seconds["FSDP"])}


def limit(seconds):
    """Which of a roofline's parts decides how long the step is."""
    if seconds.get("FSDP", 0) == seconds["step"]:
        return "FSDP"
    parts = {k: s for k, s in seconds.items() if k not in ("step", "FSDP")}
    return max(parts, key=parts.get)


def make_plan(config, setup, gpu, change=None):
    """One step as a dictionary of plain numbers.

    Args:
        config: a `LlamaConfig`; setup: a `Setup`; gpu: a `Gpu`.
        change: as in `rehearse`.

    Returns:
        memory, {purpose: bytes} at the peak of a rank, and peak_bytes; flops
        of a rank; wire_bytes, {what: bytes of the messages that a rank takes
        part in}; seconds, as `roofline` returns them, and limit;
        tokens_per_second of all GPUs together; mfu, with chapter 8's FLOPs;
        timeline and turn.
    """
    meter = rehearse(config, setup, change)
    seconds, ledger = roofline(meter, gpu), meter.ledger
    wire = Counter()
    for (name, size, _), n in meter.messages.items():
        wire["FSDP" if name.endswith("_base_") else "tensor parallel"] += (
            size * n
        )
    T, readers = setup.sequence_length, setup.gpus // setup.tensor_parallel
    speed = readers * setup.micro_batch_size * T / seconds["step"]
    useful = speed / setup.gpus * flops_per_token(config, T)
    return {
        "memory": {k: b for k, b in ledger.peak.most_common() if b},
        "peak_bytes": ledger.peak.total(),
        "flops": sum(flops * n for (flops, _), n in meter.work.items()),
        "wire_bytes": dict(wire),
        "seconds": seconds,
        "limit": limit(seconds),
        "tokens_per_second": speed,
        "mfu": useful / gpu.peak,
        "timeline": thin(ledger.timeline),
        "turn": 100 * meter.turn / len(ledger.timeline),
    }
