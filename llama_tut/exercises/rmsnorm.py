"""Checkers of chapter 3."""

import torch

from llama_tut.config import LlamaConfig
from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.rmsnorm import LlamaRMSNorm


def root_mean_square(x, eps):
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


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
        r = root_mean_square(x, 0.1)
        scaled = dy * gain / r
        plain = x / r * (dy * x / r).mean(-1, keepdim=True) / r
    expect(
        not torch.allclose(torch.as_tensor(found).float(), scaled, atol=1e-4),
        "you treat the root mean square as a constant, but it moves with x",
    )
    expect(
        not torch.allclose(
            torch.as_tensor(found).float(), dy / r - plain, atol=1e-4
        ),
        "the gain is missing: the gradient reaches y through gain * x / rms",
    )
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


@wrong("rmsnorm.backward", "the gain is missing")
def no_gain(x, gain, eps, dy):
    r = root_mean_square(x, eps)
    y = x / r
    return (dy - y * (dy * y).mean(-1, keepdim=True)) / r
