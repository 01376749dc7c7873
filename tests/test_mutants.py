"""The faults of scripts/mutants.py still fit the source that they break."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location(
    "mutants", ROOT / "scripts" / "mutants.py"
)
mutants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutants)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_the_fault_can_be_planted(mutant):
    source = (ROOT / "llama_tut" / mutant.file).read_text()
    compile(mutants.planted(mutant, source), mutant.file, "exec")
    for test in mutant.tests.split():
        file, _, name = test.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert f"def {name}(" in text if name else text


def test_one_that_does_not_fit_says_so():
    mutant = mutants.MUTANTS[0]
    with pytest.raises(ValueError, match="0 times; bring scripts/mutants.py"):
        mutants.planted(mutant, "another text")
    with pytest.raises(ValueError, match="2 times"):
        mutants.planted(mutant, 2 * mutant.old)


@pytest.mark.slow
def test_a_fault_is_caught_and_a_harmless_change_survives(tmp_path):
    mutant = mutants.MUTANTS[0]
    test = mutants.tests_that_fail(mutant, tmp_path / "a")
    assert test == mutant.tests
    harmless = mutant._replace(new=mutant.old + "  ".strip())
    assert mutants.tests_that_fail(harmless, tmp_path / "b") is None
