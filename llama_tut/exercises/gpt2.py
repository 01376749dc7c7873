"""Checkers for chapter 22."""

import math

import torch

from llama_tut.exercises import exercise, expect, wrong


@exercise("gpt2.width")
def check_width(answer):
    """The width of a gated MLP with as many parameters as a plain one."""
    for D, I in ((96, 384), (768, 3072), (8, 100)):
        right = round((2 * D * I + I) / (3 * D + 2))
        found = answer(D, I)
        expect(found is not None, "return a number")
        expect(found != I, f"{I} keeps the width: three matrices, not two")
        expect(
            found == round(found), f"{found}: a width is a whole number: round"
        )
        expect(
            found != math.floor(I / 3),
            f"{found} is a third: the plain MLP has two matrices, not one",
        )
        expect(
            found == right,
            f"{found} for D {D}, I {I}: {right} is closer; count the biases, "
            "I + D before and 2I' + D after, and round to the nearest",
        )


@wrong("gpt2.width", "three matrices, not two")
def same_width(D, I):
    return I


@wrong("gpt2.width", "a whole number")
def not_rounded(D, I):
    return (2 * D * I + I) / (3 * D + 2)


@wrong("gpt2.width", "count the biases")
def rounded_down(D, I):
    return 2 * I // 3


@exercise("gpt2.seeds")
def check_seeds(answer):
    """Seeds until a paired interval is narrow enough."""
    found = answer(0.02, 0.0, 0.01)
    expect(found is not None, "return a number")
    expect(
        found != 16,
        "16: a difference of two runs has twice the variance of one",
    )
    expect(found == round(found), f"{found}: seeds are whole: round up")
    expect(found != 30, "30.7 seeds are 31, not 30: round up")
    expect(found == 31, f"{found} at r 0, sd 0.02, gap 0.01: 31 are needed")
    found = answer(0.02, 0.9, 0.01)
    expect(found != 31, "pairing helps: the variance shrinks by 1 - r")
    expect(
        found != 6,
        "6: the correlation enters as 1 - r, not as 1 - r squared",
    )
    expect(found == 4, f"{found} at r 0.9: 4 are needed")
    expect(answer(0.01, 0.99, 0.5) >= 1, "no interval comes from no seed")


@wrong("gpt2.seeds", "twice the variance")
def of_one_run(sd, r, gap):
    return math.ceil(1.96**2 * sd**2 * (1 - r) / gap**2)


@wrong("gpt2.seeds", "pairing helps")
def unpaired(sd, r, gap):
    return math.ceil(2 * (1.96 * sd / gap) ** 2)


@wrong("gpt2.seeds", "not as 1 - r squared")
def squared(sd, r, gap):
    return math.ceil(2 * (1.96 * sd / gap) ** 2 * (1 - r**2))


@exercise("gpt2.fold")
def check_fold(answer):
    """A norm's gain and bias moved into the layer behind it."""
    source = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64)

    g, b, W, c, x = normal(5), normal(5), normal(3, 5), normal(3), normal(7, 5)
    made = answer(g, b, W, c)
    expect(made is not None, "return a weight and a bias")
    weight, bias = made
    expect(weight.shape == W.shape, f"the weight is {list(W.shape)}")
    expect(bias.shape == c.shape, f"the bias is {list(c.shape)}")
    true = (x * g + b) @ W.T + c
    found = x @ weight.T + bias
    near = torch.allclose(found, true)
    lost = torch.allclose(found - found[:1], true - true[:1])
    expect(
        near or not torch.allclose(bias, c),
        "the norm's bias is lost: it passes through W too",
    )
    expect(
        near or not lost,
        "the bias is wrong: b goes through W as it was, without the gain",
    )
    expect(near, "other outputs: the gain scales the columns of W")


@wrong("gpt2.fold", "bias is lost")
def bias_left(g, b, W, c):
    return W * g, c


@wrong("gpt2.fold", "without the gain")
def scaled_twice(g, b, W, c):
    return W * g, (W * g) @ b + c


@wrong("gpt2.fold", "scales the columns")
def gain_left(g, b, W, c):
    return W, W @ b + c
