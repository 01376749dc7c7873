"""Runs: a folder that belongs to one run, its log, and the wish to stop."""

import json
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from llama_tut.tools.files import (
    InputError,
    read_json,
    read_jsonl,
    require,
    write_atomic,
    write_json,
)
from llama_tut.tools.ranks import own_part


@dataclass
class Run:
    """What the functions of a run share (chapter 18)."""

    config: object  #: its TrainConfig
    info: object  #: the data's DatasetInfo
    ranks: object  #: the Ranks that train together
    layout: object  #: where the model lives, a Layout of chapter 16 or 24
    say: object  #: prints a line, on rank 0
    model: object  #: as it was built; it is evaluated, sampled and saved
    build: object  #: makes another model of this kind
    parallel: object  #: what a step calls: compiled, with DDP around it
    optimizer: object  #: that of `model`
    autocast: object  #: makes the context of matrix products
    loader: object  #: rows to train on; its position is saved
    validation: object  #: rows that are never trained on
    step: int = 0  #: steps that are done
    recorder: object = None  #: its Recorder, on rank 0
    prompt: tuple = ()  #: ids that a sample begins with
    tokenizer: object = None  #: of transformers, where it is needed
    score_batch: object = None  #: scores rows of HellaSwag
    examples: object = None  #: of HellaSwag, if it is measured
    choices: object = None  #: of continuation choice, if it is measured
    baselines: dict = field(default_factory=dict)  #: accuracies of choice
    after_step: object = None  #: (model, line), called after each step


def print0(rank, line):
    """One line to stdout on rank 0, above a progress bar if there is one.

    A reader that has gone away (`train.py | head`) does not end a run.
    """
    if rank != 0 or sys.stdout is None:
        return
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        quiet()


def quiet():
    """Send what is still printed to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def lock_folder(folder, resume, wait_s=5):
    """Make a run's folder and lock it; a context that holds the lock.

    The kernel takes the lock back when the process ends, however it ends.

    Raises:
        InputError: the folder cannot be made or read, another process has it,
            it holds something else than a run, or it holds a run and `resume`
            is off.
    """
    folder = Path(folder)
    try:
        check_folder(folder, resume)
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock").acquire(timeout=wait_s)
        try:
            check_folder(folder, resume)  # we may have waited for a run's end
        except BaseException:
            held.lock.release()
            raise
    except Timeout as error:
        raise InputError(
            f"{folder} is in use by a run that is going on: wait for it, "
            "or choose another --out"
        ) from error
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"{where}: {error.strerror}") from error
    return held


def check_folder(folder, resume):
    """Refuse a folder of somebody else, and a run that would be overwritten.

    Raises:
        OSError: it cannot be looked into.
        InputError: it is not for this run.
    """
    if not folder.is_dir():
        return
    inside = set(os.listdir(folder)) - {".lock"}
    checkpoints = folder / "checkpoints"
    saved = checkpoints.is_dir() and any(os.scandir(checkpoints))
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        metrics.open("rb").close()  # readable?
    begun = saved or (metrics.is_file() and metrics.stat().st_size > 0)
    about = folder / "config.json"
    ours = not inside or metrics.is_file()
    if not ours and about.is_file():
        ours = {"config", "data"} <= read_json(about).keys()
    require(
        ours,
        f"{folder} is not empty and holds no training run: choose another "
        "--out",
    )
    require(
        resume or not begun,
        f"{folder} holds a run already: go on with --resume, or choose "
        "another --out",
    )


def read_metrics(path):
    """The lines of a metrics.jsonl; one cut off at the end is left out."""
    return [line for _, line in read_jsonl(path, cut_off="drop")]


def was_measured(folder):
    """Whether the last line of a run's metrics has a validation loss."""
    lines = read_metrics(folder / "metrics.jsonl")
    return bool(lines) and "val_loss" in lines[-1]


def truncate_metrics(path, step):
    """Drop the lines of steps after `step`: they will be done again."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomic(path, text.encode())


class Recorder:
    """What rank 0 writes of a run of `steps`, after the first `step`.

    Args:
        about: how the run was started, for config.json.
    """

    def __init__(self, folder, about, step, steps):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path, self.problem = folder / "metrics.jsonl", None
        write_json(folder / "config.json", about)
        truncate_metrics(self.path, step)
        self.file = open(self.path, "a", encoding="utf-8")
        board = folder / "tensorboard"
        self.board = SummaryWriter(board, purge_step=step + 1)
        self.bar = tqdm(
            total=steps, initial=step, unit="step", disable=None, leave=False
        )

    def write(self, line):
        """Record one step."""
        with self.noting_problems():
            print(json.dumps(line), file=self.file, flush=True)
            for name in line.keys() - {"step", "tokens"}:
                self.board.add_scalar(name, line[name], line["step"])
        if "loss" in line:
            speed = f"{line['tokens_per_second']:,.0f} tokens/s"
            text = f"loss {line['loss']:.3f}, {speed}"
            self.bar.set_postfix_str(text, False)
            self.bar.update()

    def flush(self):
        """Wait until the lines are on the disk.

        Raises:
            InputError: the disk has refused one of them.
        """
        with self.noting_problems():
            os.fsync(self.file.fileno())
        require(not self.problem, self.problem)

    @contextmanager
    def noting_problems(self):
        """Keep the first problem of the disk: all ranks end together."""
        try:
            yield
        except OSError as error:
            reason = f"cannot write {self.path}: {error.strerror}"
            self.problem = self.problem or reason

    def close(self):
        """Close the files, and clear the bar away."""
        for one in (self.bar, self.file, self.board):
            with self.noting_problems(), suppress(BrokenPipeError):
                one.close()


def open_recorder(run):
    """Rank 0: note how the run was started, and open its metrics."""
    folder = Path(run.config.out)
    about = {
        "config": asdict(run.config),
        "command": sys.argv,
        "torch": torch.__version__,
        "data": asdict(run.info),
        "choice": run.baselines,
    }
    try:
        run.recorder = Recorder(folder, about, run.step, run.config.steps)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error


@contextmanager
def stop_signals():
    """Note SIGTERM and SIGINT instead of dying; yields the list of them."""
    seen = []
    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread may have handlers
        return

    def note(number, frame):
        if number == signal.SIGINT and number in seen:
            raise KeyboardInterrupt
        seen.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def due(step, every):
    """Whether something done every so many steps is due now."""
    return every > 0 and step % every == 0


def check_finite(model, optimizer, where, advice):
    """Refuse a number that is not finite in the model or the optimizer."""
    for name, p in model.named_parameters():
        state = optimizer.state.get(p, {})
        tensors = {name: p} | {f"{name}/{key}": v for key, v in state.items()}
        for full, tensor in tensors.items():
            require(
                not torch.is_tensor(tensor)
                or own_part(tensor).isfinite().all(),
                f"{where} NaN or infinity in {full}: {advice}",
            )
