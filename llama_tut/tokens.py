# From notebooks/11_tokens.ipynb by scripts/export.py: edit the notebook.
"""Tokens: corpora, tokenizers, and shards of token ids on disk.

Letters: V vocab_size.
"""

import ast
import errno
import glob
import hashlib
import importlib.metadata
import importlib.util
import inspect
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
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from llama_tut.config import InputError

END_OF_TEXT = "<|endoftext|>"


def train_bpe(texts, vocab_size):
    """Fit a byte-level BPE on an iterable of texts.

    The first id is the end-of-text token, then come the 256 bytes, then the
    merges in the order in which they were learned.

    Returns:
        A `tokenizers.Tokenizer` with at most `vocab_size` tokens.
    """
    if vocab_size < 257:
        raise InputError(
            f"vocabulary of {vocab_size}: 256 bytes and {END_OF_TEXT} need 257"
        )
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(model):
    """A tokenizer with GPT-2's pre-tokens, over bytes, around a model."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """Write the two files that make a Hugging Face tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(True).encode())


def byte_characters():
    """{byte: the character that stands for it in a tokenizer's files}.

    Printable bytes stand for themselves, the others for characters from 256
    on. Source: OpenAI's GPT-2, `encoder.py`, `bytes_to_unicode`.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    table = {b: chr(b) for b in printable}
    table.update((b, chr(256 + n)) for n, b in enumerate(others))
    return table


def merge_pieces(token, ranks):
    """Merge the bytes of `token` by rank, stopping before `token` itself."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        best = min(range(len(joined)), key=lambda i: ranks.get(joined[i], 1e9))
        pieces[best : best + 2] = [joined[best]]
    return pieces


def gpt2_tokenizer():
    """GPT-2's vocabulary, which tiktoken holds, as a `tokenizers` object."""
    ranks = load_tiktoken()._mergeable_ranks
    letters = byte_characters()

    def spell(token):
        return "".join(letters[b] for b in token)

    merges = [
        tuple(map(spell, merge_pieces(token, ranks)))
        for token in sorted(ranks, key=ranks.get)
        if len(token) > 1
    ]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = byte_level(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def load_tiktoken():
    """tiktoken's GPT-2 encoding, from its cache or from the network."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        if not isinstance(error, OSError):
            raise
        raise InputError(
            "GPT-2's vocabulary is neither in tiktoken's cache nor can it be "
            "fetched: connect to the network, or set TIKTOKEN_CACHE_DIR"
        ) from error


class Encoder:
    """Texts -> ids, with the tokenizer of a Hugging Face folder.

    Text that looks like a special token is encoded as plain text.

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
            found = self.tokenizer.encode_batch_fast(
                texts, add_special_tokens=False
            )
            ids = [encoding.ids for encoding in found]
        return [np.array(one, np.uint32) for one in ids]


def read_tokenizer(folder):
    """The `tokenizers` object of a folder, set to encode plain text."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder}: no tokenizer.json in this folder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise InputError(f"{path}: not a tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def separator_id(folder, tokenizer):
    """The id of the token that belongs in front of a document.

    `<|endoftext|>` where the vocabulary has it (GPT-2, SmolLM2, our own),
    Llama 3's `<|begin_of_text|>`, else the config's bos or eos token.
    """
    names = [END_OF_TEXT, "<|begin_of_text|>"]
    path = Path(folder) / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text())
        for token in (settings.get("bos_token"), settings.get("eos_token")):
            named = isinstance(token, dict)
            names.append(token["content"] if named else token)
    for name in filter(None, names):
        if tokenizer.token_to_id(name) is not None:
            return tokenizer.token_to_id(name)
    raise InputError(f"{folder}: this tokenizer has no end-of-text token")


MAGIC = b"LLAMATUT"
VERSION = 1
LAYOUT = struct.Struct("<8sIIQIIQ32s32s24x")


@dataclass(frozen=True)
class Shard:
    """The header of a shard: 128 bytes that say how to read the rest.

    Args:
        dtype: "uint16", or "uint32" where V is above 65,536.
        count: number of tokens.
        vocab_size: V; every id is below it.
        bytes: of the text, UTF-8, that begins in this shard.
        tokenizer: blake2b hash of tokenizer.json, in hexadecimal.
        checksum: blake2b hash of header and tokens, in hexadecimal.
    """

    dtype: str
    count: int
    vocab_size: int
    bytes: int
    tokenizer: str
    checksum: str = "00" * 32
    version: int = VERSION

    def pack(self):
        """The header's bytes."""
        return LAYOUT.pack(
            MAGIC,
            self.version,
            np.dtype(self.dtype).itemsize,
            self.count,
            self.vocab_size,
            0,
            self.bytes,
            bytes.fromhex(self.tokenizer),
            bytes.fromhex(self.checksum),
        )


def write_atomic(path, *parts):
    """Write a file under another name, then rename it: all of it or none."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2).encode() + b"\n")


def digest(*parts):
    """blake2b of the parts, 32 bytes, in hexadecimal."""
    h = hashlib.blake2b(digest_size=32)
    for part in parts:
        h.update(part)
    return h.hexdigest()


def write_shard(path, tokens, vocab_size, tokenizer, text_bytes):
    """Write tokens as a shard -> its `Shard` header.

    Raises:
        ValueError: an id does not fit the vocabulary.
    """
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise ValueError(f"id {tokens.max()} in a vocabulary of {vocab_size}")
    data = np.ascontiguousarray(tokens, np.dtype(dtype).newbyteorder("<"))
    fields = (dtype, len(data), vocab_size, text_bytes, tokenizer)
    checksum = digest(Shard(*fields).pack(), data)
    shard = Shard(*fields, checksum)
    write_atomic(Path(path), shard.pack(), data)
    return shard


def read_header(path):
    """The `Shard` header of a file.

    Raises:
        InputError: missing, empty, not a shard, or not of the length that
            its header states.
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
    _, version, width, count, vocab_size, _, text, name, checksum = (
        LAYOUT.unpack(head)
    )
    if version != VERSION or width not in (2, 4):
        raise InputError(f"{path}: unknown version of the shard format")
    if size != LAYOUT.size + width * count:
        raise InputError(
            f"{path}: the shard is truncated: {size:,} bytes instead of "
            f"{LAYOUT.size + width * count:,}; prepare it again"
        )
    dtype = f"uint{8 * width}"
    names = (name.hex(), checksum.hex())
    return Shard(dtype, count, vocab_size, text, *names)


def open_shard(path, verify=True):
    """A shard as (header, read-only memory map of its ids).

    Raises:
        InputError: as `read_header`; or, with `verify`, a bit has changed.
    """
    shard = read_header(path)
    dtype = np.dtype(shard.dtype).newbyteorder("<")
    if not shard.count:
        return shard, np.zeros(0, dtype)
    tokens = np.memmap(path, dtype, "r", LAYOUT.size, (shard.count,))
    if verify:
        blank = Shard(*astuple(shard)[:5]).pack()
        if digest(blank, tokens) != shard.checksum:
            raise InputError(
                f"{path}: the shard is corrupted (its checksum differs); "
                "prepare it again"
            )
    return shard, tokens


def find_files(paths):
    """Files of a list of files, folders and glob patterns, in order."""
    found = []
    for path in map(str, paths):
        if Path(path).is_dir():
            inside = sorted(Path(path).rglob("*"))
            files = [p for p in inside if p.suffix in SUFFIXES and p.is_file()]
            if not files:
                raise InputError(f"{path}: no {', '.join(SUFFIXES)} in it")
        else:
            names = [path] if Path(path).exists() else sorted(glob.glob(path))
            files = [Path(name) for name in names]
        if not files:
            raise InputError(f"{path}: no such file or folder")
        found += files
    for path in found:
        if not path.stat().st_size:
            raise InputError(f"{path}: the file is empty")
    return found


SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".parquet")


def read_text(path):
    """Documents of a text file: one, or parts between end-of-text lines."""
    data = path.read_bytes()
    if b"\0" in data:
        raise InputError(f"{path}: a binary file, not text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start:,})"
        ) from error
    text = text.replace("\r\n", "\n")
    line = re.compile(rf"^{re.escape(END_OF_TEXT)}[ \t]*\n?", re.MULTILINE)
    yield from line.split(text)


def read_jsonl(path):
    """Documents of a file with a JSON object a line, from field `text`."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except UnicodeDecodeError as error:
                where = f"{path}, line {number}"
                raise InputError(f"{where}: not UTF-8 text") from error
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise InputError(
                    f"{path}, line {number}: not a JSON object with a string "
                    'in its field "text"'
                )
            yield text


def read_parquet(path):
    """Documents of a parquet file, from its column `text`."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise InputError(f'{path}: no column "text"')
            for batch in file.iter_batches(1000, columns=["text"]):
                yield from filter(None, batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file ({error})") from error


FEW = 100


def is_validation(text, share):
    """Whether a hash of the text falls into the share."""
    hashed = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") < share * 2**64


def split_documents(documents, share):
    """Documents -> (split, text), "val" for about `share` of them.

    With a hundred documents or more a hash of the text decides. With fewer,
    the end of each document is held out.
    """
    documents = iter(documents)
    first = list(itertools.islice(documents, FEW))
    if len(first) < FEW:
        for text in first:
            yield from zip(("train", "val"), cut(text, share), strict=True)
    else:
        for text in itertools.chain(first, documents):
            yield "val" if is_validation(text, share) else "train", text


def cut(text, share):
    """A text in two; the second, about `share` of it, begins a line."""
    at = max(1, int(len(text) * (1 - share)))
    line = text.rfind("\n", 0, at) + 1
    return (
        (text[:line], text[line:])
        if line > at / 2
        else (
            text[:at],
            text[at:],
        )
    )


def read_files(paths, share=0.05):
    """(split, text) of the documents of text, jsonl and parquet files."""
    readers = {".jsonl": read_jsonl, ".parquet": read_parquet}
    documents = (
        text.encode(errors="replace").decode()
        for path in paths
        for text in readers.get(path.suffix, read_text)(path)
        if text.strip()
    )
    return split_documents(documents, share)


FINEWEB_EDU = ("HuggingFaceFW/fineweb-edu", "sample-10BT")


def stream_dataset(path, name=None, share=0.005, **options):
    """(split, text) of a data set on the Hugging Face hub, streamed."""
    from datasets import load_dataset  # takes a second to import

    try:
        rows = load_dataset(
            path, name, split="train", streaming=True, **options
        )
        rows = rows.select_columns("text")
        documents = (row["text"] for row in rows if row["text"])
        yield from split_documents(documents, share)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); this corpus "
            "needs the network"
        ) from error


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


def python_files(root, prefix):
    """(name, path) of the modules under a folder, without its tests."""
    skip = {"test", "tests", "site-packages", "dist-packages"}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - skip)
        for file in sorted(files):
            path = Path(folder) / file
            if path.suffix == ".py":
                yield f"{prefix}/{path.relative_to(root).as_posix()}", path


def docs_files():
    """(name, path) of the standard library and of ten packages."""
    yield from python_files(sysconfig.get_path("stdlib"), "python")
    for package in PACKAGES:
        # Finds the folder without importing the package.
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise InputError(f"the docs corpus needs the package {package}")
        yield from python_files(spec.submodule_search_locations[0], package)


def docs_versions():
    """{name: version} of Python and of the packages of the corpus."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions


def read_docstrings(files):
    """(name, docstring) of all modules, classes and functions in the files.

    The files are parsed, never imported.
    """
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    found = []
    for name, path in files:
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and files of other Python versions
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                text = ast.get_docstring(node) or ""
                if len(text) >= MIN_CHARACTERS:
                    text = text.encode(errors="replace").decode()
                    found.append((name, text))
    return found


MIN_CHARACTERS = 200
MIN_PARAGRAPH = 60


def normalise(text):
    """Lower-case words of a text, without punctuation."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def deduplicate(documents):
    """Drop documents, and long paragraphs, that have come before."""
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
    """The set of runs of eight words of a text."""
    words = normalise(text).split()
    return {
        " ".join(words[i : i + WINDOW]) for i in range(len(words) - WINDOW + 1)
    }


def split_by_module(documents, share=0.04, overlap=0.1):
    """(name, text) -> (split, text), without leakage from train to val.

    All documents of a module file land on one side. A document of the
    validation side is dropped when more than `overlap` of its runs of eight
    words stand in the training text as well.
    """
    train, val = [], []
    for name, text in documents:
        (val if is_validation(name, share) else train).append(text)
    held_out = [windows(text) for text in val]
    wanted = set().union(*held_out)
    known = set()
    for text in train:
        known |= windows(text) & wanted
    for text, own in zip(val, held_out, strict=True):
        if len(own & known) <= overlap * len(own):
            yield "val", text
    for text in train:
        yield "train", text


def cache_folder():
    """$LLAMA_TUT_CACHE, or ~/.cache/llama_tut."""
    home = Path.home() / ".cache" / "llama_tut"
    return Path(os.environ.get("LLAMA_TUT_CACHE", home))


def docs_corpus(processes=None):
    """The docs corpus as a jsonl file in the cache, built if it is missing.

    Each line has `split` and `text`. The documents stand in the order of
    their hashes, so that any part of the file is a fair sample.
    """
    source = inspect.getsource(deduplicate) + inspect.getsource(
        split_by_module
    )
    key = digest(json.dumps(docs_versions()).encode(), source.encode())[:16]
    path = cache_folder() / f"docs_{key}.jsonl"
    if path.exists():
        return path
    files = list(docs_files())
    groups = [files[i : i + 100] for i in range(0, len(files), 100)]
    found = parallel_map(read_docstrings, groups, processes)
    documents = itertools.chain.from_iterable(found)
    lines = [
        json.dumps({"split": split, "text": text})
        for split, text in split_by_module(deduplicate(documents))
    ]
    lines.sort(key=lambda line: digest(line.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(lines).encode() + b"\n")
    return path


def read_docs(path):
    """(split, text) of the docs corpus."""
    with open(path) as lines:
        for line in lines:
            row = json.loads(line)
            yield row["split"], row["text"]


def default_processes():
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def follow_parent(setup, arguments):
    """In a worker: end when the parent is gone, then call `setup`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if setup:
        setup(*arguments)


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


PIECE = 1 << 20
BATCH = 1 << 18


def cut_pieces(documents):
    """(split, text) -> (split, starts, text) of at most a million letters.

    Long documents are cut behind a line end, so that they need no more
    memory than others and can be shared among processes.
    """
    for split, text in documents:
        at = 0
        while at < len(text):
            end = at + PIECE
            if end < len(text):
                end = text.rfind("\n", at + PIECE // 2, end) + 1 or end
            yield split, at == 0, text[at:end]
            at = end


def group_pieces(pieces):
    """Lists of pieces, each of about a quarter of a million letters."""
    group, letters = [], 0
    for piece in pieces:
        group.append(piece)
        letters += len(piece[-1])
        if letters >= BATCH:
            yield group
            group, letters = [], 0
    if group:
        yield group


def start_encoder(folder, name, separator):
    """Give this process its encoder."""
    global encoder
    encoder = Encoder(folder, name), separator


def encode_pieces(group):
    """Pieces -> (split, starts, bytes of text, ids) of each.

    The end-of-text token stands in front of each document.
    """
    encode, separator = encoder
    out = []
    ids = encode([text for _, _, text in group])
    for (split, starts, text), one in zip(group, ids, strict=True):
        if starts:
            one = np.concatenate([np.array([separator], np.uint32), one])
        out.append((split, starts, len(text.encode()), one))
    return out


class ShardWriter:
    """Cuts a stream of ids into shards of equal length.

    Args:
        folder: where SPLIT_00000.bin and so on are written.
        split: "train" or "val".
        shard_tokens: length of every shard but the last.
        vocab_size, tokenizer: for the headers.
    """

    def __init__(self, folder, split, shard_tokens, vocab_size, tokenizer):
        self.folder, self.split = folder, split
        self.shard_tokens = shard_tokens
        self.header = vocab_size, tokenizer
        self.rest = np.zeros(0, np.uint32)
        self.new = []  # arrays that are not yet part of `rest`
        self.waiting = 0  # tokens in `rest` and `new`
        self.rest_bytes = 0
        self.shards = self.tokens = self.bytes = self.documents = 0

    def add(self, starts, text_bytes, ids):
        """Append a piece; write every shard that is now full."""
        self.documents += starts
        self.tokens += len(ids)
        self.bytes += text_bytes
        self.new.append(ids)
        self.waiting += len(ids)
        self.rest_bytes += text_bytes
        while self.waiting >= self.shard_tokens:
            self.flush(self.shard_tokens)

    def flush(self, count):
        """Write the first `count` waiting tokens as one shard."""
        tokens = np.concatenate([self.rest, *self.new])
        path = self.folder / f"{self.split}_{self.shards:05d}.bin"
        write_shard(path, tokens[:count], *self.header, self.rest_bytes)
        self.rest, self.new = tokens[count:].copy(), []
        self.waiting = len(self.rest)
        self.rest_bytes = 0
        self.shards += 1

    def state(self):
        """Counters and waiting tokens, as arrays."""
        counters = self.shards, self.tokens, self.bytes, self.documents
        rest = np.concatenate([self.rest, *self.new])
        return np.array([*counters, self.rest_bytes], np.int64), rest

    def restore(self, counters, rest):
        """Continue from a `state`."""
        self.shards, self.tokens, self.bytes, self.documents = map(
            int, counters[:4]
        )
        self.rest_bytes = int(counters[4])
        self.rest, self.waiting = rest, len(rest)


def save_progress(path, pieces, writers):
    """Store how many pieces are done and what waits for the next shard."""
    arrays = {"pieces": np.array(pieces)}
    for writer in writers:
        counters, rest = writer.state()
        arrays[f"{writer.split}_counters"] = counters
        arrays[f"{writer.split}_rest"] = rest
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_atomic(path, file.getvalue())


def load_progress(path, writers):
    """Restore the writers -> number of pieces that are done."""
    if not path.exists():
        return 0
    with np.load(path, allow_pickle=False) as arrays:
        for writer in writers:
            writer.restore(
                arrays[f"{writer.split}_counters"],
                arrays[f"{writer.split}_rest"],
            )
        return int(arrays["pieces"])


def write_shards(documents, writers, encode, max_tokens=None, progress=None):
    """Encode documents and write their shards, from where a run stopped.

    Args:
        documents: (split, text), always in the same order.
        writers: a `ShardWriter` for each split.
        encode: a function from groups of pieces to `encode_pieces` of each.
        max_tokens: stop at the first document behind so many tokens.
        progress: file that remembers what is done.
    """
    splits = {writer.split: writer for writer in writers}
    done = load_progress(progress, writers)
    pieces = itertools.islice(cut_pieces(documents), done, None)
    shards = sum(writer.shards for writer in writers)
    bar = tqdm(unit="B", unit_scale=True, disable=None, desc="tokens")
    for group in encode(group_pieces(pieces)):
        for split, starts, text_bytes, ids in group:
            total = sum(writer.tokens for writer in writers)
            if starts and max_tokens and total >= max_tokens:
                return
            splits[split].add(starts, text_bytes, ids)
            bar.update(text_bytes)
        done += len(group)
        if sum(writer.shards for writer in writers) > shards:
            shards = sum(writer.shards for writer in writers)
            save_progress(progress, done, writers)


FLOOR_TOKENS = 50_000_000


def first_tokens(folder, split, limit=FLOOR_TOKENS):
    """The first `limit` tokens of a split, as int64."""
    parts, count = [], 0
    for path in sorted(Path(folder).glob(f"{split}_*.bin")):
        _, tokens = open_shard(path, verify=False)
        parts.append(tokens[: limit - count].astype(np.int64))
        count += len(parts[-1])
        if count == limit:
            break
    return np.concatenate(parts)


def unigram_nats(train, val, vocab_size):
    """Mean of -log p(token), p counted in `train`, one added to each count.

    Args:
        train, val: ids, int64.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1
    return float(-np.log(counts[val] / counts.sum()).mean())


def bigram_nats(train, val, vocab_size):
    """Mean of -log p(token | the token before), interpolated Kneser-Ney.

    Each pair that occurs in `train` gives up a discount. What is given up
    goes to all tokens, by the number of different tokens they follow.
    Source: Chen and Goodman, 1998 (TR-10-98), equation for the bigram.
    """
    V = vocab_size
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / max(once + 2 * twice, 1)
    before, after = pairs // V, pairs % V
    total = np.bincount(before, counts, V)  # tokens that follow each token
    kinds = np.bincount(before, minlength=V)  # different ones
    follows = np.bincount(after, minlength=V) + 1
    lower = follows / follows.sum()
    a, b = val[:-1], val[1:]
    place = np.searchsorted(pairs, a * V + b).clip(max=len(pairs) - 1)
    found = np.where(pairs[place] == a * V + b, counts[place] - discount, 0)
    seen = np.maximum(total[a], 1)
    left = np.where(total[a] > 0, discount * kinds[a] / seen, 1.0)
    return float(-np.log(found / seen + left * lower[b]).mean())


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` in a data folder says."""

    corpus: str
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    end_of_text: int
    shard_tokens: int
    train_shards: int
    train_documents: int
    train_tokens: int
    train_bytes: int
    val_shards: int
    val_documents: int
    val_tokens: int
    val_bytes: int
    unigram_nats: float
    bigram_nats: float
    settings: str = ""
    hash: str = ""
    versions: dict = field(default_factory=dict)

    @property
    def bytes_per_token(self):
        """UTF-8 bytes of text for each token of the validation text."""
        return self.val_bytes / self.val_tokens

    def bits_per_byte(self, nats):
        """Nats a token of the validation text -> bits a byte."""
        return nats / math.log(2) / self.bytes_per_token


def load_dataset_info(folder):
    """The `DatasetInfo` of a data folder.

    Raises:
        InputError: no data folder, or an unfinished one.
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


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a data folder will hold."""

    corpus: str
    source: str
    tokenizer: str
    vocab_size: int | None
    max_tokens: int | None
    shard_tokens: int
    val_share: float | None

    def key(self):
        """A short hash of the settings."""
        return digest(json.dumps(asdict(self)).encode())[:32]


def open_corpus(corpus, processes, val_share=None):
    """A corpus by name or files -> (source, function that reads it).

    `source` is a text that changes when the corpus does.
    """
    share = {} if val_share is None else {"share": val_share}
    if corpus == "docs":
        path = docs_corpus(processes)
        return path.stem, lambda: read_docs(path)
    if corpus == "fineweb-edu":
        return "/".join(FINEWEB_EDU), lambda: stream_dataset(
            *FINEWEB_EDU, **share
        )
    paths = [corpus] if isinstance(corpus, str | Path) else corpus
    files = find_files(paths)
    stats = [(str(p.resolve()), p.stat()) for p in files]
    marks = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
    return json.dumps(marks), lambda: read_files(files, **share)


TRAIN_BYTES = 200_000_000


def training_texts(documents, limit=TRAIN_BYTES):
    """Texts of the training side, up to a limit of letters."""
    for split, text in documents:
        if split == "train":
            yield text
            limit -= len(text)
            if limit < 0:
                return


def prepare_tokenizer(name, read, vocab_size, folder, source):
    """Write the tokenizer folder: trained, GPT-2's or a copy."""
    if name == "gpt2":
        save_tokenizer(gpt2_tokenizer(), folder)
    elif name == "bpe":
        size = vocab_size or 2048
        kept = cache_folder() / f"bpe_{digest(source.encode())[:16]}_{size}"
        if source.startswith("docs_") and kept.exists():
            tokenizer = read_tokenizer(kept)
        else:
            tokenizer = train_bpe(training_texts(read()), size)
            if source.startswith("docs_"):
                save_tokenizer(tokenizer, kept)
        save_tokenizer(tokenizer, folder)
    else:
        read_tokenizer(name)
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(name).iterdir()):
            if file.name in TOKENIZER_FILES or file.suffix == ".jinja":
                shutil.copy(file, folder / file.name)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def vocabulary_size(tokenizer, wanted):
    """V: the tokenizer's, or a larger wanted one."""
    size = max(tokenizer.get_vocab().values()) + 1
    if wanted is not None and wanted < size:
        raise InputError(
            f"the tokenizer has {size:,} tokens; --vocab-size {wanted:,} is "
            "too small for it"
        )
    return size


FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def prepare(
    corpus,
    out,
    tokenizer="bpe",
    vocab_size=None,
    max_tokens=None,
    shard_tokens=100_000_000,
    val_share=None,
    processes=None,
):
    """Make a data folder: shards, tokenizer/ and dataset.json.

    The folder appears when it is complete. Until then its parts lie in
    OUT.partial; a run that was killed continues there and ends with the
    same bytes.

    Args:
        corpus: "docs", "fineweb-edu", or a list of files.
        out: the folder to make.
        tokenizer: "bpe", "gpt2", or a folder with tokenizer.json.
        vocab_size: size of a trained vocabulary, 2,048 unless given.
        max_tokens: stop after the document that reaches so many.
        val_share: share of the text held out (not for docs).
        processes: workers, one a processor unless given.

    Returns:
        `DatasetInfo`.

    Raises:
        InputError: of any input that cannot be used, and of a full disk.
    """
    out = Path(out)
    source, read = open_corpus(corpus, processes, val_share)
    names = corpus if isinstance(corpus, str) else " ".join(map(str, corpus))
    settings = Settings(
        names,
        source,
        str(tokenizer),
        vocab_size,
        max_tokens,
        shard_tokens,
        val_share,
    )
    if (out / "dataset.json").exists():
        info = load_dataset_info(out)
        if info.settings != settings.key():
            raise InputError(f"{out} holds another data set: delete it first")
        return info
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a data folder")
    partial = out.with_name(out.name + ".partial")
    try:
        info = fill_folder(partial, settings, read, processes)
        os.replace(partial, out)
    except InputError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"{partial}: the disk is full; free some space and run the same "
            "command again, it will continue"
        ) from error
    return info


def fill_folder(folder, settings, read, processes):
    """Do the work of `prepare` in `folder`, or what is left of it."""
    begun = folder / "settings.json"
    if begun.exists() and json.loads(begun.read_text()) != settings.key():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(begun, settings.key())
    place = folder / "tokenizer"
    if not (place / "tokenizer.json").exists():
        prepare_tokenizer(
            settings.tokenizer,
            read,
            settings.vocab_size,
            place,
            settings.source,
        )
    tokenizer = read_tokenizer(place)
    bpe = settings.tokenizer == "bpe"
    V = vocabulary_size(tokenizer, None if bpe else settings.vocab_size)
    separator = separator_id(place, tokenizer)
    name = digest((place / "tokenizer.json").read_bytes())
    writers = [
        ShardWriter(folder, split, settings.shard_tokens, V, name)
        for split in ("train", "val")
    ]

    def encode(groups):
        return parallel_map(
            encode_pieces,
            groups,
            processes,
            start_encoder,
            (place, settings.tokenizer, separator),
        )

    progress = folder / "progress.npz"
    write_shards(read(), writers, encode, settings.max_tokens, progress)
    for writer in writers:
        if writer.waiting:
            writer.flush(writer.waiting)
        if writer.tokens < 2:
            raise InputError(f"the corpus leaves no {writer.split} text")
    train, val = (first_tokens(folder, w.split) for w in writers)
    train_writer, val_writer = writers
    info = DatasetInfo(
        corpus=settings.corpus,
        tokenizer=settings.tokenizer,
        tokenizer_hash=name,
        vocab_size=V,
        end_of_text=separator,
        shard_tokens=settings.shard_tokens,
        train_shards=train_writer.shards,
        train_documents=train_writer.documents,
        train_tokens=train_writer.tokens,
        train_bytes=train_writer.bytes,
        val_shards=val_writer.shards,
        val_documents=val_writer.documents,
        val_tokens=val_writer.tokens,
        val_bytes=val_writer.bytes,
        unigram_nats=unigram_nats(train, val, V),
        bigram_nats=bigram_nats(train, val, V),
        settings=settings.key(),
        versions=docs_versions() if settings.corpus == "docs" else {},
    )
    write_json(folder / "dataset.json", asdict(info))
    begun.unlink()
    progress.unlink(missing_ok=True)
    return info
