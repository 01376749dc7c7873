"""Corpora: documents from files, from FineWeb-Edu, or from docstrings, in two splits."""

import ast
import bz2
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import lzma
import os
import platform
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import glob
from multiprocessing import get_context
from pathlib import Path

from llama_tut.tools.files import (
    InputError,
    digest,
    first_line,
    read_lines,
    require,
    write_atomic,
)
from llama_tut.tools.pretrained import cache_folder
from llama_tut.tools.tokenizers import END_OF_TEXT

# One file


def open_zst(path, mode):
    """A .zst file as a stream of its bytes."""
    import pyarrow  # a third of a second that other files need not pay

    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


COMPRESSED = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zst,
}


@contextmanager
def open_bytes(path):
    """The bytes of a file, unpacked; errors while it is read become a line."""
    opener = COMPRESSED.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path} cannot be read: {reason}") from error


def read_text(path, column):
    """Documents of a text file: one, or parts between end-of-text lines."""
    with open_bytes(path) as file:
        data = file.read()
    require(b"\0" not in data, f"{path}: a binary file, not text")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start:,})"
        ) from error
    line = rf"^{re.escape(END_OF_TEXT)}[ \t]*(?:\n|\Z)"
    yield from re.split(line, text, flags=re.MULTILINE)


def read_objects(path, column):
    """Documents of a file with one JSON object a line, from one field."""
    with open_bytes(path) as file:
        if first_letter(file) == b"[":
            raise InputError(
                f"{path}: a JSON array, which is read as a whole or not at "
                "all; write one object a line (jq -c '.[]' does it)"
            )
        for number, record in read_lines(path, file):
            text = record.get(column)
            if not isinstance(text, str):
                names = ", ".join(sorted(record)[:9]) or "nothing"
                raise InputError(
                    f'{path}, line {number}: no "{column}" that is a string '
                    f"(it holds: {names}); name the field with --text-column"
                )
            yield text


def first_letter(file):
    """The first byte of an open file that is no space; it stays unread."""
    start = file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start[:1]


def read_parquet(path, column):
    """Documents of a parquet file, from one column of text or bytes."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            require(
                column in names,
                f'{path}: no column "{column}" (it holds: '
                f"{', '.join(names[:9])}); name one with --text-column",
            )
            row = 0
            for batch in file.iter_batches(1000, columns=[column]):
                for value in text_bytes(path, batch.column(0)):
                    row += 1
                    yield decode_row(path, row, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: a parquet file that cannot be read ({first_line(error)})"
        ) from error


def text_bytes(path, values):
    """The values of a parquet column as bytes, or None where there is none.

    Spark and Athena write text as binary; strings can hold bad UTF-8. Both
    come back as bytes, so that one place decodes them.
    """
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kinds = types.is_string, types.is_large_string, types.is_string_view
    kinds += types.is_binary, types.is_large_binary, types.is_binary_view
    require(
        any(kind(values.type) for kind in (*kinds, types.is_null)),
        f"{path}: the text column holds {values.type}, not text; name "
        "another one with --text-column",
    )
    return values.cast(pyarrow.large_binary()).to_pylist()


def decode_row(path, row, value):
    """Bytes of one row -> its text. Raises InputError with the row."""
    try:
        return (value or b"").decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, row {row:,}: not UTF-8 text (byte {error.start:,})"
        ) from error


READERS = {
    ".txt": read_text,
    ".md": read_text,
    ".rst": read_text,
    ".jsonl": read_objects,
    ".ndjson": read_objects,
    ".json": read_objects,
    ".parquet": read_parquet,
}


def kind_of(path):
    """The suffix that tells how to read a file: ".jsonl" for a.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_documents(path, column="text"):
    """The documents of one file that are not blank, as valid Unicode."""
    for text in READERS.get(kind_of(path), read_text)(path, column):
        if text and not text.isspace():
            # JSON can spell half of a surrogate pair, which UTF-8 cannot.
            yield text.encode(errors="replace").decode()


# Many files


def find_files(paths):
    """Files, folders and glob patterns -> the files to read, in order.

    Folders are searched to the bottom, linked ones too. Hidden names, empty
    files and other kinds of file are left out, and a line says how many.
    """
    found, left_out = [], Counter()
    for path in map(Path, paths):
        try:
            files = sorted(set(list_files(path, left_out)))
        except OSError as error:
            raise InputError(
                f"{path} cannot be read: {error.strerror}"
            ) from error
        kinds = f" with {', '.join(READERS)}" if path.is_dir() else ""
        require(files, f"{path}: no such file{kinds}{told(left_out)}")
        found += files
    for path in found:
        require(
            kind_of(path) not in (".csv", ".tsv"),
            f"{path}: a table, of which commas and numbers would be trained "
            "on; write its text column as jsonl or parquet",
        )
    if left_out:
        print(f"{len(found)} files taken{told(left_out)}", file=sys.stderr)
    return found


def list_files(path, left_out):
    """The files that one argument names: itself, a folder's, a pattern's."""
    if path.is_dir():
        return [f for f in walk(path, left_out) if usable(f, left_out)]
    if path.exists():
        require(path.stat().st_size, f"{path}: the file is empty")
        return [path]
    files = [f for f in map(Path, glob(str(path))) if f.is_file()]
    empty = [f for f in files if not f.stat().st_size]
    left_out.update({"empty": len(empty)} if empty else {})
    return set(files) - set(empty)


def walk(folder, left_out):
    """The files below a folder. Raises InputError where it may not look."""

    def refuse(error):
        raise InputError(
            f"{error.filename} cannot be read: {error.strerror}"
        ) from error

    seen = set()
    for root, folders, files in os.walk(
        folder, onerror=refuse, followlinks=True
    ):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()  # a link back to a folder above
            continue
        seen.add(real)
        hidden = [name for name in folders if name.startswith(".")]
        left_out.update({"hidden folders": len(hidden)} if hidden else {})
        folders[:] = sorted(set(folders) - set(hidden))
        yield from (Path(root) / name for name in files)


def usable(path, left_out):
    """Whether a file of a folder is read; if not, the reason is counted."""
    kind = kind_of(path)
    if path.name.startswith("."):
        left_out["hidden"] += 1
    elif kind not in READERS or kind == ".json" == path.suffix.lower():
        # A lone .json in a folder is more often settings than text.
        left_out[path.suffix or "no ending"] += 1
    elif not path.stat().st_size:
        left_out["empty"] += 1
    else:
        return True
    return False


def told(left_out):
    """What was left out and why, as the end of a sentence."""
    if not left_out:
        return ""
    rows = ", ".join(f"{n} {why}" for why, n in sorted(left_out.items()))
    return f"; left out: {rows}"


def hash_file(path):
    """`digest` of a file's bytes, however large it is."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


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
    tails: bool = False  #: whether the end of each document is for validation

    def documents(self):
        """(split, text) of all documents, always in the same order."""
        return itertools.chain.from_iterable(part() for part in self.parts)


def split_corpus(source, readers, share):
    """A `Corpus` from functions that return iterators of documents.

    Whole documents are held out, chosen by their hash; where there are fewer
    than 100, the end of each.
    """
    texts = itertools.chain.from_iterable(read() for read in readers)
    first = list(itertools.islice(texts, FEW))
    require(first, "the corpus has no text in it")
    rule = by_tail if len(first) < FEW else by_hash
    if rule is by_hash:  # at least one of these is held out
        share = max(share, min(map(hash_place, first)))
    parts = [partial(rule, read, share) for read in readers]
    return Corpus(source, parts, tails=rule is by_tail)


# FineWeb-Edu

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


# Docstrings: what is already here

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
    """(name, text) -> (split, text), without leaks from train to val.

    All docstrings of a module are on one side. A validation document leaves
    if more than a tenth of its windows also occur in training text.
    """
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


DOCS_RULES = 1  # raise it when a rule of cleaning or splitting changes


def docs_path():
    """Where the cache keeps the docs corpus of these versions."""
    key = json.dumps([DOCS_RULES, docs_versions()])
    return cache_folder() / f"docs_{digest(key.encode())[:16]}.jsonl"


def default_processes():
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_docs(path, processes=None):
    """Write the docs corpus: a line of JSON for each document."""
    files = list(docs_files())
    groups = [files[i : i + 100] for i in range(0, len(files), 100)]
    processes = processes or default_processes()
    if processes == 1:
        found = list(map(read_docstrings, groups))
    else:  # workers of a Pool end with their parent, however it ends
        with get_context("spawn").Pool(processes) as pool:
            found = pool.map(read_docstrings, groups, chunksize=1)
    documents = deduplicate(itertools.chain.from_iterable(found))
    rows = sorted(
        split_by_module(documents), key=lambda r: digest(r[1].encode())
    )
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


# Any of them


def open_corpus(corpus, val_share=None, processes=None, text_column=None):
    """A `Corpus`: "docs", "fineweb-edu", or a list of files.

    Args:
        val_share: of the text that is held out; 0.05 of files, 0.005 of
            FineWeb-Edu.
        processes: workers that read docstrings.
        text_column: the field or column of files that holds the text.
    """
    if corpus in ("docs", "fineweb-edu"):
        require(not text_column, "text_column: only of jsonl and parquet")
    if corpus == "docs":
        require(not val_share, "val_share: the docs corpus has its own split")
        parts = [partial(read_docs, processes)]
        return Corpus(docs_path().stem, parts)
    if corpus == "fineweb-edu":
        return stream_corpus(val_share or 0.005, **FINEWEB_EDU)
    files = find_files([corpus] if isinstance(corpus, str | Path) else corpus)
    column = text_column or "text"
    # Contents, not names and times: a file that was only moved or touched
    # is the same corpus.
    source = json.dumps([[kind_of(f), hash_file(f)] for f in files] + [column])
    readers = [partial(read_documents, path, column) for path in files]
    return split_corpus(source, readers, val_share or 0.05)
