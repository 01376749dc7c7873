"""Corpora: the docs, FineWeb-Edu or files of text, in a training and a validation split."""

import itertools
import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llama_tut.tools.docs_corpus import docs_path, read_docs
from llama_tut.tools.documents import (
    find_files,
    hash_file,
    hash_place,
    kind_of,
    read_documents,
)
from llama_tut.tools.files import InputError, require

# What is held out

FEW = 100


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

    Raises:
        InputError: there is no text in it.
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


# Any of them


def open_corpus(corpus, val_share=None, processes=None, text_column=None):
    """A `Corpus`: "docs", "fineweb-edu", or a list of files.

    Args:
        val_share: of the text that is held out; 0.05 of files, 0.005 of
            FineWeb-Edu.
        processes: workers that read docstrings.
        text_column: the field or column of files that holds the text.

    Raises:
        InputError: it cannot be read, or has no such option.
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
