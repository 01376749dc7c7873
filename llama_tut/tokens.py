# From notebooks/12_tokens.ipynb by scripts/export.py: edit the notebook.
"""Tokens: corpora, tokenizers, and shards of token ids on disk.

Letters: V vocab_size.
"""

import ast
import errno
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import struct
import sysconfig
import threading
import warnings
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from llama_tut.tools.files import (
    InputError,
    digest,
    write_atomic,
    write_json,
)
from llama_tut.tools.pretrained import cache_folder

# Pre-tokens


def byte_characters():
    """{byte: the character that stands for it in a tokenizer's files}.

    Source: OpenAI's GPT-2, `encoder.py`, `bytes_to_unicode`.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    table = {b: chr(b) for b in printable}
    table.update((b, chr(256 + n)) for n, b in enumerate(others))
    return table


# The library

END_OF_TEXT = "<|endoftext|>"
BYTE_VOCABULARY = 257  # 256 bytes and the end of text


def byte_level(model):
    """A tokenizer with GPT-2's pre-tokens, over bytes, around a model."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts, vocab_size):
    """An iterable of texts -> a byte-level BPE of at most `vocab_size`.

    Id 0 is the end of text, then come the 256 bytes, then the merges.
    """
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# A folder that others can read


def save_tokenizer(tokenizer, folder):
    """Write a `tokenizers` object as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(True).encode())


# GPT-2's vocabulary


def last_merge(token, ranks):
    """The two byte strings that the vocabulary merges into `token`."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        best = min(range(len(joined)), key=lambda i: ranks.get(joined[i], 1e9))
        pieces[best : best + 2] = [joined[best]]
    return tuple(pieces)


def tokenizer_from_ranks(ranks):
    """{byte string: rank} -> a `tokenizers` object with the same ids."""
    letters = byte_characters()

    def spell(token):
        return "".join(letters[b] for b in token)

    longer = (t for t in sorted(ranks, key=ranks.get) if len(t) > 1)
    merges = [tuple(map(spell, last_merge(t, ranks))) for t in longer]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = byte_level(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def load_tiktoken():
    """tiktoken's GPT-2 encoding, from its cache or from the network."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # every error of `requests` is one
        raise InputError(
            "GPT-2's vocabulary is neither in tiktoken's cache nor can it be "
            "fetched: connect to the network, or set TIKTOKEN_CACHE_DIR"
        ) from error


# Anyone's tokenizer


def read_tokenizer(folder):
    """The `tokenizers` object of a folder, set to encode plain text.

    Raises:
        InputError: no tokenizer.json, or one that cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: neither bpe nor gpt2, nor a folder with tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def separator_id(folder, tokenizer):
    """The id of the token that belongs in front of a document.

    `<|endoftext|>` where the vocabulary has it (GPT-2, SmolLM2, our own), or
    Llama 3's `<|begin_of_text|>`, or else the folder's bos or eos token.
    """
    names = [END_OF_TEXT, "<|begin_of_text|>"]
    path = Path(folder) / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text())
        for token in (settings.get("bos_token"), settings.get("eos_token")):
            # Some folders hold {"content": "<s>", ...} in place of "<s>".
            names.append(
                token.get("content") if type(token) is dict else token
            )
    for name in filter(None, names):
        if tokenizer.token_to_id(name) is not None:
            return tokenizer.token_to_id(name)
    raise InputError(f"{folder}: this tokenizer has no end-of-text token")


class Encoder:
    """Texts -> ids, with the tokenizer of a Hugging Face folder.

    Args:
        folder: holds tokenizer.json.
        name: "gpt2" encodes with tiktoken, which gives the same ids.
    """

    def __init__(self, folder, name=None):
        self.tokenizer = read_tokenizer(folder)
        self.tiktoken = load_tiktoken() if name == "gpt2" else None

    def __call__(self, texts):
        """A list of texts -> a list of arrays, uint32."""
        if self.tiktoken:
            ids = [self.tiktoken.encode_ordinary(text) for text in texts]
        else:
            encode = self.tokenizer.encode_batch_fast
            ids = [e.ids for e in encode(texts, add_special_tokens=False)]
        return [np.array(one, np.uint32) for one in ids]


# Documents: user's files


def read_text(path):
    """Documents of a text file: one, or parts between end-of-text lines."""
    data = path.read_bytes()
    if b"\0" in data:
        raise InputError(f"{path}: a binary file, not text")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start:,})"
        ) from error
    line = rf"^{re.escape(END_OF_TEXT)}[ \t]*(?:\n|\Z)"
    return iter(re.split(line, text, flags=re.MULTILINE))


def read_jsonl(path):
    """Documents of a file with a JSON object a line, from field `text`."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise InputError(
                    f'{path}, line {number}: no JSON object with a "text"'
                )
            yield text


def read_parquet(path):
    """Documents of a parquet file, from its column `text`."""
    import pyarrow  # a third of a second that other files need not pay
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise InputError(f'{path}: no column "text"')
            for batch in file.iter_batches(1000, columns=["text"]):
                yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file ({error})") from error


READERS = {
    ".txt": read_text,
    ".md": read_text,
    ".rst": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def find_files(paths):
    """Files, folders and glob patterns -> the files, in order."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.suffix in READERS]
        else:
            files = [path, *map(Path, glob.glob(str(path)))]
        files = sorted({p for p in files if p.is_file()})
        if not files:
            kinds = f" with {', '.join(READERS)}" if path.is_dir() else ""
            raise InputError(f"{path}: no such file{kinds}")
        found += files
    for path in found:
        if not path.stat().st_size:
            raise InputError(f"{path}: the file is empty")
    return found


def read_documents(path):
    """The documents of one file that are not blank, as valid Unicode."""
    for text in READERS.get(path.suffix, read_text)(path):
        if text and not text.isspace():
            # JSON can spell half of a surrogate pair, which UTF-8 cannot.
            yield text.encode(errors="replace").decode()


# What is held out

FEW = 100


def hash_place(text):
    """A hash of the text as a number from 0 to 1."""
    hashed = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64


def by_hash(read, share):
    """Documents -> (split, text): each on one side."""
    for text in read():
        yield "val" if hash_place(text) <= share else "train", text


def by_tail(read, share):
    """Documents -> (split, text): the end of each is for validation."""
    for text in read():
        at = max(1, int(len(text) * (1 - share)))
        line = text.rfind("\n", 0, at) + 1
        at = line if line > at / 2 else at
        yield "train", text[:at]
        yield "val", text[at:]


@dataclass(frozen=True)
class Corpus:
    """Documents in parts that can each be read from its beginning."""

    source: str  #: a text that changes when the corpus does
    parts: list  #: functions that return an iterator of (split, text)

    def documents(self):
        """(split, text) of all documents, always in the same order."""
        return itertools.chain.from_iterable(part() for part in self.parts)


def split_corpus(source, readers, share):
    """A `Corpus` from functions that return iterators of documents."""
    texts = itertools.chain.from_iterable(read() for read in readers)
    first = list(itertools.islice(texts, FEW))
    if not first:
        raise InputError("the corpus has no text in it")
    rule = by_tail if len(first) < FEW else by_hash
    if rule is by_hash:  # at least one of these is held out
        share = max(share, min(map(hash_place, first)))
    return Corpus(source, [partial(rule, read, share) for read in readers])


# Documents: FineWeb-Edu

FINEWEB_EDU = {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT"}


@contextmanager
def needs_network(name):
    """Turn errors of the network into one line, and silence its retries."""
    from datasets.exceptions import DatasetsError
    from httpx import HTTPError
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, HTTPError, DatasetsError) as error:
        raise InputError(
            f"{name}: cannot be read ({type(error).__name__}); this corpus "
            "needs the network"
        ) from error
    finally:
        logging.set_verbosity(level)


def stream_corpus(share, **where):
    """The `Corpus` of a data set of `datasets`, streamed.

    Args:
        share: of the documents, for validation.
        where: arguments of `datasets.load_dataset`.
    """
    from datasets import load_dataset  # takes a second to import

    name = where["path"]
    with needs_network(name):
        rows = load_dataset(**where, split="train", streaming=True)
        rows = rows.select_columns("text")

    def read(index):
        with needs_network(name):
            for row in rows.shard(rows.num_shards, index):
                if row["text"]:
                    yield row["text"]

    readers = [partial(read, i) for i in range(rows.num_shards)]
    return split_corpus(json.dumps(where), readers, share)


# Documents: what is already here

PACKAGES = (
    *("torch", "transformers", "datasets", "huggingface_hub", "numpy"),
    *("pandas", "matplotlib", "sympy", "networkx", "sqlalchemy"),
)


def docs_versions():
    """{name: version} of Python and of the packages of the corpus."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise InputError(
                f"the docs corpus needs the package {package}: install it, or "
                "choose another corpus"
            ) from error
    return versions


def python_files(root, prefix):
    """(name, path) of the modules in a folder, without its tests."""
    skip = {"test", "tests", "site-packages", "dist-packages"}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - skip)
        for file in sorted(files):
            path = Path(folder) / file
            if path.suffix == ".py":
                yield f"{prefix}/{path.relative_to(root).as_posix()}", path


def docs_files():
    """(name, path) of the standard library's and the packages' modules."""
    yield from python_files(sysconfig.get_path("stdlib"), "python")
    for package in PACKAGES:
        # Finds the folder without importing the package.
        spec = importlib.util.find_spec(package)
        yield from python_files(spec.submodule_search_locations[0], package)


MIN_CHARACTERS = 200


def read_docstrings(files):
    """(name, path) of modules -> (name, docstring) of all that they define.

    Docstrings of fewer than 200 characters are left out.
    """
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    found = []
    for name, path in files:
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates, and files for other versions of Python
        for node in ast.walk(tree):
            text = isinstance(node, kinds) and ast.get_docstring(node) or ""
            if len(text) >= MIN_CHARACTERS:
                found.append((name, text.encode(errors="replace").decode()))
    return found


MIN_PARAGRAPH = 60


def normalise(text):
    """The words of a text in lower case, without punctuation."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def deduplicate(documents):
    """(name, text) without documents and paragraphs that came before."""
    seen = set()
    for name, text in documents:
        whole = normalise(text)
        if whole in seen:
            continue
        seen.add(whole)
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            plain = normalise(paragraph)
            if len(plain) < MIN_PARAGRAPH or plain not in seen:
                kept.append(paragraph)
                seen.add(plain)
        text = "\n\n".join(kept).strip()
        if len(text) >= MIN_CHARACTERS:
            yield name, text


WINDOW = 8


def windows(text):
    """The set of all runs of eight words of a text."""
    words = normalise(text).split()
    starts = range(len(words) - WINDOW + 1)
    return {" ".join(words[i : i + WINDOW]) for i in starts}


def split_by_module(documents, share=0.04, overlap=0.1):
    """(name, text) -> (split, text), without leaks from train to val."""
    sides = {False: [], True: []}
    for name, text in documents:
        sides[hash_place(name) < share].append(text)
    train, val = sides[False], [(t, windows(t)) for t in sides[True]]
    wanted = set().union(*(own for _, own in val))
    known = set()
    for text in train:
        known |= windows(text) & wanted
    for text, own in val:
        if len(own & known) <= overlap * len(own):
            yield "val", text
    for text in train:
        yield "train", text


# Many processes, one order


def follow_parent(setup, arguments):
    """In a new worker: end when the parent has ended; then call `setup`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if setup:
        setup(*arguments)


def default_processes():
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel_map(function, items, processes=None, setup=None, arguments=()):
    """`map` in worker processes: in order, a few items ahead, no more."""
    processes = processes or default_processes()
    if processes == 1:
        if setup:
            setup(*arguments)
        yield from map(function, items)
        return
    with ProcessPoolExecutor(
        processes, get_context("spawn"), follow_parent, (setup, arguments)
    ) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


DOCS_RULES = 1  # raise it when a rule of cleaning or splitting changes


def docs_path():
    """Where the cache keeps the docs corpus of these versions."""
    key = json.dumps([DOCS_RULES, docs_versions()])
    return cache_folder() / f"docs_{digest(key.encode())[:16]}.jsonl"


def build_docs(path, processes=None):
    """Write the docs corpus: a line of JSON for each document."""
    files = list(docs_files())
    groups = [files[i : i + 100] for i in range(0, len(files), 100)]
    found = parallel_map(read_docstrings, groups, processes)
    documents = deduplicate(itertools.chain.from_iterable(found))
    rows = [(split, text) for split, text in split_by_module(documents)]
    rows.sort(key=lambda row: digest(row[1].encode()))
    lines = (json.dumps(row).encode() + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, *lines)


def read_docs(processes=None):
    """(split, text) of the docs corpus, built when the cache lacks it."""
    path = docs_path()
    if not path.exists():
        build_docs(path, processes)
    with open(path) as lines:
        for line in lines:
            yield tuple(json.loads(line))


def open_corpus(corpus, val_share=None, processes=None):
    """A `Corpus`: "docs", "fineweb-edu", or a list of files."""
    if corpus == "docs":
        if val_share:
            raise InputError("val_share: the docs corpus has its own split")
        parts = [partial(read_docs, processes)]
        return Corpus(docs_path().stem, parts)
    if corpus == "fineweb-edu":
        return stream_corpus(val_share or 0.005, **FINEWEB_EDU)
    paths = [corpus] if isinstance(corpus, str | Path) else corpus
    files = find_files(paths)
    stats = [(str(path.resolve()), path.stat()) for path in files]
    marks = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
    readers = [partial(read_documents, path) for path in files]
    return split_corpus(json.dumps(marks), readers, val_share or 0.05)


# Shards, and why they have a header

MAGIC = b"LLAMATUT"
VERSION = 1
LAYOUT = struct.Struct("<8sIIQIIQ32s32s24x")  # 128 bytes


@dataclass(frozen=True)
class Shard:
    """The header of a shard: how to read the rest."""

    dtype: str  #: "uint16", or "uint32" where V is above 65,536
    count: int  #: number of tokens
    vocab_size: int  #: V; every id is below it
    bytes: int  #: UTF-8 length of the text that was added for this shard
    tokenizer: str  #: `digest` of tokenizer.json
    checksum: str = "00" * 32  #: `digest` of header (zeros here) and tokens
    version: int = VERSION


def pack_header(shard):
    """A `Shard` as 128 bytes, little-endian."""
    width = np.dtype(shard.dtype).itemsize
    numbers = shard.version, width, shard.count, shard.vocab_size, 0
    names = bytes.fromhex(shard.tokenizer), bytes.fromhex(shard.checksum)
    return LAYOUT.pack(MAGIC, *numbers, shard.bytes, *names)


def write_shard(path, tokens, vocab_size, tokenizer, text_bytes):
    """Write ids as a shard, atomically -> its `Shard`.

    Raises:
        ValueError: an id is not below `vocab_size`.
    """
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"id {tokens.max()} in a vocabulary of {vocab_size}")
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    data = np.ascontiguousarray(tokens, np.dtype(dtype).newbyteorder("<"))
    shard = Shard(dtype, len(data), vocab_size, text_bytes, tokenizer)
    shard = replace(shard, checksum=digest(pack_header(shard), data))
    write_atomic(Path(path), pack_header(shard), data)
    return shard


def read_header(path):
    """The `Shard` of a file.

    Raises:
        InputError: missing, empty, no shard, or not of the stated length.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(LAYOUT.size)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not size:
        raise InputError(f"{path}: the shard is empty; prepare it again")
    if size < LAYOUT.size or head[:8] != MAGIC:
        raise InputError(f"{path}: this file is not a shard of tokens")
    _, version, width, count, V, _, text, *names = LAYOUT.unpack(head)
    if version != VERSION or width not in (2, 4):
        raise InputError(f"{path}: a shard of another version, {version}")
    if size != LAYOUT.size + width * count:
        raise InputError(
            f"{path}: the shard is truncated ({size:,} bytes instead of "
            f"{LAYOUT.size + width * count:,}); prepare it again"
        )
    names = (name.hex() for name in names)
    return Shard(f"uint{8 * width}", count, V, text, *names)


def open_shard(path, verify=True):
    """A file as (`Shard`, read-only memory map of its ids).

    Raises:
        InputError: as `read_header`; with `verify` also for a changed bit.
    """
    shard = read_header(path)
    dtype = np.dtype(shard.dtype).newbyteorder("<")
    if not shard.count:
        return shard, np.zeros(0, dtype)
    tokens = np.memmap(path, dtype, "r", LAYOUT.size, (shard.count,))
    blank = Shard(*astuple(shard)[:5])
    if verify and digest(pack_header(blank), tokens) != shard.checksum:
        raise InputError(
            f"{path}: the shard is corrupted (its checksum differs); prepare "
            "it again"
        )
    return shard, tokens


# From documents to shards

PIECE, GROUP = 1 << 20, 1 << 18  # letters


class Piece(NamedTuple):
    """A document or a part of one, before and after it is encoded."""

    part: int  # of the corpus
    split: str
    starts: bool  # whether a document begins here
    text: str
    bytes: int = 0
    ids: np.ndarray | None = None


def cut_pieces(parts, first=0):
    """The documents of a corpus as pieces, from part `first` on."""
    for number, part in enumerate(parts[first:], first):
        for split, text in part():
            at = 0
            while at < len(text):
                end = at + PIECE
                if end < len(text):
                    end = text.rfind("\n", at + PIECE // 2, end) + 1 or end
                yield Piece(number, split, at == 0, text[at:end])
                at = end


def group_pieces(pieces):
    """Lists of pieces, each of about a quarter of a million letters."""
    group, letters = [], 0
    for piece in pieces:
        group.append(piece)
        letters += len(piece.text)
        if letters >= GROUP:
            yield group
            group, letters = [], 0
    if group:
        yield group


worker = {}  # what a worker process keeps between groups


def start_encoder(folder, name, separator):
    """Load the tokenizer in a worker process."""
    worker["encode"] = Encoder(folder, name)
    worker["separator"] = np.array([separator], np.uint32)


def encode_pieces(group):
    """Pieces of text -> the same pieces with ids."""
    out = []
    ids = worker["encode"]([piece.text for piece in group])
    for piece, one in zip(group, ids, strict=True):
        if piece.starts:
            one = np.concatenate([worker["separator"], one])
        size = len(piece.text.encode())
        out.append(piece._replace(text="", bytes=size, ids=one))
    return out


class ShardWriter:
    """Cuts the ids of one split into shards of equal length."""

    def __init__(self, folder, split, shard_tokens, vocab_size, tokenizer):
        self.folder, self.split = folder, split
        self.shard_tokens = shard_tokens
        self.header = vocab_size, tokenizer
        self.waiting = []  # arrays of ids that no shard holds yet
        self.counts = Counter(shards=0, documents=0, tokens=0, bytes=0)

    def add(self, piece):
        """Append a piece; write every shard that is full."""
        size = {"tokens": len(piece.ids), "bytes": piece.bytes}
        self.counts.update(documents=piece.starts, **size)
        self.waiting.append(piece.ids)
        while self.left() >= self.shard_tokens:
            self.flush()

    def left(self):
        """How many ids wait for the next shard."""
        return self.counts["tokens"] - self.counts["stored"]

    def flush(self):
        """Write the ids that wait as a shard, not more than fit."""
        tokens = np.concatenate(self.waiting)
        path = self.folder / f"{self.split}_{self.counts['shards']:05d}.bin"
        size = self.counts["bytes"] - self.counts["stored_bytes"]
        now, later = np.split(tokens, [self.shard_tokens])
        write_shard(path, now, *self.header, size)
        self.waiting = [later.copy()]
        self.counts.update(shards=1, stored=len(now), stored_bytes=size)


def save_progress(path, place, writers):
    """Note the place in the corpus, and what each writer holds."""
    note = {"place": place, "counts": [writer.counts for writer in writers]}
    waiting = {w.split: np.concatenate(w.waiting or [[]]) for w in writers}
    file = io.BytesIO()
    np.savez(file, note=np.array(json.dumps(note)), **waiting)
    write_atomic(path, file.getvalue())


def load_progress(path, writers):
    """Restore the writers -> (part, pieces done in it)."""
    if not path.exists():
        return 0, 0
    with np.load(path, allow_pickle=False) as arrays:
        note = json.loads(str(arrays["note"]))
        for writer, counts in zip(writers, note["counts"], strict=True):
            writer.counts = Counter(counts)
            writer.waiting = [arrays[writer.split].astype(np.uint32)]
    return tuple(note["place"])


def write_shards(corpus, writers, encode, max_tokens=None, progress=None):
    """Encode a corpus into shards, from where an earlier run stopped.

    Args:
        writers: a `ShardWriter` for each split.
        encode: groups of pieces -> the same with ids, in order.
        max_tokens: stop at the first document behind so many.
        progress: the file with the note.
    """
    part, done = load_progress(progress, writers)
    pieces = cut_pieces(corpus.parts, part)
    pieces = itertools.islice(pieces, done, None)
    by_split = {writer.split: writer for writer in writers}
    bar = tqdm(unit="B", unit_scale=True, disable=None, desc="text")
    for group in encode(group_pieces(pieces)):
        shards = total(writers, "shards")
        for piece in group:
            full = max_tokens and total(writers, "tokens") >= max_tokens
            if full and piece.starts:
                return bar.close()
            by_split[piece.split].add(piece)
            done = done + 1 if piece.part == part else 1
            part = piece.part
        bar.update(sum(piece.bytes for piece in group))
        if total(writers, "shards") > shards:
            save_progress(progress, (part, done), writers)
    bar.close()


def total(writers, name):
    """The sum of one count over all writers."""
    return sum(writer.counts[name] for writer in writers)


# Two floors


def unigram_nats(train, val, vocab_size):
    """Mean of -log p(token) over val[1:], with counts from `train`.

    Args:
        train, val: ids, int64.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1
    return float(-np.log(counts[val[1:]] / counts.sum()).mean())


def bigram_nats(train, val, vocab_size):
    """Mean of -log p(token | token before) over val[1:], Kneser-Ney."""
    V = vocab_size
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    d = once / max(once + 2 * twice, 1)
    c = np.bincount(pairs // V, counts, V)  # tokens seen behind each token
    k = np.bincount(pairs // V, minlength=V)  # different ones
    lower = np.bincount(pairs % V, minlength=V) + 1
    lower = lower / lower.sum()
    a, b = val[:-1], val[1:]
    place = np.searchsorted(pairs, a * V + b).clip(max=len(pairs) - 1)
    seen = np.where(pairs[place] == a * V + b, counts[place] - d, 0)
    rest = np.where(c[a] > 0, d * k[a], 1)  # a token never seen: all to p_k
    p = (seen + rest * lower[b]) / np.maximum(c[a], 1)
    return float(-np.log(p).mean())


# The data folder


@dataclass(frozen=True)
class DatasetInfo:
    """`dataset.json`: sizes, floors in nats a token, and origin."""

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
        """Nats a token of the validation text -> bits a byte of it."""
        return nats / math.log(2) / self.bytes_per_token


def load_dataset_info(folder):
    """The `DatasetInfo` of a data folder.

    Raises:
        InputError: not a data folder, or a damaged one.
    """
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: no dataset.json in it; make a data folder with "
            "scripts/prepare.py"
        )
    try:
        return DatasetInfo(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error})") from error


FLOOR_TOKENS = 50_000_000


def first_tokens(folder, split, limit=FLOOR_TOKENS):
    """The first `limit` ids of a split, int64: enough for the floors."""
    parts, left = [], limit
    for path in sorted(Path(folder).glob(f"{split}_*.bin")):
        parts.append(open_shard(path, verify=False)[1][:left])
        left -= len(parts[-1])
    return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True)
class Settings:
    """What may be chosen when a data folder is made."""

    tokenizer: str = "bpe"  # or "gpt2", or a folder with tokenizer.json
    vocab_size: int | None = None  # of a trained tokenizer; 2,048
    max_tokens: int | None = None  # stop after so many
    shard_tokens: int = 100_000_000  # of every shard but the last
    val_share: float | None = None  # of the text that is held out

    def __post_init__(self):
        """Refuse what cannot be, before any work is done."""
        for name in ("vocab_size", "max_tokens", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value}: must be at least 1")
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise InputError(f"val_share {self.val_share}: not in (0, 1)")
        small = self.vocab_size and self.vocab_size < BYTE_VOCABULARY
        if self.tokenizer == "bpe" and small:
            raise InputError(
                f"vocab_size {self.vocab_size}: bytes and end of text need "
                f"{BYTE_VOCABULARY}"
            )
        if self.tokenizer not in ("bpe", "gpt2"):
            read_tokenizer(self.tokenizer)


TRAIN_LETTERS = 200_000_000


def training_texts(corpus, limit=TRAIN_LETTERS):
    """Texts of the training side, up to a limit of letters."""
    for split, text in corpus.documents():
        if split == "train":
            yield text
            limit -= len(text)
            if limit < 0:
                return


def trained_tokenizer(corpus, size):
    """A BPE fitted to a corpus; for docs, the cache remembers it."""
    if not corpus.source.startswith("docs_"):
        return train_bpe(training_texts(corpus), size)
    version = importlib.metadata.version("tokenizers")
    name = f"bpe_{corpus.source}_{version}_{size}"
    kept = cache_folder() / name
    if not (kept / "tokenizer.json").exists():
        save_tokenizer(train_bpe(training_texts(corpus), size), kept)
    return read_tokenizer(kept)


def make_tokenizer(settings, corpus, folder):
    """Fill a tokenizer folder: trained, GPT-2's, or a copy -> V."""
    name = settings.tokenizer
    if name == "bpe":
        size = settings.vocab_size or 2048
        save_tokenizer(trained_tokenizer(corpus, size), folder)
    elif name == "gpt2":
        ranks = load_tiktoken()._mergeable_ranks
        save_tokenizer(tokenizer_from_ranks(ranks), folder)
    else:
        folder.mkdir(exist_ok=True)
        kinds = "tokenizer*.json", "special*.json", "*.jinja", "*.model"
        for kind in (*kinds, "added_tokens.json", "vocab.json", "merges.txt"):
            for file in Path(name).glob(kind):
                shutil.copy(file, folder / file.name)
    size = 1 + max(read_tokenizer(folder).get_vocab().values())
    if name != "bpe" and settings.vocab_size:
        if settings.vocab_size < size:
            raise InputError(
                f"the tokenizer {name} has {size:,} tokens: a vocab_size of "
                f"{settings.vocab_size:,} is too small for it"
            )
        size = settings.vocab_size  # more than needed: rows to spare
    return size


def fill_folder(folder, settings, corpus, processes):
    """Write tokenizer and shards, or what is left of them.

    Returns:
        The fields of `DatasetInfo` that are known then, as a dict.
    """
    place = folder / "tokenizer"
    V = make_tokenizer(settings, corpus, place)
    separator = separator_id(place, read_tokenizer(place))
    name = digest((place / "tokenizer.json").read_bytes())
    shape = settings.shard_tokens, V, name
    writers = [ShardWriter(folder, s, *shape) for s in ("train", "val")]
    encode = partial(
        parallel_map,
        encode_pieces,
        processes=processes,
        setup=start_encoder,
        arguments=(place, settings.tokenizer, separator),
    )
    note = folder / "progress.npz"
    write_shards(corpus, writers, encode, settings.max_tokens, note)
    known = dict(tokenizer_hash=name, vocab_size=V, end_of_text=separator)
    for writer in writers:
        if writer.left():
            writer.flush()
        for count in ("shards", "documents", "tokens", "bytes"):
            known[f"{writer.split}_{count}"] = writer.counts[count]
    note.unlink(missing_ok=True)
    return known


def describe(folder, settings, corpus, key, known):
    """Measure the floors and write dataset.json."""
    for split in ("train", "val"):
        if known[f"{split}_tokens"] < 2:
            raise InputError(
                f"no {split} text: add some, or raise max_tokens or val_share"
            )
    train, val = (first_tokens(folder, split) for split in ("train", "val"))
    sums = [read_header(p).checksum for p in sorted(folder.glob("*.bin"))]
    names = [corpus] if isinstance(corpus, str | Path) else corpus
    info = DatasetInfo(
        corpus=" ".join(Path(name).name for name in names),
        tokenizer=Path(settings.tokenizer).name,
        unigram_nats=unigram_nats(train, val, known["vocab_size"]),
        bigram_nats=bigram_nats(train, val, known["vocab_size"]),
        bytes_per_token=known["val_bytes"] / known["val_tokens"],
        hash=digest("".join(sums).encode()),
        settings=key,
        versions=docs_versions() if corpus == "docs" else {},
        **known,
    )
    write_json(folder / "dataset.json", asdict(info))


def finished(out, key):
    """Whether the folder is there, made with the same settings.

    Raises:
        InputError: it holds something else.
    """
    if (out / "dataset.json").exists():
        if load_dataset_info(out).settings != key:
            raise InputError(
                f"{out} holds another data set: delete it, or choose another "
                "folder"
            )
        return True
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists, but is not a data folder")
    return False


def claim_folder(folder, key):
    """Make the folder for the parts, or find that of the same settings."""
    note = folder / "settings"
    if not note.exists() or note.read_text() != key:
        if (folder / "progress.npz").exists():
            raise InputError(
                f"{folder} holds an unfinished data set with other settings: "
                "delete it, or choose another folder"
            )
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for half_written in folder.rglob("*.tmp"):
        half_written.unlink()
    write_atomic(note, key.encode())


@contextmanager
def clear_errors(folder):
    """Name a full disk; after bad input remove what was begun."""
    try:
        yield
    except InputError:
        if not (folder / "progress.npz").exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"the disk is full, {folder} is unfinished: free some space "
                "and run the same command again, it will go on"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise InputError(f"{error.filename}: {error.strerror}") from error
        raise


def prepare(corpus, out, processes=None, **options):
    """Make a data folder: shards, tokenizer/ and dataset.json.

    Args:
        corpus: "docs", "fineweb-edu", or a list of files.
        out: the folder, which appears when it is complete.
        processes: workers; one for each processor unless given.
        options: the fields of `Settings`.

    Returns:
        Its `DatasetInfo`; at once if the folder is there already.

    Raises:
        InputError: input that cannot be used, or a full disk.
    """
    settings, out = Settings(**options), Path(out)
    text = open_corpus(corpus, settings.val_share, processes)
    key = digest(json.dumps([asdict(settings), text.source]).encode())
    if finished(out, key):
        return load_dataset_info(out)
    parts = out.with_name(out.name + ".partial")
    with clear_errors(parts):
        claim_folder(parts, key)
        known = fill_folder(parts, settings, text, processes)
        describe(parts, settings, corpus, key, known)
        (parts / "settings").unlink()
        os.replace(parts, out)
    return load_dataset_info(out)
