"""The loader: every target once, whatever the number of ranks: chapter 13."""

import gzip
import json
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_tut.loader import ReadAhead, ShardLoader, shuffled
from llama_tut.tools.dataset import DatasetInfo
from llama_tut.tools.files import InputError, digest, write_json
from llama_tut.tools.shards import write_shard


def data_folder(folder, lengths, vocab_size=None):
    """A data folder whose training tokens are 0, 1, 2, ..."""
    (folder / "tokenizer").mkdir(parents=True)
    write_json(folder / "tokenizer" / "tokenizer.json", {})
    name = digest((folder / "tokenizer" / "tokenizer.json").read_bytes())
    fields = dict.fromkeys(DatasetInfo.__dataclass_fields__, 0)
    total = sum(lengths)
    fields |= dict(
        tokenizer_hash=name,
        vocab_size=vocab_size or total,
        train_shards=len(lengths),
        train_tokens=total,
    )
    write_json(folder / "dataset.json", asdict(DatasetInfo(**fields)))
    parts = np.split(np.arange(total), np.cumsum(lengths)[:-1])
    for number, part in enumerate(parts):
        path = folder / f"train_{number:05d}.bin"
        write_shard(path, part, vocab_size or total, name, 0)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards with 32, 1, 0 and 31 rows of 8; 64 rows in all."""
    place = tmp_path_factory.mktemp("data") / "tiny"
    return data_folder(place, (261, 9, 8, 254))


def batches(folder, world_size, B, rows, start=0, **options):
    """Each global micro batch: the rows of all ranks, in order."""
    loaders = [
        ShardLoader(folder, "train", B, 8, rank, world_size, **options)
        for rank in range(world_size)
    ]
    for loader in loaders:
        loader.position = start
    out = []
    while loaders[0].position < start + rows:
        out += [loader.next_batch() for loader in loaders]
    inputs, targets = (torch.cat(x) for x in zip(*out, strict=True))
    return inputs, targets


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_target_once_for_any_ranks(folder, shuffle):
    inputs, alone = batches(folder, 1, 1, 64, shuffle=shuffle)
    assert inputs.dtype == alone.dtype == torch.int64
    assert inputs.is_contiguous() and torch.equal(inputs + 1, alone)
    seen = alone.flatten().tolist()
    assert len(seen) == len(set(seen)) == 64 * 8
    for world_size, B in ((1, 16), (2, 4), (4, 4), (8, 2), (4, 1)):
        _, targets = batches(folder, world_size, B, 64, shuffle=shuffle)
        assert torch.equal(targets, alone), (world_size, B)
    if not shuffle:
        assert seen == sorted(seen)


def test_what_is_left_out_is_the_tail(folder):
    _, targets = batches(folder, 1, 1, 64)
    left = set(range(532)) - set(targets.flatten().tolist())
    first = {0, 261, 270, 278}
    tails = {*range(257, 261), *range(271, 278), *range(527, 532)}
    assert left == first | tails


def test_seek_equals_stepping_across_epochs(folder):
    loader = ShardLoader(folder, "train", 5, 8, 1, 3, seed=4)
    stepped = []
    for _ in range(20):
        position = loader.position
        stepped.append((position, loader.next_batch()))
    assert loader.position == 300
    fresh = ShardLoader(folder, "train", 5, 8, 1, 3, seed=4)
    for position, expected in reversed(stepped):
        fresh.position = position
        for a, b in zip(fresh.next_batch(), expected, strict=True):
            assert torch.equal(a, b)


def test_a_batch_depends_on_its_position_alone(folder):
    loader = ShardLoader(folder, "train", 4, 8, 1, 2)
    stepped = [loader.next_batch() for _ in range(20)]
    assert loader.position == 20 * 8
    with ThreadPoolExecutor(4) as pool:
        jumped = list(pool.map(loader.batch_at, range(0, 160, 8)))
    for a, b in zip(stepped, jumped, strict=True):
        assert torch.equal(torch.stack(a), torch.stack(b))
    assert loader.position == 20 * 8, "asking does not move"


def test_threads_never_take_the_same_rows(folder):
    loader = ShardLoader(folder, "train", 1, 8)
    with ThreadPoolExecutor(8) as pool:
        taken = [pool.submit(loader.next_batch) for _ in range(64)]
    targets = torch.cat([future.result()[1] for future in taken])
    assert len(set(targets.flatten().tolist())) == 64 * 8
    assert loader.position == 64


def test_memory_is_constant(folder):
    loader, peaks = ShardLoader(folder, "train", 2, 8), []
    for count in (50, 500):
        tracemalloc.start()
        for _ in range(count):
            loader.next_batch()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert abs(peaks[1] - peaks[0]) < 20_000


def test_epochs_and_seeds_differ(folder):
    orders = [batches(folder, 1, 1, 64, start)[1] for start in (0, 64, 128)]
    orders.append(batches(folder, 1, 1, 64, seed=1)[1])
    for i, a in enumerate(orders):
        assert sorted(a.flatten().tolist()) == sorted(
            orders[0].flatten().tolist()
        )
        assert not any(torch.equal(a, b) for b in orders[:i])
    assert torch.equal(orders[0], batches(folder, 1, 1, 64)[1])


def test_the_order_is_fixed_for_good():
    """Checkpoints hold positions: a changed order would spoil them."""
    order = shuffled(np.arange(10), 10, seed=0, epoch=0)
    assert order.tolist() == FIRST_ORDER
    far = shuffled(np.array([0, 10**12]), 10**12 + 7, seed=3, epoch=2)
    assert far.tolist() == FAR


FIRST_ORDER = [3, 7, 4, 6, 5, 2, 1, 0, 9, 8]
FAR = [141907725586, 512550020251]


def test_a_permutation_of_any_size():
    for size in (1, 2, 3, 4, 5, 63, 64, 65, 1000, 65_537):
        rows = shuffled(np.arange(size), size, 7, 1)
        assert np.array_equal(np.sort(rows), np.arange(size)), size


def test_shuffled_rows_are_spread():
    """Neighbours in the order are far apart in the text, on average M / 3."""
    size = 100_000
    rows = shuffled(np.arange(size), size, 0, 0)
    distance = np.abs(np.diff(rows)).mean() / size
    assert abs(distance - 1 / 3) < 0.005
    assert abs(np.corrcoef(np.arange(size), rows)[0, 1]) < 0.01


def test_too_little_text_for_a_batch(folder):
    assert len(ShardLoader(folder, "train", 16, 8, 0, 4)) == 64
    with pytest.raises(InputError, match="has 64 rows, .* takes 68"):
        ShardLoader(folder, "train", 17, 8, 0, 4)


def damaged(tmp_path, change):
    """A copy of the folder with one file changed."""
    place = data_folder(tmp_path / "data", (100, 100))
    change(place)
    return place


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda p: (p / "dataset.json").unlink(), "no dataset.json"),
        (lambda p: (p / "dataset.json").write_text("{"), "no readable"),
        (lambda p: (p / "train_00001.bin").unlink(), "train_00001.bin: No"),
        (lambda p: (p / "train_00001.bin").write_bytes(b""), "01.bin.*empty"),
        (lambda p: flip(p / "train_00001.bin"), "00001.bin.*corrupted"),
        (lambda p: edit(p / "dataset.json", vocab_size=7), "vocabulary"),
        (lambda p: edit(p / "dataset.json", train_tokens=7), "instead of 7"),
        (lambda p: edit(p / "tokenizer/tokenizer.json", a=1), "tokenizer"),
        (
            lambda p: (p / "tokenizer/tokenizer.json").unlink(),
            "cannot be read.*No such",
        ),
    ],
)
def test_damage_is_found_at_the_start(tmp_path, change, says):
    place = damaged(tmp_path, change)
    with pytest.raises(InputError, match=says):
        ShardLoader(place, "train", 2, 8)


def test_a_tokenizer_that_may_not_be_read_is_one_line(tmp_path):
    """A folder in the file's place cannot be read either, even by root."""
    place = damaged(tmp_path, lambda p: (p / TOKENIZER).unlink())
    (place / TOKENIZER).mkdir()
    with pytest.raises(InputError, match="tokenizer.json cannot be read"):
        ShardLoader(place, "train", 2, 8)


TOKENIZER = "tokenizer/tokenizer.json"


def test_a_split_without_shards(folder):
    with pytest.raises(InputError, match="its val text has 0 rows"):
        ShardLoader(folder, "val", 1, 8)


def test_ranks_share_the_checksums(tmp_path):
    place = damaged(tmp_path, lambda p: flip(p / "train_00001.bin"))
    ShardLoader(place, "train", 2, 8, rank=0, world_size=2)
    with pytest.raises(InputError, match="corrupted"):
        ShardLoader(place, "train", 2, 8, rank=1, world_size=2)


def test_the_small_file_of_published_losses_can_be_made(tmp_path):
    """From logs as learn-llm's, whose lines are `STEP train LOSS`."""
    names = ("24_12_6_6e-04", "12_12_12_6e-4", "16_12_6_6e-4")
    mixtral = "mix_16_layer({})_b(32)_gradacc({})_step(38146)"
    names += (mixtral.format(10, 2), mixtral.format(12, 1))
    for i, name in enumerate(names):
        log = tmp_path / f"log_{name}" / "log.txt"
        log.parent.mkdir()
        log.write_text(f"0 val 9.9\n0 train {i}.123456\n1 train {i}.5\n")
    root = Path(__file__).resolve().parent.parent
    script = root / "benchmarks" / "published_losses.py"
    command = [sys.executable, script, tmp_path, "--out", tmp_path]
    subprocess.run(command, check=True)
    made = gzip.decompress(
        (tmp_path / "published_train_losses.csv.gz").read_bytes()
    )
    head, *rows = made.decode().splitlines()
    assert rows == [
        "0.123,3.123,1.123,2.123,4.123",
        "0.500,3.500,1.500,2.500,4.500",
    ]
    carried = root / "notebooks" / "data" / "published_train_losses.csv.gz"
    lines = gzip.decompress(carried.read_bytes()).decode().splitlines()
    assert lines[0] == head and len(lines) == 1 + 38_146


def test_reading_ahead_changes_nothing(folder):
    """The same batches, through the end of an epoch and after a seek."""
    one, two = (ShardLoader(folder, "train", 3, 8, 1, 2) for _ in range(2))
    ahead = ReadAhead(two)
    for position in (None, None, 60, None, None, 0, None):
        for loader in (one, two):
            loader.position = loader.position if position is None else position
        for a, b in zip(one.next_batch(), ahead.next_batch(), strict=True):
            assert torch.equal(a, b)
        assert one.position == two.position


def test_the_next_batch_is_read_before_it_is_asked_for(folder):
    read = []

    class Noted(ShardLoader):
        def batch_at(self, position):
            read.append(position)
            return super().batch_at(position)

    loader = Noted(folder, "train", 2, 8)
    ahead = ReadAhead(loader)
    ahead.next_batch()
    ahead.reader.shutdown()  # waits for what was begun
    assert sorted(read) == [0, 2] and loader.position == 2


def test_an_error_while_reading_ahead_reaches_the_caller(folder):
    class Broken(ShardLoader):
        def batch_at(self, position):
            if position:
                raise OSError("the disk is gone")
            return super().batch_at(position)

    ahead = ReadAhead(Broken(folder, "train", 2, 8))
    ahead.next_batch()
    with pytest.raises(OSError, match="gone"):
        ahead.next_batch()
