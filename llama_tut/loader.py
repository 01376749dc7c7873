# From notebooks/13_loader.ipynb by scripts/export.py: edit the notebook.
"""Loader: rows of tokens from shards, for every rank, in any order.

Letters: B batch, T time, W ranks, M rows of an epoch.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llama_tut.tools.files import InputError, digest
from llama_tut.tools.prepare import load_dataset_info
from llama_tut.tools.shards import open_shard

# An order that can be indexed

ROUNDS = 8


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


def shuffled(places, size, seed, epoch):
    """Places in an epoch's order -> rows: a permutation of range(size).

    Time and memory for a place do not depend on `size`.

    Args:
        places: integers below `size`, any shape.
        seed, epoch: choose the permutation.
    """
    text = f"{seed} {epoch}".encode()
    hashed = hashlib.blake2b(text, digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(hashed, "<u8").astype(np.uint64)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    rows = feistel(np.asarray(places).astype(np.uint64), half, keys)
    while (outside := rows >= size).any():
        rows[outside] = feistel(rows[outside], half, keys)
    return rows.astype(np.int64)


# The shards


def open_shards(folder, split, rank=0, world_size=1):
    """Memory maps of a split's shards, checked against dataset.json.

    Raises:
        InputError: a shard or the tokenizer is missing, damaged, or does not
            belong to the others.
    """
    info = load_dataset_info(folder)
    tokenizer = Path(folder) / "tokenizer" / "tokenizer.json"
    if not tokenizer.is_file():
        raise InputError(f"{tokenizer} is missing; prepare the data again")
    shards = []
    for number in range(getattr(info, f"{split}_shards")):
        path = Path(folder) / f"{split}_{number:05d}.bin"
        header, tokens = open_shard(path, number % world_size == rank)
        for name in (info.tokenizer_hash, digest(tokenizer.read_bytes())):
            if header.tokenizer != name:
                raise InputError(f"{path}: written with another tokenizer")
        if header.vocab_size != info.vocab_size:
            raise InputError(
                f"{path}: a vocabulary of {header.vocab_size:,}, but "
                f"{info.vocab_size:,} in dataset.json"
            )
        shards.append(tokens)
    found, expected = sum(map(len, shards)), getattr(info, f"{split}_tokens")
    if found != expected:
        raise InputError(
            f"{folder}: {found:,} {split} tokens instead of {expected:,}; "
            "prepare it again"
        )
    return shards


def check_rows(folder, split, rows, batch):
    """Refuse a split that does not fill one batch of all ranks."""
    if rows < batch:
        raise InputError(
            f"{folder}: its {split} text has {rows} rows, and one batch of all "
            f"ranks takes {batch}: take more text, or smaller or shorter rows"
        )


# From a place to tokens


def rows_at(start, count, size, seed=None):
    """Rows at the global places start .. start + count - 1.

    Args:
        size: M, rows of an epoch.
        seed: of the order; None keeps the order of the text.
    """
    epochs, places = np.divmod(np.arange(start, start + count), size)
    if seed is not None:
        for epoch in np.unique(epochs):
            now = epochs == epoch
            places[now] = shuffled(places[now], size, seed, epoch)
    return places


def read_row(shards, ends, row, sequence_length):
    """The T + 1 tokens of a row; `ends` counts rows up to each shard's end."""
    shard = int(np.searchsorted(ends, row, side="right"))
    first = ends[shard - 1] if shard else 0
    at = int(row - first) * sequence_length
    return shards[shard][at : at + sequence_length + 1]


def read_rows(shards, ends, rows, sequence_length):
    """The tokens of many rows, int64 [B, T + 1]."""
    rows = [read_row(shards, ends, row, sequence_length) for row in rows]
    return torch.from_numpy(np.stack(rows).astype(np.int64))  # [B, T+1]


# The class


@dataclass(eq=False)
class ShardLoader:
    """Rows of T + 1 tokens from the shards of a data folder.

    Raises:
        InputError: as `open_shards`; or fewer than W * B rows.
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
        who = self.rank, self.world_size
        self.shards = open_shards(self.folder, self.split, *who)
        rows = [(len(s) - 1) // self.sequence_length for s in self.shards]
        self.ends = np.cumsum(rows)
        batch = self.world_size * self.batch_size
        check_rows(self.folder, self.split, len(self), batch)

    def __len__(self):
        """M: rows of an epoch, of all ranks together."""
        return int(self.ends[-1])

    def next_batch(self):
        """This rank's next B rows -> inputs, targets, int64 [B, T] each."""
        start = self.position + self.rank * self.batch_size
        self.position += self.world_size * self.batch_size
        seed = self.seed if self.shuffle else None
        rows = rows_at(start, self.batch_size, len(self), seed)
        size = self.sequence_length
        batch = read_rows(self.shards, self.ends, rows, size)  # [B, T+1]
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
