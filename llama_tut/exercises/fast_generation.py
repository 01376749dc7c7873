"""Checkers of chapter 21."""

import torch

from llama_tut.exercises import exercise, expect, expect_close, wrong


def accepted(guesses, answers, more=1):
    """The ids that are added to the text; `more` plants a mistake."""
    agree = 0
    while agree < len(guesses) and guesses[agree] == answers[agree]:
        agree += 1
    return answers[: agree + more]


def without_the_models_own(guesses, answers):
    return accepted(guesses, answers, more=0)


def all_that_agree(guesses, answers):
    pairs = zip(guesses, answers, strict=False)
    agree = sum(g == a for g, a in pairs)
    return answers[: agree + 1]


def the_wrong_guess_too(guesses, answers):
    agree = len(accepted(guesses, answers)) - 1
    return guesses[: agree + 1]


def shifted(guesses, answers):
    agree = 0
    while agree < len(guesses) and guesses[agree] == answers[agree + 1]:
        agree += 1
    return answers[: agree + 1]


def every_answer(guesses, answers):
    return answers


SLIPS = {
    without_the_models_own: "the model's own token is missing: it comes after "
    "the guesses that hold",
    all_that_agree: "a guess after the first wrong one stands on a wrong text, "
    "even if it agrees",
    the_wrong_guess_too: "the last token is the model's own, not the guess it "
    "refused",
    shifted: "answers[0] follows the known text, so it belongs to guesses[0]",
    every_answer: "answers after a wrong guess follow a text that is not ours",
}
ROUNDS = [
    ([4, 5, 6], [4, 5, 9, 7]),
    ([4, 5, 6], [9, 5, 6, 7]),
    ([4, 5, 6], [4, 8, 6, 7]),
    ([4, 5, 6], [4, 5, 6, 7]),
    ([], [3]),
]


@exercise("fast_generation.accept")
def check_accept(answer):
    """Which tokens of a round are added to the text."""
    for guesses, answers in ROUNDS:
        found = answer(list(guesses), list(answers))
        found = torch.as_tensor(found).tolist()
        wanted = accepted(guesses, answers)
        if found != wanted:
            for slip, hint in SLIPS.items():
                expect(found != list(slip(guesses, answers)), hint)
        expect(
            found == wanted,
            f"guesses {guesses}, answers {answers}: {wanted} are added, not "
            f"{found}",
        )


for slip, hint in SLIPS.items():
    wrong("fast_generation.accept", hint)(slip)


def keep_or_redraw(p, q, x):
    missing = (p - q).clamp(min=0)
    return min(1.0, (p[x] / q[x]).item()), missing / missing.sum()


def turned_round(p, q, x):
    return min(1.0, (q[x] / p[x]).item()), keep_or_redraw(p, q, x)[1]


def redraw_from_p(p, q, x):
    return keep_or_redraw(p, q, x)[0], p


def not_scaled(p, q, x):
    return keep_or_redraw(p, q, x)[0], (p - q).clamp(min=0)


def absolute(p, q, x):
    missing = (p - q).abs()
    return keep_or_redraw(p, q, x)[0], missing / missing.sum()


def above_one(p, q, x):
    return (p[x] / q[x]).item(), keep_or_redraw(p, q, x)[1]


def by_p_alone(p, q, x):
    return p[x].item(), keep_or_redraw(p, q, x)[1]


@exercise("fast_generation.sample")
def check_sample(answer):
    """Keep a sampled guess, or draw again: the result is distributed as p."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    q = torch.tensor([0.2, 0.4, 0.1, 0.3])
    total = torch.zeros(4)
    for x in range(4):
        found = answer(p.clone(), q.clone(), x)
        expect(
            isinstance(found, tuple | list) and len(found) == 2,
            "two things are asked for: a probability and a distribution",
        )
        keep, again = float(found[0]), torch.as_tensor(found[1]).float()
        expect(again.shape == p.shape, "the distribution must be [V]")
        ratio = (p[x] / q[x]).item()
        expect(keep <= 1 + 1e-6, "a probability is at most 1")
        expect(
            abs(keep - min(1, 1 / ratio)) > 1e-6,
            "p/q, not q/p: keep a token that the draft likes too much less "
            "often",
        )
        expect(
            abs(keep - min(1, ratio)) < 1e-5,
            f"p {p[x]:.2f} and q {q[x]:.2f}: keep with {min(1, ratio):.3f}, "
            f"not {keep:.3f}",
        )
        expect(
            abs(again.sum() - 1) < 1e-5,
            "the second distribution must sum to 1",
        )
        expect(
            not torch.allclose(again, p),
            "drawing again from p favours tokens that were kept already: "
            "draw from what is missing",
        )
        total += q[x] * keep * torch.eye(4)[x] + q[x] * (1 - keep) * again
    expect_close(
        total,
        p,
        "tokens kept and drawn again do not add up to p: only where p is "
        "above q something is missing",
    )


wrong("fast_generation.sample", "p/q, not q/p")(turned_round)
wrong("fast_generation.sample", "what is missing")(redraw_from_p)
wrong("fast_generation.sample", "must sum to 1")(not_scaled)
wrong("fast_generation.sample", "do not add up to p")(absolute)
wrong("fast_generation.sample", "at most 1")(above_one)
wrong("fast_generation.sample", "keep with")(by_p_alone)


def rounded(group, gaps=15, pick=torch.round):
    low, high = group.min(), group.max()
    step = ((high - low) / gaps).clamp(min=1e-12)
    return low + pick((group - low) / step) * step


def sixteen_gaps(group):
    return rounded(group, gaps=16)


def cut_off(group):
    return rounded(group, pick=torch.floor)


def around_zero(group):
    step = group.abs().max() / 7
    return (group / step).round() * step


def the_levels(group):
    low, high = group.min(), group.max()
    return ((group - low) / ((high - low) / 15).clamp(min=1e-12)).round()


def by_zero(group):
    low, high = group.min(), group.max()
    step = (high - low) / 15
    return low + ((group - low) / step).round() * step


@exercise("fast_generation.levels")
def check_levels(answer):
    """A group rounded to 16 levels between its extremes."""
    torch.manual_seed(0)
    group = torch.randn(32) + 2
    found = torch.as_tensor(answer(group.clone())).float()
    expect(
        found.shape == group.shape,
        f"the result has shape {list(found.shape)}, it must be [32]",
    )
    hints = {
        sixteen_gaps: "sixteen levels have fifteen gaps",
        cut_off: "round to the nearest level, do not cut off",
        around_zero: "the levels go from the lowest to the highest number, "
        "not evenly around 0",
        the_levels: "these are the levels 0 to 15: the rounded numbers are "
        "asked for",
    }
    for slip, hint in hints.items():
        expect(not torch.allclose(found, slip(group), atol=1e-5), hint)
    expect_close(found, rounded(group), "not the nearest of 16 levels", 1e-4)
    equal = torch.full((32,), 3.0)
    expect_close(
        answer(equal.clone()),
        equal,
        "where all numbers are equal you divide by zero",
    )


wrong("fast_generation.levels", "fifteen gaps")(sixteen_gaps)
wrong("fast_generation.levels", "do not cut off")(cut_off)
wrong("fast_generation.levels", "not evenly around 0")(around_zero)
wrong("fast_generation.levels", "rounded numbers are asked for")(the_levels)
wrong("fast_generation.levels", "divide by zero")(by_zero)
