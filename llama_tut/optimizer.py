# From notebooks/14_optimizer.ipynb by scripts/export.py: edit the notebook.
"""Optimizers: AdamW, Muon for matrices, and the learning rate.

Letters: N parameters; matrices have rows and columns.
"""

import math

import torch

from llama_tut.tools.files import InputError

# Which parameters decay


def parameter_groups(model, weight_decay, muon=False):
    """Groups of parameters for an optimizer: those that decay, and the others.

    Tensors of two dimensions or more decay, embeddings among them. Gains of
    norms and biases have one and do not: zero is no natural value for a gain.

    Args:
        model: the model itself, before anything wraps it or flattens its
            parameters.
        muon: put the matrices of the blocks, and stacks of matrices (the
            experts of chapter 26), into a group marked `muon`.
    """
    groups = {}
    for name, p in model.named_parameters():
        # Blocks are numbered, as in layers.0; embeddings and head are not.
        in_block = any(part.isdigit() for part in name.split("."))
        key = p.dim() >= 2, muon and in_block and p.dim() >= 2
        # torch takes (name, tensor) pairs, and keeps names for checkpoints
        groups.setdefault(key, []).append((name, p))
    return [
        {
            "params": named,
            "weight_decay": weight_decay if decays else 0.0,
            "muon": hidden,
        }
        for (decays, hidden), named in groups.items()
    ]


# The learning rate


def learning_rate_at(
    step,
    peak,
    steps,
    warmup_steps=0,
    schedule="cosine",
    final_fraction=0.1,
    decay_fraction=0.2,
):
    """The learning rate of a step, counted from 0.

    It reaches `peak` in step `warmup_steps - 1` and `final_fraction * peak`
    in step `steps - 1`. "cosine" falls from the peak on, "wsd" (warm-up,
    stable, decay) in the last `decay_fraction` of the steps.

    Raises:
        InputError: no schedule has this name.
    """
    if schedule not in ("cosine", "wsd"):
        raise InputError(f"schedule {schedule!r}: take cosine or wsd")
    done = step + 1
    if done <= warmup_steps:
        return peak * done / warmup_steps
    fall = steps - warmup_steps
    if schedule == "wsd":
        fall = min(fall, round(decay_fraction * steps))
    left = min(1.0, max(0, steps - done) / max(1, fall))  # 1: still at peak
    if schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return peak * (final_fraction + (1 - final_fraction) * left)


# Muon: a step for a matrix


def newton_schulz(g, steps=5):
    """Bring all singular values of each matrix close to 1.

    Source: Jordan et al., 2024 (kellerjordan.github.io/posts/muon); the same
    steps in bfloat16 as in `torch.optim.Muon`, for many matrices at once.

    Args:
        g: matrices of one shape, [count, rows, columns].

    Returns:
        The same shape in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.bfloat16().mT if tall else g.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # square, of the shorter side
        # b * gram + c * gram @ gram, rounded to bfloat16 only once
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, inner, x, beta=a)
    return x.mT if tall else x


# How long is the step?


def muon_step(state, matrices, group, momentum):
    """One step of Muon, in place, for matrices of one shape, or for stacks
    of them, [..., rows, columns]: each matrix of a stack is its own."""
    for p in matrices:
        if not state[p]:
            # AdamW.load_state_dict looks for a `step` in every state
            state[p]["step"] = torch.zeros(())
            state[p]["momentum"] = torch.zeros_like(p)
    means = [state[p]["momentum"] for p in matrices]
    gradients = [p.grad for p in matrices]
    torch._foreach_lerp_(means, gradients, 1 - momentum)
    ahead = torch._foreach_lerp(gradients, means, momentum)  # Nesterov
    ahead = torch.stack(ahead)  # [count, ..., rows, columns]
    updates = newton_schulz(ahead.flatten(0, -3)).view_as(ahead)
    updates = updates.to(matrices[0].dtype)
    size = group["lr"] * 0.2 * max(matrices[0].shape[-2:]) ** 0.5
    torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(matrices, list(updates), alpha=-size)


def equal_shapes(parameters, limit=2**26):
    """Lists of parameters that have gradients, of one shape each.

    A list holds at most `limit` numbers, since a batch of them is copied.
    """
    by_shape = {}
    for p in parameters:
        if p.grad is not None:
            by_shape.setdefault(p.shape, []).append(p)
    for same in by_shape.values():
        count = max(1, limit // same[0].numel())
        for i in range(0, len(same), count):
            yield same[i : i + count]


class Muon(torch.optim.AdamW):
    """Muon for the groups marked `muon`, torch's AdamW for all others.

    Source: Jordan et al., 2024; update size of Liu et al., 2025 (arXiv
    2502.16982), `match_rms_adamw` in `torch.optim.Muon`.
    """

    def __init__(self, groups, momentum=0.95, **adamw):
        super().__init__(groups, **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure=None):  # torch's helpers pass None
        """Update every parameter that has a gradient.

        The gradients of Muon's matrices are None afterwards, so that AdamW
        passes over them.
        """
        for group in self.param_groups:
            if group.get("muon"):
                for matrices in equal_shapes(group["params"]):
                    muon_step(self.state, matrices, group, self.momentum)
                for p in group["params"]:
                    p.grad = None
        super().step()


# Building the optimizer


def build_optimizer(
    model,
    name="adamw",
    learning_rate=3e-4,
    weight_decay=0.1,
    betas=(0.9, 0.95),
):
    """The optimizer of this name for a model, fused where torch can.

    Args:
        name: "adamw", or "muon": Muon for the matrices inside the blocks,
            AdamW for embeddings, head and norms.

    Raises:
        InputError: no optimizer has this name.
    """
    kinds = {"adamw": torch.optim.AdamW, "muon": Muon}
    if name not in kinds:
        raise InputError(f"optimizer {name!r}: take adamw or muon")
    return kinds[name](
        parameter_groups(model, weight_decay, muon=name == "muon"),
        lr=learning_rate,
        betas=betas,
        eps=1e-8,
        fused=next(model.parameters()).device.type in ("cpu", "cuda", "mps"),
    )
