"""Checkers of chapter 17."""

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from llama_tut.exercises import (
    exercise,
    expect,
    expect_close,
    wrong,
    wrong_variants,
)


class Watch:
    """Notes what an answer does to the file at `path`, and when."""

    def __init__(self, path):
        self.path, self.flushed, self.source = path, False, None
        self.old_stayed = True
        self.calls = {n: getattr(os, n) for n in ("fsync", "replace")}
        self.calls["rename"] = os.rename

    def write(self, file):
        """What the reader's function is to call: it writes b"new"."""
        self.look()
        file.write(b"new")

    def look(self):
        old = self.path.exists() and self.path.read_bytes() == b"old"
        self.old_stayed = self.old_stayed and old

    def fsync(self, descriptor):
        self.flushed = self.flushed or os.fstat(descriptor).st_size == 3
        self.calls["fsync"](descriptor)

    def moved(self, name):
        def move(source, target, **options):
            if Path(target) == self.path:
                self.look()
                self.source = Path(source)
                self.early = not self.flushed
            return self.calls[name](source, target, **options)

        return move

    def watching(self):
        """A context in which the calls of the operating system are noted."""
        noted = {n: self.moved(n) for n in ("replace", "rename")}
        return mock.patch.multiple(os, fsync=self.fsync, **noted)


@exercise("checkpoint.replace")
def check_replace(answer):
    """A file that is replaced as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.json")
        path.write_bytes(b"old")
        watch = Watch(path)
        with watch.watching():
            answer(path, watch.write)
        expect(
            watch.old_stayed,
            "for a moment the old content is gone and the new one is not "
            "there: a process that dies then leaves nothing",
        )
        expect(path.read_bytes() == b"new", "the file does not hold the new")
        expect(watch.source, "the new content never gets the name by renaming")
        expect(
            watch.source.parent == path.parent,
            "the temporary file lies in another folder, perhaps on another "
            "disk: then renaming is a copy, and a copy can stop in the middle",
        )
        expect(
            not watch.early,
            "the new name is given before fsync: after a power cut it may "
            "stand on an empty file",
        )
        left = {file.name for file in Path(folder).iterdir()}
        expect(left == {path.name}, f"left over: {left - {path.name}}")


@wrong("checkpoint.replace", "the old content is gone")
def in_place(path, write):
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return path


@wrong("checkpoint.replace", "before fsync")
def flushed_after_the_rename(path, write):
    half = path.with_suffix(".tmp")
    with open(half, "wb") as file:
        write(file)
        os.replace(half, path)
        file.flush()
        os.fsync(file.fileno())
    return path


@wrong("checkpoint.replace", "before fsync")
def synced_without_flush(path, write):
    half = path.with_suffix(".tmp")
    with open(half, "wb") as file:
        write(file)
        os.fsync(file.fileno())  # Python's own buffer is not written yet
    os.replace(half, path)
    return path


@wrong("checkpoint.replace", "left over")
def copied(path, write):
    half = path.with_suffix(".tmp")
    with open(half, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    more = path.with_suffix(".tmp2")
    shutil.copy(half, more)
    os.replace(more, path)
    return path


@wrong("checkpoint.replace", "the old content is gone")
def remove_first(path, write):
    half = path.with_suffix(".tmp")
    with open(half, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    half.rename(path)
    return path


@wrong("checkpoint.replace", "before fsync")
def without_fsync(path, write):
    half = path.with_suffix(".tmp")
    with open(half, "wb") as file:
        write(file)
    return half.replace(path)


@wrong("checkpoint.replace", "in another folder")
def elsewhere(path, write):
    with tempfile.NamedTemporaryFile("wb", delete=False) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    shutil.move(file.name, path)
    return path


@exercise("checkpoint.size")
def check_size(answer):
    """Bytes of a checkpoint with AdamW and with Muon."""
    found = answer(100, 10, "adamw")
    expect(found != 880, "the weights themselves are missing")
    expect(found != 1760, "a gradient is not saved: a step throws it away")
    expect(found != 440, "the optimizer's averages are missing")
    expect(found == 1320, f"{found} for 110 numbers: it is 12 bytes each")
    found = answer(100, 10, "muon")
    expect(found != 1320, "Muon keeps one average of a matrix, not two")
    expect(found != 880, "what Muon does not take has AdamW's two averages")
    expect(found == 920, f"{found} for 100 and 10 with Muon: it is 920")
    expect(answer(7, 5, "muon") == 116, "it fails for other counts")


def size_by(matrices, others, optimizer, adamw=12, muon=8, rest=12):
    """Bytes by what a number takes: for wrong answers."""
    if optimizer == "adamw":
        return adamw * (matrices + others)
    return muon * matrices + rest * others


wrong_variants(
    "checkpoint.size",
    size_by,
    {
        "muon_as_adamw": (dict(muon=12), "not two"),
        "with_gradient": (
            dict(adamw=16, muon=16, rest=16),
            "a gradient is not saved",
        ),
        "muon_for_all": (dict(rest=8), "AdamW's two averages"),
        "averages_only": (
            dict(adamw=8, muon=8, rest=8),
            "weights themselves",
        ),
        "weights_only": (
            dict(adamw=4, muon=4, rest=4),
            "averages are missing",
        ),
        "in_bfloat16": (dict(adamw=6, muon=6, rest=6), "12 bytes each"),
    },
)


@exercise("checkpoint.interval")
def check_interval(answer):
    """The interval that loses the least time."""
    interval, lost = answer(50.0, 10_000.0, 0.0)
    expect(
        abs(interval - 500_000**0.5) > 1,
        "a failure loses half an interval on average, not a whole one",
    )
    expect_close(interval, 1000.0, "the sum is smallest at 1,000 s", 1e-3)
    expect(
        abs(lost - 0.05) > 1e-3,
        "you count the saves or the failures: both lose time, here equally",
    )
    expect_close(lost, 0.1, "50/1000 for saves, 500/10,000 for failures")
    interval, lost = answer(50.0, 10_000.0, 300.0)
    expect_close(
        interval,
        1000.0,
        "the restart costs the same however often one saves: it does not "
        "move the minimum",
        1e-3,
    )
    expect(abs(lost - 0.1) > 1e-6, "the restart is time lost too")
    expect_close(lost, 0.13, "each failure also loses the restart")


@wrong("checkpoint.interval", "half an interval")
def whole_interval(save, fails, restart):
    interval = (save * fails) ** 0.5
    return interval, save / interval + (interval + restart) / fails


@wrong("checkpoint.interval", "both lose time")
def saves_only(save, fails, restart):
    interval = (2 * save * fails) ** 0.5
    return interval, save / interval


@wrong("checkpoint.interval", "time lost too")
def without_restart(save, fails, restart):
    interval = (2 * save * fails) ** 0.5
    return interval, save / interval + interval / 2 / fails


@wrong("checkpoint.interval", "move the minimum")
def restart_as_save(save, fails, restart):
    interval = (2 * (save + restart) * fails) ** 0.5
    return interval, save / interval + (interval / 2 + restart) / fails
