"""Checkers of chapter 11."""

import torch

from llama_tut.exercises import exercise, expect, expect_close, wrong


class Tape:
    """A cache for `Counted`: the ids it was given, in order."""

    def __init__(self):
        self.ids = []


class Counted:
    """A model whose next token depends on all tokens that it was given."""

    V = 13

    def follows(self, ids):
        """The id that it finds likeliest after a list of ids."""
        return sum((i + 1) * t for i, t in enumerate(ids)) % self.V

    def __call__(self, ids, cache=None):
        cache = Tape() if cache is None else cache
        rows = []
        for token in ids[0].tolist():
            cache.ids.append(token)
            rows.append(self.follows(cache.ids))
        return torch.eye(self.V)[rows][None]  # [1, T, V]


@exercise("generate.loop")
def check_loop(answer):
    """The greedy loop: every token through the model once."""
    for prompt, new in (([3, 1, 4, 1], 6), ([5], 1)):
        model, tape, text = Counted(), Tape(), list(prompt)
        for _ in range(new):
            text.append(model.follows(text))
        wanted = text[len(prompt) :]
        found = answer(model, tape, torch.tensor([prompt]), new)
        found = torch.as_tensor(found).flatten().tolist()
        expect(
            found != text,
            "the prompt is in your result: only the new ids are asked for",
        )
        expect(
            tape.ids,
            "your cache stays empty: hand it to the model at every call",
        )
        expect(len(found) == new, f"{len(found)} new ids, {new} are asked for")
        expect(
            tape.ids[: 2 * len(prompt)] != prompt * 2 or new == 1,
            "the prompt went through the model twice: after the first call "
            "give it the new token alone, the cache holds the rest",
        )
        if found != wanted:
            first = model(torch.tensor([prompt]))[0, 0].argmax().item()
            expect(
                len(prompt) == 1 or found[0] != first,
                "you read the logits after the first token: the next one "
                "follows the last, logits[0, -1]",
            )
            expect(
                tape.ids[: len(prompt)] == prompt,
                "the whole prompt must go through the model first",
            )
            expect(False, f"{found} after {prompt}: it is {wanted}")
        expect(
            len(tape.ids) <= len(prompt) + new,
            "some token went through the model more than once",
        )


@wrong("generate.loop", "went through the model twice")
def whole_text_again(model, cache, ids, new):
    for _ in range(new):
        logits = model(ids, cache=cache)[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    return ids[0, -new:].tolist()


@wrong("generate.loop", "your cache stays empty")
def without_cache(model, cache, ids, new):
    for _ in range(new):
        logits = model(ids)[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
    return ids[0, -new:].tolist()


def looping(model, cache, ids, new, row=-1):
    out = []
    while len(out) < new:
        out.append(model(ids, cache=cache)[0, row].argmax().item())
        ids = torch.tensor([out[-1:]])
    return out


@wrong("generate.loop", "the logits after the first token")
def first_row(model, cache, ids, new):
    return looping(model, cache, ids, new, row=0)


@wrong("generate.loop", "new ids, 6 are asked for")
def one_too_many(model, cache, ids, new):
    return looping(model, cache, ids, new + 1)


@wrong("generate.loop", "the prompt is in your result")
def with_the_prompt(model, cache, ids, new):
    return ids[0].tolist() + looping(model, cache, ids, new)


@wrong("generate.loop", "the whole prompt must go")
def last_of_the_prompt(model, cache, ids, new):
    return looping(model, cache, ids[:, -1:], new)


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
    equal = torch.tensor([0.25, 0.5, 0.125, 0.125])
    expect_close(
        answer(equal.clone(), 0.75),
        torch.tensor([1, 2, 0, 0]) / 3,
        "two tokens reach 0.75 exactly: a third is not needed (< and not <=)",
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


@wrong("generate.top_p", "a third is not needed")
def one_too_many_at_the_line(p, top_p):
    ranked, order = p.sort(descending=True)
    ranked = ranked * (ranked.cumsum(0) - ranked <= top_p)
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
