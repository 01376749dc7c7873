"""Checkers of chapter 10."""

import torch

from llama_tut.exercises import exercise, expect, expect_close, wrong
from llama_tut.hellaswag import Example


def logs_of(logits, ids, start, first, mean=False):
    """Log-probabilities of ids[start:], read from row `first` on."""
    rows = logits.log_softmax(-1)[first : first + len(ids) - start]
    found = rows.gather(1, ids[start:, None])
    return found.mean() if mean else found.sum()


def not_shifted(logits, ids, start):
    return logs_of(logits, ids, start, start)


def mean_of_tokens(logits, ids, start):
    return logs_of(logits, ids, start, start - 1, mean=True)


def first_token_missing(logits, ids, start):
    return logs_of(logits, ids, start + 1, start)


def whole_row(logits, ids, start):
    return logs_of(logits, ids, 1, 0)


def raw_logits(logits, ids, start):
    return logits[start - 1 : -1].gather(1, ids[start:, None]).sum()


MISTAKES = {
    not_shifted: "row i predicts token i + 1: your rows are one too late",
    mean_of_tokens: "that is the mean by token; the sum is asked for",
    first_token_missing: "the first token of the ending is missing: it is "
    "predicted by the last row of the context",
    whole_row: "the context is in your sum: only the ending counts",
    raw_logits: "logits are no log-probabilities: each row needs a "
    "log_softmax",
}


def stub(ids):
    """Logits that depend on every token so far: ids [1, T] -> [1, T, 11]."""
    table = torch.linspace(-3, 3, 121).view(11, 11).sin() * 3
    places = torch.arange(1, ids.shape[1] + 1)[None, :, None]
    return table[ids].cumsum(1) / places**0.5


def by_rows(sum_of, context_too=True):
    """An answer that sums the rows of each ending with `sum_of`."""

    def answer(model, context, endings):
        kept = context if context_too else context[-1:]
        sums = []
        for ending in endings:
            ids = torch.tensor(kept + ending)
            logits = torch.as_tensor(model(ids[None]))[0]
            sums.append(float(sum_of(logits, ids, len(kept))))
        return sums

    return answer


def right_sum(logits, ids, start):
    return logs_of(logits, ids, start, start - 1)


def last_token_missing(logits, ids, start):
    return logs_of(logits, ids[:-1], start, start - 1)


MISTAKES[last_token_missing] = "the last token of the ending is missing"
WRONG = [(by_rows(mistake), hint) for mistake, hint in MISTAKES.items()]
WRONG += [
    (
        by_rows(right_sum, context_too=False),
        "the context is missing: each row is context + ending",
    ),
    (
        lambda *args: [-s for s in by_rows(right_sum)(*args)],
        "that is a loss: a log-probability is below 0",
    ),
]


@exercise("hellaswag.example")
def check_example(answer):
    """The four sums of log-probabilities of one example."""
    context, endings = [3, 1, 4], [[1, 5, 9], [2, 6], [5, 3, 5, 8], [9, 7, 0]]
    wanted = by_rows(right_sum)(stub, context, endings)
    found = answer(stub, list(context), [list(e) for e in endings])
    found = torch.as_tensor(found).float()
    expect(
        found.shape == (4,),
        f"the result has shape {list(found.shape)}: four numbers are asked "
        "for, one for each ending",
    )
    for mistake, hint in WRONG:
        planted = torch.tensor(mistake(stub, context, endings))
        expect(not torch.allclose(found, planted, atol=1e-4), hint)
    expect_close(
        found,
        torch.tensor(wanted),
        f"the first ending has {found[0]:.3f}, it is {wanted[0]:.3f}",
        1e-4,
    )


for mistake, hint in WRONG:
    wrong("hellaswag.example", hint)(mistake)


@wrong("hellaswag.example", "four numbers are asked for")
def best_only(model, context, endings):
    return max(by_rows(right_sum)(model, context, endings))


def pairs(lost, won, z=1.96, factor=1, centred=True, power=2):
    """Examples needed; the options plant mistakes."""
    gap = lost - won
    variance = lost + won - centred * gap**2
    return factor * z**2 * variance / gap**power


def mean_not_taken_away(lost, won):
    return pairs(lost, won, centred=False)


def one_standard_error(lost, won):
    return pairs(lost, won, z=1)


def as_if_independent(lost, won):
    return pairs(lost, won, factor=2)


def gap_not_squared(lost, won):
    return pairs(lost, won, power=1)


def by_variance(variance, lost, won):
    return 1.96**2 * variance / (lost - won) ** 2


def differs_or_not(lost, won):
    p = lost + won
    return by_variance(p * (1 - p), lost, won)


def two_coins(lost, won):
    return by_variance(lost * (1 - lost) + won * (1 - won), lost, won)


SLIPS = {
    mean_not_taken_away: "a variance is the mean of the squares minus the "
    "square of the mean",
    one_standard_error: "that is a difference of one standard error, not of "
    "1.96",
    as_if_independent: "the factor 2 belongs to two independent scores: a "
    "pair is one number already, 1, 0 or -1",
    gap_not_squared: "the gap is squared: half the gap needs four times the "
    "examples",
    differs_or_not: "p(1 - p) is the variance of a number that is 0 or 1: a "
    "pair is 1, 0 or -1",
    two_coins: "lost(1 - lost) and won(1 - won) do not simply add: no example "
    "is both lost and won",
}


@exercise("hellaswag.pairs")
def check_pairs(answer):
    """Examples needed to see a difference of two paired scores."""
    for lost, won in ((0.3, 0.1), (0.05, 0.04)):
        found, right = float(answer(lost, won)), pairs(lost, won)
        if lost == 0.3:
            for slip, hint in SLIPS.items():
                expect(abs(found / slip(lost, won) - 1) > 0.005, hint)
        expect(
            abs(found / right - 1) < 0.005,
            f"{found:,.0f} with {lost} lost and {won} won: it is {right:,.0f}",
        )


for slip, hint in SLIPS.items():
    wrong("hellaswag.pairs", hint)(slip)


def example(label, *endings):
    return Example(0, "", endings, label)


STORIES = [
    example(0, "a b c d", "longer word", "the longest of all", "12345678"),
    example(0, "tiny", "larger", "same", "very large"),
    example(3, "some words", "more of words", "abc def ghi", "short"),
    example(2, "four", "sixsix", "fivefivefive", "seven77"),
    example(1, "a longer one", "bcd", "efg", "hij"),
]


def share(examples, length, pick=min):
    """Accuracy of picking an ending by its length."""
    hits = [
        e.endings.index(pick(e.endings, key=length)) == e.label
        for e in examples
    ]
    return sum(hits) / len(hits)


def longest(examples):
    return share(examples, len, max)


def fewest_words(examples):
    return share(examples, lambda ending: (len(ending.split()), len(ending)))


def last_of_equals(examples):
    hits = 0
    for e in examples:
        lengths = [len(ending) for ending in e.endings][::-1]
        hits += 3 - lengths.index(min(lengths)) == e.label
    return hits / len(examples)


def hits_only(examples):
    return share(examples, len) * len(examples)


@exercise("hellaswag.shortest")
def check_shortest(answer):
    """How often is the shortest ending right?"""
    found = float(answer(STORIES))
    right = share(STORIES, len)
    expect(found <= 1, f"{found:g} is a count: divide by the examples")
    expect(
        abs(found - longest(STORIES)) > 1e-9,
        "that is the longest ending",
    )
    expect(
        abs(found - last_of_equals(STORIES)) > 1e-9,
        "of equally short endings the first one counts",
    )
    expect(
        abs(found - fewest_words(STORIES)) > 1e-9,
        "length is in characters, not in words",
    )
    expect(abs(found - right) < 1e-9, f"{found:g} of five, it is {right:g}")


wrong("hellaswag.shortest", "the longest ending")(longest)
wrong("hellaswag.shortest", "not in words")(fewest_words)
wrong("hellaswag.shortest", "the first one counts")(last_of_equals)
wrong("hellaswag.shortest", "is a count")(hits_only)
