"""Checkers of chapter 16."""

import torch

from llama_tut.exercises import exercise, expect, expect_close, wrong


@exercise("distributed.rows")
def check_rows(answer):
    """Which rows has a rank, so that W does not change a step?"""

    def step_of(step, world_size, batch, rows=16):
        """The rows of all ranks and micro steps of a step, in their order."""
        micros = rows // (batch * world_size)
        places = [(m, r) for m in range(micros) for r in range(world_size)]
        parts = [answer(step, *p, world_size, batch, rows) for p in places]
        expect(
            all(len(part) == batch for part in parts),
            "a rank takes `batch` rows in a micro step",
        )
        return [list(part) for part in parts]

    for W, batch in ((2, 4), (4, 4), (1, 4), (2, 2), (8, 1)):
        parts = step_of(3, W, batch)
        flat = [row for part in parts for row in part]
        expect(
            W == 1 or parts[0] != parts[1],
            "all ranks get the same rows: the rank must move them",
        )
        expect(
            len(set(flat)) == 16,
            "some rows come twice within a step, and some never: in a micro "
            "step the ranks together take world_size * batch rows",
        )
        expect(
            set(flat) == set(range(48, 64)),
            f"step 3 of 16 rows has rows 48 to 63, not {min(flat)} to "
            f"{max(flat)}: where it begins depends on `step` and `rows` only",
        )
        expect(
            flat == list(range(48, 64)),
            "the step has its rows, but in another order: in a micro step all "
            "ranks read neighbouring rows, rank 0 first",
        )


@wrong("distributed.rows", "the same rows")
def rank_forgotten(step, micro, rank, world_size, batch, rows):
    first = step * rows + micro * batch
    return list(range(first, first + batch))


@wrong("distributed.rows", "come twice")
def micro_steps_overlap(step, micro, rank, world_size, batch, rows):
    first = step * rows + (micro + rank) * batch
    return list(range(first, first + batch))


@wrong("distributed.rows", "depends on `step` and `rows` only")
def step_of_one_rank(step, micro, rank, world_size, batch, rows):
    first = step * rows // world_size + (micro * world_size + rank) * batch
    return list(range(first, first + batch))


@wrong("distributed.rows", "in another order")
def a_block_a_rank(step, micro, rank, world_size, batch, rows):
    first = step * rows + rank * (rows // world_size) + micro * batch
    return list(range(first, first + batch))


@exercise("distributed.ring")
def check_ring(answer):
    """Reduce-scatter: half of a ring."""
    for W in (2, 3, 5):
        torch.manual_seed(W)
        chunks = [list(torch.randn(W, 2)) for _ in range(W)]
        total = torch.stack([torch.stack(c) for c in chunks]).sum(0)
        places = answer(chunks)
        expect(
            len(places) == W and set(places) == set(range(W)),
            "give one place for each rank, and each place once",
        )
        found = [torch.allclose(chunks[r][c], total[c], atol=1e-5)
                 for r in range(W) for c in range(W)]  # fmt: skip
        expect(
            sum(found) > 0,
            "no rank holds a whole sum: after the first round the chunk that "
            "travels on is the one that was just added to",
        )
        expect(
            sum(found) == W,
            f"{sum(found)} chunks hold a whole sum, with {W} ranks: it should "
            "be one a rank; did a rank add before all had sent?",
        )
        expect(
            all(found[r * W + c] for r, c in enumerate(places)),
            "the sums are right, but you name other places: follow one chunk "
            "around the ring",
        )


def rounds(chunks, chunk_of):
    """The ring, with a rule for the chunk that rank r sends in a round."""
    W = len(chunks)
    for move in range(W - 1):
        sent = [chunks[r][chunk_of(r, move, W)].clone() for r in range(W)]
        for r, message in enumerate(sent):
            chunks[(r + 1) % W][chunk_of(r, move, W)] += message


@wrong("distributed.ring", "you name other places")
def own_place(chunks):
    rounds(chunks, lambda r, move, W: (r - move) % W)
    return list(range(len(chunks)))


@wrong("distributed.ring", "just added to")
def same_chunk_always(chunks):
    rounds(chunks, lambda r, move, W: (r + move) % W)
    return [(r + 1) % len(chunks) for r in range(len(chunks))]


@wrong("distributed.ring", "just added to")
def nothing_sent(chunks):
    return [(r + 1) % len(chunks) for r in range(len(chunks))]


@exercise("distributed.hide")
def check_hide(answer):
    """Tokens a rank whose backward pass is as long as the ring."""
    found = answer(8, 4e14, 1e11)
    for factor, hint in (
        (1 / 8, "`bits` counts bits: a byte has eight"),
        (1 / 2, "the ring goes around twice: once to sum, once to hand out"),
        (2, "a gradient in bfloat16 has two bytes"),
        (8 / 7, "a rank keeps one chunk of W: it sends (W - 1) / W of them"),
        (8, "no rank sends the whole gradient to all others, in a ring"),
        (2 / 3, "6N FLOPs a token are forward and backward; backward has 4N"),
    ):
        expect(abs(found / 28_000 - factor) > 1e-3, hint)
    expect_close(found, 28_000.0, f"{found:,.0f} for 8 GPUs: it is 28,000")
    expect_close(answer(2, 1e15, 8e11), 10_000 * 0.5, "other values fail")


@wrong("distributed.hide", "a byte has eight")
def bits_as_bytes(world_size, flops, bits):
    return (world_size - 1) / world_size * flops / bits


@wrong("distributed.hide", "goes around twice")
def one_way(world_size, flops, bits):
    return (world_size - 1) / world_size * flops / (bits / 8) / 2


@wrong("distributed.hide", "(W - 1) / W")
def whole_ring(world_size, flops, bits):
    return flops / (bits / 8)


@wrong("distributed.hide", "backward has 4N")
def with_forward(world_size, flops, bits):
    return (world_size - 1) / world_size * flops / (bits / 8) * 2 / 3
