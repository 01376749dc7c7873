"""tools/documents: every kind of file, and what is refused or left out."""

import bz2
import gzip
import lzma

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from llama_tut.tools import documents
from llama_tut.tools.files import InputError


def test_text_files_and_their_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\xef\xbb\xbfone\r\ntwo\n<|endoftext|>\nthree <|endoftext|> x\n"
        b"<|endoftext|>"
    )
    assert list(documents.read_documents(path)) == [
        "one\ntwo\n",
        "three <|endoftext|> x\n",
    ]


def test_jsonl_keeps_odd_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b", "id": 1}\n\n{"text": "  "}\n')
    assert list(documents.read_documents(path)) == ["a?b"]


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
        list(documents.read_documents(path))


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
    assert list(documents.read_documents(path)) == ["document 1", "document 2"]


def test_packed_text_and_packed_parts_one_after_the_other(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"book"))
    assert list(documents.read_documents(path)) == ["one book"]


@pytest.mark.parametrize("name", [n for n in WRITERS if n.count(".") > 1])
@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: b"x"]
)
def test_a_damaged_archive_is_one_line(tmp_path, name, damage):
    path = tmp_path / name
    WRITERS[name](path, LINES * 500)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        list(documents.read_documents(path))


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def closed(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", closed)
    for name in ("a.txt", "a.jsonl"):
        with pytest.raises(InputError, match=f"{name} cannot.*Permission"):
            list(documents.read_documents(tmp_path / name))
    with pytest.raises(InputError, match="a.txt cannot be read: Permission"):
        documents.hash_file(tmp_path / "a.txt")


def test_an_array_and_tables_are_refused_by_name(tmp_path):
    array = tmp_path / "a.json"
    array.write_text('\n [{"text": "x"}]')
    with pytest.raises(InputError, match="a.json: a JSON array.*jq"):
        list(documents.read_documents(array))
    for name in ("a.csv", "b.TSV", "c.csv.gz"):
        (tmp_path / name).write_text("id,text")
        with pytest.raises(InputError, match=f"{name}: a table"):
            documents.find_files([tmp_path / name])


def test_another_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one", "text": "no"}\n')
    assert list(documents.read_documents(path, "content")) == ["one"]
    pq.write_table(pa.table({"body": ["two"]}), tmp_path / "a.parquet")
    found = documents.read_documents(tmp_path / "a.parquet", "body")
    assert list(found) == ["two"]
    with pytest.raises(InputError, match=r'no column "text" .it holds: body'):
        list(documents.read_documents(tmp_path / "a.parquet"))


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
        list(documents.read_documents(tmp_path / "a.parquet"))


def test_parquet_of_bytes_dictionaries_and_nothing(tmp_path):
    path = tmp_path / "a.parquet"
    for column in (
        pa.array([b"one", None, b"two"], pa.binary()),
        pa.array(["one", None, "two"], pa.large_string()),
        pa.array(["one", None, "two"]).dictionary_encode(),
    ):
        pq.write_table(pa.table({"text": column}), path)
        assert list(documents.read_documents(path)) == ["one", "two"]


def test_a_damaged_parquet_page_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"the cat sees dog {n} " * 20 for n in range(120)]
    pq.write_table(pa.table({"text": texts}), path)
    raw = bytearray(path.read_bytes())
    raw[60:200] = bytes(b ^ 255 for b in raw[60:200])
    path.write_bytes(raw)
    with pytest.raises(InputError, match="a.parquet: a parquet file that"):
        list(documents.read_documents(path))


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
    found = documents.find_files([tmp_path / "in"])
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
    assert documents.find_files([tmp_path / "*.txt"]) == [tmp_path / "a.txt"]
    assert "left out: 1 empty" in capsys.readouterr().err
    with pytest.raises(InputError, match="b.txt: the file is empty"):
        documents.find_files([tmp_path / "b.txt"])


def test_only_left_out_files_are_named_in_the_refusal(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="no such file.*left out: 1 .json"):
        documents.find_files([tmp_path])


def test_find_files(tmp_path):
    for name in ("b.txt", "a.jsonl", "deep/c.md", "skip.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    inside = [p.name for p in documents.find_files([tmp_path])]
    assert inside == ["a.jsonl", "b.txt", "c.md"]
    assert documents.find_files([tmp_path / "*.png"])[0].name == "skip.png"
