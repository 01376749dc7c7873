"""Checkers pass the folded solutions, and tell wrong answers what is wrong."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

from llama_tut import exercises

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import exercises as listing  # noqa: E402
from export import modules  # noqa: E402

TABLE = {path.stem: (path, module.stem) for path, module in modules().items()}


@pytest.mark.parametrize("stem", TABLE)
def test_checkers_tell_right_from_wrong(stem):
    assert listing.faults(*TABLE[stem]) == []


@pytest.mark.parametrize("stem", TABLE)
def test_each_exercise_has_an_empty_and_a_solved_cell(stem):
    notebook, module = TABLE[stem]
    import_module(f"llama_tut.exercises.{module}")
    cells = nbformat.read(notebook, as_version=4).cells
    for tag, wanted in (("exercise", "not yet"), ("solution", "right")):
        said = "".join(
            output.text
            for cell in cells
            if tag in cell.metadata.get("tags", [])
            for output in cell.outputs
        )
        names = [line.split(":")[0] for line in said.splitlines()]
        known = [n for n in exercises.EXERCISES if n.startswith(module + ".")]
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
    assert said[0] == "rmsnorm.parameters: not yet. it returns nothing yet"
    assert "it raised ZeroDivisionError" in said[1]
    with pytest.raises(ValueError, match="no exercise 'rmsnorm.nonsense'"):
        exercises.check("rmsnorm.nonsense", None)
    with pytest.raises(ValueError, match="no exercise 'nowhere.x'"):
        exercises.check("nowhere.x", None)


def test_the_command(tmp_path):
    def call(*args):
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "exercises.py"), *args],
            capture_output=True,
            text=True,
        )

    done = call("03_rmsnorm")
    assert done.returncode == 0, done.stderr
    assert "eps_outside: eps belongs inside the root" in done.stdout
    refused = call("99_nothing")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: no chapter 99_nothing")
