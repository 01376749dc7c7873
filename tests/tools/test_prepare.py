"""scripts/prepare.py: what it writes, what it refuses, and that it goes on."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from llama_tut.loader import ShardLoader
from llama_tut.tools import cli, corpora, files, shards, tokenizers
from llama_tut.tools import prepare as tool
from llama_tut.tools.files import InputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "prepare.py")]


def documents(count, seed=0):
    """Documents of made-up words, 20 to 60 words each."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("aeioulnrst"))
    words = ["".join(rng.choice(letters, 5)) for _ in range(300)]
    return [
        " ".join(rng.choice(words, rng.integers(20, 60))) + f" {n} é.\n"
        for n in range(count)
    ]


@pytest.fixture
def corpus(tmp_path):
    """A jsonl file with 400 documents."""
    path = tmp_path / "corpus.jsonl"
    rows = (json.dumps({"text": text}) for text in documents(400))
    path.write_text("\n".join(rows))
    return path


@pytest.fixture
def prepare(monkeypatch, capsys):
    """Call the script in this process: (exit code, stdout, stderr)."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import prepare

    def call(*options):
        argv = ["prepare.py", "--processes", "1", *map(str, options)]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            cli.run(prepare.main)
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return call


def refused(result, *words):
    """Exit code 2, one line on stderr with these words, nothing else."""
    code, out, err = result
    assert code == 2 and out == "", (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def contents(folder):
    """{relative name: bytes} of all files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_back(folder):
    """{split: documents} that the shards hold."""
    info = tool.load_dataset_info(folder)
    auto = AutoTokenizer.from_pretrained(folder / "tokenizer")
    found = {}
    for split in ("train", "val"):
        ids = shards.first_tokens(folder, split)
        assert ids[0] == info.end_of_text
        parts = np.split(ids, np.flatnonzero(ids == info.end_of_text))[1:]
        found[split] = [auto.decode(part[1:]) for part in parts]
    return found


def test_no_token_is_lost(corpus, tmp_path, prepare):
    out = tmp_path / "data"
    code, printed, err = prepare(
        *("--corpus", corpus, "--vocab-size", 300),
        *("--shard-tokens", 5000, "--out", out),
    )
    assert (code, err) == (0, "")
    for word in ("300 tokens", "bytes a token", "MB/s", "unigram", "bigram"):
        assert word in printed
    found = read_back(out)
    assert sorted(found["train"] + found["val"]) == sorted(documents(400))
    assert len(found["val"]) > 5
    info = tool.load_dataset_info(out)
    paths = sorted(out.glob("train_*.bin"))
    headers = [shards.read_header(path) for path in paths]
    assert len(paths) == info.train_shards > 3
    assert {header.count for header in headers[:-1]} == {5000}
    assert sum(h.count for h in headers) == info.train_tokens
    assert sum(h.bytes for h in headers) == info.train_bytes
    texts = "".join(found["train"])
    assert info.train_bytes == len(texts.encode()) > len(texts)
    assert info.bigram_nats < info.unigram_nats < np.log(300)
    assert len(ShardLoader(out, "val", 1, 16)) > 1


def test_processes_do_not_change_a_byte(corpus, tmp_path):
    options = dict(vocab_size=300, shard_tokens=5000)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        tool.prepare([corpus], out, processes, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    before = (tmp_path / "1" / "dataset.json").stat().st_mtime_ns
    tool.prepare([corpus], tmp_path / "1", 1, **options)
    assert (tmp_path / "1" / "dataset.json").stat().st_mtime_ns == before


def test_two_parts_and_a_stop_anywhere(tmp_path, monkeypatch):
    """Stop before each write in turn; the next call must end the same."""
    paths = []
    for part in range(2):
        paths.append(tmp_path / f"{part}.jsonl")
        rows = (json.dumps({"text": t}) for t in documents(120, part))
        paths[-1].write_text("\n".join(rows))
    monkeypatch.setattr(tool, "GROUP", 2000)
    options = dict(vocab_size=300, shard_tokens=1500)
    tool.prepare(paths, tmp_path / "whole", 1, **options)
    whole = contents(tmp_path / "whole")
    assert len(whole) > 8
    write, left = shards.write_atomic, []

    def limited(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(*args)

    for module in (files, shards, tokenizers, tool):
        monkeypatch.setattr(module, "write_atomic", limited)
    stops = 0
    for allowed in range(0, 100, 4):
        left[:] = [None] * allowed
        out = tmp_path / f"stop{allowed}"
        try:
            tool.prepare(paths, out, 1, **options)
            assert contents(out) == whole
            break
        except KeyboardInterrupt:
            stops += 1
            assert not out.exists()
        left[:] = [None] * 1000
        tool.prepare(paths, out, 1, **options)
        assert contents(out) == whole, allowed
    assert stops > 5


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_kill_9_and_go_on(corpus, tmp_path):
    command = [*SCRIPT, "--corpus", str(corpus), "--vocab-size", "300"]
    command += ["--shard-tokens", "300", "--processes", "2"]
    out, parts = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen(
        [*command, "--out", out], stdout=subprocess.DEVNULL
    )
    for _ in range(6000):
        if (parts / "train_00003.bin").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert workers and not alive, "workers outlive their parent"
    assert parts.exists() != out.exists()
    for name in (out, tmp_path / "whole"):
        subprocess.run([*command, "--out", name], check=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert not parts.exists()


def test_max_tokens_stops_behind_a_document(corpus, tmp_path):
    options = dict(vocab_size=300, max_tokens=9000)
    info = tool.prepare([corpus], tmp_path / "data", 1, **options)
    total = info.train_tokens + info.val_tokens
    assert 9000 <= total < 9400
    assert info.train_documents + info.val_documents < 400
    found = read_back(tmp_path / "data")
    assert set(found["train"] + found["val"]) < set(documents(400))


def test_one_text_file(tmp_path, prepare):
    book = tmp_path / "book.txt"
    book.write_text("".join(documents(50)) + "<|endoftext|> inside a line\n")
    out = tmp_path / "data"
    assert prepare("--corpus", book, "--vocab-size", 300, "--out", out)[0] == 0
    found = read_back(out)
    assert [len(part) for part in found.values()] == [1, 1]
    assert found["train"][0] + found["val"][0] == book.read_text()


def test_a_folder_as_tokenizer(corpus, tmp_path, prepare):
    own = tmp_path / "tokenizer"
    tokenizers.save_tokenizer(tokenizers.train_bpe(documents(50), 320), own)
    options = ("--corpus", corpus, "--tokenizer", own)
    out = tmp_path / "data"
    assert prepare(*options, "--vocab-size", 384, "--out", out)[0] == 0
    info = tool.load_dataset_info(out)
    assert info.vocab_size == 384
    assert contents(out / "tokenizer") == contents(own)
    result = prepare(*options, "--vocab-size", 319, "--out", tmp_path / "b")
    refused(result, "320 tokens", "319", "too small")
    assert not list(tmp_path.glob("b*"))


@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR",
)
def test_gpt2(corpus, tmp_path, prepare):
    options = ("--corpus", corpus, "--tokenizer", "gpt2")
    assert prepare(*options, "--out", tmp_path / "data")[0] == 0
    info = tool.load_dataset_info(tmp_path / "data")
    assert (info.vocab_size, info.end_of_text) == (50257, 50256)
    found = read_back(tmp_path / "data")
    assert sorted(found["train"] + found["val"]) == sorted(documents(400))


def test_docs_from_a_few_modules(tmp_path, monkeypatch, prepare):
    monkeypatch.setenv("LLAMA_TUT_CACHE", str(tmp_path / "cache"))
    root = Path(json.__file__).parents[1]
    names = ("argparse", "ast", "heapq", "json", "logging", "random", "struct")
    names = [*names, "asyncio", "collections", "email", "unittest"]

    def few_files():
        for name in names:
            yield from corpora.python_files(root / name, name)
            if (path := root / f"{name}.py").exists():
                yield f"{name}.py", path

    monkeypatch.setattr(corpora, "docs_files", few_files)
    for out in ("a", "b"):
        options = ("--corpus", "docs", "--vocab-size", 400)
        assert prepare(*options, "--out", tmp_path / out)[0] == 0
        monkeypatch.setattr(corpora, "build_docs", None)  # cached from now on
        monkeypatch.setattr(tool, "train_bpe", None)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    info = tool.load_dataset_info(tmp_path / "a")
    assert set(info.versions) == {"python", *corpora.PACKAGES}
    found = read_back(tmp_path / "a")
    texts = found["train"] + found["val"]
    assert len(texts) == len(set(texts)) > 100
    assert all(len(text) >= corpora.MIN_CHARACTERS for text in texts)


def test_fineweb_edu_without_network(tmp_path, monkeypatch, prepare):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    result = prepare("--corpus", "fineweb-edu", "--out", tmp_path / "data")
    refused(result, "fineweb-edu", "network")
    assert not list(tmp_path.iterdir())


BAD_FILES = {
    "empty.txt": (b"", "empty"),
    "blank.txt": (b" \n\n", "no text"),
    "binary.txt": (b"text\0text", "binary"),
    "latin.txt": ("Größe".encode("latin-1"), "UTF-8"),
    "no_text.jsonl": (b'{"content": "x"}\n', "line 1"),
    "broken.jsonl": (b'{"text": "x"}\n{"text": ', "line 2"),
    "not.parquet": (b"PAR1 no", "parquet"),
    "one.txt": (b"x", "no val text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_corpus(name, tmp_path, prepare):
    data, says = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    options = ("--vocab-size", 300, "--out", tmp_path / "data")
    refused(prepare("--corpus", path, *options), says)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--corpus", "missing.txt"], ["missing.txt", "no such file"]),
        (["--corpus", "a*.none"], ["no such file"]),
        (["--corpse", "x"], ["--corpse"]),
        (["--vocab-size", "200"], ["257"]),
        (["--vocab-size", "many"], ["invalid int"]),
        (["--shard-tokens", "0"], ["shard_tokens"]),
        (["--val-share", "1.5"], ["val_share"]),
        (["--val-share", "0.1"], ["own split"]),
        (["--processes", "0"], ["--processes"]),
        (["--tokenizer", "gtp2"], ["gtp2", "neither bpe nor gpt2"]),
    ],
)
def test_bad_options(options, words, tmp_path, prepare, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = prepare("--out", tmp_path / "data", *options)
    refused(result, *words)
    assert not list(tmp_path.iterdir())


def test_parquet_without_text(tmp_path, prepare):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    options = ("--out", tmp_path / "data")
    refused(prepare("--corpus", tmp_path / "a.parquet", *options), '"text"')


def test_out_is_something_else(corpus, tmp_path, prepare):
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.png").write_text("x")
    options = ("--corpus", corpus, "--vocab-size", 300, "--out", out)
    refused(prepare(*options), "not a data folder")
    assert (out / "cat.png").exists()
    (out / "cat.png").unlink()
    assert prepare(*options)[0] == 0, "an empty folder is taken"
    refused(prepare(*options[:3], 310, *options[4:]), "another data set")


def test_unfinished_with_other_settings(corpus, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    options = dict(vocab_size=300, shard_tokens=5000)
    with monkeypatch.context() as patch:
        patch.setattr(tool, "describe", stop)
        patch.setattr(Path, "unlink", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            tool.prepare([corpus], tmp_path / "data", 1, **options)
    with pytest.raises(InputError, match="unfinished"):
        tool.prepare([corpus], tmp_path / "data", 1, vocab_size=310)


def test_disk_full_then_go_on(corpus, tmp_path, monkeypatch):
    options = dict(vocab_size=300, shard_tokens=5000)
    write, left = shards.write_shard, [None] * 2

    def full(*args):
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tool, "write_shard", full)
        with pytest.raises(InputError, match="disk is full.*again"):
            tool.prepare([corpus], tmp_path / "data", 1, **options)
    assert [p.name for p in tmp_path.glob("data*")] == ["data.partial"]
    tool.prepare([corpus], tmp_path / "data", 1, **options)
    tool.prepare([corpus], tmp_path / "whole", 1, **options)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_a_real_limit_of_the_system(corpus, tmp_path):
    """The system refuses to write past 20 kB: no half file stays."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = subprocess.run(
        [*SCRIPT, "--corpus", corpus, "--out", tmp_path / "data"],
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    refused((result.returncode, result.stdout, result.stderr), "disk is full")
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.bin"))


def test_long_documents_are_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr(tool, "PIECE", 100)
    text = "".join(f"a line with number {n}\n" for n in range(50)) + "x" * 300
    pieces = list(tool.cut_pieces([lambda: [("train", text)]]))
    assert "".join(p.text for p in pieces) == text
    assert [p.starts for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert max(len(p.text) for p in pieces) <= 100
    assert all(p.text.endswith("\n") for p in pieces[:10])
