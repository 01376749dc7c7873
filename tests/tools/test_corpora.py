"""tools/corpora: their two splits, and what makes them the same."""

import collections
import os

import pyarrow as pa
from pyarrow import parquet as pq

from llama_tut.tools import corpora, documents


def test_a_touched_or_moved_file_is_the_same_corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    source = corpora.open_corpus([path]).source
    os.utime(path, (1, 1))
    assert corpora.open_corpus([path]).source == source
    moved = path.rename(tmp_path / "b.txt")
    assert corpora.open_corpus([moved]).source == source
    moved.write_text("some tex.")
    assert corpora.open_corpus([moved]).source != source


def test_split_by_hash_and_by_tail():
    many = [f"document {n} " * 5 for n in range(3000)] * 2
    rows = corpora.split_corpus("", [lambda: many], 0.05).documents()
    sides = collections.defaultdict(set)
    for split, text in rows:
        sides[split].add(text)
    assert not sides["train"] & sides["val"]
    assert 0.03 < len(sides["val"]) / 3000 < 0.07

    few = ["line\n" * 50, "no line ends here", "x"]
    rows = list(corpora.split_corpus("", [lambda: few], 0.1).documents())
    assert [
        a + b for (_, a), (_, b) in zip(rows[::2], rows[1::2], strict=True)
    ] == few
    assert [split for split, _ in rows] == ["train", "val"] * 3
    assert rows[0][1].endswith("\n") and 10 <= len(rows[1][1]) <= 30


def test_the_validation_side_is_never_empty():
    for seed in range(50):
        texts = [f"{seed} {n}" for n in range(100)]
        rows = corpora.split_corpus("", [lambda t=texts: t], 1e-6).documents()
        assert [split for split, _ in rows].count("val") == 1


def test_streamed_parquet_equals_the_files(tmp_path):
    columns = (
        *("id", "dump", "url", "file_path", "language"),
        *("language_score", "token_count", "score", "int_score"),
    )
    for part in range(3):
        texts = [f"part {part}, page {n}. " * 9 for n in range(60)]
        table = {"text": texts, **{c: range(60) for c in columns}}
        pq.write_table(pa.table(table), tmp_path / f"{part}.parquet")
    files = documents.find_files([tmp_path])
    streamed = corpora.stream_corpus(
        0.1, path="parquet", data_files=[str(f) for f in files]
    )
    local = corpora.open_corpus(files, 0.1)
    assert len(streamed.parts) == 3
    assert list(streamed.documents()) == list(local.documents())
    assert list(streamed.parts[1]())[0][1].startswith("part 1, page 0")
