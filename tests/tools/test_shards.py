"""Shards: what is written is read, and damage is refused."""

import numpy as np
import pytest

from llama_tut.tools import shards
from llama_tut.tools.files import InputError


@pytest.mark.parametrize(
    "vocab_size, dtype",
    [(2048, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_shard_round_trip(tmp_path, vocab_size, dtype):
    path = tmp_path / "train_00000.bin"
    ids = np.array([0, 1, vocab_size - 1])
    written = shards.write_shard(path, ids, vocab_size, "ab" * 32, 17)
    shard, found = shards.open_shard(path)
    assert shard == written == shards.read_header(path)
    assert (shard.dtype, shard.count, shard.bytes) == (dtype, 3, 17)
    assert shard.tokenizer == "ab" * 32
    assert found.tolist() == ids.tolist() and found.dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_id_outside_the_vocabulary_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="128000"):
        shards.write_shard(
            tmp_path / "x.bin", np.array([128000]), 65536, "00" * 32, 0
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda d: b"", "empty"),
        (lambda d: d[:100], "not a shard"),
        (lambda d: b"x" * len(d), "not a shard"),
        (lambda d: d[:-1], "truncated"),
        (lambda d: d + b"\0\0", "truncated"),
        (lambda d: d[:8] + b"\2" + d[9:], "version"),
        (lambda d: d[:26] + b"\1" + d[27:], "corrupted"),  # vocab_size
        (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "corrupted"),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path, damage, says):
    path = tmp_path / "train_00003.bin"
    shards.write_shard(path, np.arange(1000), 2048, "00" * 32, 5)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"train_00003.bin.*{says}"):
        shards.open_shard(path)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(InputError, match="train_00007.bin: No such file"):
        shards.open_shard(tmp_path / "train_00007.bin")
