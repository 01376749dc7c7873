"""Prepare: a corpus and a tokenizer become a data folder that training reads."""

import errno
import importlib.metadata
import io
import itertools
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from llama_tut.tools.baselines import bigram_nats, unigram_nats
from llama_tut.tools.corpora import open_corpus
from llama_tut.tools.dataset import DatasetInfo, load_dataset_info
from llama_tut.tools.docs_corpus import docs_versions
from llama_tut.tools.files import (
    InputError,
    digest,
    require,
    write_atomic,
    write_json,
)
from llama_tut.tools.machine import core_count
from llama_tut.tools.pretrained import cache_folder
from llama_tut.tools.shards import first_tokens, read_header, write_shard
from llama_tut.tools.tokenizers import (
    BYTE_VOCABULARY,
    Encoder,
    for_documents,
    load_tiktoken,
    read_tokenizer,
    save_tokenizer,
    separator_id,
    tokenizer_from_ranks,
    train_bpe,
)

# What may be chosen

MAX_VOCABULARY = 1 << 20
MAX_TOKENS = 10**15


@dataclass(frozen=True)
class Settings:
    """What may be chosen when a data folder is made."""

    tokenizer: str = "bpe"  # or "gpt2", or a folder with tokenizer.json
    vocab_size: int | None = None  # of a trained tokenizer; 2,048
    max_tokens: int | None = None  # stop after so many
    shard_tokens: int = 100_000_000  # of every shard but the last
    val_share: float | None = None  # of the text that is held out

    def __post_init__(self):
        """Refuse what cannot be, before any work is done."""
        for name, most in (
            ("vocab_size", MAX_VOCABULARY),
            ("max_tokens", MAX_TOKENS),
            ("shard_tokens", MAX_TOKENS),
        ):
            value = getattr(self, name)
            require(
                value is None or 1 <= value <= most,
                f"{name} {value}: must be from 1 to {most:,}",
            )
        require(
            self.val_share is None or 0 < self.val_share < 1,
            f"val_share {self.val_share}: not in (0, 1)",
        )
        if self.tokenizer == "bpe" and self.vocab_size:
            require(
                self.vocab_size >= BYTE_VOCABULARY,
                f"vocab_size {self.vocab_size}: bytes and end of text need "
                f"{BYTE_VOCABULARY}",
            )


# The tokenizer

TRAIN_LETTERS = 200_000_000


def training_texts(corpus, limit=TRAIN_LETTERS):
    """Texts of the training side, up to a limit of letters."""
    for split, text in corpus.documents():
        if split == "train":
            yield text
            limit -= len(text)
            if limit < 0:
                return


def trained_tokenizer(corpus, size):
    """A BPE fitted to a corpus; for docs, the cache remembers it."""
    if not corpus.source.startswith("docs_"):
        return for_documents(train_bpe(training_texts(corpus), size))
    version = importlib.metadata.version("tokenizers")
    kept = cache_folder() / f"bpe_{corpus.source}_{version}_{size}"
    if not (kept / "tokenizer.json").exists():
        save_tokenizer(train_bpe(training_texts(corpus), size), kept)
    return read_tokenizer(kept)


def check_tokenizer(settings):
    """Refuse a tokenizer that cannot be had or used, before any work.

    Returns:
        A list with the `digest` of a folder's tokenizer.json, else empty.
    """
    name = settings.tokenizer
    if name == "gpt2":
        load_tiktoken()
    elif name != "bpe":
        separator_id(name, read_tokenizer(name))
        return [digest((Path(name) / "tokenizer.json").read_bytes())]
    return []


def make_tokenizer(settings, corpus, folder):
    """Fill the folder `tokenizer/`: trained, GPT-2's, or a copy.

    Returns:
        Its `tokenizers` object and V.
    """
    name = settings.tokenizer
    if name == "bpe":
        tokenizer = trained_tokenizer(corpus, settings.vocab_size or 2048)
        save_tokenizer(tokenizer, folder)
    elif name == "gpt2":
        ranks = load_tiktoken()._mergeable_ranks
        tokenizer = for_documents(tokenizer_from_ranks(ranks))
        save_tokenizer(tokenizer, folder)
    else:
        tokenizer = read_tokenizer(name)
        folder.mkdir(exist_ok=True)
        kinds = "tokenizer*.json", "special*.json", "*.jinja", "*.model"
        for kind in (*kinds, "added_tokens.json", "vocab.json", "merges.txt"):
            for file in Path(name).glob(kind):
                shutil.copyfile(file, folder / file.name)
    size = 1 + max(tokenizer.get_vocab().values())
    if name != "bpe" and settings.vocab_size:
        require(
            settings.vocab_size >= size,
            f"the tokenizer {name} has {size:,} tokens: a vocab_size of "
            f"{settings.vocab_size:,} is too small for it",
        )
        size = settings.vocab_size  # more than needed: rows to spare
    return tokenizer, size


# From documents to shards

PIECE = 1 << 20  # letters of a long document that are encoded at once
GROUP = 1 << 20  # letters that are given to all threads at once


class Piece(NamedTuple):
    """A document or a part of one."""

    part: int  # of the corpus
    split: str
    starts: bool  # whether a document begins here
    text: str


def cut_pieces(parts, first=0):
    """The documents of a corpus as pieces, from part `first` on."""
    for number, part in enumerate(parts[first:], first):
        for split, text in part():
            at = 0
            while at < len(text):
                end = at + PIECE
                if end < len(text):
                    end = text.rfind("\n", at + PIECE // 2, end) + 1 or end
                yield Piece(number, split, at == 0, text[at:end])
                at = end


def group_pieces(pieces):
    """Lists of pieces, each of about a million letters."""
    group, letters = [], 0
    for piece in pieces:
        group.append(piece)
        letters += len(piece.text)
        if letters >= GROUP:
            yield group
            group, letters = [], 0
    if group:
        yield group


class ShardWriter:
    """Cuts the ids of one split into shards of equal length."""

    def __init__(self, folder, split, shard_tokens, **header):
        self.folder, self.split = folder, split
        self.shard_tokens = shard_tokens
        self.header = header  # what every shard repeats
        self.waiting = []  # arrays of ids that no shard holds yet
        self.counts = dict.fromkeys(("shards", "documents"), 0)
        self.counts |= dict.fromkeys(("tokens", "bytes"), 0)
        self.stored = {"tokens": 0, "bytes": 0}  # of them, in shards

    def add(self, ids, text_bytes, starts):
        """Append the ids of a piece; write every shard that is full."""
        self.counts["documents"] += starts
        self.counts["tokens"] += len(ids)
        self.counts["bytes"] += text_bytes
        self.waiting.append(ids)
        while self.left() >= self.shard_tokens:
            self.flush()

    def left(self):
        """How many ids wait for the next shard."""
        return self.counts["tokens"] - self.stored["tokens"]

    def flush(self):
        """Write the ids that wait as a shard, not more than fit."""
        tokens = np.concatenate(self.waiting)
        path = self.folder / f"{self.split}_{self.counts['shards']:05d}.bin"
        size = self.counts["bytes"] - self.stored["bytes"]
        now, later = np.split(tokens, [self.shard_tokens])
        write_shard(path, now, text_bytes=size, **self.header)
        self.waiting = [later.copy()]
        self.counts["shards"] += 1
        self.stored["tokens"] += len(now)
        self.stored["bytes"] += size


def save_progress(path, place, writers):
    """Note the place in the corpus, and what each writer holds."""
    state = [[writer.counts, writer.stored] for writer in writers]
    note = json.dumps({"place": place, "state": state})
    waiting = {w.split: np.concatenate(w.waiting or [[]]) for w in writers}
    file = io.BytesIO()
    np.savez(file, note=np.array(note), **waiting)
    write_atomic(path, file.getvalue())


def load_progress(path, writers):
    """Restore the writers -> (part, pieces done in it)."""
    if not path.exists():
        return 0, 0
    with np.load(path, allow_pickle=False) as arrays:
        note = json.loads(str(arrays["note"]))
        for writer, state in zip(writers, note["state"], strict=True):
            writer.counts, writer.stored = state
            writer.waiting = [arrays[writer.split].astype(np.uint32)]
    return tuple(note["place"])


def write_shards(corpus, writers, encode, separator, max_tokens, note):
    """Encode a corpus into shards, from where an earlier run stopped.

    With `max_tokens` this stops at the first document after so many. A corpus
    of few documents, whose tails are the validation text, is cut within the
    document instead, and the tail is kept.

    Args:
        writers: a `ShardWriter` for each split.
        encode: the `Encoder`.
        separator: the id in front of each document.
        note: the file that `save_progress` writes, after each shard.
    """
    part, done = load_progress(note, writers)
    pieces = itertools.islice(cut_pieces(corpus.parts, part), done, None)
    by_split = {writer.split: writer for writer in writers}
    front = np.array([separator], np.uint32)
    limit = max_tokens or math.inf

    def total(name):
        return sum(writer.counts[name] for writer in writers)

    def skipped(piece):
        """Whether the rest of this document's training text is cut off."""
        full = total("tokens") >= limit
        return full and corpus.tails and piece.split == "train"

    bar = tqdm(unit="B", unit_scale=True, disable=None, desc="text")
    for group in group_pieces(pieces):
        shards = total("shards")
        texts = ["" if skipped(piece) else piece.text for piece in group]
        for piece, text, ids in zip(group, texts, encode(texts), strict=True):
            full = total("tokens") >= limit
            if (
                full
                and piece.starts
                and not (corpus.tails and piece.split == "val")
            ):
                return bar.close()
            if corpus.tails and piece.split == "train":
                room = max(0, limit - total("tokens") - piece.starts)
                if len(ids) > room:
                    text = encode.cut(text, room)
                    (ids,) = encode([text])
            if piece.starts:
                ids = np.concatenate([front, ids])
            size = len(text.encode())
            by_split[piece.split].add(ids, size, piece.starts)
            done = done + 1 if piece.part == part else 1
            part = piece.part
            bar.update(size)
        if total("shards") > shards:
            save_progress(note, (part, done), writers)
    bar.close()


def fill_folder(folder, settings, corpus, processes):
    """Write tokenizer and shards, or what is left of them.

    Returns:
        The fields of `DatasetInfo` that are known then, as a dict.
    """
    tokenizer, V = make_tokenizer(settings, corpus, folder / "tokenizer")
    separator = separator_id(folder / "tokenizer", tokenizer)
    name = digest((folder / "tokenizer" / "tokenizer.json").read_bytes())
    header = dict(vocab_size=V, tokenizer=name)
    writers = [
        ShardWriter(folder, split, settings.shard_tokens, **header)
        for split in ("train", "val")
    ]
    fast = load_tiktoken() if settings.tokenizer == "gpt2" else None
    write_shards(
        corpus,
        writers,
        Encoder(tokenizer, fast, processes),
        separator,
        settings.max_tokens,
        folder / "progress.npz",
    )
    known = dict(tokenizer_hash=name, vocab_size=V, end_of_text=separator)
    for writer in writers:
        if writer.left():
            writer.flush()
        for count, value in writer.counts.items():
            known[f"{writer.split}_{count}"] = value
    return known


def describe(folder, settings, corpus, key, known):
    """Measure the baselines and write dataset.json."""
    for split in ("train", "val"):
        require(
            known[f"{split}_tokens"] >= 2,
            f"no {split} text: add some, or raise max_tokens or val_share",
        )
    train, val = (first_tokens(folder, split) for split in ("train", "val"))
    sums = [read_header(p).checksum for p in sorted(folder.glob("*.bin"))]
    names = [corpus] if isinstance(corpus, str | Path) else corpus
    info = DatasetInfo(
        corpus=" ".join(Path(name).name for name in names),
        tokenizer=Path(settings.tokenizer).name,
        unigram_nats=unigram_nats(train, val, known["vocab_size"]),
        bigram_nats=bigram_nats(train, val, known["vocab_size"]),
        bytes_per_token=known["val_bytes"] / known["val_tokens"],
        hash=digest("".join(sums).encode()),
        settings=key,
        versions=docs_versions() if corpus == "docs" else {},
        **known,
    )
    write_json(folder / "dataset.json", asdict(info))


# One folder, one writer, complete or unfinished

NOTE = "settings"  # in a folder that is unfinished: what it will hold
OWN = ("tokenizer", "train_*.bin*", "val_*.bin*", "progress.npz*", NOTE)


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
    """Refuse a folder with files of others. `ours` are names that may be."""
    require(out.is_dir() or not out.exists(), f"{out} exists and is no folder")
    if out.exists() and not (out / NOTE).exists():
        ours = ("lock", f"{NOTE}.*.tmp", *ours)
        for path in out.iterdir():
            require(
                any(path.match(pattern) for pattern in ours),
                f"{out} holds files ({path.name}), but is not a data folder",
            )


def begin(out, key):
    """Note what the folder will hold, or find the same note in it."""
    note = out / NOTE
    if note.exists() and note.read_text() != key:
        require(
            not (out / "progress.npz").exists(),
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
def removed_after_bad_input(out):
    """After bad input remove what was begun, unless hours of it are done."""
    try:
        yield
    except InputError:
        if not (out / "progress.npz").exists():
            remove(out, *OWN)
        raise


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


def prepare(corpus, out, processes=None, text_column=None, **options):
    """Make a data folder: shards, tokenizer/ and dataset.json.

    A folder without dataset.json is unfinished; the same call goes on with
    it. A second process with the same folder waits for the first.

    Args:
        corpus: "docs", "fineweb-edu", or a list of files.
        out: the folder; missing, empty, or begun by this function.
        processes: workers; one for each processor unless given.
        text_column: of jsonl and parquet files; "text" unless given.
        options: the fields of `Settings`.

    Returns:
        Its `DatasetInfo`; at once if the folder is complete already.

    Raises:
        InputError: input that cannot be used, or a full disk.
    """
    settings, out = Settings(**options), Path(os.path.realpath(out))
    if processes:  # read when `tokenizers` starts its threads
        os.environ["RAYON_NUM_THREADS"] = str(processes)
    processes = processes or core_count()
    with system_errors(out):
        asked = [asdict(settings), *check_tokenizer(settings)]
        text = open_corpus(corpus, settings.val_share, processes, text_column)
        key = digest(json.dumps([*asked, text.source]).encode())
        if finished(out, key):
            return load_dataset_info(out)
        # Another process may be at work in the folder: all that has one of
        # our names may be its own. With the lock we look again.
        check_folder(out, ours=(*OWN, "dataset.json*"))
        with locked(out):
            if not finished(out, key):
                check_folder(out)
                begin(out, key)
                with removed_after_bad_input(out):
                    known = fill_folder(out, settings, text, processes)
                    describe(out, settings, corpus, key, known)
                remove(out, "progress.npz", NOTE)
    return load_dataset_info(out)
