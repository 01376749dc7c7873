"""A data folder: one process writes it, and it is complete or says that it is not."""

import errno
import itertools
import os
import shutil
import sys
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import InputError, require, write_atomic

# In a folder that is unfinished:
NOTE = "settings"  # the hash of what it will hold
PROGRESS = "progress.npz"  # how far it has come
OWN = ("tokenizer", "train_*.bin*", "val_*.bin*", f"{PROGRESS}*", NOTE)
OWN += ("train.npz", "val.npz", "examples")  # of pictures


def finished(out, key):
    """Whether the folder is complete and was made with the same settings.

    `dataset.json` is written last, so where it is, all the rest is.

    Raises:
        InputError: it holds another data set.
    """
    if not os.path.lexists(out / "dataset.json"):
        return False
    require(
        load_dataset_info(out).settings == key,
        f"{out} holds another data set: delete it, or choose another folder",
    )
    return True


def check_folder(out, ours=()):
    """Refuse a folder that holds files of others.

    Args:
        ours: patterns of names that it may hold.
    """
    require(out.is_dir() or not out.exists(), f"{out} exists and is no folder")
    if out.exists() and not (out / NOTE).exists():
        ours = ("lock", f"{NOTE}.*.tmp", *ours)
        for path in out.iterdir():
            require(
                any(path.match(pattern) for pattern in ours),
                f"{out} holds files ({path.name}), but is not a data folder",
            )


def begin(out, key):
    """Note what the folder will hold, or find the same note in it.

    Raises:
        InputError: it is on the way to another data set, and has come far.
    """
    note = out / NOTE
    if note.exists() and note.read_text() != key:
        require(
            not (out / PROGRESS).exists(),
            f"{out} holds an unfinished data set with other settings: delete "
            "it, or choose another folder",
        )
        remove(out, *OWN)
    remove(out, "*.tmp", "tokenizer/*.tmp")
    write_atomic(note, key.encode())


def remove(folder, *patterns):
    """Delete what carries one of our own names in a folder of ours."""
    for path in itertools.chain.from_iterable(map(folder.glob, patterns)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def make_once(out, key, fill):
    """Fill a data folder, or find what the same call has made before.

    Args:
        key: hash of what it will hold.
        fill: writes it, `dataset.json` last; with a note of its progress an
            unfinished folder goes on, without one nothing is left of it.

    Returns: its `DatasetInfo`.

    Raises: InputError.
    """
    with system_errors(out):
        if finished(out, key):
            return load_dataset_info(out)
        # Another process may be at work in the folder: all that has one of
        # our names may be its own. With the lock we look again.
        check_folder(out, ours=(*OWN, "dataset.json*"))
        with locked(out):
            if not finished(out, key):
                check_folder(out)
                begin(out, key)
                try:
                    fill()
                except InputError:
                    if not (out / PROGRESS).exists():  # no hours are lost
                        remove(out, *OWN)
                    raise
                remove(out, PROGRESS, NOTE)
    return load_dataset_info(out)


@contextmanager
def locked(out):
    """Let one process at a time into the folder, which is made if missing."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting: another process prepares {out}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows: while it is open
            (out / "lock").unlink(missing_ok=True)
        lock.release()
        if made and not any(out.iterdir()):
            out.rmdir()


@contextmanager
def system_errors(out):
    """Turn what the system refuses into one line; name a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"the disk is full, {out} is unfinished: free some space "
                "and run the same command again, it will go on"
            ) from error
        raise InputError(
            f"{error.filename or out}: {error.strerror or error}"
        ) from error
