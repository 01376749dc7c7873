"""RoPE where chapter 4 does not look: casts, devices, compile, 2-D positions."""

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama import modeling_llama

from llama_tut.config import LlamaConfig, RopeScaling
from llama_tut.rope import (
    LlamaRotaryEmbedding,
    apply_rotary,
    inverse_frequencies,
)

CONFIG = LlamaConfig(head_dim=64, rope_theta=5e5, rope_scaling=RopeScaling())
POSITIONS = torch.tensor([0, 1, 257, 8191, 8192, 100_003, 131_071])


@pytest.fixture
def default_dtype():
    """Run with bfloat16 as torch's default dtype."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def same_tables(rope, positions=POSITIONS):
    """Assert that `rope` gives the float32 tables bit for bit."""
    expected = LlamaRotaryEmbedding(CONFIG)(POSITIONS)
    for table, reference in zip(rope(positions), expected, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
def test_a_cast_of_the_model_keeps_the_angles(dtype):
    same_tables(LlamaRotaryEmbedding(CONFIG).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_autocast_keeps_the_angles(dtype):
    with torch.autocast("cpu", dtype):
        rope = LlamaRotaryEmbedding(CONFIG)
        tables = rope(POSITIONS)
    same_tables(lambda positions: tables)


def test_the_default_dtype_does_not_matter(default_dtype):
    tables = LlamaRotaryEmbedding(CONFIG)(POSITIONS)
    torch.set_default_dtype(torch.float32)
    same_tables(lambda positions: tables)


def test_a_model_from_the_meta_device_has_its_angles():
    with torch.device("meta"):
        rope = LlamaRotaryEmbedding(CONFIG)
    assert not rope.state_dict()
    assert not [*rope.buffers(), *rope.parameters()]
    same_tables(rope)


def test_on_the_meta_device_shapes_come_out():
    cos, sin = LlamaRotaryEmbedding(CONFIG)(POSITIONS.to("meta"))
    assert cos.shape == sin.shape == (7, 32)


def test_int32_positions():
    same_tables(LlamaRotaryEmbedding(CONFIG), POSITIONS.int())


def test_compiled_as_one_graph():
    rope = LlamaRotaryEmbedding(CONFIG)
    same_tables(torch.compile(rope, backend="aot_eager", fullgraph=True))


def test_rows_with_positions_of_their_own():
    """[B, T] positions turn each row as if it stood alone."""
    rope = LlamaRotaryEmbedding(CONFIG)
    positions = torch.stack((torch.arange(5), torch.arange(70_000, 70_005)))
    cos, sin = rope(positions)
    assert cos.shape == sin.shape == (2, 1, 5, 32)
    x = torch.randn(2, 3, 5, 64)
    both = apply_rotary(x, cos, sin)
    for row in range(2):
        alone = apply_rotary(x[row], *rope(positions[row]))
        assert torch.equal(both[row], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_the_rotation_is_rounded_once(dtype):
    """A 16-bit x is turned in float32; only the result is rounded."""
    x = torch.randn(1, 2, 7, 64).to(dtype)
    tables = LlamaRotaryEmbedding(CONFIG)(POSITIONS)
    turned = apply_rotary(x, *tables)
    assert turned.dtype == dtype
    assert torch.equal(turned, apply_rotary(x.float(), *tables).to(dtype))


@pytest.mark.parametrize("head_dim", [2, 64, 80, 128])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling(factor=32.0),
        RopeScaling(4.0, 1.0, 2.5, 64),
        RopeScaling(8.0, 0.5, 4.0, 8192),
    ],
)
def test_frequencies_of_other_shapes(head_dim, scaling):
    """Llama 3.2's factor of 32, odd sizes: transformers' numbers exactly."""
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    if scaling is not None:
        parameters = {**parameters, **vars(scaling), "rope_type": "llama3"}
    theirs = modeling_llama.LlamaRotaryEmbedding(
        TheirConfig(head_dim=head_dim, rope_parameters=parameters)
    )
    ours = inverse_frequencies(
        LlamaConfig(head_dim=head_dim, rope_theta=5e5, rope_scaling=scaling)
    )
    assert torch.equal(ours, theirs.inv_freq)


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
def test_linear_scaling_is_that_of_transformers(factor):
    """deepseek-coder and vicuna-16k divide every position by a factor."""
    scaling = RopeScaling(rope_type="linear", factor=factor)
    config = LlamaConfig(head_dim=128, rope_theta=1e5, rope_scaling=scaling)
    theirs = modeling_llama.LlamaRotaryEmbedding(
        TheirConfig(
            head_dim=128,
            rope_parameters={
                "rope_type": "linear",
                "rope_theta": 1e5,
                "factor": factor,
            },
        )
    )
    assert torch.equal(inverse_frequencies(config), theirs.inv_freq)
    ours = LlamaRotaryEmbedding(config)(POSITIONS)
    for table, other in zip(
        ours, theirs(torch.empty(1), POSITIONS[None]), strict=True
    ):
        assert torch.equal(table, other[0, :, :64])
    # Positions a factor apart meet the angles of the model before it.
    plain = LlamaConfig(head_dim=128, rope_theta=1e5)
    torch.testing.assert_close(
        LlamaRotaryEmbedding(config)(POSITIONS * int(factor)),
        LlamaRotaryEmbedding(plain)(POSITIONS),
        rtol=0,
        atol=2e-2,
    )


def turn_neighbours(x, cos, sin):
    """The paper's layout: pairs are the numbers 2i and 2i + 1."""
    a, b = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
    return pairs.flatten(-2)


def test_both_layouts_give_the_same_scores():
    """Neighbours, moved to the half-split layout, are turned alike."""
    q, k = torch.randn(2, 1, 7, 64).unbind()
    order = torch.cat((torch.arange(0, 64, 2), torch.arange(1, 64, 2)))
    tables = LlamaRotaryEmbedding(CONFIG)(torch.arange(7))
    paper = turn_neighbours(q, *tables)
    ours = apply_rotary(q[..., order], *tables)
    assert torch.equal(paper[..., order], ours)
    score = paper @ turn_neighbours(k, *tables).mT
    same = ours @ apply_rotary(k[..., order], *tables).mT
    torch.testing.assert_close(score, same, rtol=1e-5, atol=1e-4)
    # The converter moves rows of the matrix: row j makes number j.
    weight, x = torch.randn(64, 32), torch.randn(20, 32)
    torch.testing.assert_close((x @ weight.T)[:, order], x @ weight[order].T)


@pytest.mark.parametrize("start, tolerance", [(0, 5e-5), (100_000, 2e-2)])
def test_a_rotation_is_a_product_of_complex_numbers(start, tolerance):
    """In float64; at 100,000 a float32 angle is rounded to steps of 2^-7."""
    x, positions = torch.randn(4, 300, 64), torch.arange(start, start + 300)
    a, b = x.double().chunk(2, -1)
    frequencies = inverse_frequencies(CONFIG).double()
    angle = positions[:, None].double() * frequencies
    z = torch.complex(a, b) * torch.exp(1j * angle)
    slow = torch.cat((z.real, z.imag), -1).float()
    ours = apply_rotary(x, *LlamaRotaryEmbedding(CONFIG)(positions))
    torch.testing.assert_close(ours, slow, rtol=0, atol=tolerance)


def test_the_rotation_is_that_of_transformers():
    q, k = torch.randn(2, 4, 7, 64), torch.randn(2, 2, 7, 64)
    cos, sin = LlamaRotaryEmbedding(CONFIG)(POSITIONS)
    theirs = modeling_llama.apply_rotary_pos_emb(
        q, k, torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
    )
    for x, y in zip((q, k), theirs, strict=True):
        assert torch.equal(apply_rotary(x, cos, sin), y)


def test_only_the_distance_counts_and_lengths_stay():
    rope = LlamaRotaryEmbedding(CONFIG)
    q, k = torch.randn(2, 1, 1, 20, 64).unbind()

    def scores(start):
        tables = rope(torch.arange(start, start + 20))
        return apply_rotary(q, *tables) @ apply_rotary(k, *tables).mT

    for shift, tolerance in ((10, 1e-4), (1_000, 5e-3), (100_000, 5e-1)):
        assert (scores(shift) - scores(0)).abs().max() < tolerance
    turned = apply_rotary(q, *rope(torch.arange(20)))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
