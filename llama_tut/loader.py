# From notebooks/13_loader.ipynb by scripts/export.py: edit the notebook.
"""Loader: rows of tokens from shards, for every rank, in any order.

Letters: B batch, T time, W ranks, M rows of an epoch.
"""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llama_tut.tools.dataset import check_rows, open_shards

# An order that can be indexed

ROUNDS = 8  # four are not a fair shuffle of a few rows


def scramble(x):
    """Mix the bits of each uint64 (the last step of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def feistel(x, half, keys):
    """A permutation of the numbers of 2 * half bits, one round a key."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for key in keys:
        left, right = right, left ^ (scramble(right ^ key) & mask)
    return left << bits | right


def shuffled(places, size, seed, epoch, rounds=ROUNDS):
    """Places in an epoch's order -> rows: a permutation of range(size).

    Time and memory for a place do not depend on `size`.

    Args:
        places: integers below `size`, any shape.
        seed, epoch: choose the permutation.
        rounds: of `feistel`.
    """
    text = f"{seed} {epoch}".encode()
    hashed = hashlib.blake2b(text, digest_size=8 * rounds).digest()
    keys = np.frombuffer(hashed, "<u8").astype(np.uint64)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    rows = feistel(np.asarray(places).astype(np.uint64), half, keys)
    while (outside := rows >= size).any():
        rows[outside] = feistel(rows[outside], half, keys)
    return rows.astype(np.int64)


# From a position to tokens


def rows_at(position, count, size, seed=None):
    """The rows at the global places position .. position + count - 1.

    Args:
        size: M, rows of an epoch.
        seed: of the order; None keeps the order of the text.
    """
    epochs, places = np.divmod(np.arange(position, position + count), size)
    if seed is not None:
        for epoch in np.unique(epochs):
            now = epochs == epoch
            places[now] = shuffled(places[now], size, seed, epoch)
    return places


def read_row(shards, ends, row, sequence_length):
    """The T + 1 tokens of a row; `ends`: rows before each shard, and all."""
    shard = int(np.searchsorted(ends, row, side="right")) - 1
    start = int(row - ends[shard]) * sequence_length
    return shards[shard][start : start + sequence_length + 1]


def read_rows(shards, ends, rows, sequence_length):
    """The tokens of many rows, int64 [B, T + 1], as the embedding wants."""
    rows = [read_row(shards, ends, row, sequence_length) for row in rows]
    return torch.from_numpy(np.stack(rows).astype(np.int64))  # [B, T+1]


# The class


@dataclass(eq=False)
class ShardLoader:
    """Rows of T + 1 tokens from the shards of a data folder.

    Raises InputError as `open_shards`, or for fewer than W * B rows.
    """

    folder: Path  #: made by `llama_tut.tools.prepare.prepare`
    split: str  #: "train" or "val"
    batch_size: int  #: B of a batch
    sequence_length: int  #: T of a batch
    rank: int = 0  #: which B of each W * B rows are ours
    world_size: int = 1  #: W
    seed: int = 0  #: of the order, which differs in every epoch
    shuffle: bool = True  #: False keeps the order of the text
    position: int = 0  #: rows taken by all ranks; set it to go elsewhere

    def __post_init__(self):
        folder, split = self.folder, self.split
        self.shards = open_shards(folder, split, self.rank, self.world_size)
        rows = [(len(s) - 1) // self.sequence_length for s in self.shards]
        self.ends = np.cumsum([0, *rows])
        check_rows(folder, split, len(self), self.world_size * self.batch_size)
        self.lock = threading.Lock()

    def __len__(self):
        """M: rows of an epoch, of all ranks together."""
        return int(self.ends[-1])

    def batch_at(self, position):
        """This rank's rows there -> inputs, targets, int64 [B, T] each."""
        start = position + self.rank * self.batch_size
        seed = self.seed if self.shuffle else None
        rows = rows_at(start, self.batch_size, len(self), seed)
        batch = read_rows(self.shards, self.ends, rows, self.sequence_length)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def next_batch(self):
        """As `batch_at` the position, which then moves on."""
        with self.lock:
            position = self.position
            self.position += self.world_size * self.batch_size
        return self.batch_at(position)


# Reading ahead


class ReadAhead:
    """The next batch of a loader, read by a thread while this one is used."""

    def __init__(self, loader):
        self.loader, self.reader = loader, ThreadPoolExecutor(1)
        self.waiting = {}  # at most one: {position: a batch that is read}

    def next_batch(self):
        """As the loader's; its position counts only what was used."""
        loader = self.loader
        position, step = loader.position, loader.world_size * loader.batch_size
        batch = self.waiting.pop(position, None)
        loader.position = after = position + step
        self.waiting = {after: self.reader.submit(loader.batch_at, after)}
        return batch.result() if batch else loader.batch_at(position)
