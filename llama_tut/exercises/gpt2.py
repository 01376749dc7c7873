"""Checkers for chapter 22."""

import math

import torch
from torch.nn import functional as F

from llama_tut.exercises import exercise, expect, expect_close, wrong


def numbers(*shapes):
    """Random tensors of float64, the same at every call."""
    source = torch.Generator().manual_seed(0)
    draw = {"generator": source, "dtype": torch.float64}
    return [torch.randn(shape, **draw) for shape in shapes]


@exercise("gpt2.mlp")
def check_mlp(answer):
    """GPT-2's MLP, weights stored with a row for each input."""
    x, up, a, down, b = numbers((4, 6), (6, 9), (9,), (9, 6), (6,))
    found = torch.as_tensor(answer(x, up, a, down, b))
    z = x @ up + a

    def gelu(z):
        return F.gelu(z, approximate="tanh")

    for other, hint in (
        (
            F.gelu(z) @ down + b,
            "that is the exact GELU, with the error function: GPT-2 has the "
            "form with a tanh (they differ from the fourth digit on)",
        ),
        (F.relu(z) @ down + b, "that is ReLU"),
        (F.silu(z) @ down + b, "that is SiLU"),
        (z @ down + b, "the nonlinearity is missing"),
        (gelu(x @ up) @ down + b, "the first bias is missing"),
        (gelu(x @ up) + a, "the second matrix is missing"),
        (gelu(z) @ down, "the second bias is missing"),
        (
            (gelu(x @ up) + a) @ down + b,
            "the first bias belongs inside the nonlinearity",
        ),
    ):
        expect(
            found.shape != other.shape
            or not torch.allclose(found, other, rtol=1e-6, atol=1e-6),
            hint,
        )
    expect_close(
        found, gelu(z) @ down + b, "compare with gelu(x up + a) down + b", 1e-6
    )


@wrong("gpt2.mlp", "with the error function")
def exact_gelu(x, up, up_bias, down, down_bias):
    return F.gelu(x @ up + up_bias) @ down + down_bias


@wrong("gpt2.mlp", "first bias is missing")
def no_first_bias(x, up, up_bias, down, down_bias):
    return F.gelu(x @ up, approximate="tanh") @ down + down_bias


@wrong("gpt2.mlp", "second bias is missing")
def no_second_bias(x, up, up_bias, down, down_bias):
    return F.gelu(x @ up + up_bias, approximate="tanh") @ down


@wrong("gpt2.mlp", "inside the nonlinearity")
def bias_after(x, up, up_bias, down, down_bias):
    hidden = F.gelu(x @ up, approximate="tanh") + up_bias
    return hidden @ down + down_bias


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
    expect(
        found != 8,
        "8: that is one standard error; a 95 % interval is 1.96 of them",
    )
    expect(
        found not in (5, 6),
        f"{found}: the error falls with the root of the number of seeds, so "
        "the ratio enters squared",
    )
    expect(
        found != 22,
        "22: 1.645 leaves 5 % on each side; a 95 % interval has 1.96",
    )
    expect(found != 123, "123: ±gap is half of the interval's width")
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


@wrong("gpt2.seeds", "one standard error")
def one_error(sd, r, gap):
    return math.ceil(2 * sd**2 * (1 - r) / gap**2)


@wrong("gpt2.seeds", "enters squared")
def not_squared(sd, r, gap):
    return math.ceil(1.96 * math.sqrt(2 * (1 - r)) * sd / gap)


@wrong("gpt2.seeds", "half of the interval's width")
def whole_width(sd, r, gap):
    return math.ceil(2 * (1.96 * sd / (gap / 2)) ** 2 * (1 - r))


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
        near or not torch.allclose(bias, W @ b),
        "the layer's own bias c is lost: it is added after W",
    )
    expect(
        near or not torch.allclose(bias, b @ W.T - c),
        "the layer's own bias c is added, not subtracted",
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


@wrong("gpt2.fold", "own bias c is lost")
def without_c(g, b, W, c):
    return W * g, W @ b


@wrong("gpt2.fold", "scales the columns")
def gain_left(g, b, W, c):
    return W, W @ b + c
