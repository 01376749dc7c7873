# From notebooks/12_loader.ipynb by scripts/export.py: edit the notebook.
"""Loader: rows of tokens from shards, for every rank, in any order.

Letters: B batch, T time, W ranks, M rows of an epoch.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from llama_tut.config import InputError
from llama_tut.tokens import load_dataset_info, open_shard

ROUNDS = 4


def scramble(x):
    """Mix the bits of each uint64 (splitmix64's finaliser)."""
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
    """Places of an epoch's order -> rows: a permutation of range(size).

    Constant time and memory for each place, whatever the size.

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


class ShardLoader:
    """Rows of T + 1 tokens from the shards of a data folder.

    Row w of a shard is its tokens wT .. wT + T, both included. All ranks
    count in one global position: rows that all of them have taken.

    Args:
        folder: made by `llama_tut.tokens.prepare`.
        split: "train" or "val".
        batch_size, sequence_length: B and T of a batch.
        rank, world_size: which B of each W * B rows are ours.
        seed: of the order, which differs in every epoch.
        shuffle: False keeps the order of the text.

    Raises:
        InputError: a shard is missing, damaged or of another vocabulary, or
            the split has fewer than W * B rows.
    """

    def __init__(
        self,
        folder,
        split,
        batch_size,
        sequence_length,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
    ):
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.position = 0
        self.shards = open_shards(folder, split, rank, world_size)
        rows = [(len(s) - 1) // sequence_length for s in self.shards]
        self.ends = np.cumsum(rows)
        if len(self) < world_size * batch_size:
            raise InputError(
                f"{folder}: {split} has {len(self)} rows of {sequence_length} "
                f"tokens, fewer than the {world_size} x {batch_size} of one "
                "batch: use more text, or smaller batches"
            )

    def __len__(self):
        """M: rows of an epoch, of all ranks together."""
        return int(self.ends[-1])

    def rows(self, start, count):
        """Indices of the global rows start .. start + count, [count]."""
        n = np.arange(start, start + count)
        epochs, places = np.divmod(n, len(self))
        if not self.shuffle:
            return places
        for epoch in np.unique(epochs):
            now = epochs == epoch
            places[now] = shuffled(places[now], len(self), self.seed, epoch)
        return places

    def tokens(self, row):
        """The T + 1 tokens of one row."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        first = self.ends[shard - 1] if shard else 0
        at = int(row - first) * self.sequence_length
        return self.shards[shard][at : at + self.sequence_length + 1]

    def next_batch(self):
        """This rank's next B rows -> inputs, targets, int64 [B, T] each."""
        start = self.position + self.rank * self.batch_size
        self.position += self.world_size * self.batch_size
        rows = [self.tokens(r) for r in self.rows(start, self.batch_size)]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def open_shards(folder, split, rank=0, world_size=1):
    """Memory maps of a split's shards, checked against dataset.json.

    Every rank checks every header. The checksums, which need the whole
    file, are shared out: rank r takes shards r, r + W and so on.
    """
    info = load_dataset_info(folder)
    count = {"train": info.train_shards, "val": info.val_shards}[split]
    expected = {"train": info.train_tokens, "val": info.val_tokens}[split]
    shards = []
    for number in range(count):
        path = Path(folder) / f"{split}_{number:05d}.bin"
        verify = number % world_size == rank
        header, tokens = open_shard(path, verify)
        if header.tokenizer != info.tokenizer_hash:
            raise InputError(f"{path}: written with another tokenizer")
        if header.vocab_size != info.vocab_size:
            raise InputError(
                f"{path}: {header.vocab_size:,} tokens in its vocabulary, "
                f"{info.vocab_size:,} in dataset.json"
            )
        shards.append(tokens)
    found = sum(map(len, shards))
    if found != expected:
        raise InputError(
            f"{folder}: {found:,} {split} tokens instead of {expected:,}"
        )
    return shards
