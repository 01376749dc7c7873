"""Checkers of chapter 15."""

import torch

from llama_tut.exercises import (
    exercise,
    expect,
    expect_close,
    wrong,
    wrong_variants,
)


class Line(torch.nn.Module):
    """One weight w; the loss is the mean of (w x - y) squared."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs, targets):
        return ((self.w * inputs - targets) ** 2).mean()


def two_steps(answer, max_norm):
    """Weights after two steps of SGD (learning rate 0.1), and the losses.

    Gradients of the three micro batches at w = 0: -12, -2, 4; mean -10/3.
    """
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.ones(4), torch.full((4,), float(y))) for y in (6, 1, -2)]
    weights, losses = [], []
    for _ in range(2):
        losses.append(float(answer(model, optimizer, batches, max_norm)))
        weights.append(model.w.item())
    return weights, losses


# Where w goes in the first step, and why it may go there
WRONG_WEIGHTS = {
    0.0: "the weights have not moved: optimizer.step() is missing",
    1.0: "the gradients are summed: divide each loss by the number of micro "
    "batches",
    -0.4: "only the last micro batch counts: zero_grad belongs after the "
    "step, not between the micro batches",
    -0.4 / 3: "only the last micro batch counts, and it is divided by k: "
    "zero_grad belongs after the step",
    1.2: "only the first micro batch counts",
    0.4: "only the first micro batch counts, and it is divided by k",
    0.277333: "it steps after each micro batch: one step for all of them",
    0.528: "it steps after each micro batch: one step for all of them",
}
WRONG_LOSSES = {
    41.0: "this is the sum of the losses, not their mean",
    4.0: "this is the loss of the last micro batch",
    4 / 3: "this is the loss of the last micro batch over k",
}


@exercise("trainer.step")
def check_step(answer):
    """One optimizer step on several micro batches."""
    (first, second), (loss, _) = two_steps(answer, 1e9)
    for value, hint in WRONG_WEIGHTS.items():
        expect(abs(first - value) > 1e-4, hint)
    expect_close(
        first, 1 / 3, "w must go to 0.3333: the mean gradient is -3.33"
    )
    expect(
        abs(second - 0.93333) > 1e-4,
        "the second step still has the gradient of the first: zero_grad is "
        "missing",
    )
    expect_close(second, 0.6, "the second step is wrong: zero_grad after it?")
    for value, hint in WRONG_LOSSES.items():
        expect(abs(loss - value) > 1e-4, hint)
    expect_close(loss, 41 / 3, "the mean of the three losses is 13.667")
    clipped = two_steps(answer, 2.0)[0][0]
    expect(
        abs(clipped - 1 / 3) > 1e-4,
        "the gradient has not been clipped before the step",
    )
    expect(
        abs(clipped - 0.2) < 1e-4,
        f"clipped to 2, w must go to 0.2, not {clipped:.3f}: clip once, after "
        "the last backward pass",
    )


def step_with(
    model, optimizer, batches, max_norm,
    divide=True, zero="after", clip="once", steps=1, total="mean",
):  # fmt: skip
    """A step with a fault, by which line is wrong."""
    k, losses = len(batches), []
    for inputs, targets in batches:
        loss = model(inputs, targets=targets)
        (loss / k if divide else loss).backward()
        losses.append(loss.item())
        if clip == "each":
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if steps == k or steps == "each":
            optimizer.step()
        if zero == "between" and inputs is not batches[-1][0]:
            optimizer.zero_grad()
        if steps == "each":
            optimizer.zero_grad()
    if clip == "once":
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if steps == 1:
        optimizer.step()
    if clip == "late":
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if zero in ("after", "between"):
        optimizer.zero_grad()
    return {"mean": sum(losses) / k, "sum": sum(losses)}.get(total, losses[-1])


wrong_variants(
    "trainer.step",
    step_with,
    {
        "not_divided": (dict(divide=False), "divide each loss"),
        "zeroed_between": (dict(zero="between"), "zero_grad belongs after"),
        "never_zeroed": (dict(zero="never"), "zero_grad is missing"),
        "steps_each_time": (dict(steps="each"), "one step for all"),
        "clipped_late": (dict(clip="late"), "not been clipped"),
        "clipped_each": (dict(clip="each"), "clip once"),
        "sum_of_losses": (dict(total="sum"), "the sum of the losses"),
        "last_loss": (dict(total="last"), "loss of the last"),
    },
)


@exercise("trainer.mfu")
def check_mfu(answer):
    """MFU from tokens per second."""
    sizes = dict(N=100e6, L=10, D=800, T=1000)
    found = answer(500_000.0, peak=989e12, **sizes)
    right = 500_000.0 * 696e6 / 989e12
    expect(
        abs(found / right - 600 / 696) > 1e-3,
        "attention is missing: each token reads T others, 12 L T D FLOPs",
    )
    expect(
        abs(found / right - 1 / 3) > 1e-3,
        "these are the FLOPs of the forward pass; training takes three times "
        "as many",
    )
    expect(
        abs(found / right - 632 / 696) > 1e-3,
        "4 L T D is attention's forward pass: its backward counts too",
    )
    expect(abs(found / right - 100) > 0.1, "a part of the peak, not per cent")
    expect_close(
        found,
        right,
        "FLOPs per token are 6N + 12LTD; times tokens per second; over the peak",
    )
    expect_close(
        answer(1000.0, peak=1e12, **sizes), 0.696, "read the peak", 1e-4
    )


@wrong("trainer.mfu", "attention is missing")
def parameters_only(tokens_a_second, N, L, D, T, peak):
    return tokens_a_second * 6 * N / peak


@wrong("trainer.mfu", "three times")
def forward_only(tokens_a_second, N, L, D, T, peak):
    return tokens_a_second * (2 * N + 4 * L * T * D) / peak


@wrong("trainer.mfu", "its backward counts too")
def attention_forward_only(tokens_a_second, N, L, D, T, peak):
    return tokens_a_second * (6 * N + 4 * L * T * D) / peak


@exercise("trainer.weights")
def check_weights(answer):
    """Weights that make a mean over all tokens, on several ranks."""
    counts = [[10, 30], [20, 40]]
    found = answer(counts)
    expect(
        [len(own) for own in found] == [2, 2],
        "give a weight for each micro batch of each rank",
    )
    flat = [weight for own in found for weight in own]

    def like(weights):
        pairs = zip(flat, weights, strict=True)
        return all(abs(a - b) < 1e-6 for a, b in pairs)

    expect(
        not like([0.5] * 4) and not like([0.25] * 4),
        "this is the mean of means: a micro batch counts by its tokens",
    )
    expect(
        not like([0.25, 0.75, 1 / 3, 2 / 3]),
        "you divide by the tokens of one rank: a rank with few tokens then "
        "counts as much as one with many",
    )
    expect(
        not like([0.1, 0.3, 0.2, 0.4]),
        "DDP divides by the number of ranks once more",
    )
    expect_close(found, [[0.2, 0.6], [0.4, 0.8]], "count * W / all tokens")
    expect_close(
        answer([[3, 1], [0, 4], [2, 2]]),
        [[0.75, 0.25], [0, 1.0], [0.5, 0.5]],
        "it fails with three ranks",
    )


@wrong("trainer.weights", "mean of means")
def one_over_k(counts):
    return [[1 / len(own)] * len(own) for own in counts]


@wrong("trainer.weights", "of one rank")
def by_rank(counts):
    return [[count / sum(own) for count in own] for own in counts]


@wrong("trainer.weights", "DDP divides")
def without_ddp(counts):
    total = sum(map(sum, counts))
    return [[count / total for count in own] for own in counts]
