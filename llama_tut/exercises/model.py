"""Checkers of chapter 8."""

import math

import torch

from llama_tut.config import LlamaConfig
from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.model import flops_per_token, parameter_count


@exercise("model.targets")
def check_targets(answer):
    """Inputs and shifted targets of padded texts."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 7, 6, 0, 0]])
    found = answer(ids.clone(), 0)
    expect(
        isinstance(found, tuple | list) and len(found) == 2,
        "return two tensors: inputs, targets",
    )
    inputs, targets = found
    expect(
        inputs.shape == targets.shape == (2, 4),
        "both have T - 1 tokens: the last token has no successor",
    )
    expect(
        not torch.equal(inputs[0], targets[0]),
        "the targets are not shifted: each token would have to say itself",
    )
    expect(
        not torch.equal(inputs[0], ids[0, 1:]),
        "you shift the wrong way: the model would predict the past",
    )
    expect(
        torch.equal(inputs[0], ids[0, :4]),
        "the inputs are the ids without the last token",
    )
    expect(not (targets == 0).any(), "padding still counts as a target")
    expect(
        targets[1, 1] == 6,
        "mask by the target, not by the input: the last real token is a "
        "target too",
    )
    wanted = torch.tensor([[6, 7, 8, 9], [7, 6, -100, -100]])
    expect_close(targets, wanted, f"the targets must be {wanted.tolist()}")
    expect(not (inputs < 0).any(), "-100 is no token: the inputs keep theirs")


@wrong("model.targets", "not shifted")
def not_shifted(ids, pad):
    return ids[:, :-1], ids[:, :-1]


@wrong("model.targets", "the wrong way")
def backwards(ids, pad):
    return ids[:, 1:], ids[:, :-1]


@wrong("model.targets", "padding still counts")
def with_padding(ids, pad):
    return ids[:, :-1], ids[:, 1:]


@wrong("model.targets", "the inputs keep theirs")
def masked_first(ids, pad):
    ids = ids.masked_fill(ids == pad, -100)
    return ids[:, :-1], ids[:, 1:]


@exercise("model.first_loss")
def check_first_loss(answer):
    """ln V + D sigma^2 / 2."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=400, initializer_range=0.1
    )
    base, found = math.log(1000), answer(config)
    expect(
        abs(found - base) > 1e-6,
        "random logits are worse than none: ln V is not all",
    )
    expect(abs(found - base - 4) > 1e-6, "half of the variance, not all of it")
    expect(
        abs(found - base - 20) > 1e-6,
        "the variance of a weight is the square of initializer_range",
    )
    expect(
        abs(found - math.log2(1000) - 2) > 1e-6,
        "nats: the natural logarithm of V",
    )
    expect_close(float(found), base + 2, "compare with ln V + D * sigma^2 / 2")


@wrong("model.first_loss", "worse than none")
def rule_of_thumb(config):
    return math.log(config.vocab_size)


@wrong("model.first_loss", "half of the variance")
def not_halved(config):
    variance = config.hidden_size * config.initializer_range**2
    return math.log(config.vocab_size) + variance


@wrong("model.first_loss", "the square")
def not_squared(config):
    half = config.hidden_size * config.initializer_range / 2
    return math.log(config.vocab_size) + half


@exercise("model.half_attention")
def check_half_attention(answer):
    """T at which the table of weights costs as much as the matrices."""
    for tied in (True, False):
        config = LlamaConfig(
            vocab_size=5000,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
        found, wanted = answer(config), right(config)
        hints = {
            2 * wanted: "attention has two products: scores and weighted sums",
            3 * wanted: "backward triples both: it cancels",
            without_head(config): "the head is a product, tied or not",
            with_gains(config): "gains of norms are no matrices",
            all_parameters(config): "the table of embeddings is looked up, "
            "that takes no FLOPs",
        }
        for value, hint in hints.items():
            same = abs(found / value - 1) < 1e-9
            expect(not same or abs(value / wanted - 1) < 1e-9, hint)
        expect(
            abs(found / wanted - 1) < 1e-3,
            f"{found:.0f} tokens, it is {wanted:.0f} for the config of the "
            f"check (tied: {tied})",
        )
    smol = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    expect(round(answer(smol)) == 3891, "for SmolLM2 it is 3,891")


def a_token(config):
    """FLOPs of attention's two products for each token that is read."""
    heads = config.num_attention_heads * config.head_dim
    return 4 * config.num_hidden_layers * heads


def right(config):
    return flops_per_token(config, 0, training=False) / a_token(config)


@wrong("model.half_attention", "tied or not")
def without_head(config):
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    matrices = parameter_count(config, embeddings=False) - norms
    return 2 * matrices / a_token(config)


@wrong("model.half_attention", "looked up")
def all_parameters(config):
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return 2 * (parameter_count(config) - norms) / a_token(config)


@wrong("model.half_attention", "two products")
def scores_only(config):
    return 2 * right(config)


@wrong("model.half_attention", "no matrices")
def with_gains(config):
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return right(config) + 2 * norms / a_token(config)
