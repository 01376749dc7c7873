"""Training as a reader starts it: ranks, kills, signals, bad input."""

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from training_setup import (
    OPTIONS,
    ROOT,
    finish,
    flags,
    kill_at,
    losses,
    metrics,
    start,
    wait_for_step,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The folder of a run of one rank from step 0 to the end."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    code, _, err = finish(start({"data": data, "out": out, **OPTIONS}, 1))
    assert (code, err) == (0, "")
    return out


def same_run(one, other):
    """The losses of 16 steps and the last validation loss agree."""
    assert len(losses(one)) == 16
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    a, b = (metrics(run)[-1]["val_loss"] for run in (one, other))
    assert a == pytest.approx(b, abs=1e-5)


def test_four_ranks_do_not_change_the_losses(data, unbroken, tmp_path):
    options = {"data": data, "out": tmp_path / "run", **OPTIONS}
    code, out, err = finish(start(options, 4))
    assert (code, err) == (0, ""), err
    same_run(tmp_path / "run", unbroken)


@pytest.fixture(scope="module")
def two_machines(data, tmp_path_factory):
    """A run of two ranks, its folder and what the machines said.

    Both machines are this one: a torchrun each, joined over a port.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    out = tmp_path_factory.mktemp("runs") / "two_machines"
    options = {"data": data, "out": out, **OPTIONS, "micro_batch_size": 1}
    nodes = [start(options, 1, NODE_RANK=str(i), **where) for i in (0, 1)]
    ends = [finish(node) for node in nodes]
    # On a busy machine one may have to wait for the other, and says so.
    waiting = f"waiting for 1 of 2 machines at 127.0.0.1:{port}\n"
    assert all(code == 0 and err in ("", waiting) for code, _, err in ends)
    return out, [said for _, said, _ in ends]


def test_two_machines_do_not_change_the_losses(two_machines, unbroken):
    """Nor does the micro batch."""
    out, said = two_machines
    assert "step 16: validation" in said[0] and said[1] == ""
    same_run(out, unbroken)


def stub(folder, name, text):
    """Put a program called `name` in front of the others."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_slurm_example(data, tmp_path):
    """With stand-ins for Slurm's programs: trains, and queues again."""
    stub(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/said')
    stub(tmp_path, "srun", 'exec "$@"')
    options = {"data": data, "out": tmp_path / "run", **OPTIONS, "steps": 2}
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
    }
    process = start(options, 2, "train_slurm.sh", **environment)
    code, out, err = finish(process)
    assert (code, err) == (0, "") and "starting at step 0" in out
    assert (tmp_path / "said").read_text() == "show hostnames here\n"
    stub(tmp_path, "srun", "exit 0")  # stopped by SIGTERM before the end
    options["out"] = tmp_path / "other"
    code, _, _ = finish(start(options, 2, "train_slurm.sh", **environment))
    assert code == 0
    assert (tmp_path / "said").read_text().endswith("requeue 7\n")


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """The options of a run on two ranks that was killed behind step 5."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    options = {"data": data, "out": out, **OPTIONS, "micro_batch_size": 1}
    kill_at(start(options, 2), out, 6)
    return options


def test_kill_twice_and_resume_bit_for_bit(killed, two_machines, tmp_path):
    """Also across an epoch's end."""
    whole, out = two_machines[0], tmp_path / "run"
    shutil.copytree(killed["out"], out)
    options = {**killed, "out": out, "resume": True}
    process = start(options, 2)
    kill_at(process, out, 11)
    code, said, err = finish(start(options, 2))
    assert (code, err) == (0, "")
    assert re.search(r"resumed at step (8|12)\b", said)
    assert losses(out) == losses(whole)
    assert list(losses(out)) == list(range(1, 17))
    text = (whole / "model" / "model.safetensors").read_bytes()
    assert text == (out / "model" / "model.safetensors").read_bytes()


def train_here(monkeypatch, capsys, options):
    """Run scripts/train.py in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(options)])
    monkeypatch.syspath_prepend(ROOT / "scripts")
    try:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_resume_on_another_number_of_ranks(
    killed, unbroken, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(killed["out"], tmp_path / "run")
    options = {"out": out, "resume": True}
    code, _, err = train_here(monkeypatch, capsys, options)
    assert (code, err) == (0, "")
    same_run(out, unbroken)


def test_sigterm_saves_and_a_second_start_is_refused(
    data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    options = {"data": data, "out": out, **OPTIONS, "checkpoint_every": 0}
    options["steps"] = 100_000
    process = start(options, 2)
    wait_for_step(process, out, 3)
    again = {**options, "resume": True}
    code, _, err = train_here(monkeypatch, capsys, again)
    assert code == 2 and "in use" in err
    assert len(err.splitlines()) == 1
    process.terminate()
    code, said, err = finish(process)
    assert (code, err) == (0, "")
    step = metrics(out)[-1]["step"]
    assert f"stopped at step {step:,}" in said
    assert (out / "checkpoints" / f"step_{step:08d}").is_dir()


def test_interrupt_saves_a_single_process(data, tmp_path):
    out = tmp_path / "run"
    options = {"data": data, "out": out, **OPTIONS, "steps": 100_000}
    process = start(options)
    wait_for_step(process, out, 2)
    process.send_signal(signal.SIGINT)
    code, said, err = finish(process)
    assert (code, err) == (0, "")
    step = metrics(out)[-1]["step"]
    assert (out / "checkpoints" / f"step_{step:08d}").is_dir()


def test_lost_rank_ends_the_job(data, tmp_path):
    out = tmp_path / "run"
    options = {"data": data, "out": out, **OPTIONS, "steps": 100_000}
    process = start(options, 2)
    wait_for_step(process, out, 2)
    began = time.monotonic()
    psutil.Process(process.pid).children()[1].kill()
    code, _, err = finish(process)
    assert code == 1 and time.monotonic() - began < 60
    assert "rank 1 was killed by signal 9" in err.splitlines()[-1]


def test_bad_input_under_torchrun_is_one_line(data, tmp_path):
    out = tmp_path / "run"
    options = {"data": data, "out": out, **OPTIONS, "hidden_sizes": 3}
    code, _, err = finish(start(options, 2))
    assert code == 2 and not out.exists()
    assert err.startswith("error: unrecognized arguments: --hidden-sizes 3")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"no_such_option": 1}, "unrecognized arguments"),
        ({"steps": "ten"}, "invalid int value"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"max_norm": "inf"}, "--max-norm must be at least 0 and finite"),
        ({"beta1": "nan"}, "--beta1 must be at least 0 and at most 0.99999"),
        ({"mlp": "mixtral", "balance": "inf"}, "--balance must be a number"),
        ({"mlp": "deepseek", "dense_layers": 9}, "must have experts"),
        ({"mlp": "mixtral", "text_model": "x"}, "--mlp is not for"),
        ({"text_model": "x"}, "--hidden-size: the text model brings"),
        ({"dtype": "float8"}, "invalid choice"),
        ({"preset": "huge"}, "'huge' is unknown: take laptop"),
        ({"data": "nowhere"}, "dataset.json"),
        ({"data": ""}, "--data is missing"),
        ({"out": ""}, "--out is missing"),
        ({"device": "tpu"}, "take auto, cpu"),
        pytest.param(
            {"device": "cuda"},
            "device cuda",
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="there is one"
            ),
        ),
        ({"micro_batch_size": 3}, "512 is not a multiple of micro batch 3"),
        ({"num_attention_heads": 3}, "hidden_size 32 is not a multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"vocab_size": 100}, "--vocab-size 100"),
        ({"max_position_embeddings": 8}, "--sequence-length 32 is longer"),
        ({"rope_scaling": "{"}, "not a RopeScaling"),
        ({"hidden_size": 10**6, "head_dim": 64}, "a rank needs"),
        ({"sequence_length": 4096, "tokens_per_step": 8192}, "take more text"),
        ({"choice": 9}, "--choice takes rows of 60 tokens"),
        ({"parallel": "zero"}, "invalid choice"),
        ({"tensor_parallel": 0}, "--tensor-parallel 0 must be at least 1"),
        ({"tensor_parallel": 2}, "--tensor-parallel 2 does not divide the 1"),
        ({"choice": 9, "sequence_length": 64}, "only 0 such items"),
        ({"resume": True, "out": "FILE"}, "File exists"),
        ({"out": "FILE/run"}, "Not a directory"),
    ],
)
def test_bad_input_is_one_line(
    data, tmp_path, monkeypatch, capsys, changes, words
):
    (tmp_path / "FILE").touch()
    options = {"data": data, "out": "run", **OPTIONS, **changes}
    monkeypatch.chdir(tmp_path)
    code, _, err = train_here(monkeypatch, capsys, options)
    assert code == 2 and words in err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    left = {path.name for path in tmp_path.rglob("*")} - {".lock", "run"}
    assert left == {"FILE"}


@pytest.mark.parametrize("how", ["cut", "flip", "empty", "missing"])
def test_damaged_shard_is_one_line(data, tmp_path, monkeypatch, capsys, how):
    copy = shutil.copytree(data, tmp_path / "copy")
    shard = copy / "train_00000.bin"
    content = bytearray(shard.read_bytes())
    if how == "flip":
        content[-9] ^= 1
    keep = {"cut": -3, "flip": None, "empty": 0, "missing": 0}[how]
    shard.write_bytes(content[:keep])
    if how == "missing":
        shard.unlink()
    options = {"data": copy, "out": tmp_path / "run", **OPTIONS}
    code, _, err = train_here(monkeypatch, capsys, options)
    assert code == 2 and len(err.splitlines()) == 1 and str(shard) in err


def test_llama3_8b_says_what_is_lacking(data, tmp_path, monkeypatch, capsys):
    options = {"data": data, "out": tmp_path / "run", "preset": "llama3-8b"}
    code, _, err = train_here(
        monkeypatch, capsys, {**options, "device": "cpu", "vocab_size": 128256}
    )
    assert code == 2 and len(err.splitlines()) == 1
    assert "choose a smaller model" in err
    assert "--parallel fsdp on more ranks" in err


def test_start_into_a_finished_run_needs_resume(
    data, unbroken, monkeypatch, capsys
):
    before = (unbroken / "metrics.jsonl").read_bytes()
    options = {"data": data, "out": unbroken, **OPTIONS}
    code, _, err = train_here(monkeypatch, capsys, options)
    assert code == 2 and "--resume" in err and len(err.splitlines()) == 1
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_full_disk_is_one_line(data, tmp_path, monkeypatch, capsys):
    """A small file system of its own, where the test may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        options = {"data": data, "out": disk / "run", **OPTIONS}
        code, _, err = finish(start({**options, "keep_checkpoints": 9}, 2))
        assert code == 2 and len(err.splitlines()) == 1, err
        assert "No space left" in err
        left = sorted((disk / "run" / "checkpoints").iterdir())
        assert left and not any(p.name.startswith(".") for p in left)
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        again = {**options, "resume": True}
        code, said, err = train_here(monkeypatch, capsys, again)
        assert (code, err) == (0, "")
        assert f"resumed at step {int(left[-1].name[5:])}" in said
    finally:
        subprocess.run(["umount", str(disk)])


@pytest.mark.parametrize("how", ["reader goes away", "closed"])
def test_a_closed_stdout_does_not_end_a_run(data, tmp_path, how):
    """`train.py | head -1` and `train.py >&-` train to the end.

    The one in a locale without UTF-8.
    """
    where = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    out = tmp_path / "run"
    options = flags({"data": data, "out": out, **OPTIONS, "steps": 4})
    script = f"{sys.executable} {ROOT / 'scripts' / 'train.py'}"
    pipe = "| head -1" if how == "reader goes away" else ">&-"
    line = f"set -o pipefail; {script} {' '.join(options)} {pipe}"
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (where if "|" in pipe else {}),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (out / "model").is_dir() and (out / "samples.txt").is_file()
    assert len(metrics(out)) == 4
