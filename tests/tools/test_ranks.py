"""Joining other ranks: the environment, waiting, and agreeing."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from llama_tut.tools.devices import choose_device
from llama_tut.tools.files import InputError
from llama_tut.tools.ranks import (
    Ranks,
    any_rank,
    broadcast_object,
    gather_objects,
    mean_over_ranks,
    on_rank_zero,
    shared_errors,
    start,
    stop,
    wait_for_all,
)

WAIT = """
import signal, sys
from llama_tut.tools import ranks
signal.signal(signal.SIGTERM, lambda *_: print("a handler that only notes"))
ranks.SILENCE_S = 0.2
ranks.start("cpu")
"""


def test_alone():
    ranks = start("cpu")
    assert ranks == Ranks(0, 1, torch.device("cpu"), None)
    assert mean_over_ranks(torch.tensor(3.0)) == 3
    assert any_rank(True) and not any_rank(False)
    assert broadcast_object("x") == "x" and gather_objects("x") == ["x"]
    wait_for_all(ranks)
    assert on_rank_zero(ranks, divmod, 7, 2) == (3, 1)
    with pytest.raises(InputError, match="bad line 7"), shared_errors():
        raise InputError("bad line 7")
    with pytest.raises(ZeroDivisionError), shared_errors():
        raise ZeroDivisionError  # a bug is not turned into bad input
    stop()


def test_an_error_of_one_rank_reaches_all(monkeypatch):
    heard = []

    def gather(text, group):  # as rank 0 hears it, when rank 1 has failed
        heard.append(text)
        return [text, "bad line 7"]

    monkeypatch.setattr("llama_tut.tools.ranks.gather_objects", gather)
    with pytest.raises(InputError, match="bad line 7"), shared_errors():
        pass
    assert heard == [None]


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but RANK"),
        ({"RANK": "abc"}, "RANK=abc"),
        ({"RANK": ""}, "RANK="),
        ({"RANK": "1"}, "from 0 to 0"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE=1.5"),
        ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE=999"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "from 0 to 3"),
    ],
)
def test_odd_environments_are_one_line(monkeypatch, environment, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        start("cpu")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "scripts/train_ddp.sh" in str(error.value)


def test_waiting_for_a_rank_can_be_stopped():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        env={**os.environ, **where, "RANK": "0", "WORLD_SIZE": "2"},
        stderr=subprocess.PIPE,
        text=True,
    )
    line = job.stderr.readline()
    assert line == f"waiting for all 2 ranks at 127.0.0.1:{port}\n"
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=20)
    assert (job.returncode, err) == (-signal.SIGTERM, "")


@pytest.mark.parametrize("name", ["tpu", "", "cuda:x"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(InputError, match="take auto, cpu, cuda or mps"):
        choose_device(name)


def test_fewer_gpus_than_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1)
    for name in ("auto", "cuda"):
        with pytest.raises(InputError, match="4 wanted, 2 found"):
            choose_device(name, 0, 4)
