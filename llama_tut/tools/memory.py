"""Memory and work: what a run will do and need, known before it starts."""

import math
import os
from pathlib import Path

import torch
from matplotlib.ticker import EngFormatter

from llama_tut.tools.devices import matmul_dtype, without_memory
from llama_tut.tools.files import require
from llama_tut.tools.options import gradient_accumulation_steps

in_bytes = EngFormatter("B", places=2)  # 1.6e9 -> "1.60 GB"
LARGE_VOCABULARY = 65_536  # above it a CPU gets chapter 19's tiles in any case


def activation_bytes(
    llama, T, dtype, blocks=False, cut=1, half_stream=False, compiled=False
):
    """Bytes that one token of one block keeps for the backward pass.

    Args:
        llama: a `LlamaConfig`.
        blocks: attention by blocks of queries (chapter 19), not by one
            kernel, which keeps no weights.
        cut: ranks that share the heads and the MLP (tensor parallel).
        half_stream: the residual stream is in `dtype` too, as under FSDP;
            otherwise it is float32.
        compiled: small operations are done again in backward, so that only
            the inputs and outputs of norms and products are kept.
    """
    D, I = llama.hidden_size, llama.intermediate_size
    H, C = llama.num_attention_heads, llama.head_dim
    queries, keys = H * C, llama.num_key_value_heads * C
    a, half = dtype.itemsize, dtype.itemsize == 2
    norms = 16 * D + (5 if half else 2) * a * D
    if half and half_stream:
        norms = 16 * D
    attention = a * (3 * queries + 2 * keys)
    if compiled:
        stream = a if half_stream else 4
        return (
            2 * (stream + a) * D + a * (2 * queries + 2 * keys + 3 * I) / cut
        )
    if blocks:
        n = math.ceil(T / max(32, math.ceil(T / 8)))  # blocks of queries
        weights = H * T / n * (6 if half else 4)
        attention = 2 * a * queries + (n + 1) / 2 * (2 * a * keys + weights)
    return norms + (attention + 4 * a * I) / cut


def plan(
    config, model, device, dtype, shards=1, tensor_parallel=1, recompute=False
):
    """{purpose: bytes} of one rank, by formula: chapter 25 derives it.

    Activations are planned for configs with a LLaMA's fields only.

    Args:
        model: whole, not yet cut; it may be on the meta device.
        shards: ranks that FSDP shards over; 1: every rank holds it all.
        tensor_parallel: ranks that one matrix is cut over.
        recompute: whether a layer keeps only its input (chapter 24).
    """
    T = config.sequence_length
    rows = config.micro_batch_size * T
    N = sum(p.numel() for p in model.parameters())
    half = dtype == torch.bfloat16
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cut = shards * tensor_parallel
    own, moving = math.ceil(N / cut), math.ceil(trained / cut)
    parts = {"parameters": 4 * own, "gradients": 4 * moving}
    parts["optimizer"] = 8 * moving
    if shards == 1:
        parts["bfloat16 copies"] = 2 * own * half
    llama = model.config
    if hasattr(llama, "num_key_value_heads"):
        V, D, L = llama.vocab_size, llama.hidden_size, llama.num_hidden_layers
        tp, a = tensor_parallel, dtype.itemsize
        if shards > 1:  # the root's parameters, and those of two layers
            layer = sum(p.numel() for p in model.model.layers[0].parameters())
            parts["gathered"] = a * (N - (L - 2) * layer) // tp
        # where chapter 19's parts are used
        cpu, cuda = (device.type == kind for kind in ("cpu", "cuda"))
        compiled = getattr(config, "compile", False)
        fast, large = not config.plain, cpu and V > LARGE_VOCABULARY
        tiles = fast and tp == 1 and (large or not compiled) and (cpu or cuda)
        blocks = fast and cpu and half
        less = compiled and cuda  # what it saves elsewhere is not measured
        block = activation_bytes(
            llama, T, dtype, blocks, tp, shards > 1, compiled=less
        )
        if hasattr(llama, "extra_activation_bytes"):  # experts, chapter 26
            block += llama.extra_activation_bytes(dtype)
        if recompute:  # the input of every layer, and all of one
            stream = a if shards > 1 else 4
            block = stream * D + block / L
        parts["activations"] = round(rows * (L * block + 12 * D))
        parts["logits"] = rows * V * (a if less else 10 if half else 8)
        if tp > 1:  # the loss over a cut vocabulary
            parts["logits"] = rows * V * 14 // tp
        if tiles:
            tile = 2**21 if cpu else 2**28
            kept = a * 512 * V if cpu and 4 * 512 * V <= 2**26 else 0
            sizes = min(kept, a * rows * V) + 3 * min(tile, 4 * rows * V)
            parts["logits"] = 4 * V * D + sizes
    return parts


def capacity(device):
    """Bytes that one rank may use on this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check(parts, available, where):
    """Refuse a plan that cannot fit.

    Raises:
        InputError: it needs more than the bytes `available` in `where`.
    """
    total = sum(parts.values())
    moving = parts.get("activations", 0) + parts.get("logits", 0)
    advice = "choose a smaller --micro-batch-size"
    if total - moving > available:
        advice = (
            "choose a smaller model or a larger device, or cut the model "
            "with --parallel fsdp on more ranks"
        )
    require(
        total <= available,
        f"a rank needs {in_bytes(total)} (of which activations "
        f"{in_bytes(moving)}), {where} has {in_bytes(available)}: {advice}",
    )


def describe(config, info, model, world_size, device, dtype, **layout):
    """Three lines: the run, a step of it, and the memory of a rank.

    Args:
        info: the data's `DatasetInfo`.
        model: may be on the meta device.
        layout: shards, tensor_parallel and recompute, as `plan` takes them.

    Raises:
        InputError: a step cannot be shared out, or does not fit.
    """
    readers = world_size // layout.get("tensor_parallel", 1)
    k = gradient_accumulation_steps(config, readers)
    N = sum(p.numel() for p in model.parameters())
    tokens = config.steps * config.tokens_per_step
    flops = tokens * model.flops_per_token(config.sequence_length)
    epochs = tokens / info.train_tokens
    if getattr(info, "train_shards", 1) == 0:  # pictures: a row is one
        epochs = tokens / config.sequence_length / info.train_documents
    run = (
        f"{N:,} parameters, {config.steps:,} steps, {tokens:,} tokens: "
        f"{epochs:.2f} epochs of {config.data}, "
        f"{flops:.3g} FLOPs"
    )
    step = (
        f"a step: ranks {readers} x micro batches {k} x rows "
        f"{config.micro_batch_size} x tokens {config.sequence_length} = "
        f"{config.tokens_per_step:,} tokens, on {device.type}, {dtype}"
    )
    parts = plan(config, model, device, dtype, **layout)
    room = capacity(device)
    listed = ", ".join(
        f"{name} {in_bytes(b)}" for name, b in parts.items() if b
    )
    needed = (
        f"memory of a rank: {in_bytes(sum(parts.values()))} of "
        f"{in_bytes(room)}: {listed}"
    )
    check(parts, room, f"{device.type} for each rank")
    return run, step, needed


def announce(config, info, ranks, build_model, say, **layout):
    """Print what a run will do and need. Raises: InputError, if too much."""
    with without_memory():  # shapes, no numbers
        model = build_model(config, info)
    dtype = matmul_dtype(config.dtype, ranks.device)
    for line in describe(
        config, info, model, ranks.world_size, ranks.device, dtype, **layout
    ):
        say(line)
