"""Corpora: files, FineWeb-Edu, docstrings, and their splits."""

import collections
import math
import re

import numpy as np
import pytest

from llama_tut.tools import corpora
from llama_tut.tools.files import InputError


def test_text_files_and_their_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\xef\xbb\xbfone\r\ntwo\n<|endoftext|>\nthree <|endoftext|> x\n"
        b"<|endoftext|>"
    )
    assert list(corpora.read_documents(path)) == [
        "one\ntwo\n",
        "three <|endoftext|> x\n",
    ]


def test_jsonl_keeps_odd_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b", "id": 1}\n\n{"text": "  "}\n')
    assert list(corpora.read_documents(path)) == ["a?b"]


@pytest.mark.parametrize(
    "line", ['{"txt": "a"}', '{"text": 3}', "[1]", "not json", "\xff"]
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match=r"a.jsonl, line 2: .*text"):
        list(corpora.read_documents(path))


def test_find_files(tmp_path):
    for name in ("b.txt", "a.jsonl", "deep/c.md", "skip.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    inside = [p.name for p in corpora.find_files([tmp_path])]
    assert inside == ["a.jsonl", "b.txt", "c.md"]
    assert corpora.find_files([tmp_path / "*.png"])[0].name == "skip.png"


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
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = (
        *("id", "dump", "url", "file_path", "language"),
        *("language_score", "token_count", "score", "int_score"),
    )
    for part in range(3):
        texts = [f"part {part}, page {n}. " * 9 for n in range(60)]
        table = {"text": texts, **{c: range(60) for c in columns}}
        parquet.write_table(pa.table(table), tmp_path / f"{part}.parquet")
    files = corpora.find_files([tmp_path])
    streamed = corpora.stream_corpus(
        0.1, path="parquet", data_files=[str(f) for f in files]
    )
    local = corpora.open_corpus(files, 0.1)
    assert len(streamed.parts) == 3
    assert list(streamed.documents()) == list(local.documents())
    assert list(streamed.parts[1]())[0][1].startswith("part 1, page 0")


def test_docstrings_without_import(tmp_path):
    text = "What it does. " * 20
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "no.py").write_text(f'"""{text}"""')
    (tmp_path / "bad.py").write_text("{{ template }}")
    (tmp_path / "good.py").write_text(
        f'"""{text}module"""\nraise SystemExit\n'
        f'class A:\n    """{text}class"""\n'
        f'    async def f():\n        """{text}function"""\n'
        '    def g():\n        """short"""\n'
    )
    files = list(corpora.python_files(tmp_path, "pkg"))
    assert [name for name, _ in files] == ["pkg/bad.py", "pkg/good.py"]
    found = corpora.read_docstrings(files)
    ends = [(name, re.search(r"\w+$", text)[0]) for name, text in found]
    assert ends == [
        ("pkg/good.py", "module"),
        ("pkg/good.py", "class"),
        ("pkg/good.py", "function"),
    ]


def test_duplicates_and_leaks_are_dropped():
    rng = np.random.default_rng(0)

    def prose(n=80):
        return " ".join(f"w{i}" for i in rng.integers(5000, size=n))

    shared, documents = prose(), []
    for n in range(400):
        own = prose()
        documents.append((f"m{n}.py", f"{own}\n\n{shared}"))
        documents.append((f"x{n}.py", own.upper() + "!"))
    kept = list(corpora.deduplicate(documents))
    assert len(kept) == 400, "the copy in capitals is a duplicate"
    assert sum(shared in text for _, text in kept) == 1

    borrowed = [(f"n{n}.py", kept[n][1] + prose(20)) for n in range(400)]
    rows = list(corpora.split_by_module(kept + borrowed, 0.5))
    train = {text for split, text in rows if split == "train"}
    known = set().union(*map(corpora.windows, train))
    for split, text in rows:
        if split == "val":
            own = corpora.windows(text)
            assert len(own & known) <= 0.1 * len(own)


def test_docs_versions_name_all_packages(monkeypatch):
    assert set(corpora.docs_versions()) == {"python", *corpora.PACKAGES}
    monkeypatch.setattr(corpora, "PACKAGES", ("no_such_package",))
    with pytest.raises(InputError, match="no_such_package"):
        corpora.docs_versions()


def test_parallel_map_keeps_order_and_looks_ahead_only_a_little():
    taken = []

    def items():
        for n in range(100):
            taken.append(n)
            yield n

    results = corpora.parallel_map(math.sqrt, items(), 2)
    assert next(results) == 0.0
    assert len(taken) <= 10
    assert list(results) == [math.sqrt(n) for n in range(1, 100)]
