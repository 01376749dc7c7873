# From notebooks/13_optimizer.ipynb by scripts/export.py: edit the notebook.
"""Optimizers: AdamW, Muon for matrices, the learning rate, clipping.

Letters: D hidden_size, I intermediate_size, N parameters.
"""

import math

import torch

from llama_tut.config import InputError

# Which parameters decay


def decays(name):
    """Whether weight decay applies to the parameter of this name.

    Matrices decay, embeddings among them. Gains of norms and biases do not:
    zero is no natural value for them.
    """
    owner, _, kind = name.rpartition(".")
    owner = owner.rpartition(".")[2]
    return kind != "bias" and "norm" not in owner and owner[:3] != "ln_"


def parameter_groups(model, weight_decay):
    """Two groups for an optimizer: parameters that decay, and the others.

    Args:
        model: the inner model (not wrapped), so that names are its own.
        weight_decay: the decay of the first group.

    Returns:
        A list of dicts with `params`, a list of (name, parameter), and
        `weight_decay`. An empty group is left out.
    """
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if decays(n)]
    others = [(n, p) for n, p in named if not decays(n)]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# Muon


def newton_schulz(g, steps=5):
    """Move the singular values of each matrix close to 1.

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/; the
    same five steps in bfloat16 as `torch.optim.Muon`.

    Args:
        g: matrices of one shape, [..., rows, columns].

    Returns:
        The same shape in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Muon for the groups marked `muon`, AdamW for all others.

    Source: Liu et al., 2025 (arXiv 2502.16982): the update is scaled to the
    size of AdamW's, so that both share one learning rate and one decay.
    """

    def __init__(self, groups, momentum=0.95, **adamw):
        for group in groups:
            group.setdefault("muon", False)
        super().__init__(groups, **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [g for g in groups if not g["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for batch in equal_shapes(group["params"]):
                    self.update(batch, group["lr"], group["weight_decay"])

    def update(self, parameters, rate, weight_decay):
        """One Muon step for matrices of one shape."""
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in parameters]
        gradients = [p.grad for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
        ahead = torch._foreach_lerp(gradients, buffers, self.momentum)
        updates = newton_schulz(torch.stack(ahead))
        size = 0.2 * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - rate * weight_decay)
        updates = list((-rate * size * updates).to(parameters[0].dtype))
        torch._foreach_add_(parameters, updates)


def equal_shapes(parameters, limit=2**26):
    """Lists of parameters with gradients and one shape, <= limit numbers."""
    by_shape = {}
    for p in parameters:
        if p.grad is not None:
            by_shape.setdefault(p.shape, []).append(p)
    for same in by_shape.values():
        count = max(1, limit // same[0].numel())
        for i in range(0, len(same), count):
            yield same[i : i + count]


# Building the optimizer


def build_optimizer(
    model,
    name="adamw",
    learning_rate=3e-4,
    weight_decay=0.1,
    betas=(0.9, 0.95),
):
    """The optimizer of this name for the inner model.

    Args:
        name: "adamw", or "muon": Muon for the matrices inside the blocks,
            AdamW for embeddings, head and norms.

    Raises:
        InputError: no optimizer has this name.
    """
    groups = parameter_groups(model, weight_decay)
    device = next(model.parameters()).device.type
    settings = dict(lr=learning_rate, betas=betas, eps=1e-8)
    settings["fused"] = device in ("cpu", "cuda", "mps")
    if name == "adamw":
        return torch.optim.AdamW(groups, **settings)
    if name == "muon":
        return Muon(split_hidden(groups), **settings)
    raise InputError(f"optimizer {name!r} is unknown: take adamw or muon")


def split_hidden(groups):
    """Part the matrices inside the blocks from the group that decays."""
    matrices, *others = groups
    named = matrices["params"]
    hidden = [(n, p) for n, p in named if ".layers." in n and p.ndim == 2]
    names = {n for n, _ in hidden}
    rest = [(n, p) for n, p in named if n not in names]
    parts = [
        {**matrices, "params": hidden, "muon": True},
        {**matrices, "params": rest},
    ]
    return [part for part in parts if part["params"]] + others


# The learning rate


def learning_rate_at(
    step,
    peak,
    steps,
    warmup_steps,
    schedule="cosine",
    final_fraction=0.1,
    decay_fraction=0.2,
):
    """The learning rate of a step, counted from 0.

    Args:
        peak: the largest rate, reached in step `warmup_steps - 1`.
        steps: steps of the whole run; the last has `final_fraction * peak`.
        schedule: "cosine" falls from the peak on; "wsd" (warm-up, stable,
            decay) holds the peak and falls in the last `decay_fraction`.

    Raises:
        InputError: no schedule has this name.
    """
    done = step + 1
    if done <= warmup_steps:
        return peak * done / warmup_steps
    low = final_fraction * peak
    if schedule == "cosine":
        part = min(1.0, (done - warmup_steps) / max(1, steps - warmup_steps))
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * part))
    if schedule == "wsd":
        left = max(0.0, steps - done) / max(1, decay_fraction * steps)
        return low + (peak - low) * min(1.0, left)
    raise InputError(f"schedule {schedule!r} is unknown: take cosine or wsd")


# Clipping


def clip_gradients(parameters, max_norm):
    """Scale all gradients down together if their norm exceeds max_norm.

    Args:
        max_norm: the largest norm allowed; infinity only measures.

    Returns:
        The norm before clipping, a scalar tensor.
    """
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
