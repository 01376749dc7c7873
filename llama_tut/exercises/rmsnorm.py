"""Checkers of chapter 3."""

import torch
from transformers.models.llama import modeling_llama

from llama_tut.config import LlamaConfig
from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.rmsnorm import LlamaRMSNorm


def root_mean_square(x, eps):
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


@exercise("rmsnorm.norm")
def check_norm(answer):
    """The norm itself, against transformers' class."""
    torch.manual_seed(0)
    x, gain = 3 * torch.randn(5, 3, 8), torch.linspace(0.5, 2, 8)
    found = answer(x, gain, 0.0)
    expect(
        found.shape == x.shape,
        f"the result has shape {list(found.shape)}, it must be that of x, "
        f"{list(x.shape)}",
    )
    y = x / root_mean_square(x, 0.0)

    def is_close(other):
        return torch.allclose(found, other, rtol=1e-4, atol=1e-4)

    cases = {
        gain_forgotten: "the gain is missing",
        norm_of_length_one: "your vectors have length 1: take the mean of the "
        "squares, not their sum",
        mean_square_for_its_root: "you divide by the mean square: its root is "
        "missing",
    }
    for case, hint in cases.items():
        expect(not is_close(case(x, gain, 0.0)), hint)
    for axis in (0, 1, None):
        keep = {} if axis is None else {"dim": axis, "keepdim": True}
        expect(
            not is_close(gain * x / x.square().mean(**keep).sqrt()),
            "the mean runs over the wrong axis: each token is normalised "
            "alone, over its D numbers, the last axis",
        )
    for unbiased in (True, False):
        std = x.std(-1, keepdim=True, unbiased=unbiased)
        centred = x - x.mean(-1, keepdim=True)
        for above in (x, centred):
            expect(
                not is_close(gain * above / std),
                "the standard deviation subtracts the mean: RMSNorm does not",
            )
    expect_close(found, gain * y, "compare with gain * x / rms(x)", 1e-4)
    small = 0.1 * x
    expect_close(
        answer(small, gain, 0.5),
        gain * small / root_mean_square(small, 0.5),
        "eps belongs inside the root, added to the mean square",
        1e-4,
    )
    large = torch.full((1, 8), 300.0, dtype=torch.half)
    found = answer(large, gain.half(), 1e-5)
    expect(
        found.dtype == torch.half,
        f"a float16 input gives {found.dtype}: cast the result back",
    )
    expect(
        bool(found.any()),
        "a large float16 input becomes zero: its squares overflow, so square "
        "in float32",
    )
    theirs = modeling_llama.LlamaRMSNorm(64, eps=1e-5).bfloat16()
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 2.0)
    x = torch.randn(40, 64).bfloat16()
    found = answer(x, theirs.weight, 1e-5)
    expect(
        found.dtype == torch.bfloat16,
        f"a bfloat16 input gives {found.dtype}: cast the result back",
    )
    expect(
        torch.equal(found, theirs(x)),
        "bits differ in bfloat16: first cast the normalised vector back, then "
        "multiply by the gain",
    )


@wrong("rmsnorm.norm", "must be that of x")
def only_the_rms(x, gain, eps):
    return (x.float().square().mean(-1) + eps).sqrt()


@wrong("rmsnorm.norm", "not their sum")
def norm_of_length_one(x, gain, eps):
    x32 = x.float()
    inverse = torch.rsqrt(x32.square().sum(-1, keepdim=True) + eps)
    return gain * (x32 * inverse).to(x.dtype)


@wrong("rmsnorm.norm", "its root is missing")
def mean_square_for_its_root(x, gain, eps):
    x32 = x.float()
    inverse = 1 / (x32.square().mean(-1, keepdim=True) + eps)
    return gain * (x32 * inverse).to(x.dtype)


@wrong("rmsnorm.norm", "wrong axis")
def over_all_axes(x, gain, eps):
    return gain * (x * torch.rsqrt(x.square().mean() + eps))


@wrong("rmsnorm.norm", "wrong axis")
def over_the_first_axis(x, gain, eps):
    return gain * (x * torch.rsqrt(x.square().mean(0, keepdim=True) + eps))


@wrong("rmsnorm.norm", "subtracts the mean")
def standard_deviation(x, gain, eps):
    return gain * x / (x.var(-1, keepdim=True) + eps).sqrt()


@wrong("rmsnorm.norm", "inside the root")
def eps_outside_the_root(x, gain, eps):
    return gain * x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


@wrong("rmsnorm.norm", "the gain is missing")
def gain_forgotten(x, gain, eps):
    return x / root_mean_square(x, eps)


@wrong("rmsnorm.norm", "square in float32")
def squares_as_they_come(x, gain, eps):
    return gain * (x / root_mean_square(x, eps))


@wrong("rmsnorm.norm", "cast the result back")
def left_in_float32(x, gain, eps):
    return gain * (x.float() / root_mean_square(x.float(), eps))


@wrong("rmsnorm.norm", "then multiply by the gain")
def gain_before_the_cast(x, gain, eps):
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, True) + eps)
    return (gain * y).to(x.dtype)


@exercise("rmsnorm.without_mean")
def check_without_mean(answer):
    """Turn F.layer_norm into RMSNorm: which vectors do both treat alike?"""
    x = torch.tensor([[3.0, 4.0, 5.0], [0.1, -0.7, 0.3]])
    found = answer(x, 0.0)
    expect_close(
        found.mean(-1),
        torch.zeros(2),
        "the coordinates of your vectors do not sum to zero",
    )
    centred = x - x.mean(-1, keepdim=True)
    plain = centred / centred.norm(dim=-1, keepdim=True)
    expect(
        not torch.allclose(found, plain, atol=1e-4),
        "your vectors have length 1: a root mean square of 1 is length "
        "sqrt(D)",
    )
    expect(
        not torch.allclose(found, centred / x.std(-1, keepdim=True)),
        "your standard deviation divides by D - 1, as torch's std() and var() "
        "do unless told otherwise: the root mean square divides by D",
    )
    expect_close(
        found,
        centred / root_mean_square(centred, 0.0),
        "it is no RMSNorm of the centred vector: first the mean of each row "
        "goes away, then the root mean square of what is left is measured",
    )
    expect_close(
        answer(x, 0.5),
        centred / root_mean_square(centred, 0.5),
        "eps belongs inside the root, added to the mean square",
    )


@wrong("rmsnorm.without_mean", "inside the root")
def eps_outside(x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


@wrong("rmsnorm.without_mean", "divides by D - 1")
def unbiased(x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.var(-1, keepdim=True) + eps).sqrt()


@wrong("rmsnorm.without_mean", "do not sum to zero")
def centred_by_column(x, eps):
    x = x - x.mean(0)
    return x / root_mean_square(x, eps)


@wrong("rmsnorm.without_mean", "do not sum to zero")
def no_centring(x, eps):
    return x / root_mean_square(x, eps)


@wrong("rmsnorm.without_mean", "have length 1")
def sum_for_mean(x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


@exercise("rmsnorm.parameters")
def check_parameters(answer):
    """How many numbers do the norms of a whole model hold?"""
    small = LlamaConfig(hidden_size=64, num_hidden_layers=5)
    found = answer(small)
    expect(found != 10 * 64, "the norm in front of the head is missing")
    expect(found != 6 * 64, "each block has two norms")
    expect(found != 22 * 64, "RMSNorm has a gain only, no bias")
    expect(found == 11 * 64, f"{found} for 5 layers of 64: it is 704")
    smollm = LlamaConfig(hidden_size=576, num_hidden_layers=30)
    expect(answer(smollm) == 35_136, "read both sizes from the config")


@wrong("rmsnorm.parameters", "in front of the head")
def no_final_norm(config):
    return 2 * config.num_hidden_layers * config.hidden_size


@wrong("rmsnorm.parameters", "two norms")
def one_norm_a_block(config):
    return (config.num_hidden_layers + 1) * config.hidden_size


@wrong("rmsnorm.parameters", "no bias")
def with_bias(config):
    return 2 * (2 * config.num_hidden_layers + 1) * config.hidden_size


@exercise("rmsnorm.backward")
def check_backward(answer):
    """The gradient by hand, from the gradient of the output."""
    torch.manual_seed(0)
    norm = LlamaRMSNorm(6, eps=0.1)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x = torch.randn(4, 6, requires_grad=True)
    dy = torch.randn(4, 6)
    norm(x).backward(dy)
    gain = norm.weight.detach()
    with torch.no_grad():
        found = answer(x, gain, 0.1, dy)
    cases = {
        rms_as_constant: "you treat the root mean square as a constant, but "
        "it moves with x",
        no_gain: "the gain is missing: the gradient reaches y through gain * "
        "x / rms",
        not_divided: "the whole gradient is divided by the root mean square "
        "once more",
        sum_over_coordinates: "the component along x is a mean over the D "
        "coordinates, not a sum",
    }
    for case, hint in cases.items():
        value, own = case(x, gain, 0.1, dy), torch.as_tensor(found).float()
        expect(not torch.allclose(own, value, atol=1e-4), hint)
    expect_close(
        found,
        x.grad,
        "compare with (g - y * mean(g * y)) / rms, where g is dy * gain and y "
        "is x / rms",
        1e-4,
    )


@wrong("rmsnorm.backward", "as a constant")
def rms_as_constant(x, gain, eps, dy):
    return dy * gain / root_mean_square(x, eps)


@wrong("rmsnorm.backward", "not a sum")
def sum_over_coordinates(x, gain, eps, dy):
    r = root_mean_square(x, eps)
    g, y = dy * gain, x / r
    return (g - y * (g * y).sum(-1, keepdim=True)) / r


@wrong("rmsnorm.backward", "once more")
def not_divided(x, gain, eps, dy):
    r = root_mean_square(x, eps)
    g, y = dy * gain, x / r
    return g - y * (g * y).mean(-1, keepdim=True)


@wrong("rmsnorm.backward", "the gain is missing")
def no_gain(x, gain, eps, dy):
    r = root_mean_square(x, eps)
    y = x / r
    return (dy - y * (dy * y).mean(-1, keepdim=True)) / r
