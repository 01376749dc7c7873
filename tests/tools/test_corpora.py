"""Corpora: files, FineWeb-Edu, docstrings, and their splits."""

import bz2
import collections
import gzip
import lzma
import os
import re

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

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


BAD_LINES = {
    '{"txt": "a"}': 'no "text" that is a string .it holds: txt.; name .*--text-c',
    '{"text": 3}': 'no "text" that is a string',
    "[1]": "no JSON object",
    "not json": "not JSON",
    "\xff": "not JSON",
    '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}": "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:12])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(
        InputError, match=f"a.jsonl, line 2: {BAD_LINES[line]}"
    ):
        list(corpora.read_documents(path))


LINES = b"".join(
    b'{"id": %d, "text": "document %d"}\n' % (n, n) for n in (1, 2)
)


def write_zst(path, data):
    import pyarrow

    with pyarrow.output_stream(path, compression="zstd") as file:
        file.write(data)


WRITERS = {
    "a.JSONL": lambda path, data: path.write_bytes(data),
    "a.ndjson": lambda path, data: path.write_bytes(data),
    "a.json": lambda path, data: path.write_bytes(b"\xef\xbb\xbf" + data),
    "a.jsonl.gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    "a.json.gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    "a.jsonl.bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    "a.jsonl.xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    "a.jsonl.zst": write_zst,
}


@pytest.mark.parametrize("name", WRITERS)
def test_lines_of_json_under_any_name_and_packed(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path, LINES)
    assert list(corpora.read_documents(path)) == ["document 1", "document 2"]


def test_packed_text_and_packed_parts_one_after_the_other(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"book"))
    assert list(corpora.read_documents(path)) == ["one book"]


@pytest.mark.parametrize("name", [n for n in WRITERS if n.count(".") > 1])
@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: b"x"]
)
def test_a_damaged_archive_is_one_line(tmp_path, name, damage):
    path = tmp_path / name
    WRITERS[name](path, LINES * 500)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        list(corpora.read_documents(path))


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def closed(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", closed)
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(InputError, match=f"{name} cannot.*Permission"):
            list(corpora.read_documents(tmp_path / name))
    with pytest.raises(InputError, match="a.txt cannot be read: Permission"):
        corpora.hash_file(tmp_path / "a.txt")


def test_an_array_and_tables_are_refused_by_name(tmp_path):
    array = tmp_path / "a.json"
    array.write_text('\n [{"text": "x"}]')
    with pytest.raises(InputError, match="a.json: a JSON array.*jq"):
        list(corpora.read_documents(array))
    for name in ("a.csv", "b.TSV", "c.csv.gz"):
        (tmp_path / name).write_text("id,text")
        with pytest.raises(InputError, match=f"{name}: a table"):
            corpora.find_files([tmp_path / name])


def test_another_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one", "text": "no"}\n')
    assert list(corpora.read_documents(path, "content")) == ["one"]
    pq.write_table(pa.table({"body": ["two"]}), tmp_path / "a.parquet")
    found = corpora.read_documents(tmp_path / "a.parquet", "body")
    assert list(found) == ["two"]
    with pytest.raises(InputError, match=r'no column "text" .it holds: body'):
        list(corpora.read_documents(tmp_path / "a.parquet"))


BAD_UTF8 = pa.array([b"fine", b"ok \xff bad"], pa.binary())
COLUMNS = {
    "numbers": (pa.array([1, 2]), "holds int64, not text"),
    "lists": (pa.array([["a"]]), "holds list.*, not text"),
    "binary": (BAD_UTF8, r"row 2: not UTF-8 text \(byte 3\)"),
    "strings": (
        pa.StringArray.from_buffers(2, *BAD_UTF8.buffers()[1:]),
        "row 2: not UTF-8 text",
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_parquet_column_that_is_no_text(tmp_path, name):
    column, says = COLUMNS[name]
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=f"a.parquet.*{says}"):
        list(corpora.read_documents(tmp_path / "a.parquet"))


def test_parquet_of_bytes_dictionaries_and_nothing(tmp_path):
    path = tmp_path / "a.parquet"
    for column in (
        pa.array([b"one", None, b"two"], pa.binary()),
        pa.array(["one", None, "two"], pa.large_string()),
        pa.array(["one", None, "two"]).dictionary_encode(),
    ):
        pq.write_table(pa.table({"text": column}), path)
        assert list(corpora.read_documents(path)) == ["one", "two"]


def test_a_damaged_parquet_page_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"the cat sees dog {n} " * 20 for n in range(120)]
    pq.write_table(pa.table({"text": texts}), path)
    raw = bytearray(path.read_bytes())
    raw[60:200] = bytes(b ^ 255 for b in raw[60:200])
    path.write_bytes(raw)
    with pytest.raises(InputError, match="a.parquet: a parquet file that"):
        list(corpora.read_documents(path))


def test_what_a_folder_leaves_out_is_said(tmp_path, capsys):
    names = ("a.txt", "b.TXT", "c.json.gz", "sub/d.md", "x.png", "y.json")
    names += (".ipynb_checkpoints/a.txt", "._a.txt", "NOTES")
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("x")
    (tmp_path / "in" / "empty.md").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.txt").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    found = corpora.find_files([tmp_path / "in"])
    names = ["a.txt", "b.TXT", "c.json.gz", "linked.txt", "d.md"]
    assert [path.name for path in found] == names
    said = capsys.readouterr().err
    assert said == (
        "5 files taken; left out: 1 .json, 1 .png, 1 empty, 1 hidden, "
        "1 hidden folders, 1 no ending\n"
    )


def test_a_pattern_leaves_out_empty_files_and_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").touch()
    assert corpora.find_files([tmp_path / "*.txt"]) == [tmp_path / "a.txt"]
    assert "left out: 1 empty" in capsys.readouterr().err
    with pytest.raises(InputError, match="b.txt: the file is empty"):
        corpora.find_files([tmp_path / "b.txt"])


def test_only_left_out_files_are_named_in_the_refusal(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="no such file.*left out: 1 .json"):
        corpora.find_files([tmp_path])


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
    columns = (
        *("id", "dump", "url", "file_path", "language"),
        *("language_score", "token_count", "score", "int_score"),
    )
    for part in range(3):
        texts = [f"part {part}, page {n}. " * 9 for n in range(60)]
        table = {"text": texts, **{c: range(60) for c in columns}}
        pq.write_table(pa.table(table), tmp_path / f"{part}.parquet")
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
