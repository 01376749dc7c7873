"""Checkers of chapter 4."""

import math

import torch

from llama_tut.config import LlamaConfig, RopeScaling
from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.rope import LlamaRotaryEmbedding, apply_rotary


@exercise("rope.theta")
def check_theta(answer):
    """A base for which the slowest pair turns once in so many tokens."""
    for C, tokens in ((64, 8192), (128, 131_072)):
        found = float(answer(C, tokens))
        expect(found > 0, f"theta is {found}, it must be above 0")
        turns = found ** (-(C - 2) / C) * tokens / (2 * math.pi)
        expect(
            not math.isclose(found, tokens / (2 * math.pi), rel_tol=1e-4),
            "the last exponent is (C - 2)/C, not 1: pairs are counted from 0",
        )
        expect(
            not math.isclose(turns, 1 / (2 * math.pi), rel_tol=1e-4),
            "your slowest pair moves by 1 radian: a turn is 2 pi",
        )
        expect(
            not math.isclose(
                found, (tokens / (2 * math.pi)) ** ((C - 2) / C), rel_tol=1e-4
            ),
            "your exponent is upside down: theta^((C - 2)/C) is given, theta "
            "is asked for",
        )
        expect(
            math.isclose(turns, 1, rel_tol=1e-4),
            f"with C {C} your slowest pair makes {turns:.4g} turns in "
            f"{tokens:,} tokens, not 1",
        )


@wrong("rope.theta", "not 1: pairs are counted")
def last_exponent_one(C, tokens):
    return tokens / (2 * math.pi)


@wrong("rope.theta", "a turn is 2 pi")
def radians_for_turns(C, tokens):
    return tokens ** (C / (C - 2))


@wrong("rope.theta", "upside down")
def exponent_upside_down(C, tokens):
    return (tokens / (2 * math.pi)) ** ((C - 2) / C)


def interleaved(weight, heads):
    """Rows of each head from neighbours to half-split, one by one."""
    C = len(weight) // heads
    order = [*range(0, C, 2), *range(1, C, 2)]
    return torch.cat([head[order] for head in weight.split(C)])


@exercise("rope.half_split")
def check_half_split(answer):
    """The rows of a query matrix, from pairs of neighbours to half-split."""
    weight = torch.arange(16.0)[:, None] * torch.ones(3)
    found = torch.as_tensor(answer(weight, 2))
    right = interleaved(weight, 2)
    expect(
        found.shape == right.shape,
        f"the result has shape {list(found.shape)}, not {list(right.shape)}",
    )
    expect(
        bool((found[:8] < 8).all()),
        "rows leave their head: move them within the C rows of each",
    )
    back = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    expect(
        not torch.equal(found[:8], weight[back]),
        "that is the way back, from half-split to neighbours",
    )
    expect(
        not torch.equal(found, weight),
        "no row has moved, yours reads 0 1 2 3 4 5 6 7",
    )
    expect_close(
        found,
        right,
        "the first head of 8 rows must read 0 2 4 6 1 3 5 7; yours reads "
        + " ".join(f"{row[0]:.0f}" for row in found[:8]),
    )


@wrong("rope.half_split", "rows leave their head")
def whole_matrix(weight, heads):
    return torch.cat((weight[0::2], weight[1::2]))


@wrong("rope.half_split", "the way back")
def way_back(weight, heads):
    halves = weight.view(heads, 2, len(weight) // heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


@wrong("rope.half_split", "no row has moved")
def nothing_moved(weight, heads):
    return weight


def count(config, frequencies=None, tokens=None, turn=2 * math.pi):
    """Pairs that stay, blend, are slowed; the options plant mistakes."""
    s, C = config.rope_scaling, config.head_dim
    if frequencies is None:
        frequencies = config.rope_theta ** -(torch.arange(0, C, 2) / C)
    tokens = tokens or s.original_max_position_embeddings
    turns = frequencies * tokens / turn
    stay = int((turns >= s.high_freq_factor).sum())
    slowed = int((turns <= s.low_freq_factor).sum())
    return stay, C // 2 - stay - slowed, slowed


def stretched(C, factor):
    """The config of a stretched Llama with heads of C numbers."""
    return LlamaConfig(
        hidden_size=4 * C,
        num_attention_heads=4,
        rope_theta=5e5,
        rope_scaling=RopeScaling(factor=factor),
        max_position_embeddings=131_072,
    )


def slowed_already(config):
    rope = LlamaRotaryEmbedding(config)
    cos, sin = rope(torch.tensor([1]))
    return count(config, torch.atan2(sin, cos)[0])


def in_radians(config):
    return count(config, turn=1)


def in_the_long_context(config):
    return count(config, tokens=config.max_position_embeddings)


@exercise("rope.pairs")
def check_pairs(answer):
    """How many pairs of a stretched model stay, blend and are slowed?"""
    for config in (stretched(128, 8.0), stretched(64, 32.0)):
        found = tuple(int(n) for n in answer(config))
        half = config.head_dim // 2
        expect(
            sum(found) == half,
            f"{found} are {sum(found)} pairs; {config.head_dim} numbers "
            f"make {half}",
        )
        expect(
            found != slowed_already(config),
            "you counted with the slowed speeds: the turns are those of the "
            "model before it was stretched",
        )
        expect(
            found != in_radians(config),
            "you counted radians: a turn is 2 pi of them",
        )
        expect(
            found != in_the_long_context(config),
            "the turns are counted in the original context, "
            "rope_scaling.original_max_position_embeddings",
        )
        right = count(config)
        expect(
            found == right or found != right[::-1],
            "the order is: stay, blend, slowed",
        )
        expect(
            found == right,
            f"{found} with C {config.head_dim}: 4 turns or more stay, "
            "1 turn or fewer are slowed",
        )


wrong("rope.pairs", "the slowed speeds")(slowed_already)
wrong("rope.pairs", "a turn is 2 pi")(in_radians)
wrong("rope.pairs", "in the original context")(in_the_long_context)


@exercise("rope.move")
def check_move(answer):
    """Keys that are turned already, moved by some positions."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    rope = LlamaRotaryEmbedding(config)
    k = torch.randn(2, 3, 5, 16)

    def at(start):
        return apply_rotary(k, *rope(torch.arange(start, start + 5)))

    for steps in (40, -100):
        found = torch.as_tensor(answer(at(150), steps, config))
        anew = apply_rotary(at(150), *rope(torch.arange(5) + steps))
        expect(
            found.shape != anew.shape or not torch.allclose(found, anew),
            "you turn each key by a position of its own, but they are "
            "turned already: all of them need the same further turn",
        )
        expect(
            found.shape != k.shape or not torch.allclose(found, at(150)),
            "the keys have not moved",
        )
        expect(
            steps > 0 or not torch.allclose(found, at(250), atol=1e-3),
            "a negative number of steps must turn the other way",
        )
        expect(
            steps < 0 or not torch.allclose(found, at(150 - steps), atol=1e-3),
            "your keys go back where they must go on: the angle has the "
            "wrong sign",
        )
        expect_close(
            found,
            at(150 + steps),
            f"moved by {steps}, the keys are not those of the new positions",
            1e-3,
        )


@wrong("rope.move", "turned already")
def turned_anew(k, steps, config):
    positions = torch.arange(k.shape[2]) + steps
    return apply_rotary(k, *LlamaRotaryEmbedding(config)(positions))


@wrong("rope.move", "turn the other way")
def forward_only(k, steps, config):
    tables = LlamaRotaryEmbedding(config)(torch.tensor([abs(steps)]))
    return apply_rotary(k, *tables)


@wrong("rope.move", "the wrong sign")
def backward(k, steps, config):
    cos, sin = LlamaRotaryEmbedding(config)(torch.tensor([steps]))
    return apply_rotary(k, cos, -sin)
