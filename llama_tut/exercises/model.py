"""Checkers of chapter 8."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.config import LlamaConfig
from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.model import LlamaForCausalLM, flops_per_token, parameter_count

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def stream_of(body, ids, start=0):
    """The body step by step, without the last norm."""
    x = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(torch.arange(start, start + ids.shape[1]))
    for layer in body.layers:
        x = layer(x, cos, sin)
    return x


@exercise("model.loss")
@torch.no_grad()
def check_loss(answer):
    """The loss of a whole model, step by step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config)
    nn.init.uniform_(model.model.norm.weight, 0.5, 1.5)
    body, weight = model.model, model.output_weight
    ids = torch.randint(0, 50, (2, 9))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    all_count = answer(body, weight, inputs, targets.clone())
    expect(
        torch.as_tensor(all_count).numel() == 1,
        "give one number: the mean over all positions",
    )
    cases = {
        no_final_norm: "the head reads the stream through the last norm",
        summed: "the mean over the positions, not the sum",
        shifted_again: "the targets are already shifted",
        by_two: "the natural logarithm",
        first_block_only: "the stream runs through every block",
        no_logarithm: "the loss is minus the *logarithm* of the probability",
        wrong_sign: "minus the logarithm: a loss is positive",
        over_time: "the softmax runs over the vocabulary, the last axis",
    }
    for case, hint in cases.items():
        value = case(body, weight, inputs, targets)
        expect(abs(float(all_count) - float(value)) > 1e-4, hint)
    wanted = model(inputs, targets=targets)
    expect_close(all_count, wanted, f"it must be {wanted:.4f}", 1e-4)
    targets[0, 2:6] = -100
    found = answer(body, weight, inputs, targets.clone())
    wanted = model(inputs, targets=targets)
    expect(
        abs(float(found) - float(wanted) * 12 / 16) > 1e-4,
        "divide by the number of targets that count",
    )
    expect_close(found, wanted, "a target of -100 does not count", 1e-4)


def losses(stream, weight, targets):
    """Loss of each position from the normed stream."""
    logits = (stream @ weight.T).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), reduction="none")


@wrong("model.loss", "the last norm")
def no_final_norm(body, weight, ids, targets):
    return losses(stream_of(body, ids), weight, targets).mean()


@wrong("model.loss", "not the sum")
def summed(body, weight, ids, targets):
    return losses(body(ids), weight, targets).sum()


@wrong("model.loss", "already shifted")
def shifted_again(body, weight, ids, targets):
    return losses(body(ids)[:, :-1], weight, targets[:, 1:]).mean()


@wrong("model.loss", "natural logarithm")
def by_two(body, weight, ids, targets):
    return losses(body(ids), weight, targets).mean() / math.log(2)


@wrong("model.loss", "every block")
def first_block_only(body, weight, ids, targets):
    x = body.embed_tokens(ids)
    x = body.layers[0](x, *body.rotary_emb(torch.arange(ids.shape[1])))
    return losses(body.norm(x), weight, targets).mean()


@wrong("model.loss", "*logarithm*")
def no_logarithm(body, weight, ids, targets):
    return 1 - (-losses(body(ids), weight, targets)).exp().mean()


@wrong("model.loss", "is positive")
def wrong_sign(body, weight, ids, targets):
    return -losses(body(ids), weight, targets).mean()


@wrong("model.loss", "the last axis")
def over_time(body, weight, ids, targets):
    log_p = (body(ids) @ weight.T).log_softmax(1)
    return -log_p.gather(-1, targets.clamp(min=0)[..., None]).mean()


@wrong("model.loss", "number of targets that count")
def divided_by_all(body, weight, ids, targets):
    return losses(body(ids), weight, targets).sum() / targets.numel()


@wrong("model.loss", "does not count")
def pads_are_token_0(body, weight, ids, targets):
    return losses(body(ids), weight, targets.clamp(min=0)).mean()


@wrong("model.loss", "one number")
def each_position(body, weight, ids, targets):
    return losses(body(ids), weight, targets)


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
            num_hidden_layers=5,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
        found, wanted = answer(config), right(config)
        for hint, mistake in SLIPS.items():
            value = mistake(config)
            same = abs(found / value - 1) < 1e-9
            expect(not same or abs(value / wanted - 1) < 1e-9, hint)
        expect(
            abs(found / wanted - 1) < 1e-3,
            f"{found:.0f} tokens, it is {wanted:.0f} for the config of the "
            f"check (tied: {tied}). Set 2N = 4LTHC, with N all matrices "
            "and the head, and solve for T",
        )
    expect(round(answer(SMOLLM2)) == 3891, "for SmolLM2 it is 3,891")


def a_token(config):
    """FLOPs of attention's two products for each token that is read."""
    heads = config.num_attention_heads * config.head_dim
    return 4 * config.num_hidden_layers * heads


def right(config):
    return flops_per_token(config, 0, training=False) / a_token(config)


def gains(config):
    return (2 * config.num_hidden_layers + 1) * config.hidden_size


def without_head(config):
    matrices = parameter_count(config, embeddings=False) - gains(config)
    return 2 * matrices / a_token(config)


# A hint, and the mistake that it is for.
SLIPS = {
    "the width of attention is H * C, and there are L layers of it: "
    "4LTHC": lambda c: right(c) * c.num_hidden_layers,
    "there are H heads of C numbers each": lambda c: (
        right(c) * c.num_attention_heads
    ),
    "it is the other way round: N over attention's FLOPs for one "
    "token": lambda c: 1 / right(c),
    "2N = 4LTHC: a weight takes two FLOPs, a product and a sum": lambda c: (
        right(c) / 2
    ),
    "attention has two products: scores and weighted sums": lambda c: (
        2 * right(c)
    ),
    "backward triples both: it cancels": lambda c: 3 * right(c),
    "the head is a product, tied or not": without_head,
    "gains of norms are no matrices": lambda c: (
        right(c) + 2 * gains(c) / a_token(c)
    ),
    "the table of embeddings is looked up, that takes no FLOPs": lambda c: (
        2 * (parameter_count(c) - gains(c)) / a_token(c)
    ),
}
for hint, mistake in SLIPS.items():
    wrong("model.half_attention", hint)(mistake)
