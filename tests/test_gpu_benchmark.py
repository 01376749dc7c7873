"""benchmarks/gpu.py: every part on a CPU, failures that stay alone, an end in time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
PARTS = (
    "ceilings tests training shapes head_loss profiles ranks generation run"
).split()


def call(out, *args, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--out", str(out), *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    done = call(out, "--seconds", "600")
    assert done.returncode == 0, done.stderr
    return out


def read(folder, part):
    return json.loads((folder / f"gpu_{part}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_writes_what_it_found(folder, part):
    found = read(folder, part)
    log = (folder / f"{part}.log").read_text()
    assert found["status"] == "done", log[-2000:]
    assert found["results"]
    assert {"torch", "processor", "command", "arguments"} <= set(
        found["machine"]
    )
    for name, value in found["results"].items():
        assert "error" not in str(value), (name, value)


@pytest.mark.slow
def test_the_results_make_sense(folder):
    steps = read(folder, "training")["results"]
    assert list(steps) == list(gpu.LADDER)
    first = {value["first_loss"] for value in steps.values()}
    assert max(first) - min(first) < 0.01  # one model, many ways
    losses = read(folder, "head_loss")["results"]
    assert all(abs(value["loss"] - 6.24) < 0.3 for value in losses.values())
    assert read(folder, "ranks")["results"]["resume"]["equal"]
    trained = read(folder, "run")["results"]
    assert trained["last line"]["step"] == trained["losses"][-1][0]
    losses = [row["val_loss"] for row in trained["small runs"]]
    assert abs(trained["predicted"]["val_loss"] - losses[-1]) < 1
    assert "sample 1" in trained["samples"]
    assert read(folder, "tests")["results"]["exit code"] == 0


@pytest.mark.slow
def test_some_rows_are_measured_again_and_the_others_kept(tmp_path):
    row = {"first_loss": 1.0}
    path = tmp_path / "gpu_training.json"
    path.write_text(json.dumps({"results": {"plain": row, "old": row}}))
    done = call(tmp_path, "--only", "training", "--rows", "loss*", "plai?")
    assert done.returncode == 0
    results = read(tmp_path, "training")["results"]
    assert list(results) == ["plain", "old", "loss by tiles"]
    assert results["plain"] != row and results["old"] == row


def test_a_file_that_cannot_be_read_is_kept(tmp_path):
    path = tmp_path / "gpu_training.json"
    path.write_text("{ cut off")
    done = call(tmp_path, "--only", "training", "--rows", "plain")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(path) in done.stderr and path.read_text() == "{ cut off"


@pytest.mark.slow
def test_a_part_that_fails_leaves_the_others_alone(tmp_path):
    done = call(
        tmp_path, "--only", "generation", "head_loss", "--model", "nowhere"
    )
    assert done.returncode == 0
    assert read(tmp_path, "generation")["status"] == "failed"
    assert "nowhere" in read(tmp_path, "generation")["error"]
    assert read(tmp_path, "head_loss")["status"] == "done"


@pytest.mark.slow
def test_it_ends_within_its_time_whatever_a_part_does(tmp_path):
    began = time.monotonic()
    done = call(tmp_path, "--only", "ranks", "run", "--seconds", "6")
    assert time.monotonic() - began < 60
    assert done.returncode == 0
    assert read(tmp_path, "ranks")["status"] == "out of time"
    assert "run: no time is left" in done.stdout
