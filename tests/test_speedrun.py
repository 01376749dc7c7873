"""The laptop speedrun: its records, what is measured, and `make train`."""

import json
import re
import shlex
from pathlib import Path
from statistics import mean

import pytest
import speedrun
from small_model import caller, refused
from train import EXTRA, build_parser
from training_setup import TINY, tiny_data

from llama_tut.tools.options import configure

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "speedrun.json"


@pytest.mark.parametrize("record", speedrun.RECORDS + speedrun.OTHERS)
def test_every_record_is_a_run_that_can_be_made(record):
    options = {**speedrun.options_of(record), "data": "x", "out": "y"}
    configure(options, EXTRA)


def test_a_record_changes_something_and_keeps_the_rest():
    options = [speedrun.options_of(record) for record in speedrun.RECORDS]
    ranks = [record.ranks for record in speedrun.RECORDS]
    for i, record in enumerate(speedrun.RECORDS[1:], 1):
        assert options[i] == options[i - 1] | record.options
        assert (options[i], ranks[i]) != (options[i - 1], ranks[i - 1])


def test_options_become_words():
    options = {"learning_rate": 4e-3, "compile": True, "plain": False}
    assert list(speedrun.arguments(options)) == [
        *("--learning-rate", "0.004", "--compile", "--no-plain")
    ]


def test_make_train_is_the_last_record_for_longer():
    """The same options, but for the steps, and what it shows on the way."""
    script = (ROOT / "scripts" / "make_train.sh").read_text()
    (line,) = re.findall(r"show .*train_ddp\.sh((?:.*\\\n)*.*)", script)
    words = line.replace("\\\n", " ")
    given = vars(build_parser().parse_args(shlex.split(words)))
    shown = "data out resume choice eval_every".split()
    own = {k: v for k, v in given.items() if k not in shown}
    assert own == speedrun.options_of(speedrun.OTHERS[-1])
    assert own["steps"] > speedrun.RECORDS[-1].options["steps"]
    assert f"NPROC={speedrun.RECORDS[-1].ranks} " in script


def test_one_run_gives_its_numbers(tmp_path, monkeypatch):
    """A tiny record, of one process and of two ranks."""
    data = tiny_data(tmp_path)
    small = TINY | {"steps": 3, "tokens_per_step": 64}
    records = [
        speedrun.Record("one", "", small),
        speedrun.Record("two", "", {}, ranks=2),
    ]
    monkeypatch.setattr(speedrun, "RECORDS", records)
    found = speedrun.measure(records, data, 64, seeds=(1,))
    (before,), (run,) = (one["runs"] for one in found)
    for one in (run, before):
        assert one["seed"] == 1 and one["steps"] == 3
        assert one["tokens"] == 3 * 64
        assert one["seconds"] > 0
    # The mean over ranks rounds differently, and nothing else.
    assert run["val_loss"] == pytest.approx(before["val_loss"], rel=1e-4)


def test_an_unknown_record_is_refused_in_one_line(monkeypatch, capsys):
    refused(caller("speedrun", monkeypatch, capsys)("--record", "no such"))


@pytest.mark.skipif(not COMMITTED.exists(), reason="not measured")
def test_committed_records_reach_the_target_and_are_faster():
    found = json.loads(COMMITTED.read_text())
    assert found["target"] == speedrun.TARGET
    assert [one["name"] for one in found["records"]] == speedrun.NAMES
    for one, record in zip(found["records"], speedrun.RECORDS, strict=True):
        assert one["options"] == speedrun.options_of(record)
        assert [run["seed"] for run in one["runs"]] == list(speedrun.SEEDS)
        bits = [run["bits_per_byte"] for run in one["runs"]]
        assert mean(bits) <= speedrun.TARGET, one["name"]
    seconds = [
        mean(run["seconds"] for run in one["runs"]) for one in found["records"]
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 2 * seconds[-1]
