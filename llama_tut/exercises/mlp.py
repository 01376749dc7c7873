"""Checkers of chapter 6."""

import torch
from torch.nn import functional as F

from llama_tut.exercises import exercise, expect, expect_close, wrong


@exercise("mlp.swiglu")
def check_swiglu(answer):
    """The MLP itself, against transformers' class."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    gate, up, down = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 6)
    found = torch.as_tensor(answer(x, gate, up, down))
    expect(
        found.shape == x.shape,
        f"the result has shape {list(found.shape)}, it must be "
        f"{list(x.shape)}: down brings the I neurons back to D numbers",
    )
    z, u = x @ gate.T, x @ up.T
    for hidden, hint in (
        (F.silu(u) * z, "gate and up are exchanged: SiLU goes to the gate"),
        (torch.sigmoid(z) * u, "that is a sigmoid: silu(z) is z * sigmoid(z)"),
        (F.relu(z) * u, "that is ReLU: silu(z) is z * sigmoid(z)"),
        (F.gelu(z) * u, "that is GELU (GeGLU): silu(z) is z * sigmoid(z)"),
        (F.silu(z * u), "SiLU goes to the gate alone, before the product"),
        (F.silu(z) * F.silu(u), "the value gets no nonlinearity"),
        (F.silu(z) + u, "gate and value are multiplied, not added"),
        (F.silu(z), "the value is missing: silu(gate) is multiplied by up"),
        (z * u, "the nonlinearity is missing: SiLU goes to the gate"),
    ):
        expect(not torch.allclose(found, hidden @ down.T, atol=1e-4), hint)
    wanted = (F.silu(z) * u) @ down.T
    expect_close(found, wanted, "it is not down(silu(gate x) * up x)", 1e-4)


@wrong("mlp.swiglu", "are exchanged")
def up_through_silu(x, gate, up, down):
    return (F.silu(x @ up.T) * (x @ gate.T)) @ down.T


@wrong("mlp.swiglu", "that is a sigmoid")
def sigmoid_gate(x, gate, up, down):
    return (torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T


@wrong("mlp.swiglu", "before the product")
def silu_of_the_product(x, gate, up, down):
    return F.silu((x @ gate.T) * (x @ up.T)) @ down.T


@wrong("mlp.swiglu", "is missing: silu(gate)")
def two_matrices(x, gate, up, down):
    return F.silu(x @ gate.T) @ down.T


@wrong("mlp.swiglu", "no nonlinearity")
def silu_on_both(x, gate, up, down):
    return (F.silu(x @ gate.T) * F.silu(x @ up.T)) @ down.T


@wrong("mlp.swiglu", "I neurons back to D")
def not_brought_down(x, gate, up, down):
    return F.silu(x @ gate.T) * (x @ up.T)


@exercise("mlp.width")
def check_width(answer):
    """LLaMA's rule for intermediate_size."""
    found = answer(4096, 1.0, 256)
    expect(found != 16_384, "two thirds of 4D: there are three matrices")
    expect(found != 10_752, "up to the next multiple, not down")
    expect(found != 10_922, "the last step is missing: a multiple of 256")
    expect(found == 11_008, f"Llama 2 7B has 11,008, not {found:,}")
    expect(
        answer(512, 1.0, 256) != 1280,
        "up to the next multiple, not down and not to the nearest",
    )
    expect(
        answer(768, 1.0, 256) == 2048,
        "a multiple already: 2048 needs no rounding",
    )
    found = answer(4096, 1.3, 1024)
    expect(
        found % 1024 == 0,
        "the multiplier comes before the rounding to a multiple",
    )
    expect(found != 11_264, "the multiplier is not used")
    expect(found == 14_336, f"Llama 3 8B has 14,336, not {found:,}")
    # 8 * 100 / 3 is 266.67, and 1.3 * 266 is 345.8.
    expect(
        answer(100, 1.0, 1) != 267,
        "two thirds of 4D are rounded down, not to the nearest",
    )
    expect(answer(100, 1.0, 1) == 266, "D 100, 1.0, 1: 266 neurons")
    expect(
        answer(100, 1.3, 1) != 346,
        "D 100, 1.3, 1: two thirds of 4D are rounded down, then the multiplier "
        "is applied and the result is rounded down again",
    )
    expect(answer(100, 1.3, 1) == 345, "D 100, 1.3, 1: 345 neurons")


@wrong("mlp.width", "not to the nearest")
def nearest(hidden_size, multiplier, multiple_of):
    neurons = round(multiplier * round(8 * hidden_size / 3))
    return -(-neurons // multiple_of) * multiple_of


@wrong("mlp.width", "rounded down again")
def rounded_once(hidden_size, multiplier, multiple_of):
    neurons = int(multiplier * 8 * hidden_size / 3)
    return -(-neurons // multiple_of) * multiple_of


@wrong("mlp.width", "not to the nearest")
def to_the_nearest_multiple(hidden_size, multiplier, multiple_of):
    neurons = int(multiplier * (8 * hidden_size // 3))
    return round(neurons / multiple_of) * multiple_of


@wrong("mlp.width", "not down")
def rounded_down(hidden_size, multiplier, multiple_of):
    neurons = int(multiplier * (8 * hidden_size // 3))
    return neurons // multiple_of * multiple_of


@wrong("mlp.width", "needs no rounding")
def one_more(hidden_size, multiplier, multiple_of):
    neurons = int(multiplier * (8 * hidden_size // 3))
    return (neurons // multiple_of + 1) * multiple_of


@wrong("mlp.width", "before the rounding")
def multiplied_last(hidden_size, multiplier, multiple_of):
    neurons = -(-(8 * hidden_size // 3) // multiple_of) * multiple_of
    return int(multiplier * neurons)


@wrong("mlp.width", "three matrices")
def no_two_thirds(hidden_size, multiplier, multiple_of):
    neurons = int(multiplier * 4 * hidden_size)
    return -(-neurons // multiple_of) * multiple_of


@exercise("mlp.fused")
def check_fused(answer):
    """gate_proj and up_proj in one matrix."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    gate_up, down = torch.randn(12, 8), torch.randn(8, 6)
    found = answer(x, gate_up, down)
    expect(
        not torch.allclose(found, value_first(x, gate_up, down), atol=1e-4),
        "gate and value are exchanged: the gate's rows come first",
    )
    expect(
        found.shape != x.shape
        or not torch.allclose(found, in_turns(x, gate_up, down), atol=1e-4),
        "the rows do not take turns: first all of the gate, then all of up",
    )
    expect(
        not torch.allclose(found, silu_last(x, gate_up, down), atol=1e-4),
        "SiLU goes to the gate alone, before the product",
    )
    gate, value = x @ gate_up[:6].T, x @ gate_up[6:].T
    wanted = (F.silu(gate) * value) @ down.T
    expect_close(found, wanted, "it is not down(silu(gate) * value)", 1e-4)


@wrong("mlp.fused", "are exchanged")
def value_first(x, gate_up, down):
    value, gate = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * value, down)


@wrong("mlp.fused", "take turns")
def in_turns(x, gate_up, down):
    both = F.linear(x, gate_up)
    return F.linear(F.silu(both[..., ::2]) * both[..., 1::2], down)


@wrong("mlp.fused", "to the gate alone")
def silu_last(x, gate_up, down):
    gate, value = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate * value), down)


@exercise("mlp.backward")
def check_backward(answer):
    """Gradients of silu(z) * u."""
    torch.manual_seed(0)
    z, value = torch.randn(2, 6, requires_grad=True).unbind()
    dy = torch.randn(6)
    wanted = torch.autograd.grad(F.silu(z) * value, (z, value), dy)
    z, value = z.detach(), value.detach()
    found = answer(z, value, dy)
    expect(
        isinstance(found, tuple | list) and len(found) == 2,
        "return two gradients: that of z, that of the value",
    )
    expect(
        not torch.allclose(found[0], wanted[1], atol=1e-5),
        "the order is z, value",
    )
    s = torch.sigmoid(z)
    for slope, hint in (
        (s, "s moves with z too: the slope has a second term"),
        (s * (1 - s), "that is the slope of the sigmoid; SiLU is z times it"),
    ):
        same = torch.allclose(found[0], dy * value * slope, atol=1e-5)
        expect(not same, hint)
    expect(
        not torch.allclose(found[1], dy * value, atol=1e-5),
        "d value: the slope in u is the other factor, silu(z), and not u",
    )
    expect_close(found[0], wanted[0], "dz is dy * value * slope", 1e-4)
    expect_close(found[1], wanted[1], "d value is dy * silu(z)", 1e-4)


@wrong("mlp.backward", "moves with z too")
def sigmoid_as_constant(z, value, dy):
    s = torch.sigmoid(z)
    return dy * value * s, dy * z * s


@wrong("mlp.backward", "slope of the sigmoid")
def slope_of_sigmoid(z, value, dy):
    s = torch.sigmoid(z)
    return dy * value * s * (1 - s), dy * z * s


@wrong("mlp.backward", "the other factor")
def value_for_itself(z, value, dy):
    s = torch.sigmoid(z)
    return dy * value * (s + z * s * (1 - s)), dy * value


@wrong("mlp.backward", "the order is")
def other_order(z, value, dy):
    s = torch.sigmoid(z)
    return dy * z * s, dy * value * (s + z * s * (1 - s))
