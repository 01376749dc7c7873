"""Checkers of chapter 11."""

import torch

from llama_tut.config import LlamaConfig
from llama_tut.exercises import exercise, expect, expect_close, wrong

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


@exercise("generate.even")
def check_even(answer):
    """Tokens at which the cache weighs as much as the weights."""
    found = answer(SMOLLM2, 134_515_008)
    expect(
        found != 23_353,
        "you count one tensor a layer; keys and values are two",
    )
    expect(
        found != 3_892,
        "you count the query heads; only keys and values are kept, and there "
        "are fewer of their heads",
    )
    expect(found != 350_299, "you count one layer, each has its own cache")
    expect(found == 11_676, f"{found} for SmolLM2: it is 11,676")


@wrong("generate.even", "keys and values are two")
def one_tensor(config, N):
    heads = config.num_hidden_layers * config.num_key_value_heads
    return N // (heads * config.head_dim)


@wrong("generate.even", "count the query heads")
def query_heads(config, N):
    heads = config.num_hidden_layers * config.num_attention_heads
    return N // (2 * heads * config.head_dim)


@wrong("generate.even", "one layer")
def one_layer(config, N):
    return N // (2 * config.num_key_value_heads * config.head_dim)


@exercise("generate.mask")
def check_mask(answer):
    """Causal, aligned at the lower right."""
    one = torch.as_tensor(answer(1, 4))
    expect(
        one.dtype == torch.bool and one.shape == (1, 4),
        "the result must be bool [T, S]",
    )
    expect(
        one[0].tolist() != [True, False, False, False],
        "your triangle is aligned at the upper left: a single query would "
        "read the first key alone",
    )
    expect(
        one[0].tolist() != [True, True, True, False],
        "a token reads itself too",
    )
    expect(one.all(), "a single query behind the cache reads every key")
    two = torch.as_tensor(answer(2, 4)).tolist()
    expect(
        two != [[True] * 4] * 2,
        "the first of two new tokens must not read the second",
    )
    expect(
        two == [[True, True, True, False], [True] * 4],
        "query i stands at position S - T + i and reads keys up to there",
    )
    whole = torch.ones(3, 3).tril().bool()
    expect(
        torch.equal(torch.as_tensor(answer(3, 3)), whole),
        "without a cache it is the triangle of chapter 5",
    )


@wrong("generate.mask", "upper left")
def upper_left(T, S):
    return torch.ones(T, S).tril().bool()


@wrong("generate.mask", "must not read the second")
def everything(T, S):
    return torch.ones(T, S).bool()


@wrong("generate.mask", "reads itself too")
def strict(T, S):
    return torch.arange(S) < torch.arange(S - T, S)[:, None]


@exercise("generate.top_p")
def check_top_p(answer):
    """The fewest likeliest tokens that together reach p."""
    p = torch.tensor([0.15, 0.5, 0.1, 0.25])
    found = torch.as_tensor(answer(p.clone(), 0.7))
    expect(found.shape == p.shape, "the result must be [V], as p is")
    expect(
        found.tolist() != [0.0, 1.0, 0.0, 0.0],
        "0.5 alone does not reach 0.7: the token that crosses the line stays",
    )
    expect(
        not torch.allclose(found, torch.tensor([0, 0.5, 0, 0.25])),
        "what is left must be scaled to sum 1",
    )
    expect(
        not torch.allclose(found, torch.tensor([2, 1, 0, 0]) / 3),
        "the result is in the order of the ranking, not of p",
    )
    expect_close(
        found,
        torch.tensor([0, 2, 0, 1]) / 3,
        "of .15 .5 .1 .25 with p = 0.7 there stay 2/3 and 1/3",
    )
    expect_close(
        answer(p.clone(), 0.4),
        torch.tensor([0.0, 1, 0, 0]),
        "the likeliest token always stays",
    )


@wrong("generate.top_p", "crosses the line")
def up_to_here(p, top_p):
    ranked, order = p.sort(descending=True)
    ranked = ranked * (ranked.cumsum(0) < top_p)
    kept = torch.zeros_like(p).scatter(0, order, ranked)
    return kept / kept.sum()


@wrong("generate.top_p", "sum 1")
def not_scaled(p, top_p):
    ranked, order = p.sort(descending=True)
    ranked = ranked * (ranked.cumsum(0) - ranked < top_p)
    return torch.zeros_like(p).scatter(0, order, ranked)


@wrong("generate.top_p", "order of the ranking")
def left_sorted(p, top_p):
    ranked = p.sort(descending=True).values
    ranked = ranked * (ranked.cumsum(0) - ranked < top_p)
    return ranked / ranked.sum()
