"""Memory and work: what a run will do and need, known before it starts."""

import math
import os
from pathlib import Path

import torch
from matplotlib.ticker import EngFormatter

from llama_tut.tools.devices import matmul_dtype
from llama_tut.tools.files import require
from llama_tut.tools.options import gradient_accumulation_steps

in_bytes = EngFormatter("B", places=2)  # 1.6e9 -> "1.60 GB"


def activation_bytes(llama, T, dtype, blocks=False):
    """Bytes that one token of one block keeps for the backward pass.

    Args:
        llama: a `LlamaConfig`.
        blocks: attention by blocks of queries (chapter 19), not by one
            kernel, which keeps no weights.
    """
    D, I = llama.hidden_size, llama.intermediate_size
    H, C = llama.num_attention_heads, llama.head_dim
    queries, keys = H * C, llama.num_key_value_heads * C
    a, half = dtype.itemsize, dtype.itemsize == 2
    norms = 16 * D + (5 if half else 2) * a * D
    attention = a * (3 * queries + 2 * keys)
    if blocks:
        n = math.ceil(T / max(32, math.ceil(T / 8)))  # blocks of queries
        weights = H * T / n * (6 if half else 4)
        attention = 2 * a * queries + (n + 1) / 2 * (2 * a * keys + weights)
    return norms + attention + 4 * a * I


def plan(config, model, device, dtype):
    """{purpose: bytes} of one rank. The model may be on the meta device.

    Activations are planned for configs with a LLaMA's fields only.
    """
    T = config.sequence_length
    rows = config.micro_batch_size * T
    N = sum(p.numel() for p in model.parameters())
    half = dtype == torch.bfloat16
    parts = {
        "parameters": 4 * N,
        "gradients": 4 * N,
        "optimizer": 8 * N,
        "bfloat16 copies": 2 * N * half,
    }
    llama = model.config
    if hasattr(llama, "num_key_value_heads"):
        V, D = llama.vocab_size, llama.hidden_size
        # where chapter 19's parts are used
        cpu, fast = device.type == "cpu", not config.plain
        blocks = fast and cpu and half
        tiles = blocks or (fast and device.type == "cuda" and V > 2**14)
        block = activation_bytes(llama, T, dtype, blocks)
        parts["activations"] = round(
            rows * (llama.num_hidden_layers * block + 12 * D)
        )
        parts["logits"] = rows * V * (10 if half else 8)
        if tiles:
            tile = 2**23 if cpu else 2**28
            parts["logits"] = 4 * V * D + 3 * min(tile, 4 * rows * V)
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
        advice = "choose a smaller model, or a larger device"
    require(
        total <= available,
        f"a rank needs {in_bytes(total)} (of which activations "
        f"{in_bytes(moving)}), {where} has {in_bytes(available)}: {advice}",
    )


def describe(config, info, model, world_size, device, dtype):
    """Three lines: the run, a step of it, and the memory of a rank.

    Args:
        info: the data's `DatasetInfo`.
        model: may be on the meta device.

    Raises:
        InputError: a step cannot be shared out, or does not fit.
    """
    k = gradient_accumulation_steps(config, world_size)
    N = sum(p.numel() for p in model.parameters())
    tokens = config.steps * config.tokens_per_step
    flops = tokens * model.flops_per_token(config.sequence_length)
    run = (
        f"{N:,} parameters, {config.steps:,} steps, {tokens:,} tokens: "
        f"{tokens / info.train_tokens:.2f} epochs of {config.data}, "
        f"{flops:.3g} FLOPs"
    )
    step = (
        f"a step: ranks {world_size} x micro batches {k} x rows "
        f"{config.micro_batch_size} x tokens {config.sequence_length} = "
        f"{config.tokens_per_step:,} tokens, on {device.type}, {dtype}"
    )
    parts, room = plan(config, model, device, dtype), capacity(device)
    listed = ", ".join(
        f"{name} {in_bytes(b)}" for name, b in parts.items() if b
    )
    needed = (
        f"memory of a rank: {in_bytes(sum(parts.values()))} of "
        f"{in_bytes(room)}: {listed}"
    )
    check(parts, room, f"{device.type} for each rank")
    return run, step, needed


def announce(config, info, ranks, build_model, say):
    """Print what a run will do and need. Raises: InputError, if too much."""
    with torch.device("meta"):  # shapes, no numbers
        model = build_model(config, info)
    dtype = matmul_dtype(config.dtype, ranks.device)
    for line in describe(
        config, info, model, ranks.world_size, ranks.device, dtype
    ):
        say(line)
