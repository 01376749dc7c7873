"""Corpora: documents from files, from FineWeb-Edu, or from docstrings, in two splits."""

import ast
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import sysconfig
import threading
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

from llama_tut.tools.files import InputError, digest, write_atomic
from llama_tut.tools.pretrained import cache_folder
from llama_tut.tools.tokenizers import END_OF_TEXT


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
