"""Prepare: a corpus and a tokenizer become a data folder that training reads."""

import importlib.metadata
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_tut.tools.baselines import ngram_nats
from llama_tut.tools.corpora import open_corpus
from llama_tut.tools.data_folder import (
    PROGRESS,
    make_once,
    system_errors,
)
from llama_tut.tools.dataset import DatasetInfo
from llama_tut.tools.docs_corpus import docs_versions
from llama_tut.tools.encoding import ShardWriter, write_shards
from llama_tut.tools.files import digest, require, write_json
from llama_tut.tools.machine import core_count
from llama_tut.tools.pretrained import cache_folder
from llama_tut.tools.shards import first_tokens, read_header
from llama_tut.tools.tokenizers import (
    BYTE_VOCABULARY,
    Encoder,
    for_documents,
    load_tiktoken,
    read_tokenizer,
    save_tokenizer,
    separator_id,
    tokenizer_from_ranks,
    train_bpe,
)

# What may be chosen

MAX_VOCABULARY = 1 << 20
MAX_TOKENS = 10**15


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
        for name, most in (
            ("vocab_size", MAX_VOCABULARY),
            ("max_tokens", MAX_TOKENS),
            ("shard_tokens", MAX_TOKENS),
        ):
            value = getattr(self, name)
            require(
                value is None or 1 <= value <= most,
                f"{name} {value}: must be from 1 to {most:,}",
            )
        require(
            self.val_share is None or 0 < self.val_share < 1,
            f"val_share {self.val_share}: not in (0, 1)",
        )
        if self.tokenizer == "bpe" and self.vocab_size:
            require(
                self.vocab_size >= BYTE_VOCABULARY,
                f"vocab_size {self.vocab_size}: bytes and end of text need "
                f"{BYTE_VOCABULARY}",
            )


# The tokenizer

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
        return for_documents(train_bpe(training_texts(corpus), size))
    version = importlib.metadata.version("tokenizers")
    kept = cache_folder() / f"bpe_{corpus.source}_{version}_{size}"
    if not (kept / "tokenizer.json").exists():
        save_tokenizer(train_bpe(training_texts(corpus), size), kept)
    return read_tokenizer(kept)


def check_tokenizer(settings):
    """Refuse a tokenizer that cannot be had or used, before any work.

    Returns:
        A list with the `digest` of a folder's tokenizer.json, else empty.
    """
    name = settings.tokenizer
    if name == "gpt2":
        load_tiktoken()
    elif name != "bpe":
        separator_id(name, read_tokenizer(name))
        return [digest((Path(name) / "tokenizer.json").read_bytes())]
    return []


def make_tokenizer(settings, corpus, folder):
    """Fill the folder `tokenizer/`: trained, GPT-2's, or a copy.

    Returns:
        Its `tokenizers` object and V.

    Raises:
        InputError: V is too small for the tokenizer.
    """
    name = settings.tokenizer
    if name == "bpe":
        tokenizer = trained_tokenizer(corpus, settings.vocab_size or 2048)
        save_tokenizer(tokenizer, folder)
    elif name == "gpt2":
        ranks = load_tiktoken()._mergeable_ranks
        tokenizer = for_documents(tokenizer_from_ranks(ranks))
        save_tokenizer(tokenizer, folder)
    else:
        tokenizer = read_tokenizer(name)
        folder.mkdir(exist_ok=True)
        kinds = "tokenizer*.json", "special*.json", "*.jinja", "*.model"
        for kind in (*kinds, "added_tokens.json", "vocab.json", "merges.txt"):
            for file in Path(name).glob(kind):
                shutil.copyfile(file, folder / file.name)
    size = 1 + max(tokenizer.get_vocab().values())
    if name != "bpe" and settings.vocab_size:
        require(
            settings.vocab_size >= size,
            f"the tokenizer {name} has {size:,} tokens: a vocab_size of "
            f"{settings.vocab_size:,} is too small for it",
        )
        size = settings.vocab_size  # more than needed: rows to spare
    return tokenizer, size


def fill_folder(folder, settings, corpus):
    """Write tokenizer and shards, or what is left of them.

    Returns:
        The fields of `DatasetInfo` that are known then, as a dict.
    """
    tokenizer, V = make_tokenizer(settings, corpus, folder / "tokenizer")
    separator = separator_id(folder / "tokenizer", tokenizer)
    name = digest((folder / "tokenizer" / "tokenizer.json").read_bytes())
    header = dict(vocab_size=V, tokenizer=name)
    writers = [
        ShardWriter(folder, split, settings.shard_tokens, **header)
        for split in ("train", "val")
    ]
    write_shards(
        corpus,
        writers,
        Encoder(tokenizer),
        separator,
        settings.max_tokens,
        folder / PROGRESS,
    )
    known = dict(tokenizer_hash=name, vocab_size=V, end_of_text=separator)
    for writer in writers:
        if writer.left():
            writer.flush()
        for count, value in writer.counts.items():
            known[f"{writer.split}_{count}"] = value
    return known


def describe(folder, settings, corpus, key, known):
    """Measure the baselines and write dataset.json.

    Raises:
        InputError: a split has no text.
    """
    for split in ("train", "val"):
        require(
            known[f"{split}_tokens"] >= 2,
            f"no {split} text: add some, or raise max_tokens or val_share",
        )
    train, val = (first_tokens(folder, split) for split in ("train", "val"))
    sums = [read_header(p).checksum for p in sorted(folder.glob("*.bin"))]
    names = [corpus] if isinstance(corpus, str | Path) else corpus
    info = DatasetInfo(
        corpus=" ".join(Path(name).name for name in names),
        tokenizer=Path(settings.tokenizer).name,
        unigram_nats=ngram_nats(train, val, known["vocab_size"], 1),
        bigram_nats=ngram_nats(train, val, known["vocab_size"], 2),
        bytes_per_token=known["val_bytes"] / known["val_tokens"],
        hash=digest("".join(sums).encode()),
        settings=key,
        versions=docs_versions() if corpus == "docs" else {},
        **known,
    )
    write_json(folder / "dataset.json", asdict(info))


def prepare(corpus, out, processes=None, text_column=None, **options):
    """Make a data folder: shards, tokenizer/ and dataset.json.

    A folder without dataset.json is unfinished; the same call goes on with
    it. A second process with the same folder waits for the first.

    Args:
        corpus: "docs", "fineweb-edu", or a list of files.
        out: the folder; missing, empty, or begun by this function.
        processes: workers; one for each processor unless given.
        text_column: of jsonl and parquet files; "text" unless given.
        options: the fields of `Settings`.

    Returns:
        Its `DatasetInfo`; at once if the folder is complete already.

    Raises:
        InputError: input that cannot be used, or a full disk.
    """
    settings, out = Settings(**options), Path(os.path.realpath(out))
    if processes:  # read when the tokenizer starts its threads
        os.environ["RAYON_NUM_THREADS"] = str(processes)
    processes = processes or core_count()
    with system_errors(out):
        asked = [asdict(settings), *check_tokenizer(settings)]
        text = open_corpus(corpus, settings.val_share, processes, text_column)
        key = digest(json.dumps([*asked, text.source]).encode())

    def fill():
        known = fill_folder(out, settings, text)
        describe(out, settings, corpus, key, known)

    return make_once(out, key, fill)
