"""Checkers of chapter 4."""

import math

import torch

from llama_tut.config import LlamaConfig, RopeScaling
from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.rope import LlamaRotaryEmbedding, apply_rotary


@exercise("rope.rotary")
def check_rotary(answer):
    """The rotation itself, in the half-split layout."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4)
    cos, sin = LlamaRotaryEmbedding(config)(torch.arange(6))
    x = torch.randn(2, 3, 6, 8)
    found = torch.as_tensor(answer(x, cos, sin))
    right = apply_rotary(x, cos, sin)
    expect(
        found.shape == x.shape,
        f"the result has shape {list(found.shape)}, it must be "
        f"{list(x.shape)}: join the two halves along the last axis",
    )

    def refuse(other, hint):
        expect(not torch.allclose(found, other, atol=1e-4), hint)

    a, b = x.chunk(2, -1)
    refuse(x, "nothing has been turned")
    refuse(
        apply_rotary(x, cos, -sin),
        "you turn the other way: a' = a cos - b sin, b' = b cos + a sin",
    )
    refuse(
        torch.cat((a * cos + b * sin, b * cos + a * sin), -1),
        "one of the two sines must be subtracted: a' = a cos - b sin",
    )
    first = a * cos - b * sin
    refuse(
        torch.cat((first, b * cos + first * sin), -1),
        "the second half is made from the first one after it was turned: both "
        "need the old numbers",
    )
    even, odd = x[..., 0::2], x[..., 1::2]
    e, o = even * cos - odd * sin, odd * cos + even * sin
    for joined in (torch.stack((e, o), -1).flatten(-2), torch.cat((e, o), -1)):
        refuse(
            joined,
            "you turn pairs of neighbours: here number i and number i + C/2 "
            "form a pair",
        )
    refuse(
        torch.stack((first, b * cos + a * sin), -1).flatten(-2),
        "the pairs are right, but the result mixes the layouts: first all a', "
        "then all b'",
    )
    lengths = found.norm(dim=-1)
    expect_close(
        lengths, x.norm(dim=-1), "a rotation keeps every vector's length", 1e-4
    )
    expect_close(found, right, "compare with the formula, pair by pair", 1e-4)
    found = torch.as_tensor(answer(x.bfloat16(), cos, sin))
    expect(
        found.dtype == torch.bfloat16,
        f"a bfloat16 x gives {found.dtype}: cast the result back",
    )
    expect(
        torch.equal(found, apply_rotary(x.bfloat16(), cos, sin)),
        "in bfloat16 the bits differ: multiply with the float32 tables, and "
        "round once, at the end",
    )


@wrong("rope.rotary", "the other way")
def other_way(x, cos, sin):
    return apply_rotary(x, cos, -sin)


@wrong("rope.rotary", "must be subtracted")
def both_added(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos + a * sin), -1)


@wrong("rope.rotary", "pairs of neighbours")
def neighbours(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


@wrong("rope.rotary", "mixes the layouts")
def mixed_layouts(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


@wrong("rope.rotary", "need the old numbers")
def in_place(x, cos, sin):
    a, b = x.chunk(2, -1)
    a = a * cos - b * sin
    b = b * cos + a * sin
    return torch.cat((a, b), -1)


@wrong("rope.rotary", "cast the result back")
def not_cast_back(x, cos, sin):
    return apply_rotary(x.float(), cos, sin)


@wrong("rope.rotary", "round once")
def tables_rounded(x, cos, sin):
    return apply_rotary(x, cos.to(x.dtype), sin.to(x.dtype))


@wrong("rope.rotary", "along the last axis")
def one_half(x, cos, sin):
    a, b = x.chunk(2, -1)
    return a * cos - b * sin


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


def scaled(C, factor):
    """The config of a scaled Llama with heads of C numbers."""
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
    """How many pairs of a scaled model stay, blend and are slowed?"""
    for config in (scaled(128, 8.0), scaled(64, 32.0)):
        found = tuple(int(n) for n in answer(config))
        half = config.head_dim // 2
        expect(
            sum(found) == half,
            f"{found} are {sum(found)} pairs; {config.head_dim} numbers "
            f"make {half}",
        )
        expect(
            found != slowed_already(config),
            "you counted with the slowed frequencies: the turns are those of "
            "the model before it was scaled",
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


wrong("rope.pairs", "the slowed frequencies")(slowed_already)
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
