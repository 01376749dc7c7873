"""Checkers of chapter 15."""

from llama_tut.exercises import exercise, expect, expect_close, wrong


@exercise("trainer.mfu")
def check_mfu(answer):
    """MFU from tokens a second."""
    sizes = dict(N=100e6, L=10, D=800, T=1000)
    found = answer(500_000.0, peak=989e12, **sizes)
    right = 500_000.0 * 696e6 / 989e12
    expect(
        abs(found / right - 600 / 696) > 1e-3,
        "attention is missing: each token reads T others, 12 L T D FLOPs",
    )
    expect(
        abs(found / right - 1 / 3) > 1e-3,
        "these are the FLOPs of the forward pass; training takes three times "
        "as many",
    )
    expect(
        abs(found / right - 632 / 696) > 1e-3,
        "4 L T D is attention's forward pass: its backward counts too",
    )
    expect(abs(found / right - 100) > 0.1, "a part of the peak, not per cent")
    expect_close(
        found,
        right,
        "FLOPs a token are 6N + 12LTD; times tokens a second; over the peak",
    )
    expect_close(
        answer(1000.0, peak=1e12, **sizes), 0.696, "read the peak", 1e-4
    )


@wrong("trainer.mfu", "attention is missing")
def parameters_only(tokens_a_second, N, L, D, T, peak):
    return tokens_a_second * 6 * N / peak


@wrong("trainer.mfu", "three times")
def forward_only(tokens_a_second, N, L, D, T, peak):
    return tokens_a_second * (2 * N + 4 * L * T * D) / peak


@wrong("trainer.mfu", "its backward counts too")
def attention_forward_only(tokens_a_second, N, L, D, T, peak):
    return tokens_a_second * (6 * N + 4 * L * T * D) / peak


@exercise("trainer.weights")
def check_weights(answer):
    """Weights that make a mean over all tokens, on several ranks."""
    counts = [[10, 30], [20, 40]]
    found = answer(counts)
    expect(
        [len(own) for own in found] == [2, 2],
        "give a weight for each micro batch of each rank",
    )
    flat = [weight for own in found for weight in own]

    def like(weights):
        pairs = zip(flat, weights, strict=True)
        return all(abs(a - b) < 1e-6 for a, b in pairs)

    expect(
        not like([0.5] * 4) and not like([0.25] * 4),
        "this is the mean of means: a micro batch counts by its tokens",
    )
    expect(
        not like([0.25, 0.75, 1 / 3, 2 / 3]),
        "you divide by the tokens of one rank: a rank with few tokens then "
        "counts as much as one with many",
    )
    expect(
        not like([0.1, 0.3, 0.2, 0.4]),
        "DDP divides by the number of ranks once more",
    )
    expect_close(found, [[0.2, 0.6], [0.4, 0.8]], "count * W / all tokens")
    expect_close(
        answer([[3, 1], [0, 4], [2, 2]]),
        [[0.75, 0.25], [0, 1.0], [0.5, 0.5]],
        "it fails with three ranks",
    )


@wrong("trainer.weights", "mean of means")
def one_over_k(counts):
    return [[1 / len(own)] * len(own) for own in counts]


@wrong("trainer.weights", "of one rank")
def by_rank(counts):
    return [[count / sum(own) for count in own] for own in counts]


@wrong("trainer.weights", "DDP divides")
def without_ddp(counts):
    total = sum(map(sum, counts))
    return [[count / total for count in own] for own in counts]


@exercise("trainer.fit")
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


@wrong("trainer.fit", "no multiple of 20")
def whatever_fits(free, row, tokens, T, world_size):
    return free // row


@wrong("trainer.fit", "ask for all ranks")
def one_rank(free, row, tokens, T, world_size):
    fits = range(1, free // row + 1)
    return max((B for B in fits if tokens % (B * T) == 0), default=0)


@wrong("trainer.fit", "powers of two")
def halving(free, row, tokens, T, world_size):
    B = 1 << (free // row).bit_length() >> 1
    while B and tokens % (B * T * world_size):
        B //= 2
    return B
