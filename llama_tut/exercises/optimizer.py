"""Checkers of chapter 14."""

import math

import torch

from llama_tut.exercises import exercise, expect, expect_close, wrong


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
        "the rate is missing: a step takes away rate * decay of the weight",
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


@wrong("optimizer.half_life", "the rate is missing")
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
