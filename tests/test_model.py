"""The whole model: initialisation, the seams, embeddings from outside, its cost."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llama_tut.config import LlamaConfig
from llama_tut.model import (
    LlamaForCausalLM,
    flops_per_token,
    next_token_loss,
    parameter_count,
)

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("std", [None, 0.02])
@pytest.mark.parametrize("tied", [False, True])
def test_initialisation(tied, std):
    """N(0, std^2); the two matrices that write divided by sqrt(2L); gains 1.

    By name, since depth scaling on `up_proj` in place of `down_proj` gives
    the same products (chapter 8).
    """
    config = LlamaConfig(
        **SIZES, tie_word_embeddings=tied, initializer_range=std
    )
    std = std or 0.5 / 64**0.5
    for name, p in LlamaForCausalLM(config).named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = std / 4 if writes else std  # sqrt(2 * 8) = 4
        assert abs(p.std() / expected - 1) < 4 / p.numel() ** 0.5, name
        assert abs(p.mean() / expected) < 5 / p.numel() ** 0.5, name
        # A normal distribution has 4.6 % beyond two standard deviations.
        tail = (p.abs() > 2 * expected).float().mean()
        assert abs(tail - 0.0455) < 0.012, name


def test_a_generator_makes_it_repeatable():
    one, other = (LlamaForCausalLM(LlamaConfig(**SIZES)) for _ in "ab")
    first = one.model.layers[0].mlp.up_proj.weight.clone()
    one.init_weights(torch.Generator().manual_seed(5))
    other.init_weights(torch.Generator().manual_seed(5))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first, one.model.layers[0].mlp.up_proj.weight)


def test_built_without_memory_then_filled():
    """Built on meta, given memory, drawn: the way of large models."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(5))
    usual = LlamaForCausalLM(LlamaConfig(**SIZES))
    usual.init_weights(torch.Generator().manual_seed(5))
    for a, b in zip(model.parameters(), usual.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loss_of_a_text():
    """The mean of -log p over the targets that count, in float32."""
    hidden, weight = torch.randn(2, 5, 64), torch.randn(1000, 64)
    targets = torch.randint(0, 1000, (2, 5))
    targets[0, :3] = -100
    p = (hidden @ weight.T).softmax(-1)
    own = p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = -own.log()[targets != -100].mean()
    torch.testing.assert_close(
        next_token_loss(hidden, weight, targets), expected
    )
    half = next_token_loss(hidden.bfloat16(), weight.bfloat16(), targets)
    assert half.dtype == torch.float32


def test_an_instance_may_compute_the_loss_by_another_function():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    other = LlamaForCausalLM(LlamaConfig(**SIZES))
    seen = {}

    def loss(hidden, weight, targets):
        seen.update(hidden=hidden, weight=weight, targets=targets)
        return hidden.sum() * 0

    model.compute_loss = loss
    ids = torch.randint(0, 1000, (2, 7))
    assert model(ids[:, :-1], targets=ids[:, 1:]) == 0
    assert seen["hidden"].shape == (2, 6, 64)
    assert seen["weight"] is model.output_weight
    assert other(ids[:, :-1], targets=ids[:, 1:]) > 1


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_from_outside(tied):
    """Vectors in place of ids: the same logits, and gradients reach them."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 1000, (2, 7))
    vectors = model.model.embed_tokens(ids).detach().requires_grad_()
    torch.testing.assert_close(model(inputs_embeds=vectors), model(ids))
    model(inputs_embeds=vectors, targets=ids).backward()
    assert (vectors.grad != 0).any(-1).all()


@pytest.mark.parametrize("T", [1, 32, 300])
def test_flops_of_plain_attention(T):
    """PyTorch's counter agrees with the formula: forward, and training.

    The counter does not know the fused kernel for CPUs: MATH is two products.
    """
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    ids = torch.randint(0, 1000, (2, T + 1))
    for training in (False, True):
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter:
            if training:
                model(ids[:, :-1], targets=ids[:, 1:]).backward()
            else:
                model(ids[:, :-1])
        expected = model.flops_per_token(T, training=training)
        assert expected == flops_per_token(model.config, T, training)
        assert counter.get_total_flops() == 2 * T * expected


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count(tied):
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    counted = sum(p.numel() for p in model.parameters())
    assert parameter_count(config) == counted
    tables = (1 if tied else 2) * 1000 * 64
    assert parameter_count(config, embeddings=False) == counted - tables


def test_compiled_as_one_graph():
    torch._dynamo.reset()
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.randint(0, 1000, (2, 9))
    loss = model(ids[:, :-1], targets=ids[:, 1:])
    torch.testing.assert_close(compiled(ids[:, :-1], targets=ids[:, 1:]), loss)
    torch.testing.assert_close(
        F.cross_entropy(
            model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
        ),
        loss,
    )
