"""The launcher of ranks: inputs, waiting that can be stopped, exit codes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import run

from llama_tut.tools import launch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
TWO = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0"}
LAUNCH = (
    "from llama_tut.tools import launch; launch.SILENCE_S = 0.2; launch.main()"
)


def train_ddp(**environment):
    """What scripts/train_ddp.sh would start: (exit code, stdout, stderr)."""
    others = {k: v for k, v in os.environ.items() if k not in NAMES}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "train_ddp.sh", "--out", "a b"],
        env={**others, "PYTHON": "echo", **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"NPROC": "0"}, "NPROC is '0'"),
        ({"NPROC": "two"}, "NPROC is 'two'"),
        ({"NPROC": "-1"}, "NPROC is '-1'"),
        ({"NPROC": "99999999999999999999"}, "from 1 to 4096"),
        ({"NNODES": "0"}, "NNODES is '0'"),
        ({"NNODES": "2"}, "NODE_RANK is ''"),
        ({**TWO, "NODE_RANK": "2"}, "from 0 to 1"),
        ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
        ({**TWO, "MASTER_PORT": "70000"}, "from 1 to 65535"),
    ],
)
def test_bad_settings_are_one_line(environment, words):
    code, out, err = train_ddp(**environment)
    assert (code, out) == (2, "") and words in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_one_machine_needs_no_name_of_its_own():
    code, out, err = train_ddp(NPROC="3")
    assert (code, err) == (0, "")
    assert "--standalone --local-addr 127.0.0.1 --nproc-per-node 3" in out
    assert out.endswith("train.py --out a b\n")


def test_several_machines():
    code, out, _ = train_ddp(**TWO, NPROC="8", MASTER_PORT="1234")
    assert code == 0 and "standalone" not in out
    assert "--node-rank 0 --master-addr node0 --master-port 1234" in out


@pytest.mark.parametrize(
    "options, words",
    [
        ([], None),
        (["--nproc-per-node=gpu"], None),
        (["--nproc-per-node=0"], "NPROC is 0"),
        (["--nproc-per-node=x"], "NPROC is x"),
        (["--nnodes=x"], "NNODES is x"),
        (["--nnodes=1:4", "--node-rank=3"], None),
        (["--nnodes=2", "--node-rank=5"], "NODE_RANK is 5"),
        (["--nnodes=2", "--master-port=99999"], "MASTER_PORT is 99999"),
    ],
)
def test_options_of_torchrun(options, words):
    found = launch.problem(run.parse_args([*options, "train.py"]))
    assert (found is None) if words is None else words in found


@pytest.mark.parametrize(
    "codes, signals, wanted",
    [
        ({0: 2, 1: -15}, [], 2),  # bad input of one rank
        ({0: -15, 1: -15}, [15], 143),  # stopped before the workers began
        ({0: 1, 1: -9}, [], 1),
        ({0: 1, 1: 1}, [15], 1),
    ],
)
def test_exit_codes(monkeypatch, capsys, codes, signals, wanted):
    monkeypatch.setattr(launch, "signals", signals)
    failures = {
        rank: SimpleNamespace(exitcode=code, timestamp=rank)
        for rank, code in codes.items()
    }
    assert launch.exit_code(failures) == wanted
    said = capsys.readouterr().err
    assert said.count("\n") == (wanted == 1)
    assert wanted != 1 or "rank 0 failed (1)" in said


def launcher(*options, code=LAUNCH):
    """Start the launcher; its arguments are those of torchrun."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *options],
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_waiting_for_a_machine_can_be_stopped(number):
    port = free_port()
    job = launcher(
        "--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1",
        f"--master-port={port}", "--nproc-per-node=1", "-m", "this",
    )  # fmt: skip
    line = job.stderr.readline()
    assert line == f"waiting for 1 of 2 machines at 127.0.0.1:{port}\n"
    job.send_signal(number)
    _, err = job.communicate(timeout=20)
    assert job.returncode == 128 + number and err == ""


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        job = launcher(
            "--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1",
            f"--master-port={port}", "--nproc-per-node=1", "-m", "this",
        )  # fmt: skip
        _, err = job.communicate(timeout=60)
    assert job.returncode == 2
    assert err.startswith(f"error: port {port} of this machine is taken")
    assert err.count("\n") == 1


STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: open(sys.argv[1] + "/asked", "w"))
open(sys.argv[1] + "/ready", "w").close()
while True:
    time.sleep(0.05)
"""


def test_the_second_interrupt_ends_the_job_at_once(tmp_path):
    (tmp_path / "work.py").write_text(STUBBORN)
    job = launcher(
        "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=1",
        str(tmp_path / "work.py"), str(tmp_path),
    )  # fmt: skip
    for name in ("ready", "asked"):
        for _ in range(600):
            if (tmp_path / name).exists():
                break
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
    job.communicate(timeout=20)
    assert job.returncode == 130
