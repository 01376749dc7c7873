"""A run's folder, its log, its wish to stop."""

import json
import os
import signal
import sys
import threading
import time

import pytest
import torch

from llama_tut.tools import runs
from llama_tut.tools.files import InputError, read_jsonl
from llama_tut.tools.runs import (
    Recorder,
    check_finite,
    due,
    lock_folder,
    print0,
    read_metrics,
    stop_signals,
    truncate_metrics,
)

ABOUT = {"config": {"steps": 3}, "data": {}}


def line(step):
    return {"step": step, "loss": 1.5, "tokens": 8, "tokens_per_second": 2.0}


def test_a_folder_is_locked_once(tmp_path):
    with lock_folder(tmp_path / "run", resume=False):
        with pytest.raises(InputError, match="is in use by a run"):
            lock_folder(tmp_path / "run", resume=True, wait_s=0)
    with lock_folder(tmp_path / "run", resume=False):
        pass


def test_a_run_that_was_waited_for_is_not_overwritten(tmp_path):
    """Two are started together: the second finds the run of the first."""
    first, second = lock_folder(tmp_path, resume=False), []

    def start():
        try:
            lock_folder(tmp_path, resume=False)
        except InputError as error:
            second.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    time.sleep(0.2)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    first.lock.release()
    thread.join()
    assert "holds a run already" in second[0]
    with lock_folder(tmp_path, resume=True, wait_s=0):
        pass  # it has given the lock back


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "checkpoints"])
def test_a_folder_of_somebody_else_is_refused(tmp_path, name):
    if name == "checkpoints":
        (tmp_path / name / "last.ckpt").mkdir(parents=True)
    else:
        (tmp_path / name).write_text("{}")
    for resume in (False, True):
        with pytest.raises(InputError, match="holds no training run"):
            lock_folder(tmp_path, resume)


def test_what_counts_as_a_run(tmp_path):
    """An empty log of a failed start does not; a step or a checkpoint does."""
    (tmp_path / "config.json").write_text(json.dumps(ABOUT))
    (tmp_path / "metrics.jsonl").touch()
    with lock_folder(tmp_path, resume=False):
        pass
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="holds a run already"):
        lock_folder(tmp_path, resume=False)
    with lock_folder(tmp_path, resume=True):
        pass


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    """Never "no checkpoint: starting at step 0" because of a permission."""
    (tmp_path / "config.json").write_text(json.dumps(ABOUT))
    (tmp_path / "checkpoints").mkdir()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="checkpoints: Permission denied"):
        lock_folder(tmp_path, resume=True)


def test_metrics_are_cut_at_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 3)  # nothing there
    path.write_text("".join(json.dumps(line(s)) + "\n" for s in (1, 2, 3)))
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # the process died here
    assert [one["step"] for one in read_metrics(path)] == [1, 2, 3]
    truncate_metrics(path, 2)
    assert [one["step"] for one in read_metrics(path)] == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(InputError, match="line 2"):  # damaged, not cut off
        read_metrics(path)


def test_a_cut_line_is_refused_unless_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    assert [n for n, _ in read_jsonl(path, cut_off="drop")] == [1]
    with pytest.raises(InputError, match="line 2"):
        list(read_jsonl(path))


def test_a_recorder_writes_and_notes_problems(tmp_path):
    recorder = Recorder(tmp_path, ABOUT, 0, 3)
    recorder.write(line(1))
    recorder.flush()
    assert read_metrics(tmp_path / "metrics.jsonl") == [line(1)]
    assert json.loads((tmp_path / "config.json").read_text()) == ABOUT
    recorder.file.close()
    recorder.file = open("/dev/full", "a")
    recorder.write(line(2))
    assert "No space left" in recorder.problem
    with pytest.raises(InputError, match="No space left"):
        recorder.flush()
    recorder.close()


def test_print0_speaks_on_rank_0_only(capsys, monkeypatch):
    print0(1, "no")
    print0(0, "yes ± é")
    assert capsys.readouterr().out == "yes ± é\n"
    monkeypatch.setattr(sys, "stdout", None)  # python script >&-
    print0(0, "nobody listens")


def test_a_reader_that_goes_away_is_no_error(monkeypatch):
    went = []

    def broken(*args, **options):
        raise BrokenPipeError

    monkeypatch.setattr(runs.tqdm, "write", broken)
    monkeypatch.setattr(runs, "quiet", lambda: went.append(1))
    print0(0, "nobody listens")
    assert went == [1]


def test_signals_are_noted_and_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as seen:
        assert seen == []
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):  # the second Ctrl-C
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_due():
    assert [step for step in range(1, 8) if due(step, 3)] == [3, 6]
    assert not any(due(step, 0) for step in range(9))


@pytest.mark.parametrize("where", ["weights", "averages"])
def test_numbers_that_are_not_finite_are_named(where):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    check_finite(model, optimizer, "here are", "do this")
    tensor = model.bias
    if where == "averages":
        tensor = optimizer.state[model.bias]["exp_avg"]
    with torch.no_grad():
        tensor[0] = float("nan")
    with pytest.raises(InputError, match="here are NaN or infinity in bias"):
        check_finite(model, optimizer, "here are", "do this")
