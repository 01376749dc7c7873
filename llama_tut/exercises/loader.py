"""Checkers of chapter 13."""

import numpy as np

from llama_tut.exercises import exercise, expect, wrong, wrong_variants
from llama_tut.loader import feistel, scramble


def walk(n, b, rank, world_size):
    """Batches that fit, counted one by one."""
    at, taken = rank * b, 0
    while at + b + 1 <= n:
        at, taken = at + world_size * b, taken + 1
    return taken


def right_rows(lengths, T, position, rank, W, B, **mistake):
    """A solution, with switches for natural mistakes."""
    spare = mistake.get("spare", 1)  # tokens of a shard that start no row
    stride = T + mistake.get("gap", 0)
    epoch = [
        (shard, row * stride)
        for shard, length in enumerate(lengths)
        for row in range((length - spare) // T)
    ]
    if mistake.get("interleaved"):
        places = [position + rank + W * i for i in range(B)]
    else:
        start = position + mistake.get("reads_as", rank) * B
        places = range(start, start + B)
    return [epoch[place % len(epoch)] for place in places]


@exercise("loader.rows")
def check_rows(answer):
    """Shard and first token of each row of one rank."""
    lengths = (17, 16, 30)  # 4, 3 and 7 rows of 4 inputs
    first = list(map(tuple, answer(lengths, 4, 0, 0, 1, 4)))
    expect(
        first != [(0, 0), (0, 5), (0, 10), (0, 15)],
        "your rows begin T + 1 tokens apart; they share one token, so that no "
        "target is lost: the next one begins T tokens further",
    )
    expect(len(first) == 4, f"B is 4 and you return {len(first)} rows, not 4")
    expect(
        first == [(0, 0), (0, 4), (0, 8), (0, 12)],
        f"17 tokens hold the rows at 0, 4, 8 and 12; you say {first}",
    )
    found = list(map(tuple, answer(lengths, 4, 4, 0, 1, 4)))
    expect(
        found != [(1, 0), (1, 4), (1, 8), (1, 12)],
        "16 tokens have three rows of 4, not four: the last target needs one "
        "token more",
    )
    expect(
        found == [(1, 0), (1, 4), (1, 8), (2, 0)],
        f"after the rows of a shard come those of the next; you say {found}",
    )
    found = list(map(tuple, answer(lengths, 4, 0, 1, 2, 2)))
    expect(
        found != [(0, 0), (0, 4)],
        "all your ranks read the same rows: rank r begins at position + r B",
    )
    expect(
        found != [(0, 4), (0, 12)],
        "your ranks take every W-th row; a rank takes B rows that stand "
        "together",
    )
    expect(
        found == [(0, 8), (0, 12)],
        f"rank 1 of 2 with B = 2 begins at row 2; you say {found}",
    )
    found = list(map(tuple, answer(lengths, 4, 12, 0, 1, 4)))
    expect(
        found == [(2, 20), (2, 24), (0, 0), (0, 4)],
        "after the last row of an epoch comes its first: take the place "
        "modulo the number of rows",
    )


wrong_variants(
    "loader.rows",
    right_rows,
    {
        "rows_without_overlap": (dict(gap=1), "share one token"),
        "rows_without_a_last_target": (
            dict(spare=0),
            "needs one token more",
        ),
        "rows_of_rank_zero": (dict(reads_as=0), "ranks read the same rows"),
        "every_wth_row": (dict(interleaved=True), "stand together"),
    },
)


@wrong("loader.rows", "modulo the number of rows")
def stays_at_the_last(lengths, T, position, rank, W, B):
    total = sum((length - 1) // T for length in lengths)
    position = min(position, total - B)
    return right_rows(lengths, T, position, rank, W, B)


@exercise("loader.own_end")
def check_own_end(answer):
    """Batches that a rank takes if only its own must fit."""
    found = [answer(100_000_000, 32 * 1024, r, 8) for r in range(8)]
    expect(
        found != [381] * 4 + [380] * 4,
        "these are the batches of the old rule, which asks for room for all "
        "ranks: now b + 1 tokens are enough",
    )
    expect(
        len(set(found)) > 1,
        "your ranks all take the same, but rank r begins at token r * b",
    )
    expect(
        found != [381] * 3 + [380] * 5,
        "you return the number of the last batch; they count from 0",
    )
    expect(
        answer(9, 4, 1, 2) == 1 and answer(8, 4, 1, 2) == 0,
        "the last target needs one token more than the b inputs",
    )
    for n in (40, 41, 100):
        for rank in range(4):
            wanted = walk(n, 4, rank, 4)
            expect(
                answer(n, 4, rank, 4) == wanted,
                f"{n} tokens, b = 4, rank {rank} of 4: it takes {wanted}",
            )


@wrong("loader.own_end", "the old rule")
def room_for_all(n, b, rank, world_size):
    return (n - 1 - rank * b) // (world_size * b)


@wrong("loader.own_end", "begins at token r * b")
def no_offset(n, b, rank, world_size):
    return (n - 1 - b) // (world_size * b) + 1


@wrong("loader.own_end", "count from 0")
def number_of_the_last(n, b, rank, world_size):
    return (n - 1 - b - rank * b) // (world_size * b)


@wrong("loader.own_end", "one token more")
def no_target(n, b, rank, world_size):
    return (n - b - rank * b) // (world_size * b) + 1


@exercise("loader.epoch")
def check_epoch(answer):
    """Whole steps in each shard."""
    lengths = [100_000_000] * 98 + [54_000_000]
    found, step = answer(lengths, 262_144), 262_144
    expect(
        found != sum(lengths) // step,
        "your steps cross the ends of shards: each shard has a tail that no "
        "step reads",
    )
    expect(
        found not in (37_642, 37_544),
        "you round up, or to the nearest: a step that a shard cannot fill is "
        "not taken, so round down",
    )
    expect(
        found != 37_719,
        "the last shard is shorter: each shard has its own number of steps",
    )
    expect(found == 37_543, f"{found} for the published runs: it is 37,543")
    expect(
        answer([17, 16], 8) == 3,
        "a shard of 16 tokens has one step of 8, not two: the last input "
        "needs a target behind it",
    )
    expect(answer([9, 8, 30], 8) == 4, "add the whole steps of each shard")


@wrong("loader.epoch", "cross the ends of shards")
def one_long_shard(lengths, step):
    return sum(lengths) // step


@wrong("loader.epoch", "needs a target behind it")
def no_last_target(lengths, step):
    return sum(n // step for n in lengths)


@wrong("loader.epoch", "round down")
def to_the_nearest(lengths, step):
    return sum(round((n - 1) / step) for n in lengths)


@wrong("loader.epoch", "round down")
def rounded_up(lengths, step):
    return sum(-(-(n - 1) // step) for n in lengths)


@wrong("loader.epoch", "the last shard is shorter")
def like_the_first(lengths, step):
    return len(lengths) * ((lengths[0] - 1) // step)


@exercise("loader.undo")
def check_undo(answer):
    """The inverse of a Feistel permutation."""
    x = np.arange(64, dtype=np.uint64)
    keys = np.array([5, 7, 11], dtype=np.uint64)
    one = answer(feistel(x, 3, keys[:1]), 3, keys[:1])
    swapped = (x >> np.uint64(3)) | (x & np.uint64(7)) << np.uint64(3)
    expect(
        not np.array_equal(one, feistel(feistel(x, 3, keys[:1]), 3, keys[:1])),
        "you apply the round once more; undo it: the left half that you get "
        "is the old right half, and names F",
    )
    expect(
        not np.array_equal(one, swapped),
        "one round comes back with its halves exchanged: the old left half "
        "goes to the left",
    )
    expect(np.array_equal(one, x), "one round is not undone")
    expect(
        np.array_equal(answer(feistel(x, 3, keys), 3, keys), x),
        "one round comes back, three do not: the last key is undone first",
    )


@wrong("loader.undo", "apply the round once more")
def forward_again(x, half, keys):
    return feistel(x, half, keys)


@wrong("loader.undo", "the last key is undone first")
def keys_in_order(x, half, keys):
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for key in keys:
        left, right = right ^ (scramble(left ^ key) & mask), left
    return left << bits | right


@wrong("loader.undo", "halves exchanged")
def no_swap(x, half, keys):
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for key in reversed(keys):
        left, right = left, right ^ (scramble(left ^ key) & mask)
    return left << bits | right
