"""Checkers of chapter 14."""

import math

import torch

from llama_tut.exercises import (
    exercise,
    expect,
    expect_close,
    wrong,
    wrong_variants,
)


@exercise("optimizer.adamw")
def check_adamw(answer):
    """One step of AdamW, written out."""
    p, g = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    m, v = torch.tensor([0.1, -0.2]), torch.tensor([0.3, 0.2])
    before = [x.clone() for x in (p, g, m, v)]
    rest = dict(t=3, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
    found = answer(p, g, m, v, weight_decay=0.0, **rest)
    expect(len(found) == 3, "return three tensors: p, m and v")
    new_p, new_m, new_v = found
    expect_close(
        new_m, 0.9 * before[2] + 0.1 * before[1], "m keeps beta1 of itself "
        "and takes 1 - beta1 of the gradient",
    )  # fmt: skip
    expect(
        not torch.allclose(new_v, 0.95 * before[3] + 0.05 * before[1]),
        "v is a mean of the squared gradient",
    )
    expect_close(
        new_v, 0.95 * before[3] + 0.05 * before[1] ** 2, "v keeps beta2 of "
        "itself and takes 1 - beta2 of the gradient's square",
    )  # fmt: skip

    def step(mean, square):
        return before[0] - 0.1 * mean / (square.sqrt() + 1e-8)

    right = step(new_m / (1 - 0.9**3), new_v / (1 - 0.95**3))
    for other, hint in (
        (step(new_m, new_v), "the correction is missing: divide m by "
         "1 - beta1 ** t, and v by 1 - beta2 ** t"),
        (step(new_m / (1 - 0.9**2), new_v / (1 - 0.95**2)),
         "t counts from 1: use t itself in the correction, not t - 1"),
        (step(new_m / (1 - 0.9), new_v / (1 - 0.95)),
         "the correction has beta ** t, not beta"),
        (step(before[2] / (1 - 0.9**3), before[3] / (1 - 0.95**3)),
         "the update uses the new means, not the old ones"),
        (step(new_m / (1 - 0.9**3), (new_v / (1 - 0.95**3)) ** 2),
         "divide by the root of v"),
        (2 * before[0] - right, "it goes uphill: subtract the update"),
    ):  # fmt: skip
        expect(not torch.allclose(new_p, other, atol=1e-5), hint)
    expect_close(new_p, right, "p moves by lr * m_hat / (root of v_hat + eps)")
    decayed = answer(p, g, m, v, weight_decay=0.5, **rest)
    expect(
        torch.allclose(decayed[1], new_m),
        "the decay is decoupled: it does not enter the gradient or the means",
    )
    for other, hint in (
        (right, "the decay is missing"),
        (right - 0.5 * before[0], "lr is missing in the decay: it takes "
         "lr * weight_decay of p"),
        (right + 0.05 * before[0], "decay shrinks p, it must not grow"),
    ):  # fmt: skip
        expect(not torch.allclose(decayed[0], other, atol=1e-5), hint)
    expect_close(
        decayed[0],
        right - 0.05 * before[0],
        "the decay takes lr * weight_decay of the old p",
        1e-4,
    )
    small = answer(p, 1e-9 * g, 0 * m, 0 * v, weight_decay=0.0, **rest)[0]
    expect(
        (small - p).abs().max() < 0.07,
        "eps is added after the root, not inside it",
    )
    same = all(map(torch.equal, before, (p, g, m, v)))
    expect(same, "you changed what came in: return new tensors")


def adamw_with(
    p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, **fault
):  # fmt: skip
    """AdamW's step with one line wrong."""
    if fault.get("coupled"):
        g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g if fault.get("linear") else g**2)
    t = fault.get("always", t - fault.get("late", 0))
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    if fault.get("uncorrected"):
        m_hat, v_hat = m, v
    shrink = (1 if fault.get("no_lr") else lr) * weight_decay
    if fault.get("coupled"):
        shrink = 0
    sign = -1 if fault.get("uphill") else 1
    return p - shrink * p - sign * lr * m_hat / (v_hat.sqrt() + eps), m, v


wrong_variants(
    "optimizer.adamw",
    adamw_with,
    {
        "uncorrected": (dict(uncorrected=True), "correction is missing"),
        "t_from_zero": (dict(late=1), "t counts from 1"),
        "beta_without_power": (dict(always=1), "beta ** t, not beta"),
        "not_squared": (dict(linear=True), "squared gradient"),
        "l2": (dict(coupled=True), "decoupled"),
        "decay_without_lr": (dict(no_lr=True), "lr is missing"),
        "uphill": (dict(uphill=True), "uphill"),
    },
)


@exercise("optimizer.half_life")
def check_half_life(answer):
    """Steps until decay alone has halved a weight."""
    found = answer(1e-3, 0.1)
    expect(found > 1, "more than one step: rate times decay is small")
    expect(
        abs(found - 1e4) > 1,
        "after 1 / (rate * decay) steps 1/e of the weight is left, not half",
    )
    expect(
        abs(found - math.log(2) / 0.1) > 1,
        "the learning rate is missing: a step takes away learning rate * "
        "decay of the weight",
    )
    expect(
        abs(found - 0.5e4) > 1,
        "a step takes a share of what is left, not of the first weight: it "
        "does not fall on a straight line",
    )
    expect(
        abs(found - math.log(10) / 1e-4) > 2,
        "this is the time to a tenth: take the logarithm of a half",
    )
    expect_close(
        answer(6e-4, 0.1),
        math.log(2) / 6e-5,
        "(1 - rate * decay) ** n is a half: take logarithms",
        1e-3,
    )
    expect_close(
        answer(0.5, 0.5),
        math.log(0.5) / math.log(0.75),
        "exact for a large product too: ln(1/2) / ln(1 - rate * decay)",
    )


@wrong("optimizer.half_life", "1/e of the weight")
def time_to_one_eth(learning_rate, weight_decay):
    return 1 / (learning_rate * weight_decay)


@wrong("optimizer.half_life", "straight line")
def linear_half_life(learning_rate, weight_decay):
    return 0.5 / (learning_rate * weight_decay)


@wrong("optimizer.half_life", "learning rate is missing")
def without_rate(learning_rate, weight_decay):
    return math.log(2) / weight_decay


@wrong("optimizer.half_life", "for a large product too")
def for_small_products(learning_rate, weight_decay):
    return math.log(2) / (learning_rate * weight_decay)


@exercise("optimizer.clip")
def check_clip(answer):
    """Clip a list of gradients by the norm of all together."""
    pair = [torch.tensor([3.0]), torch.tensor([4.0])]
    found = answer(pair, 10.0)
    expect(len(found) == 2, "one clipped gradient for each that came in")
    expect_close(
        torch.cat(list(found)),
        [3.0, 4.0],
        "a gradient below the limit stays as it is: the factor is at most 1",
    )
    found = torch.cat(list(answer(pair, 1.0)))
    expect(pair[0] == 3 and pair[1] == 4, "you changed what came in")
    expect(
        not torch.equal(found, torch.ones(2)),
        "each tensor is clipped by itself, so the direction changes: take one "
        "norm over all",
    )
    expect_close(
        found,
        [0.6, 0.8],
        "the norm of 3 and 4 is 5, so a limit of 1 leaves 0.6 and 0.8",
    )
    expect_close(
        torch.cat([g.ravel() for g in answer([torch.zeros(2, 2)], 1.0)]),
        [0.0] * 4,
        "a gradient of zeros must stay zero, not become NaN",
    )


@wrong("optimizer.clip", "take one norm over all")
def each_by_itself(gradients, max_norm):
    return [g * min(1.0, max_norm / g.norm().item()) for g in gradients]


@wrong("optimizer.clip", "at most 1")
def always_scaled(gradients, max_norm):
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    return [g * max_norm / norm for g in gradients]


@wrong("optimizer.clip", "you changed what came in")
def in_place(gradients, max_norm):
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    return [g.mul_(min(1.0, max_norm / norm)) for g in gradients]


@wrong("optimizer.clip", "must stay zero")
def zero_over_zero(gradients, max_norm):
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return [g / norm * norm.clamp(max=max_norm) for g in gradients]


@exercise("optimizer.bytes")
def check_bytes(answer):
    """Bytes of a rank with weights in bfloat16 and AdamW in float32."""
    found = answer(1000, 1)
    expect(found != 12_000, "weights and gradients in bfloat16: 2 bytes each")
    expect(found != 20_000, "the gradient is bfloat16 too: 2 bytes, not 4")
    expect(
        found != 14_000,
        "the gradient is missing: each weight has one, 2 bytes",
    )
    expect(found == 16_000, f"{found} bytes for 1,000 parameters: 16 each")
    found = answer(1000, 8)
    expect(
        found != 2_000,
        "only the copy and the means are divided: each rank holds all weights "
        "and gradients",
    )
    expect(
        found == 5_500, f"{found} bytes on each of 8 ranks: 4 + 12 / 8 each"
    )


@wrong("optimizer.bytes", "the gradient is missing")
def without_gradient(parameters, shards):
    return 2 * parameters + 12 * parameters / shards


@wrong("optimizer.bytes", "only the copy and the means")
def all_divided(parameters, shards):
    return 16 * parameters / shards


@wrong("optimizer.bytes", "2 bytes each")
def optimizer_only(parameters, shards):
    return 12 * parameters / shards
