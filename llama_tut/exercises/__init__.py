"""Exercises: check an answer, and be told the likely mistake.

In a chapter, fill in the function and ask:

    from llama_tut.exercises import check
    check("rmsnorm.without_mean", my_function)

One file a chapter holds its checkers. A checker takes the reader's function
and raises `Hint` with what is wrong. Beside it stand wrong answers that people
give; `make exercises` shows that each gets the hint that belongs to it. The
solutions stand in the chapters, folded.
"""

import traceback
from dataclasses import dataclass, field
from functools import partial
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


def wrong_variants(name, answer, variants):
    """Register `answer` with other options as wrong answers to `name`.

    Args:
        variants: {what is wrong: (options, hint)}.
    """
    for fault, (options, hint) in variants.items():
        variant = partial(answer, **options)
        variant.__name__ = fault
        wrong(name, hint)(variant)


def expect(condition, hint):
    """Raise the hint unless the condition holds."""
    if not condition:
        raise Hint(hint)


def describe(value):
    """What kind of thing an answer returned, in words for a hint."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, list | tuple):
        kind = type(value).__name__
        return f"a {kind} of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, bool | int | float):
        return f"the number {value}"
    return f"a {type(value).__name__}"


def expect_close(found, wanted, hint, tolerance=1e-5):
    """Raise the hint unless `found` is `wanted`: numbers, lists or tensors.

    Another kind of thing and a wrong shape get hints of their own, which say
    what was returned and what it must be. The tolerance is relative, and
    absolute below 1.
    """
    wanted = torch.as_tensor(wanted)
    shape = list(wanted.shape)
    kind = f"a tensor of shape {shape}" if shape else "one number"
    try:
        numbers = torch.as_tensor(found)
        if numbers.is_complex() and not wanted.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise Hint(f"it returned {describe(found)}, not {kind}") from None
    expect(
        numbers.shape == wanted.shape,
        f"it returned {describe(found)}, not {kind}: the result has shape "
        f"{list(numbers.shape)}, it must be {shape}",
    )
    numbers, wanted = numbers.detach(), wanted.detach()
    exact = torch.complex128 if wanted.is_complex() else torch.float64
    numbers, wanted = numbers.to(exact), wanted.to(exact)
    close = torch.allclose(numbers, wanted, rtol=tolerance, atol=tolerance)
    if not close and not numbers.isfinite().all() and wanted.isfinite().all():
        hint = f"{hint} (some of your numbers are infinite or not a number)"
    expect(close, hint)


def find(name):
    """The exercise of that name."""
    chapter = name.split(".")[0]
    try:
        import_module(f"{__name__}.{chapter}")
        return EXERCISES[name]
    except (ModuleNotFoundError, KeyError):
        raise ValueError(f"there is no exercise {name!r}") from None


def where(error, answer):
    """The line of the reader's function in which `error` was raised, or ''.

    The innermost line of the file or cell that defines `answer`; deeper lines
    belong to PyTorch.
    """
    code = getattr(answer, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        frame.line
        for frame in frames
        if code and frame.filename == code.co_filename and frame.line
    ]
    return lines[-1] if lines else ""


def sentence(error, answer):
    """An exception in the reader's code, as one sentence."""
    last = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"it raised {type(error).__name__}"
    if last:
        said += f": {last[-1]}"
    line = where(error, answer)
    return f"{said}, in your line `{line}`" if line else said


def verdict(name, answer):
    """'right', or what is wrong with the function `answer`.

    What the answer raises becomes a sentence with the reader's own line,
    unless the checker expects and catches it. So does what a checker raises
    when it computes with a result of the wrong kind or shape: the sentence
    says what the answer returned.
    """
    raised, returned = [], []

    def attempt(*args, **options):
        try:
            result = answer(*args, **options)
        except Exception as error:  # the reader's code may raise anything
            raised.append(error)
            raise
        expect(result is not None, "it returns nothing so far")
        returned.append(result)
        return result

    checker = find(name).checker
    try:
        checker(attempt)
    except Hint as hint:
        return str(hint)
    except Exception as error:
        if error in raised:
            return sentence(error, answer)
        if not returned:
            raise  # the checker itself is broken
        line = str(error).strip().splitlines() or [type(error).__name__]
        return (
            f"it returned {describe(returned[-1])}, and that cannot be "
            f"compared with the right answer ({line[-1].strip()})"
        )
    return "right"


def check(name, answer):
    """Print whether the function `answer` solves the exercise `name`."""
    said = verdict(name, answer)
    print(f"{name}: {said}" if said == "right" else f"{name}: not yet, {said}")
