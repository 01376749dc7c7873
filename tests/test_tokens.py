"""Tokenizers, corpora, shards and floors: chapter 12."""

import collections
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer

from llama_tut import tokens
from llama_tut.tools.files import InputError

SAMPLES = (
    "two  spaces,   three\n\n\nand lines \t\n end ",
    "don't we'll I'VE it's they'RE",
    "🙂 👩‍👩‍👧 and 你好，世界。 Ünïcödé \u200b",
    "x**2 + 3.14159 == 0x1F  # 100%",
    "a\r\nb\x00c",
)
SPECIAL = "before <|endoftext|> after"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A trained tokenizer as a folder."""
    folder = tmp_path_factory.mktemp("bpe")
    text = (tokens.__doc__ + tokens.prepare.__doc__) * 3
    tokens.save_tokenizer(tokens.train_bpe([text], 400), folder)
    return folder


def test_bpe_round_trip_and_ids_of_auto_tokenizer(bpe):
    encode, auto = tokens.Encoder(bpe), AutoTokenizer.from_pretrained(bpe)
    for sample in SAMPLES:
        (ids,) = encode([sample])
        assert ids.dtype == np.uint32
        assert ids.tolist() == auto(sample).input_ids
        assert auto.decode(ids) == sample
    assert len(auto) == 400
    assert auto.eos_token == auto.bos_token == tokens.END_OF_TEXT
    assert auto.eos_token_id == 0


def test_bpe_is_the_same_every_time(bpe):
    text = (tokens.__doc__ + tokens.prepare.__doc__) * 3
    again = tokens.train_bpe(iter([text]), 400)
    assert again.to_str(True) == (bpe / "tokenizer.json").read_text()


def test_special_token_in_a_document_stays_text(bpe):
    (ids,) = tokens.Encoder(bpe)([SPECIAL])
    assert 0 not in ids
    assert tokens.read_tokenizer(bpe).decode(ids) == SPECIAL


def test_merges_come_back_from_ranks(bpe):
    model = json.loads((bpe / "tokenizer.json").read_text())["model"]
    byte_of = {c: b for b, c in tokens.byte_characters().items()}
    names = sorted(model["vocab"], key=model["vocab"].get)[1:]
    ranks = {bytes(byte_of[c] for c in t): i for i, t in enumerate(names)}
    rebuilt = json.loads(tokens.tokenizer_from_ranks(ranks).to_str())
    assert rebuilt["model"]["merges"] == model["merges"]


needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR",
)


@needs_gpt2
def test_gpt2_ids_equal_tiktokens(tmp_path):
    gpt2 = tokens.load_tiktoken()
    folder = tmp_path / "gpt2"
    ranks = gpt2._mergeable_ranks
    tokens.save_tokenizer(tokens.tokenizer_from_ranks(ranks), folder)
    fast, slow = tokens.Encoder(folder, "gpt2"), tokens.Encoder(folder)
    auto = AutoTokenizer.from_pretrained(folder)
    for sample in (*SAMPLES, SPECIAL, tokens.prepare.__doc__):
        ids = gpt2.encode_ordinary(sample)
        assert fast([sample])[0].tolist() == ids
        assert slow([sample])[0].tolist() == ids
        if sample != SPECIAL:
            assert auto(sample).input_ids == ids
    assert auto.eos_token_id == gpt2.eot_token == 50256
    reader = tokens.read_tokenizer(folder)
    assert tokens.separator_id(folder, reader) == 50256


def test_no_gpt2_and_no_network(monkeypatch):
    def fail(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tokens.tiktoken, "get_encoding", fail)
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR"):
        tokens.load_tiktoken()


@pytest.mark.parametrize(
    "special, config, expected",
    [
        (["<|im_start|>", "<|endoftext|>"], {"bos_token": "<|im_start|>"}, 1),
        (["<|begin_of_text|>", "<|end_of_text|>"], {}, 0),
        (["<s>", "</s>"], {"bos_token": {"content": "<s>"}}, 0),
        (["<s>", "</s>"], {"bos_token": None, "eos_token": "</s>"}, 1),
    ],
)
def test_separator_of_other_tokenizers(tmp_path, special, config, expected):
    core = tokens.byte_level(tokens.models.BPE())
    core.add_special_tokens(special)
    (tmp_path / "tokenizer.json").write_text(core.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reader = tokens.read_tokenizer(tmp_path)
    assert tokens.separator_id(tmp_path, reader) == expected


def test_a_tokenizer_without_separator_is_refused(tmp_path):
    core = tokens.byte_level(tokens.models.BPE())
    (tmp_path / "tokenizer.json").write_text(core.to_str())
    with pytest.raises(InputError, match="no end-of-text"):
        tokens.separator_id(tmp_path, tokens.read_tokenizer(tmp_path))


# Files


def test_text_files_and_their_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\xef\xbb\xbfone\r\ntwo\n<|endoftext|>\nthree <|endoftext|> x\n"
        b"<|endoftext|>"
    )
    assert list(tokens.read_documents(path)) == [
        "one\ntwo\n",
        "three <|endoftext|> x\n",
    ]


def test_jsonl_keeps_odd_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b", "id": 1}\n\n{"text": "  "}\n')
    assert list(tokens.read_documents(path)) == ["a?b"]


@pytest.mark.parametrize(
    "line", ['{"txt": "a"}', '{"text": 3}', "[1]", "not json", "\xff"]
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match=r"a.jsonl, line 2: .*text"):
        list(tokens.read_documents(path))


def test_find_files(tmp_path):
    for name in ("b.txt", "a.jsonl", "deep/c.md", "skip.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    inside = [p.name for p in tokens.find_files([tmp_path])]
    assert inside == ["a.jsonl", "b.txt", "c.md"]
    assert tokens.find_files([tmp_path / "*.png"])[0].name == "skip.png"


def test_split_by_hash_and_by_tail():
    many = [f"document {n} " * 5 for n in range(3000)] * 2
    rows = tokens.split_corpus("", [lambda: many], 0.05).documents()
    sides = collections.defaultdict(set)
    for split, text in rows:
        sides[split].add(text)
    assert not sides["train"] & sides["val"]
    assert 0.03 < len(sides["val"]) / 3000 < 0.07

    few = ["line\n" * 50, "no line ends here", "x"]
    rows = list(tokens.split_corpus("", [lambda: few], 0.1).documents())
    assert [
        a + b for (_, a), (_, b) in zip(rows[::2], rows[1::2], strict=True)
    ] == few
    assert [split for split, _ in rows] == ["train", "val"] * 3
    assert rows[0][1].endswith("\n") and 10 <= len(rows[1][1]) <= 30


def test_the_validation_side_is_never_empty():
    for seed in range(50):
        texts = [f"{seed} {n}" for n in range(100)]
        rows = tokens.split_corpus("", [lambda t=texts: t], 1e-6).documents()
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
    files = tokens.find_files([tmp_path])
    streamed = tokens.stream_corpus(
        0.1, path="parquet", data_files=[str(f) for f in files]
    )
    local = tokens.open_corpus(files, 0.1)
    assert len(streamed.parts) == 3
    assert list(streamed.documents()) == list(local.documents())
    assert list(streamed.parts[1]())[0][1].startswith("part 1, page 0")


# The docs corpus


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
    files = list(tokens.python_files(tmp_path, "pkg"))
    assert [name for name, _ in files] == ["pkg/bad.py", "pkg/good.py"]
    found = tokens.read_docstrings(files)
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
    kept = list(tokens.deduplicate(documents))
    assert len(kept) == 400, "the copy in capitals is a duplicate"
    assert sum(shared in text for _, text in kept) == 1

    borrowed = [(f"n{n}.py", kept[n][1] + prose(20)) for n in range(400)]
    rows = list(tokens.split_by_module(kept + borrowed, 0.5))
    train = {text for split, text in rows if split == "train"}
    known = set().union(*map(tokens.windows, train))
    for split, text in rows:
        if split == "val":
            own = tokens.windows(text)
            assert len(own & known) <= 0.1 * len(own)


def test_docs_versions_name_all_packages(monkeypatch):
    assert set(tokens.docs_versions()) == {"python", *tokens.PACKAGES}
    monkeypatch.setattr(tokens, "PACKAGES", ("no_such_package",))
    with pytest.raises(InputError, match="no_such_package"):
        tokens.docs_versions()


# Shards


@pytest.mark.parametrize(
    "vocab_size, dtype",
    [(2048, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_shard_round_trip(tmp_path, vocab_size, dtype):
    path = tmp_path / "train_00000.bin"
    ids = np.array([0, 1, vocab_size - 1])
    written = tokens.write_shard(path, ids, vocab_size, "ab" * 32, 17)
    shard, found = tokens.open_shard(path)
    assert shard == written == tokens.read_header(path)
    assert (shard.dtype, shard.count, shard.bytes) == (dtype, 3, 17)
    assert shard.tokenizer == "ab" * 32
    assert found.tolist() == ids.tolist() and found.dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_id_outside_the_vocabulary_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="128000"):
        tokens.write_shard(
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
    tokens.write_shard(path, np.arange(1000), 2048, "00" * 32, 5)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"train_00003.bin.*{says}"):
        tokens.open_shard(path)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(InputError, match="train_00007.bin: No such file"):
        tokens.open_shard(tmp_path / "train_00007.bin")


# Floors


def plain_bigram(train, val, V):
    """Kneser-Ney by dictionaries, from the formula."""
    pairs = collections.Counter(zip(train, train[1:], strict=False))
    n1 = sum(c == 1 for c in pairs.values())
    n2 = sum(c == 2 for c in pairs.values())
    d = n1 / (n1 + 2 * n2)
    loss = 0
    for a, b in zip(val, val[1:], strict=False):
        k = {x: 1 + sum(p[1] == x for p in pairs) for x in range(V)}
        lower = k[b] / sum(k.values())
        c = sum(n for p, n in pairs.items() if p[0] == a)
        if c:
            kinds = sum(p[0] == a for p in pairs)
            p = (max(pairs[a, b] - d, 0) + d * kinds * lower) / c
        else:
            p = lower
        loss -= math.log(p)
    return loss / (len(val) - 1)


def test_bigram_floor_equals_the_formula():
    rng = np.random.default_rng(1)
    train = rng.choice(6, 60, p=[0.5, 0.2, 0.1, 0.1, 0.1, 0]).astype(np.int64)
    val = rng.integers(6, size=40)
    ours = tokens.bigram_nats(train, val, 6)
    assert ours == pytest.approx(plain_bigram(train.tolist(), val.tolist(), 6))


def test_unigram_floor():
    train, val = np.array([0, 0, 1]), np.array([2, 0, 2])
    expected = -(math.log(3 / 6) + math.log(1 / 6)) / 2
    assert tokens.unigram_nats(train, val, 3) == pytest.approx(expected)


def test_bits_per_byte():
    fields = dict.fromkeys(tokens.DatasetInfo.__dataclass_fields__, 0)
    info = tokens.DatasetInfo(**{**fields, "bytes_per_token": 4.5})
    assert round(info.bits_per_byte(2.9555), 3) == 0.948


# Processes


def test_parallel_map_keeps_order_and_looks_ahead_only_a_little():
    taken = []

    def items():
        for n in range(100):
            taken.append(n)
            yield n

    results = tokens.parallel_map(math.sqrt, items(), 2)
    assert next(results) == 0.0
    assert len(taken) <= 10
    assert list(results) == [math.sqrt(n) for n in range(1, 100)]


def test_long_documents_are_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 100)
    text = "".join(f"a line with number {n}\n" for n in range(50)) + "x" * 300
    pieces = list(tokens.cut_pieces([lambda: [("train", text)]]))
    assert "".join(p.text for p in pieces) == text
    assert [p.starts for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert max(len(p.text) for p in pieces) <= 100
    assert all(p.text.endswith("\n") for p in pieces[:10])


def test_tokenizer_folder_is_refused_when_unreadable(tmp_path):
    with pytest.raises(InputError, match="neither bpe nor gpt2"):
        tokens.read_tokenizer(tmp_path / "gtp2")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        tokens.read_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)
