"""Checkers of chapter 19."""

import torch
from torch.nn import functional as F

from llama_tut.exercises import exercise, expect, expect_close, wrong


def a_text(scale=1.0):
    """hidden [20, 8], weight [50, 8], targets [20]."""
    torch.manual_seed(0)
    hidden, weight = scale * torch.randn(20, 8), torch.randn(50, 8)
    return hidden, weight, torch.randint(0, 50, (20,))


@exercise("fast_training.loss")
def check_loss(answer):
    """The loss by tiles of the vocabulary."""
    hidden, weight, targets = a_text()
    wanted = F.cross_entropy(hidden @ weight.T, targets)
    found = torch.as_tensor(answer(hidden, weight, targets, 10))
    expect(found.numel() == 1, "give one number: the mean over all rows")
    hints = {
        summed: "the mean over the rows, not the sum",
        last_tile_only: "the normaliser must hold all tiles, not the last one",
        sum_of_logarithms: "add the exponentials of the tiles, not their "
        "logarithms",
        by_tile: "the normaliser of a row runs over all words, not over the "
        "tile of its target",
        without_target: "subtract the logit of the target",
    }
    for case, hint in hints.items():
        value = case(hidden, weight, targets, 10)
        expect(not torch.allclose(found, value, rtol=1e-4), hint)
    expect_close(found, wanted, f"it must be {wanted:.4f}", 1e-4)
    uneven = answer(hidden, weight, targets, 16)
    expect_close(
        uneven, wanted, "50 words in tiles of 16: the last tile has 2", 1e-4
    )
    hidden, weight, targets = a_text(100)
    wanted = F.cross_entropy(hidden @ weight.T, targets)
    found = torch.as_tensor(answer(hidden, weight, targets, 10))
    expect(
        found.isfinite().all(),
        "logits of some hundred overflow exp: use logsumexp and logaddexp",
    )
    expect_close(found, wanted, "large logits lose the smaller tiles", 1e-4)


def parts(hidden, weight, targets, words):
    """Normalisers [tiles, N] and the targets' logits [N]."""
    tiles = [(hidden @ w.T).logsumexp(-1) for w in weight.split(words)]
    return torch.stack(tiles), (hidden * weight[targets]).sum(-1)


@wrong("fast_training.loss", "not the sum")
def summed(hidden, weight, targets, words):
    tiles, own = parts(hidden, weight, targets, words)
    return (tiles.logsumexp(0) - own).sum()


@wrong("fast_training.loss", "not the last one")
def last_tile_only(hidden, weight, targets, words):
    tiles, own = parts(hidden, weight, targets, words)
    return (tiles[-1] - own).mean()


@wrong("fast_training.loss", "not their logarithms")
def sum_of_logarithms(hidden, weight, targets, words):
    tiles, own = parts(hidden, weight, targets, words)
    return (tiles.sum(0) - own).mean()


@wrong("fast_training.loss", "not over the tile")
def by_tile(hidden, weight, targets, words):
    tiles, own = parts(hidden, weight, targets, words)
    rows = torch.arange(len(targets))
    return (tiles[targets // words, rows] - own).mean()


@wrong("fast_training.loss", "subtract the logit")
def without_target(hidden, weight, targets, words):
    return parts(hidden, weight, targets, words)[0].logsumexp(0).mean()


@wrong("fast_training.loss", "overflow")
def plain_exponentials(hidden, weight, targets, words):
    tiles = weight.split(words)
    total = sum((hidden @ w.T).exp().sum(-1) for w in tiles)
    return (total.log() - (hidden * weight[targets]).sum(-1)).mean()


@wrong("fast_training.loss", "the last tile has 2")
def whole_tiles_only(hidden, weight, targets, words):
    whole = weight[: len(weight) // words * words]
    tiles, _ = parts(hidden, whole, targets * 0, words)
    return (tiles.logsumexp(0) - (hidden * weight[targets]).sum(-1)).mean()


@exercise("fast_training.computed")
def check_computed(answer):
    """The share of the causal table that blocks compute."""
    found = answer(1024, 128)
    expect(
        abs(found - 0.5) > 1e-9,
        "half of the table is needed, but a block computes up to its end",
    )
    expect(
        abs(found - 7 / 16) > 1e-9,
        "a block needs its own keys too, not only those before it",
    )
    expect(abs(found - 1) > 1e-9, "a block stops at its own last query")
    expect(
        found <= 1, "a share of the table: divide by T * T, not by the rows"
    )
    expect_close(found, 9 / 16, "eight blocks compute 9/16 of the table")
    uneven = (64 * 64 + 36 * 100) / 100**2
    found = answer(100, 64)
    expect(
        abs(found - 0.75) > 1e-9,
        "the last block may be shorter: 100 tokens are 64 and 36 queries",
    )
    expect_close(found, uneven, "100 tokens in blocks of 64: 0.7696")
    expect_close(answer(20, 32), 1.0, "one block computes the whole table")


@wrong("fast_training.computed", "up to its end")
def one_half(T, size):
    return 0.5


@wrong("fast_training.computed", "its own keys too")
def keys_before(T, size):
    return sum(size * start for start in range(0, T, size)) / T**2


@wrong("fast_training.computed", "may be shorter")
def formula(T, size):
    n = -(-T // size)
    return (n + 1) / (2 * n)


@wrong("fast_training.computed", "divide by T * T")
def numbers(T, size):
    return sum(size * end for end in range(size, T + 1, size))


@exercise("fast_training.products")
def check_products(answer):
    """Products with the head: 3, and one more for all tiles but the last."""
    found = answer(50_304, 16_384)
    expect(
        abs(found - 4) > 1e-9, "the last tile of the first pass is still there"
    )
    expect(
        abs(found - 3.75) > 1e-9,
        "these tiles are not equal: the last one has 1,152 words",
    )
    expect(
        abs(found - (3 + 1152 / 50_304)) > 1e-9,
        "the last tile is the one that is *not* made again",
    )
    expect(
        abs(found - (found // 1)) > 1e-9 or found > 4,
        "a narrow tile costs a part of a product: count words, not tiles",
    )
    expect_close(found, 3 + 49_152 / 50_304, "V 50,304 in 16,384: 3.977", 1e-9)
    found = answer(4096, 4096)
    expect(abs(found - 4) > 1e-9, "one tile is the last one: 3 products")
    expect_close(found, 3.0, "one tile: 3 products", 1e-9)
    expect_close(answer(8192, 4096), 3.5, "two equal tiles: 3.5", 1e-9)
    expect_close(
        answer(1000, 4096), 3.0, "a tile wider than V is one tile", 1e-9
    )


@wrong("fast_training.products", "still there")
def all_again(V, words):
    return 4.0


@wrong("fast_training.products", "not equal")
def equal_tiles(V, words):
    n = -(-V // words)
    return 3 + (n - 1) / n


@wrong("fast_training.products", "*not* made again")
def last_again(V, words):
    return 3 + (V % words or min(V, words)) / V


@wrong("fast_training.products", "one tile is the last one")
def remainder_zero(V, words):
    return 3 + (V - V % words) / V
