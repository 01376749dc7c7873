"""Checkers pass the folded solutions, and tell wrong answers what is wrong."""

from importlib import import_module
from pathlib import Path

import exercises as listing
import nbformat
import pytest
import torch
from small_model import caller, refused

from llama_tut import exercises
from llama_tut.exercises import Hint, describe, expect_close

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


TABLE = listing.chapters()


@pytest.mark.parametrize("stem", TABLE)
def test_checkers_tell_right_from_wrong(stem):
    assert listing.faults(*TABLE[stem]) == []


@pytest.mark.parametrize("stem", TABLE)
def test_each_exercise_has_an_empty_and_a_solved_cell(stem):
    notebook, chapter = TABLE[stem]
    import_module(f"llama_tut.exercises.{chapter}")
    cells = nbformat.read(notebook, as_version=4).cells
    for tag, wanted in (("exercise", "not yet"), ("solution", "right")):
        said = "".join(
            output.text
            for cell in cells
            if tag in cell.metadata.get("tags", [])
            for output in cell.outputs
        )
        names = [line.split(":")[0] for line in said.splitlines()]
        known = [n for n in exercises.EXERCISES if n.startswith(chapter + ".")]
        assert sorted(names) == sorted(known)
        assert said.count(f": {wanted}") == len(names)


def test_a_checker_that_lets_a_wrong_answer_pass_is_found(monkeypatch, capsys):
    listing.faults(*TABLE["03_rmsnorm"])
    one = exercises.EXERCISES["rmsnorm.parameters"]
    monkeypatch.setattr(one, "checker", lambda answer: None)
    found = listing.faults(*TABLE["03_rmsnorm"])
    assert "rmsnorm.parameters: no_final_norm passes" in found


def test_a_wrong_hint_is_found(monkeypatch):
    listing.faults(*TABLE["03_rmsnorm"])
    one = exercises.EXERCISES["rmsnorm.parameters"]
    answer = one.wrong[0][0]
    monkeypatch.setattr(one, "wrong", [(answer, "nonsense"), *one.wrong[1:]])
    found = listing.faults(*TABLE["03_rmsnorm"])
    assert found == [
        "rmsnorm.parameters: no_final_norm is not told 'nonsense'"
    ]


def test_what_a_reader_sees(capsys):
    exercises.check("rmsnorm.parameters", lambda config: None)
    exercises.check("rmsnorm.parameters", lambda config: 1 / 0)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "rmsnorm.parameters: not yet, it returns nothing so far"
    assert "it raised ZeroDivisionError" in said[1]
    with pytest.raises(ValueError, match="no exercise 'rmsnorm.nonsense'"):
        exercises.check("rmsnorm.nonsense", None)
    with pytest.raises(ValueError, match="no exercise 'nowhere.x'"):
        exercises.check("nowhere.x", None)


@pytest.fixture
def product(monkeypatch):
    """An exercise "test.product": the matrix product of two matrices."""
    monkeypatch.setattr(exercises, "EXERCISES", {})
    monkeypatch.setattr(exercises, "find", lambda n: exercises.EXERCISES[n])

    @exercises.exercise("test.product")
    def check_product(answer):
        torch.manual_seed(0)
        a, b = torch.randn(3, 4), torch.randn(4, 5)
        found = answer(a, b)
        expect_close(found[:, 0], (a @ b)[:, 0], "the first column is wrong")
        expect_close(found, a @ b, "it is not the product")

    return lambda answer: exercises.verdict("test.product", answer)


def test_what_an_answer_raises_becomes_a_sentence_with_its_line(product):
    def turned(a, b):
        return b @ a

    said = product(turned)
    assert said.startswith("it raised RuntimeError: mat1 and mat2 shapes")
    assert "(4x5 and 3x4)" in said
    assert said.endswith("in your line `return b @ a`")

    def deep(a, b):
        helper = torch.nn.Linear(7, 2)
        return helper(a)  # raises inside PyTorch

    assert "in your line `return helper(a)" in product(deep)
    assert "takes 1 positional argument" in product(lambda a: a)
    assert product(lambda a, b: {}["weight"]).startswith(
        "it raised KeyError: 'weight'"
    )


def test_a_checker_may_ask_for_an_exception(monkeypatch):
    monkeypatch.setattr(exercises, "EXERCISES", {})
    monkeypatch.setattr(exercises, "find", lambda n: exercises.EXERCISES[n])

    @exercises.exercise("test.refuse")
    def check_refuse(answer):
        try:
            answer(-1)
        except ValueError:
            return
        raise Hint("a negative number must be refused")

    def refuses(number):
        raise ValueError("negative")

    def fails(number):
        raise KeyError("number")

    assert exercises.verdict("test.refuse", refuses) == "right"
    assert exercises.verdict("test.refuse", abs).startswith("a negative")
    said = exercises.verdict("test.refuse", fails)
    assert said.startswith("it raised KeyError")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "it returns nothing so far"),
        ((1, 2), "it returned a tuple of 2"),
        (3.5, "it returned the number 3.5"),
        ("text", "it returned the text 'text'"),
        (torch.zeros(5), "it returned a tensor of shape [5]"),
        (torch.zeros(3, 4, 5), "shape [3, 5], it must be [3]"),
        (torch.zeros(3, 4), "the first column is wrong"),
    ],
)
def test_a_result_of_another_kind_or_shape_is_named(product, returned, words):
    said = product(lambda a, b: returned)
    assert words in said
    assert "\n" not in said


def test_shapes_are_compared_before_numbers():
    def said(found, wanted):
        with pytest.raises(Hint) as hint:
            expect_close(found, wanted, "wrong numbers")
        return str(hint.value)

    zeros = torch.zeros
    assert "has shape [2], it must be [2, 1]" in said(zeros(2), zeros(2, 1))
    assert "a tuple of 2, not one number" in said((zeros(2), zeros(3)), 1.0)
    assert "the text 'a', not a tensor of shape [2]" in said("a", zeros(2))
    assert said(zeros(2), torch.ones(2)) == "wrong numbers"
    assert "not a number" in said(zeros(2) / 0, zeros(2))
    assert said([1, 2], [1, 3]) == "wrong numbers"
    expect_close([1.0, 2.0], torch.tensor([1, 2]), "equal")
    expect_close(torch.tensor([1j]), torch.tensor([1j]), "equal")
    expect_close(torch.tensor([True, False]), [1, 0], "equal")


def test_every_kind_has_a_name():
    assert describe([1, 2, 3]) == "a list of 3"
    assert describe(torch.zeros(2, 3)) == "a tensor of shape [2, 3]"
    assert describe(True) == "the number True"
    assert describe({}) == "a dict"


def test_few_wrong_answers_are_listed(monkeypatch):
    listing.faults(*TABLE["03_rmsnorm"])
    one = exercises.EXERCISES["rmsnorm.parameters"]
    monkeypatch.setattr(one, "wrong", one.wrong[:1])
    said = listing.few_wrong_answers(["rmsnorm.parameters"])
    assert said == ["rmsnorm.parameters: 1 wrong answers, not 3"]
    assert said[0] in listing.faults(*TABLE["03_rmsnorm"])


def test_the_command(monkeypatch, capsys):
    call = caller("exercises", monkeypatch, capsys)
    code, out, err = call("03_rmsnorm")
    assert (code, err) == (0, "")
    assert "eps_outside: eps belongs inside the root" in out
    refused(call("99_nothing"), "no chapter 99_nothing")
