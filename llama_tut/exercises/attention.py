"""Checkers of chapter 5."""

import torch
from torch.nn import functional as F

from llama_tut.attention import attend, causal_mask
from llama_tut.config import LlamaConfig
from llama_tut.exercises import (
    exercise,
    expect,
    expect_close,
    wrong,
    wrong_variants,
)


def by_hand(q, k, v, scale=None, mask="right", repeat="in place", dim=-1):
    """Attention step by step, with one step replaced: for wrong answers."""
    T, S, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if repeat == "in place":
        k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    else:
        k, v = k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    past = causal_mask(T, S)
    if mask == "left":
        past = torch.ones(T, S, dtype=torch.bool).tril()
    if mask == "strict":
        past = past.tril(S - T - 1)
    if mask == "late":
        past = torch.ones(T, S, dtype=torch.bool).tril(S - T + 1)
    if mask == "after":
        return (scores.softmax(dim) * past) @ v
    if mask == "zero":
        return (scores * past).softmax(dim) @ v
    if mask != "none":
        scores = scores.masked_fill(~past, -1e9)
    return scores.softmax(dim) @ v


# What a mistake is called; the mistakes are tried on T = S = 5.
MISTAKES = {
    "none": ({"mask": "none"}, "it reads the future: no mask"),
    "after": (
        {"mask": "after"},
        "mask the scores before the softmax: each "
        "row of weights must add up to 1",
    ),
    "zero": (
        {"mask": "zero"},
        "a masked score must be minus infinity: "
        "exp(0) is 1, which is not nothing",
    ),
    "late": (
        {"mask": "late"},
        "the mask is one step late: a token reads the one after it",
    ),
    "strict": ({"mask": "strict"}, "a token may read itself"),
    "raw": ({"scale": 1.0}, "divide the scores by the square root of C"),
    "by C": ({"scale": 1 / 8}, "divide by the square root of C, not by C"),
    "by D": (
        {"scale": 48**-0.5},
        "divide by the square root of C, the size "
        "of one head, not of all heads",
    ),
    "tiled": (
        {"repeat": "tiled"},
        "neighbouring query heads share a key "
        "head: 0 0 0 1 1 1, not 0 1 0 1 0 1",
    ),
    "dim": ({"dim": -2}, "the softmax runs over the keys, the last axis"),
}


@exercise("attention.attention")
def check_attention(answer):
    """Causal attention with shared keys, against PyTorch's."""
    torch.manual_seed(0)
    q = 2 * torch.randn(2, 6, 5, 8)
    k, v = torch.randn(2, 2, 2, 5, 8)
    alike = answer(q[:, :2].clone(), k.clone(), v.clone())
    expect(torch.is_tensor(alike), "return a tensor, [B, H, T, C]")
    expect(
        alike.shape == (2, 2, 5, 8),
        f"the result must be [B, H, T, C] = [2, 2, 5, 8], "
        f"yours is {list(alike.shape)}",
    )
    found = answer(q.clone(), k.clone(), v.clone())
    expect(
        found.shape == q.shape,
        f"with 6 query heads and 2 key heads the result must be "
        f"[2, 6, 5, 8], yours is {list(found.shape)}",
    )
    for options, hint in MISTAKES.values():
        case = by_hand(q, k, v, **options)
        expect(not torch.allclose(found, case, rtol=1e-4, atol=1e-5), hint)
    expect(
        found.isfinite().all(), "it gives NaN: a row reads nothing, not itself"
    )
    expect_close(found, attend(q, k, v), "it is not PyTorch's result", 1e-4)
    last = answer(q[:, :, -2:].clone(), k.clone(), v.clone())
    expect_close(
        last,
        attend(q[:, :, -2:], k, v),
        "with T = 2 and S = 5 the queries are the last two tokens: the mask "
        "starts at position 3",
        1e-4,
    )


wrong_variants("attention.attention", by_hand, MISTAKES)


@wrong("attention.attention", "the last two tokens")
def mask_on_the_left(q, k, v):
    return by_hand(q, k, v, mask="left")


@wrong("attention.attention", "must be [B, H, T, C]")
def heads_joined(q, k, v):
    return attend(q, k, v).transpose(1, 2).flatten(2)


@wrong("attention.attention", "with 6 query heads and 2 key heads")
def one_head_a_group(q, k, v):
    return attend(q[:, : k.shape[1]], k, v)


@wrong("attention.attention", "not PyTorch's result")
def keys_for_values(q, k, v):
    return F.scaled_dot_product_attention(
        q, k, k, is_causal=True, enable_gqa=True
    )


@exercise("attention.window")
def check_window(answer):
    """The mask of a sliding window."""
    found = answer(6, 6, 3)
    expect(
        torch.is_tensor(found) and found.dtype == torch.bool,
        "the mask must be a tensor of bool, True where a token may read",
    )
    expect(found.shape == (6, 6), "the mask must be [T, S]")
    expect(found.any(-1).all(), "your mask hides a whole row")
    expect(not found.triu(1).any(), "your mask lets a token read the future")
    expect(found.diagonal().all(), "a token may always read itself")
    expect(
        found.sum(-1).tolist() != [1, 2, 3, 4, 4, 4],
        "your window is one too wide: it counts the token itself",
    )
    expect(
        found.sum(-1).tolist() == [1, 2, 3, 3, 3, 3],
        f"with width 3 the rows may read 1, 2, 3, 3, 3, 3 tokens, yours "
        f"{', '.join(str(n) for n in found.sum(-1).tolist())}",
    )
    found = answer(2, 6, 3)
    expect(found.shape == (2, 6), "with T = 2 and S = 6 it must be [2, 6]")
    wanted = torch.zeros(2, 6, dtype=torch.bool)
    wanted[0, 2:5] = wanted[1, 3:6] = True
    expect(
        torch.equal(found, wanted),
        "the queries are the last T of S tokens: query 0 of 2 stands at "
        "position 4 of 6",
    )


@wrong("attention.window", "one too wide")
def too_wide(T, S, width):
    return causal_mask(T, S) & ~causal_mask(T, S).tril(S - T - width - 1)


@wrong("attention.window", "the future")
def both_sides(T, S, width):
    apart = torch.arange(S)[None] - torch.arange(S - T, S)[:, None]
    return apart.abs() < width


@wrong("attention.window", "last T of S")
def from_the_left(T, S, width):
    apart = torch.arange(T)[:, None] - torch.arange(S)[None]
    return (apart >= 0) & (apart < width)


@wrong("attention.window", "hides a whole row")
def not_itself(T, S, width):
    apart = torch.arange(S - T, S)[:, None] - torch.arange(S)[None]
    return (apart > 0) & (apart <= width)


@exercise("attention.tokens")
def check_tokens(answer):
    """How many tokens a cache holds."""
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
    )  # 2 * 5 * 2 * 8 = 160 numbers per token
    found = answer(config, 12_800, 4)
    expect(found != 5, "keys are shared: count key heads, not query heads")
    expect(found != 40, "a token leaves a key and a value")
    expect(found != 100, "every layer keeps keys and values of its own")
    expect(found != 80, "memory is in bytes: a number takes element_size")
    expect(
        found == 20, f"{found} tokens: in 12,800 bytes there is room for 20"
    )
    expect(
        answer(config, 12_799, 4) == 19 and isinstance(found, int),
        "only whole tokens fit: round down",
    )
    llama = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    expect(
        answer(llama, 2**30, 2) == 8192, "Llama 3 8B: 8,192 tokens in 1 GiB"
    )


def numbers(config):
    return (
        config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )


@wrong("attention.tokens", "not query heads")
def query_heads(config, memory, element_size):
    return memory // (
        2 * config.num_hidden_layers * config.hidden_size * element_size
    )


@wrong("attention.tokens", "a key and a value")
def keys_only(config, memory, element_size):
    return memory // (numbers(config) * element_size)


@wrong("attention.tokens", "every layer")
def one_layer(config, memory, element_size):
    one = 2 * config.num_key_value_heads * config.head_dim
    return memory // (one * element_size)


@wrong("attention.tokens", "in bytes")
def numbers_for_bytes(config, memory, element_size):
    return memory // (2 * numbers(config))


@wrong("attention.tokens", "round down")
def rounded(config, memory, element_size):
    return round(memory / (2 * numbers(config) * element_size))


@wrong("attention.tokens", "round down")
def a_fraction(config, memory, element_size):
    return memory / (2 * numbers(config) * element_size)


@wrong("attention.tokens", "round down")
def rounded_up(config, memory, element_size):
    return -(-memory // (2 * numbers(config) * element_size))


@exercise("attention.merge")
def check_merge(answer):
    """Two softmaxes over halves of the keys, put together."""
    torch.manual_seed(0)
    scores, values = 3 * torch.randn(5, 8), torch.randn(8, 4)
    whole = scores.softmax(-1) @ values
    parts = []
    for half in (slice(0, 6), slice(6, 8)):
        parts.append(scores[:, half].softmax(-1) @ values[half])
        parts.append(scores[:, half].logsumexp(-1))
    a, log_a, b, log_b = parts
    found = torch.as_tensor(answer(a, log_a, b, log_b))
    expect(found.shape == (5, 4), "the result must be [T, C]")
    expect(
        not torch.allclose(found, (a + b) / 2, atol=1e-4),
        "the halves do not count alike: one may hold the better keys",
    )
    share = (log_a / (log_a + log_b))[:, None]
    expect(
        not torch.allclose(found, share * a + (1 - share) * b, atol=1e-4),
        "log_a and log_b are logarithms: the shares are those of their "
        "exponentials",
    )
    share = torch.sigmoid(log_b - log_a)[:, None]
    expect(
        not torch.allclose(found, share * a + (1 - share) * b, atol=1e-4),
        "the shares are exchanged: the half with the larger sum counts more",
    )
    total = log_a.exp()[:, None] * a + log_b.exp()[:, None] * b
    expect(
        not torch.allclose(found, total, atol=1e-4),
        "divide by the sum of both sums of exponentials",
    )
    expect_close(found, whole, "it is not the softmax over all keys", 1e-4)
    large = answer(a, log_a + 1000, b, log_b + 1000)
    expect(
        torch.isfinite(torch.as_tensor(large)).all(),
        "exp(1000) is infinite: only the difference of the logarithms counts",
    )
    expect_close(large, whole, "equal shifts must change nothing", 1e-3)


@wrong("attention.merge", "do not count alike")
def plain_mean(out_a, log_a, out_b, log_b):
    return (out_a + out_b) / 2


@wrong("attention.merge", "are logarithms")
def by_logarithms(out_a, log_a, out_b, log_b):
    share = (log_a / (log_a + log_b))[:, None]
    return share * out_a + (1 - share) * out_b


@wrong("attention.merge", "only the difference")
def overflow(out_a, log_a, out_b, log_b):
    a, b = log_a.exp()[:, None], log_b.exp()[:, None]
    return (a * out_a + b * out_b) / (a + b)


@wrong("attention.merge", "divide by the sum")
def not_divided(out_a, log_a, out_b, log_b):
    return log_a.exp()[:, None] * out_a + log_b.exp()[:, None] * out_b


@wrong("attention.merge", "exchanged")
def exchanged(out_a, log_a, out_b, log_b):
    share = torch.sigmoid(log_b - log_a)[:, None]
    return share * out_a + (1 - share) * out_b
