"""Encoding: documents become shards of ids, and a run that was stopped goes on."""

import io
import itertools
import json
import math
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llama_tut.tools.files import write_atomic
from llama_tut.tools.shards import write_shard

PIECE = 1 << 20  # letters of a long document that are encoded at once
GROUP = 1 << 20  # letters that are given to all threads at once


class Piece(NamedTuple):
    """A document, or a part of a long one."""

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
        names = ("shards", "documents", "tokens", "bytes")
        self.counts = dict.fromkeys(names, 0)
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
    """Restore the writers.

    Returns:
        The place in the corpus: the number of a part, and of the pieces of
        it that are done.
    """
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
