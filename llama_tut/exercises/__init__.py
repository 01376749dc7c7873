"""Exercises: check an answer, and be told the likely mistake.

In a chapter, fill in the function and ask:

    from llama_tut.exercises import check
    check("rmsnorm.without_mean", my_function)

One file a chapter holds its checkers. A checker takes the reader's function
and raises `Hint` with what is wrong. Beside it stand wrong answers that people
give; `make exercises` shows that each gets the hint that belongs to it. The
solutions stand in the chapters, folded.
"""

from dataclasses import dataclass, field
from importlib import import_module

import torch

EXERCISES = {}


class Hint(Exception):
    """What is wrong with an answer, in words for the reader."""


@dataclass
class Exercise:
    """A checker, and the wrong answers that it must tell apart."""

    name: str  # chapter.exercise
    checker: callable
    wrong: list = field(default_factory=list)  # pairs (function, its hint)


def exercise(name):
    """Register the decorated function as the checker of `name`."""

    def register(checker):
        EXERCISES[name] = Exercise(name, checker)
        return checker

    return register


def wrong(name, hint):
    """Register the decorated function as a wrong answer to `name`.

    Args:
        hint: words that the checker's message must hold.
    """

    def register(answer):
        EXERCISES[name].wrong.append((answer, hint))
        return answer

    return register


def expect(condition, hint):
    """Raise the hint unless the condition holds."""
    if not condition:
        raise Hint(hint)


def expect_close(found, wanted, hint, tolerance=1e-5):
    """Raise the hint unless `found` is `wanted`: numbers, lists or tensors.

    A wrong shape gets a hint of its own. The tolerance is relative, and
    absolute below 1.
    """
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    expect(
        found.shape == wanted.shape,
        f"the result has shape {list(found.shape)}, "
        f"it must be {list(wanted.shape)}",
    )
    found, wanted = found.detach().double(), wanted.detach().double()
    expect(torch.allclose(found, wanted, rtol=tolerance, atol=tolerance), hint)


def find(name):
    """The exercise of that name."""
    chapter = name.split(".")[0]
    try:
        import_module(f"{__name__}.{chapter}")
        return EXERCISES[name]
    except (ModuleNotFoundError, KeyError):
        raise ValueError(f"there is no exercise {name!r}") from None


def verdict(name, answer):
    """'right', or what is wrong with the function `answer`."""

    def attempt(*args, **options):
        result = answer(*args, **options)
        expect(result is not None, "it returns nothing yet")
        return result

    checker = find(name).checker
    try:
        checker(attempt)
    except Hint as hint:
        return str(hint)
    except Exception as error:  # the reader's code may raise anything
        return f"it raised {type(error).__name__}: {error}"
    return "right"


def check(name, answer):
    """Print whether the function `answer` solves the exercise `name`."""
    said = verdict(name, answer)
    print(f"{name}: {said}" if said == "right" else f"{name}: not yet. {said}")
