# From notebooks/15_trainer.ipynb by scripts/export.py: edit the notebook.
"""Trainer: one step, the loop around it, validation, and what a loss must beat.

Letters: B batch, T time, W ranks, k micro batches of a step.
"""

import math
import time
from contextlib import nullcontext

import torch
from torch.nn.utils import clip_grad_norm_

from llama_tut.tools.files import InputError

# One step


def train_step(
    model,
    optimizer,
    batches,
    *,
    max_norm=1.0,
    clip=clip_grad_norm_,
    autocast=nullcontext,
    sync=None,
    mean=None,
):
    """One optimizer step on k micro batches, averaged over their targets.

    Args:
        batches: tuples of tensors: inputs, then targets, not all -100.
        max_norm, clip: how the gradient is clipped; 0 does not clip.
        autocast: called for the context of each forward pass.
        sync: called with whether the micro batch is the last, for the
            context in which ranks exchange gradients. None: alone.
        mean: averages a tensor over ranks. None: alone.

    Returns: the mean loss, and the gradient's norm before clipping.
    Raises: FloatingPointError, on all ranks, if one of them is not finite.
    """
    loss, device = 0.0, next(model.parameters()).device
    counts = [(targets >= 0).sum() for *_, targets in batches]
    total = mean(sum(counts).float().to(device)) if mean else sum(counts)
    for i, (*inputs, targets) in enumerate(batches, 1):
        inputs = [tensor.to(device) for tensor in inputs]
        with sync(i == len(batches)) if sync else nullcontext():
            with autocast():
                part = model(*inputs, targets=targets.to(device))
                part = part * counts[i - 1] / total
            part.backward()
        loss += part.detach()  # the number only: the graph may go
    norm = clip(model.parameters(), max_norm or math.inf)
    both = torch.stack((loss, norm))
    loss, norm = (mean(both) if mean else both).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        problem = f"the loss is {loss} and the gradient's norm {norm}"
        raise FloatingPointError(problem)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


# The loop


def training_steps(
    model, optimizer, next_batch, learning_rate, steps, first=0, k=1, **options
):
    """Train, and yield a line of numbers for each step.

    Args:
        next_batch: called for each micro batch, gives a tuple as above.
        learning_rate: the learning rate as a function of the step, from 0.
        steps, first: the loop takes the steps from `first` to `steps` - 1.
        k: micro batches per step.
        options: those of `train_step`.

    Raises: InputError when a loss or a gradient is not finite.
    """
    for step in range(first, steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        batches = [next_batch() for _ in range(k)]
        try:
            loss, norm = train_step(model, optimizer, batches, **options)
        except FloatingPointError as error:
            raise InputError(
                f"{error} at step {step + 1}, which was not taken: go on from "
                "the last checkpoint with --resume and a smaller "
                "--learning-rate"
            ) from error
        yield {
            "step": step + 1,
            "loss": loss,
            "lr": learning_rate(step),
            "grad_norm": norm,
            "seconds": time.perf_counter() - began,
        }


# Validation


@torch.no_grad()
def evaluate(
    model,
    loader,
    rows,
    *,
    rank=0,
    world_size=1,
    autocast=nullcontext,
    mean=None,
):
    """Mean loss in nats per token over the first `rows` rows of `loader`.

    All ranks make equally many passes, each on its own rows.

    Args:
        loader: as a `ShardLoader` of one rank that does not shuffle.
        mean: averages a tensor over ranks. None: alone.
    """
    B, device = loader.batch_size, next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, tokens
    model.eval()
    for first in range(rank * B, rows + rank * B, world_size * B):
        loader.position = min(first, rows - 1)
        *inputs, targets = loader.next_batch()
        inputs = [tensor.to(device) for tensor in inputs]
        targets = targets.clone()  # it shares its memory with the inputs
        targets[max(rows - first, 0) :] = -100  # rows beyond do not count
        count = (targets >= 0).sum().item()
        with autocast():
            loss = model(*inputs, targets=targets.to(device))
        if count:
            total += torch.tensor([loss.item() * count, count])
    model.train()
    losses, tokens = mean(total) if mean else total
    return (losses / tokens).item()


# What a loss must beat


def baseline_losses(info):
    """Nats per token that need no model of the text: {name: nats}."""
    return {
        "uniform": math.log(info.vocab_size),
        "unigram": info.unigram_nats,
        "bigram": info.bigram_nats,
    }
