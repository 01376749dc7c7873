"""The docs corpus: docstrings of Python and of packages that are already here."""

import ast
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import sysconfig
import warnings
from multiprocessing import get_context
from pathlib import Path

from llama_tut.tools.documents import hash_place
from llama_tut.tools.files import InputError, digest, write_atomic
from llama_tut.tools.machine import core_count
from llama_tut.tools.pretrained import cache_folder

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "huggingface_hub",
    "numpy",
    "pandas",
    "matplotlib",
    "sympy",
    "networkx",
    "sqlalchemy",
)
MIN_CHARACTERS = 200  # shorter docstrings are left out
MIN_PARAGRAPH = 60  # shorter paragraphs may occur twice
WINDOW = 8  # words
DOCS_RULES = 1  # raise it when a rule of cleaning or splitting changes


def docs_versions():
    """{name: version} of Python and of the packages of the corpus.

    Raises:
        InputError: a package is not installed.
    """
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


def read_docstrings(files):
    """(name, path) of modules -> (name, docstring) of all that they define.

    Docstrings of fewer than 200 characters are left out.
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
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


def docs_path():
    """Where the cache keeps the docs corpus of these versions."""
    key = json.dumps([DOCS_RULES, docs_versions()])
    return cache_folder() / f"docs_{digest(key.encode())[:16]}.jsonl"


def build_docs(path, processes=None):
    """Write the docs corpus: a line of JSON for each document."""
    files = list(docs_files())
    groups = [files[i : i + 100] for i in range(0, len(files), 100)]
    processes = processes or core_count()
    if processes == 1:
        found = list(map(read_docstrings, groups))
    else:  # workers of a Pool end with their parent, however it ends
        with get_context("spawn").Pool(processes) as pool:
            found = pool.map(read_docstrings, groups, chunksize=1)
    documents = deduplicate(itertools.chain.from_iterable(found))
    rows = sorted(
        split_by_module(documents), key=lambda row: digest(row[1].encode())
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
