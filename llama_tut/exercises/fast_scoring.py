"""Checkers of chapter 20."""

import torch

from llama_tut.exercises import exercise, expect, wrong

CONTEXT = [5, 6, 8]
ENDINGS = [[1, 2, 3], [4], [7, 8], [9, 1, 2, 3]]


def pack(
    context, endings, all_tokens=False, run_on=False, last=1, from_one=True
):
    """One packed row; the options plant mistakes."""
    n = len(context)
    ids, positions, parts = [*context], [*range(n)], [0] * n
    for number, ending in enumerate(endings, int(from_one)):
        read = ending if all_tokens else ending[:-1]
        start = len(ids) if run_on else n - 1 + last
        ids += read
        positions += range(start, start + len(read))
        parts += [number] * len(read)
    return ids, positions, parts


def with_last_tokens(context, endings):
    return pack(context, endings, all_tokens=True)


def positions_run_on(context, endings):
    return pack(context, endings, run_on=True)


def one_too_low(context, endings):
    return pack(context, endings, last=0)


def from_zero(context, endings):
    n = len(context)
    ids, positions, parts = pack(context, endings)
    return ids, positions[:n] + [p - n for p in positions[n:]], parts


def parts_from_zero(context, endings):
    return pack(context, endings, from_one=False)


def first_tokens_dropped(context, endings):
    _, positions, parts = pack(context, endings)
    return [*context, *sum((e[1:] for e in endings), [])], positions, parts


SLIPS = {
    with_last_tokens: "the last token of an ending predicts nothing: leave it "
    "out",
    positions_run_on: "your positions run on: each ending starts again after "
    "the context",
    one_too_low: "the context has the positions 0 to n - 1, so an ending "
    "starts at n",
    from_zero: "an ending follows the context: it starts at n, not at 0",
    parts_from_zero: "part 0 is the context: the endings count from 1",
    first_tokens_dropped: "you leave out the first token of an ending, it is "
    "the last that predicts nothing",
}


@exercise("fast_scoring.pack")
def check_pack(answer):
    """ids, positions and parts of one packed row."""
    found = answer(list(CONTEXT), [list(e) for e in ENDINGS])
    expect(
        isinstance(found, tuple | list) and len(found) == 3,
        "three lists are asked for: ids, positions, parts",
    )
    found = [torch.as_tensor(column).tolist() for column in found]
    for slip, hint in SLIPS.items():
        planted = [list(column) for column in slip(CONTEXT, ENDINGS)]
        expect(found != planted, hint)
    wanted = pack(CONTEXT, ENDINGS)
    names = ("ids", "positions", "parts")
    for name, mine, right in zip(names, found, wanted, strict=True):
        expect(mine == list(right), f"{name} are {mine}: must be {right}")


for slip, hint in SLIPS.items():
    wrong("fast_scoring.pack", hint)(slip)


def mask(parts, causal=True, context=True, own=True):
    """The mask of a packed row; the options plant mistakes."""
    T = len(parts)
    may = parts[:, None] == parts[None, :] if own else torch.zeros(T, T).bool()
    if context:
        may = may | (parts == 0)[None, :]
    return may & torch.ones(T, T).tril().bool() if causal else may


def looks_ahead(parts):
    return mask(parts, causal=False)


def without_context(parts):
    return mask(parts, context=False)


def context_only(parts):
    return mask(parts, own=False)


def plain_causal(parts):
    return torch.ones(len(parts), len(parts)).tril().bool()


def transposed(parts):
    return mask(parts).T


LEAKS = {
    plain_causal: "an ending reads the endings before it",
    looks_ahead: "a query reads keys that come later",
    without_context: "an ending must read the context",
    context_only: "a token of an ending must read its own ending, and itself",
    transposed: "rows are queries and columns are keys: yours is turned",
}


@exercise("fast_scoring.mask")
def check_mask(answer):
    """Who reads whom."""
    parts = torch.tensor([0, 0, 1, 1, 3, 4, 4])
    found = torch.as_tensor(answer(parts.clone()))
    expect(
        found.shape == (7, 7) and found.dtype == torch.bool,
        f"the result must be bool [7, 7], yours is {found.dtype} "
        f"{list(found.shape)}",
    )
    for leak, hint in LEAKS.items():
        expect(not torch.equal(found, leak(parts)), hint)
    places = (found != mask(parts)).nonzero().tolist()
    expect(not places, f"query and key {places[:1]} are wrong")


for leak, hint in LEAKS.items():
    wrong("fast_scoring.mask", hint)(leak)


def saving(n, m, k=4, dropped=1, shared=True):
    """Tokens in rows over tokens packed; the options plant mistakes."""
    packed = n + k * (m - dropped) if shared else k * (n + m - dropped) - n
    return k * (n + m - dropped) / packed


def last_tokens_read(n, m, k=4):
    return saving(n, m, k, dropped=0)


def inverse(n, m, k=4):
    return 1 / saving(n, m, k)


def context_saved_once(n, m, k=4):
    return saving(n, m, k, shared=False)


def whole_numbers(n, m, k=4):
    return k * (n + m - 1) // (n + k * (m - 1))


def without_endings(n, m, k=4):
    return k


GUESSES = {
    last_tokens_read: "the last token of each ending is read in neither way",
    inverse: "that is below 1: tokens in rows over tokens packed",
    context_saved_once: "packing saves the context k - 1 times, not once",
    whole_numbers: "divide with /, not with //",
    without_endings: "the endings are read in both ways",
}


@exercise("fast_scoring.saving")
def check_saving(answer):
    """Tokens in rows over tokens packed."""
    for n, m, k in ((40, 25, 4), (10, 7, 2)):
        found, right = float(answer(n, m, k)), saving(n, m, k)
        if k == 4:
            for guess, hint in GUESSES.items():
                expect(abs(found - guess(n, m, k)) > 1e-6, hint)
        expect(
            abs(found - right) < 1e-6,
            f"{found:.3f} for n {n}, m {m}, k {k}: it is {right:.3f}",
        )


for guess, hint in GUESSES.items():
    wrong("fast_scoring.saving", hint)(guess)
