"""Prepare: a corpus and a tokenizer become a data folder that training reads."""

import errno
import importlib.metadata
import io
import itertools
import json
import math
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llama_tut.tools.baselines import bigram_nats, unigram_nats
from llama_tut.tools.corpora import docs_versions, open_corpus, parallel_map
from llama_tut.tools.files import InputError, digest, write_atomic, write_json
from llama_tut.tools.pretrained import cache_folder
from llama_tut.tools.shards import first_tokens, read_header, write_shard
from llama_tut.tools.tokenizers import (
    BYTE_VOCABULARY,
    Encoder,
    load_tiktoken,
    read_tokenizer,
    save_tokenizer,
    separator_id,
    tokenizer_from_ranks,
    train_bpe,
)

PIECE, GROUP = 1 << 20, 1 << 18  # letters


class Piece(NamedTuple):
    """A document or a part of one, before and after it is encoded."""

    part: int  # of the corpus
    split: str
    starts: bool  # whether a document begins here
    text: str
    bytes: int = 0
    ids: np.ndarray | None = None


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
    """Lists of pieces, each of about a quarter of a million letters."""
    group, letters = [], 0
    for piece in pieces:
        group.append(piece)
        letters += len(piece.text)
        if letters >= GROUP:
            yield group
            group, letters = [], 0
    if group:
        yield group


worker = {}  # what a worker process keeps between groups


def start_encoder(folder, name, separator):
    """Load the tokenizer in a worker process."""
    worker["encode"] = Encoder(folder, name)
    worker["separator"] = np.array([separator], np.uint32)


def encode_pieces(group):
    """Pieces of text -> the same pieces with ids."""
    out = []
    ids = worker["encode"]([piece.text for piece in group])
    for piece, one in zip(group, ids, strict=True):
        if piece.starts:
            one = np.concatenate([worker["separator"], one])
        size = len(piece.text.encode())
        out.append(piece._replace(text="", bytes=size, ids=one))
    return out


class ShardWriter:
    """Cuts the ids of one split into shards of equal length."""

    def __init__(self, folder, split, shard_tokens, vocab_size, tokenizer):
        self.folder, self.split = folder, split
        self.shard_tokens = shard_tokens
        self.header = vocab_size, tokenizer
        self.waiting = []  # arrays of ids that no shard holds yet
        self.counts = Counter(shards=0, documents=0, tokens=0, bytes=0)

    def add(self, piece):
        """Append a piece; write every shard that is full."""
        size = {"tokens": len(piece.ids), "bytes": piece.bytes}
        self.counts.update(documents=piece.starts, **size)
        self.waiting.append(piece.ids)
        while self.left() >= self.shard_tokens:
            self.flush()

    def left(self):
        """How many ids wait for the next shard."""
        return self.counts["tokens"] - self.counts["stored"]

    def flush(self):
        """Write the ids that wait as a shard, not more than fit."""
        tokens = np.concatenate(self.waiting)
        path = self.folder / f"{self.split}_{self.counts['shards']:05d}.bin"
        size = self.counts["bytes"] - self.counts["stored_bytes"]
        now, later = np.split(tokens, [self.shard_tokens])
        write_shard(path, now, *self.header, size)
        self.waiting = [later.copy()]
        self.counts.update(shards=1, stored=len(now), stored_bytes=size)


def save_progress(path, place, writers):
    """Note the place in the corpus, and what each writer holds."""
    note = {"place": place, "counts": [writer.counts for writer in writers]}
    waiting = {w.split: np.concatenate(w.waiting or [[]]) for w in writers}
    file = io.BytesIO()
    np.savez(file, note=np.array(json.dumps(note)), **waiting)
    write_atomic(path, file.getvalue())


def load_progress(path, writers):
    """Restore the writers -> (part, pieces done in it)."""
    if not path.exists():
        return 0, 0
    with np.load(path, allow_pickle=False) as arrays:
        note = json.loads(str(arrays["note"]))
        for writer, counts in zip(writers, note["counts"], strict=True):
            writer.counts = Counter(counts)
            writer.waiting = [arrays[writer.split].astype(np.uint32)]
    return tuple(note["place"])


def write_shards(corpus, writers, encode, max_tokens=None, progress=None):
    """Encode a corpus into shards, from where an earlier run stopped.

    Args:
        writers: a `ShardWriter` for each split.
        encode: groups of pieces -> the same with ids, in order.
        max_tokens: stop at the first document behind so many.
        progress: the file with the note.
    """
    part, done = load_progress(progress, writers)
    pieces = cut_pieces(corpus.parts, part)
    pieces = itertools.islice(pieces, done, None)
    by_split = {writer.split: writer for writer in writers}
    bar = tqdm(unit="B", unit_scale=True, disable=None, desc="text")
    for group in encode(group_pieces(pieces)):
        shards = total(writers, "shards")
        for piece in group:
            full = max_tokens and total(writers, "tokens") >= max_tokens
            if full and piece.starts:
                return bar.close()
            by_split[piece.split].add(piece)
            done = done + 1 if piece.part == part else 1
            part = piece.part
        bar.update(sum(piece.bytes for piece in group))
        if total(writers, "shards") > shards:
            save_progress(progress, (part, done), writers)
    bar.close()


def total(writers, name):
    """The sum of one count over all writers."""
    return sum(writer.counts[name] for writer in writers)


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`: sizes, floors in nats a token, and origin."""

    corpus: str
    tokenizer: str
    tokenizer_hash: str  # `digest` of tokenizer.json
    vocab_size: int
    end_of_text: int  # the id in front of each document
    train_shards: int
    train_documents: int
    train_tokens: int
    train_bytes: int
    val_shards: int
    val_documents: int
    val_tokens: int
    val_bytes: int
    unigram_nats: float  # of the validation text, counts from training
    bigram_nats: float
    bytes_per_token: float  # of the validation text
    hash: str  # of all shards
    settings: str  # hash of what `prepare` was asked for
    versions: dict = field(default_factory=dict)

    def bits_per_byte(self, nats):
        """Nats a token of the validation text -> bits a byte of it."""
        return nats / math.log(2) / self.bytes_per_token


def load_dataset_info(folder):
    """The `DatasetInfo` of a data folder.

    Raises:
        InputError: not a data folder, or a damaged one.
    """
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: no dataset.json in it; make a data folder with "
            "scripts/prepare.py"
        )
    try:
        return DatasetInfo(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error})") from error


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
        for name in ("vocab_size", "max_tokens", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value}: must be at least 1")
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise InputError(f"val_share {self.val_share}: not in (0, 1)")
        small = self.vocab_size and self.vocab_size < BYTE_VOCABULARY
        if self.tokenizer == "bpe" and small:
            raise InputError(
                f"vocab_size {self.vocab_size}: bytes and end of text need "
                f"{BYTE_VOCABULARY}"
            )
        if self.tokenizer not in ("bpe", "gpt2"):
            read_tokenizer(self.tokenizer)


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
        return train_bpe(training_texts(corpus), size)
    version = importlib.metadata.version("tokenizers")
    name = f"bpe_{corpus.source}_{version}_{size}"
    kept = cache_folder() / name
    if not (kept / "tokenizer.json").exists():
        save_tokenizer(train_bpe(training_texts(corpus), size), kept)
    return read_tokenizer(kept)


def make_tokenizer(settings, corpus, folder):
    """Fill a tokenizer folder: trained, GPT-2's, or a copy -> V."""
    name = settings.tokenizer
    if name == "bpe":
        size = settings.vocab_size or 2048
        save_tokenizer(trained_tokenizer(corpus, size), folder)
    elif name == "gpt2":
        ranks = load_tiktoken()._mergeable_ranks
        save_tokenizer(tokenizer_from_ranks(ranks), folder)
    else:
        folder.mkdir(exist_ok=True)
        kinds = "tokenizer*.json", "special*.json", "*.jinja", "*.model"
        for kind in (*kinds, "added_tokens.json", "vocab.json", "merges.txt"):
            for file in Path(name).glob(kind):
                shutil.copy(file, folder / file.name)
    size = 1 + max(read_tokenizer(folder).get_vocab().values())
    if name != "bpe" and settings.vocab_size:
        if settings.vocab_size < size:
            raise InputError(
                f"the tokenizer {name} has {size:,} tokens: a vocab_size of "
                f"{settings.vocab_size:,} is too small for it"
            )
        size = settings.vocab_size  # more than needed: rows to spare
    return size


def fill_folder(folder, settings, corpus, processes):
    """Write tokenizer and shards, or what is left of them.

    Returns:
        The fields of `DatasetInfo` that are known then, as a dict.
    """
    place = folder / "tokenizer"
    V = make_tokenizer(settings, corpus, place)
    separator = separator_id(place, read_tokenizer(place))
    name = digest((place / "tokenizer.json").read_bytes())
    shape = settings.shard_tokens, V, name
    writers = [ShardWriter(folder, s, *shape) for s in ("train", "val")]
    encode = partial(
        parallel_map,
        encode_pieces,
        processes=processes,
        setup=start_encoder,
        arguments=(place, settings.tokenizer, separator),
    )
    note = folder / "progress.npz"
    write_shards(corpus, writers, encode, settings.max_tokens, note)
    known = dict(tokenizer_hash=name, vocab_size=V, end_of_text=separator)
    for writer in writers:
        if writer.left():
            writer.flush()
        for count in ("shards", "documents", "tokens", "bytes"):
            known[f"{writer.split}_{count}"] = writer.counts[count]
    note.unlink(missing_ok=True)
    return known


def describe(folder, settings, corpus, key, known):
    """Measure the floors and write dataset.json."""
    for split in ("train", "val"):
        if known[f"{split}_tokens"] < 2:
            raise InputError(
                f"no {split} text: add some, or raise max_tokens or val_share"
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


def finished(out, key):
    """Whether the folder is there, made with the same settings.

    Raises:
        InputError: it holds something else.
    """
    if (out / "dataset.json").exists():
        if load_dataset_info(out).settings != key:
            raise InputError(
                f"{out} holds another data set: delete it, or choose another "
                "folder"
            )
        return True
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists, but is not a data folder")
    return False


def claim_folder(folder, key):
    """Make the folder for the parts, or find that of the same settings."""
    note = folder / "settings"
    if not note.exists() or note.read_text() != key:
        if (folder / "progress.npz").exists():
            raise InputError(
                f"{folder} holds an unfinished data set with other settings: "
                "delete it, or choose another folder"
            )
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for half_written in folder.rglob("*.tmp"):
        half_written.unlink()
    write_atomic(note, key.encode())


@contextmanager
def clear_errors(folder):
    """Name a full disk; after bad input remove what was begun."""
    try:
        yield
    except InputError:
        if not (folder / "progress.npz").exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"the disk is full, {folder} is unfinished: free some space "
                "and run the same command again, it will go on"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise InputError(f"{error.filename}: {error.strerror}") from error
        raise


def prepare(corpus, out, processes=None, **options):
    """Make a data folder: shards, tokenizer/ and dataset.json.

    Args:
        corpus: "docs", "fineweb-edu", or a list of files.
        out: the folder, which appears when it is complete.
        processes: workers; one for each processor unless given.
        options: the fields of `Settings`.

    Returns:
        Its `DatasetInfo`; at once if the folder is there already.

    Raises:
        InputError: input that cannot be used, or a full disk.
    """
    settings, out = Settings(**options), Path(out)
    text = open_corpus(corpus, settings.val_share, processes)
    key = digest(json.dumps([asdict(settings), text.source]).encode())
    if finished(out, key):
        return load_dataset_info(out)
    parts = out.with_name(out.name + ".partial")
    with clear_errors(parts):
        claim_folder(parts, key)
        known = fill_folder(parts, settings, text, processes)
        describe(parts, settings, corpus, key, known)
        (parts / "settings").unlink()
        os.replace(parts, out)
    return load_dataset_info(out)
