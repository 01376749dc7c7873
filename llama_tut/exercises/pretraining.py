"""Checkers of chapter 18."""

from llama_tut.exercises import exercise, expect, wrong


@exercise("pretraining.fit")
def check_fit(answer):
    """The largest micro batch that fits and can be shared out."""
    # 512 rows a step; 20 fit
    rows = dict(free=20_999, row=1000, tokens=512 * 64, T=64)
    found = answer(**rows, world_size=1)
    expect(found * 1000 <= 20_999, f"{found} rows do not fit")
    expect(found != 20, "20 rows fit, but 512 are no multiple of 20")
    expect(found == 16, f"{found}: of 512 rows, 16 at once fit")
    found = answer(**{**rows, "tokens": 96 * 64}, world_size=8)
    expect(found != 16, "96 rows on 8 ranks are 12 a rank: ask for all ranks")
    expect(
        found not in (4, 8),
        "powers of two are not all: 12 rows a rank fit at once",
    )
    expect(found == 12, f"{found}: of 12 rows a rank, 12 at once fit")
    expect(answer(**rows, world_size=3) == 0, "512 rows on 3 ranks: no such B")
    expect(
        answer(999, 1000, 64, 64, 1) == 0, "when not one row fits, return 0"
    )


@wrong("pretraining.fit", "no multiple of 20")
def whatever_fits(free, row, tokens, T, world_size):
    return free // row


@wrong("pretraining.fit", "ask for all ranks")
def one_rank(free, row, tokens, T, world_size):
    fits = range(1, free // row + 1)
    return max((B for B in fits if tokens % (B * T) == 0), default=0)


@wrong("pretraining.fit", "powers of two")
def halving(free, row, tokens, T, world_size):
    B = 1 << (free // row).bit_length() >> 1
    while B and tokens % (B * T * world_size):
        B //= 2
    return B
