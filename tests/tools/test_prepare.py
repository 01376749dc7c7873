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
from small_model import ROOT, caller, refused
from transformers import AutoTokenizer

from llama_tut.loader import ShardLoader
from llama_tut.tools import (
    data_folder,
    docs_corpus,
    encoding,
    files,
    shards,
    tokenizers,
)
from llama_tut.tools import prepare as tool
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import InputError

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
    return caller("prepare", monkeypatch, capsys, "--processes", 1)


def contents(folder):
    """{relative name: bytes} of all files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_back(folder):
    """{split: documents} that the shards hold."""
    info = load_dataset_info(folder)
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
    for word in ("300 tokens", "bytes per token", "MB/s", "unigram", "bigram"):
        assert word in printed
    found = read_back(out)
    assert sorted(found["train"] + found["val"]) == sorted(documents(400))
    assert len(found["val"]) > 5
    info = load_dataset_info(out)
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
    monkeypatch.setattr(encoding, "GROUP", 2000)
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

    for module in (files, shards, tokenizers, encoding, data_folder):
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
            assert not (out / "dataset.json").exists()
        left[:] = [None] * 1000
        tool.prepare(paths, out, 1, **options)
        assert contents(out) == whole, allowed
    assert stops > 5


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_kill_9_and_go_on(corpus, tmp_path):
    command = [*SCRIPT, "--corpus", str(corpus), "--vocab-size", "300"]
    command += ["--shard-tokens", "300", "--processes", "2"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*command, "--out", out], stdout=subprocess.DEVNULL
    )
    for _ in range(6000):
        if (out / "train_00003.bin").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "dataset.json").exists()
    with pytest.raises(InputError, match="no dataset.json"):
        load_dataset_info(out)
    for name in (out, tmp_path / "whole"):
        subprocess.run([*command, "--out", name], check=True)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_workers_that_read_docstrings_end_with_their_parent(tmp_path):
    process = subprocess.Popen(
        [*SCRIPT, "--processes", "2", "--out", tmp_path / "out"],
        env={**os.environ, "LLAMA_TUT_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.DEVNULL,
    )
    workers = []
    for _ in range(6000):
        found = psutil.Process(process.pid).children(recursive=True)
        workers = [p for p in found if "spawn_main" in " ".join(p.cmdline())]
        if len(workers) == 2 or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(found, timeout=60)
    assert workers and not alive, "workers outlive their parent"


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
    info = load_dataset_info(out)
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
    info = load_dataset_info(tmp_path / "data")
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
            yield from docs_corpus.python_files(root / name, name)
            if (path := root / f"{name}.py").exists():
                yield f"{name}.py", path

    monkeypatch.setattr(docs_corpus, "docs_files", few_files)
    for out in ("a", "b"):
        options = ("--corpus", "docs", "--vocab-size", 400)
        assert prepare(*options, "--out", tmp_path / out)[0] == 0
        monkeypatch.setattr(
            docs_corpus, "build_docs", None
        )  # cached from now on
        monkeypatch.setattr(tool, "train_bpe", None)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    info = load_dataset_info(tmp_path / "a")
    assert set(info.versions) == {"python", *docs_corpus.PACKAGES}
    found = read_back(tmp_path / "a")
    texts = found["train"] + found["val"]
    assert len(texts) == len(set(texts)) > 100
    assert all(len(text) >= docs_corpus.MIN_CHARACTERS for text in texts)


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
        (["--vocab-size", "1" + 11 * "0"], ["vocab_size", "1,048,576"]),
        (["--vocab-size", 23 * "9"], ["vocab_size", "1,048,576"]),
        (["--max-tokens", 23 * "9"], ["max_tokens"]),
        (["--shard-tokens", 23 * "9"], ["shard_tokens"]),
        (["--processes", "9" * 9], ["--processes"]),
        (["--text-column", "x"], ["text_column"]),
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
    options += ("--text-column", "body", "--vocab-size", 300)
    refused(prepare("--corpus", tmp_path / "a.parquet", *options), "no val")


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

    def full(*args, **header):
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        return write(*args, **header)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "write_shard", full)
        with pytest.raises(InputError, match="disk is full.*again"):
            tool.prepare([corpus], tmp_path / "data", 1, **options)
    assert not (tmp_path / "data" / "dataset.json").exists()
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
    monkeypatch.setattr(encoding, "PIECE", 100)
    text = "".join(f"a line with number {n}\n" for n in range(50)) + "x" * 300
    pieces = list(encoding.cut_pieces([lambda: [("train", text)]]))
    assert "".join(p.text for p in pieces) == text
    assert [p.starts for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert max(len(p.text) for p in pieces) <= 100
    assert all(p.text.endswith("\n") for p in pieces[:10])


# The folder


def test_out_may_be_a_link_or_the_current_folder(
    corpus, tmp_path, monkeypatch
):
    """A big disk behind a link, a mounted volume: nothing is renamed onto it."""
    options = dict(vocab_size=300, shard_tokens=5000)
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    (tmp_path / "here").mkdir()
    tool.prepare([corpus], tmp_path / "link", 1, **options)
    tool.prepare([corpus], tmp_path / "dangling", 1, **options)
    monkeypatch.chdir(tmp_path / "here")
    tool.prepare([corpus], ".", 1, **options)
    assert contents(tmp_path / "big") == contents(tmp_path / "here")
    assert contents(tmp_path / "big") == contents(tmp_path / "later")
    assert (tmp_path / "link").is_symlink()
    assert os.path.samefile(".", tmp_path / "here")


def test_no_folder_of_others_is_touched(corpus, tmp_path):
    for name in ("data.partial", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("three years of work")
    with pytest.raises(InputError, match="data holds files .thesis.txt., but"):
        tool.prepare([corpus], tmp_path / "data", 1, vocab_size=300)
    (tmp_path / "data" / "thesis.txt").rename(tmp_path / "thesis.txt")
    (tmp_path / "data" / "tokenizer").mkdir()  # a name of ours, not our file
    with pytest.raises(InputError, match="holds files .tokenizer., but"):
        tool.prepare([corpus], tmp_path / "data", 1, vocab_size=300)
    (tmp_path / "data" / "tokenizer").rmdir()
    tool.prepare([corpus], tmp_path / "data", 1, vocab_size=300)
    assert (tmp_path / "data.partial" / "thesis.txt").exists()


def test_bad_input_removes_only_what_was_begun(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": text}) for text in documents(150)]
    path.write_text("\n".join([*rows, "no json"]))
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "mine", tmp_path / "new"):
        with pytest.raises(InputError, match="line 151"):
            tool.prepare([path], out, 1, vocab_size=300)
    assert not list((tmp_path / "mine").iterdir())
    assert not (tmp_path / "new").exists()


def test_three_at_once_make_one_folder(corpus, tmp_path):
    command = [*SCRIPT, "--corpus", corpus, "--vocab-size", "300"]
    command += ["--shard-tokens", "500", "--out", tmp_path / "data"]
    command += ["--processes", "1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = [subprocess.Popen(command, **pipes) for _ in range(3)]
    said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    assert len({out.split("of text")[0] for out, _ in said}) == 1
    tool.prepare(
        [corpus], tmp_path / "whole", 1, vocab_size=300, shard_tokens=500
    )
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_touched_file_is_the_same_data_set(corpus, tmp_path):
    tool.prepare([corpus], tmp_path / "data", 1, vocab_size=300)
    os.utime(corpus, (1, 1))
    tool.prepare([corpus], tmp_path / "data", 1, vocab_size=300)
    corpus.write_text(corpus.read_text().replace("aa", "ab", 1))
    with pytest.raises(InputError, match="another data set"):
        tool.prepare([corpus], tmp_path / "data", 1, vocab_size=300)


def test_another_tokenizer_in_the_same_folder_is_another_data_set(tmp_path):
    (tmp_path / "a.txt").write_text("".join(documents(50)))
    own = tmp_path / "tokenizer"
    for size in (300, 310):
        trained = tokenizers.train_bpe(documents(50), size)
        tokenizers.save_tokenizer(trained, own)
        if size == 300:
            args = [tmp_path / "a.txt"], tmp_path / "data", 1
            tool.prepare(*args, tokenizer=str(own))
    with pytest.raises(InputError, match="another data set"):
        tool.prepare(*args, tokenizer=str(own))


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda d: "", "no readable JSON"),
        (lambda d: d[:100], "no readable JSON"),
        (lambda d: "[1]", "no JSON object"),
        (lambda d: "{}", "missing"),
        (
            lambda d: d.replace('"vocab_size": 300', '"vocab_size": "x"'),
            "number",
        ),
        (lambda d: "{" + '"a": 1, ' + d[1:], "unexpected"),
    ],
)
def test_a_damaged_dataset_json_is_one_line(corpus, tmp_path, damage, says):
    tool.prepare([corpus], tmp_path / "data", 1, vocab_size=300)
    path = tmp_path / "data" / "dataset.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=f"dataset.json.*{says}"):
        load_dataset_info(tmp_path / "data")


# What a training run relies on


def test_a_separator_stands_in_front_of_each_document(corpus, tmp_path):
    info = tool.prepare([corpus], tmp_path / "data", 1, vocab_size=300)
    for split in ("train", "val"):
        ids = shards.first_tokens(tmp_path / "data", split)
        count = int((ids == info.end_of_text).sum())
        assert count == getattr(info, f"{split}_documents") > 1
        assert ids[0] == info.end_of_text and ids[-1] != info.end_of_text


def test_bits_a_byte_are_of_the_validation_text(tmp_path):
    """Of a book whose end is in another script: 3 bytes per character there."""
    (tmp_path / "a.txt").write_text(
        "the cat sees a dog " * 100 + "模型读" * 30
    )
    info = tool.prepare(
        [tmp_path / "a.txt"], tmp_path / "data", 1, vocab_size=280
    )
    found = read_back(tmp_path / "data")
    (val,) = found["val"]
    ids = shards.first_tokens(tmp_path / "data", "val")
    assert info.bytes_per_token == len(val.encode()) / len(ids)
    trained = info.train_bytes / info.train_tokens
    assert trained > 2 * info.bytes_per_token
    total = 1.5 * len(ids)  # a loss of 1.5 nats per token
    expected = total / np.log(2) / len(val.encode())
    assert info.bits_per_byte(1.5) == pytest.approx(expected)


@pytest.mark.parametrize("files", [1, 30])
def test_max_tokens_within_few_documents(files, tmp_path):
    """A book is cut within its text, and its end stays for validation."""
    text = "".join(documents(150))
    for number in range(files):
        (tmp_path / f"{number:02d}.txt").write_text(text)
    options = dict(vocab_size=300, max_tokens=3000)
    paths = sorted(tmp_path.glob("*.txt"))
    info = tool.prepare(paths, tmp_path / "data", 1, **options)
    assert abs(info.train_tokens - 3000) <= 2
    assert (info.train_documents, info.val_documents) == (1, 1)
    found = read_back(tmp_path / "data")
    assert text.startswith(found["train"][0])
    assert text.endswith(found["val"][0])
    assert info.train_bytes == len(found["train"][0].encode())


def test_max_tokens_does_not_encode_the_rest_of_a_book(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 2000)
    monkeypatch.setattr(encoding, "GROUP", 2000)
    (tmp_path / "a.txt").write_text("".join(documents(300)))
    encoded = []
    call = tokenizers.Encoder.__call__

    def counted(self, texts):
        encoded.extend(map(len, texts))
        return call(self, texts)

    monkeypatch.setattr(tokenizers.Encoder, "__call__", counted)
    options = dict(vocab_size=300, max_tokens=1000)
    tool.prepare([tmp_path / "a.txt"], tmp_path / "data", 1, **options)
    assert sum(encoded) < 0.3 * (tmp_path / "a.txt").stat().st_size
