"""Benchmarks: bad input is one line, exit code 2, and no result file changes."""

import importlib
import sys

import pytest

from llama_tut.tools import cli
from llama_tut.tools.machine import RESULTS


@pytest.mark.parametrize(
    "line",
    [
        "bench_loading --rounds 0",
        "bench_generate --new 0",
        "bench_generate --threads 0",
        "bench_generate --prompts 0",
        "bench_generate --model /nowhere",
        "bench_train --rounds 0",
        "bench_train --threads 0",
        "bench_train --litgpt /nowhere",
        "bench_hellaswag speed --limit 0",
        "bench_hellaswag speed --group 0",
        "bench_hellaswag speed --threads 0",
        "bench_hellaswag speed --file /nowhere",
        "bench_hellaswag faults --file /nowhere",
        "bench_hellaswag whole /nowhere /nowhere",
        "gpu --only nothing",
        "gpu --seconds 0",
        "gpu --data /nowhere",
        "gpu --tokenizer /nowhere",
    ],
)
def test_bad_input_is_one_line(line, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in RESULTS.iterdir()}
    words = line.split()
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.run(importlib.import_module(words[0]).main)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in RESULTS.iterdir()}
