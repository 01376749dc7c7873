"""Dataset: what a data folder holds, and its shards opened and checked."""

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from llama_tut.tools.files import (
    InputError,
    digest,
    first_line,
    read_json,
    require,
)
from llama_tut.tools.shards import open_shard


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`: sizes, baselines in nats per token, and origin."""

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
        """Nats per token of the validation text -> bits per byte of it."""
        return nats / math.log(2) / self.bytes_per_token


def load_dataset_info(folder):
    """The `DatasetInfo` of a data folder.

    Raises:
        InputError: not a data folder, or a damaged one.
    """
    path = Path(folder) / "dataset.json"
    require(
        os.path.lexists(path),
        f"{folder}: no dataset.json in it; make a data folder with "
        "scripts/prepare.py",
    )
    found = read_json(path)
    try:
        info = DatasetInfo(**found)
    except TypeError as error:
        raise InputError(f"{path}: {first_line(error)}") from error
    for one in fields(info):
        value = getattr(info, one.name)
        number = isinstance(value, int | float)
        require(
            one.type not in (int, float) or number,
            f"{path}: {one.name} must be a number, not {value!r}",
        )
    return info


def open_shards(folder, split, rank=0, world_size=1):
    """Memory maps of a split's shards, checked against dataset.json.

    Every rank checks all headers and sizes. A checksum has to read the whole
    file, so the ranks share that work: rank r takes shards r, r + W, ...

    Raises:
        InputError: a shard or the tokenizer is missing, damaged, or does not
            belong to the others.
    """
    info = load_dataset_info(folder)
    path = Path(folder) / "tokenizer" / "tokenizer.json"
    try:
        tokenizer = digest(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); prepare the data again"
        ) from error
    count = getattr(info, f"{split}_shards")
    require(
        count or not (Path(folder) / f"{split}.npz").exists(),
        f"{folder} holds pictures: say with --text-model what shall read them",
    )
    shards = []
    for number in range(count):
        path = Path(folder) / f"{split}_{number:05d}.bin"
        header, tokens = open_shard(path, number % world_size == rank)
        require(
            header.tokenizer == info.tokenizer_hash == tokenizer,
            f"{path}: written with another tokenizer",
        )
        require(
            header.vocab_size == info.vocab_size,
            f"{path}: a vocabulary of {header.vocab_size:,}, but "
            f"{info.vocab_size:,} in dataset.json",
        )
        shards.append(tokens)
    found, expected = sum(map(len, shards)), getattr(info, f"{split}_tokens")
    require(
        found == expected,
        f"{folder}: {found:,} {split} tokens instead of {expected:,}; "
        "prepare it again",
    )
    return shards


def check_rows(folder, split, rows, batch):
    """Refuse a split that does not fill one batch of all ranks."""
    require(
        rows >= batch,
        f"{folder}: its {split} text has {rows} rows, and one batch of all "
        f"ranks takes {batch}: take more text, or smaller or shorter rows",
    )
