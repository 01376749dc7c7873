"""Shards: files of token ids with a header that says how to read them."""

import os
import struct
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from llama_tut.tools.files import InputError, digest, require, write_atomic

MAGIC = b"LLAMATUT"
VERSION = 1
LAYOUT = struct.Struct("<8sIIQIIQ32s32s24x")  # 128 bytes


@dataclass(frozen=True)
class Shard:
    """The header of a shard: how to read the rest."""

    dtype: str  #: "uint16", or "uint32" where V is above 65,536
    count: int  #: number of tokens
    vocab_size: int  #: V; every id is below it
    bytes: int  #: UTF-8 length of the text that was added for this shard
    tokenizer: str  #: `digest` of tokenizer.json
    checksum: str = "00" * 32  #: `digest` of header (zeros here) and tokens
    version: int = VERSION


def pack_header(shard):
    """A `Shard` as 128 bytes, little-endian."""
    width = np.dtype(shard.dtype).itemsize
    return LAYOUT.pack(
        MAGIC,
        shard.version,
        width,
        shard.count,
        shard.vocab_size,
        0,
        shard.bytes,
        bytes.fromhex(shard.tokenizer),
        bytes.fromhex(shard.checksum),
    )


def write_shard(path, tokens, vocab_size, tokenizer, text_bytes):
    """Write ids as a shard, atomically -> its `Shard`.

    Raises:
        ValueError: an id is not below `vocab_size`.
    """
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"id {tokens.max()} in a vocabulary of {vocab_size}")
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    data = np.ascontiguousarray(tokens, np.dtype(dtype).newbyteorder("<"))
    shard = Shard(dtype, len(data), vocab_size, text_bytes, tokenizer)
    shard = replace(shard, checksum=digest(pack_header(shard), data))
    write_atomic(Path(path), pack_header(shard), data)
    return shard


def read_header(path):
    """The `Shard` of a file.

    Raises:
        InputError: missing, empty, no shard, or not of the stated length.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(LAYOUT.size)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    require(size, f"{path}: the shard is empty; prepare it again")
    require(
        size >= LAYOUT.size and head[:8] == MAGIC,
        f"{path}: this file is not a shard of tokens",
    )
    fields = LAYOUT.unpack(head)
    _, version, width, count, vocab_size, _, text_bytes, *hashes = fields
    require(
        version == VERSION and width in (2, 4),
        f"{path}: a shard of another version, {version}",
    )
    expected = LAYOUT.size + width * count
    require(
        size == expected,
        f"{path}: the shard is truncated ({size:,} bytes instead of "
        f"{expected:,}); prepare it again",
    )
    tokenizer, checksum = (value.hex() for value in hashes)
    return Shard(
        dtype=f"uint{8 * width}",
        count=count,
        vocab_size=vocab_size,
        bytes=text_bytes,
        tokenizer=tokenizer,
        checksum=checksum,
    )


def open_shard(path, verify=True):
    """A file as (`Shard`, read-only memory map of its ids).

    Raises:
        InputError: as `read_header`; with `verify` also for a changed bit.
    """
    shard = read_header(path)
    dtype = np.dtype(shard.dtype).newbyteorder("<")
    if not shard.count:
        return shard, np.zeros(0, dtype)
    tokens = np.memmap(path, dtype, "r", LAYOUT.size, (shard.count,))
    blank = Shard(*astuple(shard)[:5])
    require(
        not verify or digest(pack_header(blank), tokens) == shard.checksum,
        f"{path}: the shard is corrupted (its checksum differs); prepare it "
        "again",
    )
    return shard, tokens


FLOOR_TOKENS = 50_000_000  # enough for the losses of counting


def first_tokens(folder, split, limit=FLOOR_TOKENS):
    """The first `limit` ids of a split of a data folder, int64."""
    parts, left = [], limit
    for path in sorted(Path(folder).glob(f"{split}_*.bin")):
        parts.append(open_shard(path, verify=False)[1][:left])
        left -= len(parts[-1])
    return np.concatenate(parts).astype(np.int64)
