"""RoPE where chapter 4 does not look: casts, devices, compile, 2-D positions."""

from types import SimpleNamespace

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
    scaling = SimpleNamespace(rope_type="linear", factor=factor)
    config = SimpleNamespace(
        head_dim=128, rope_theta=1e5, rope_scaling=scaling
    )
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
    plain = SimpleNamespace(head_dim=128, rope_theta=1e5, rope_scaling=None)
    torch.testing.assert_close(
        LlamaRotaryEmbedding(config)(POSITIONS * int(factor)),
        LlamaRotaryEmbedding(plain)(POSITIONS),
        rtol=0,
        atol=2e-2,
    )
