"""Documents: text from files and folders of many kinds, one document at a time."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import sys
import zlib
from collections import Counter
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from llama_tut.tools.files import InputError, first_line, read_lines, require
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
        start = file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        require(
            not start.startswith(b"["),
            f"{path}: a JSON array, which is read as a whole or not at all; "
            "write one object a line (jq -c '.[]' does it)",
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
                    try:
                        yield (value or b"").decode()
                    except UnicodeDecodeError as error:
                        raise InputError(
                            f"{path}, row {row:,}: not UTF-8 text (byte "
                            f"{error.start:,})"
                        ) from error
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
    kinds = [types.is_string, types.is_large_string, types.is_string_view]
    kinds += [types.is_binary, types.is_large_binary, types.is_binary_view]
    kinds += [types.is_null]
    require(
        any(kind(values.type) for kind in kinds),
        f"{path}: the text column holds {values.type}, not text; name "
        "another one with --text-column",
    )
    return values.cast(pyarrow.large_binary()).to_pylist()


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
    """The documents of one file that are not blank, as valid Unicode.

    Args:
        column: the field of jsonl, or the column of parquet, with the text.

    Raises:
        InputError: the file cannot be read; with the line or row where it
            holds no text.
    """
    for text in READERS.get(kind_of(path), read_text)(path, column):
        if text and not text.isspace():
            # JSON can spell half of a surrogate pair, which UTF-8 cannot.
            yield text.encode(errors="replace").decode()


# Many files


def find_files(paths):
    """Files, folders and glob patterns -> the files to read, in order.

    Folders are searched to the bottom, linked ones too. Hidden names, empty
    files and other kinds of file are left out, and a line says how many.

    Raises:
        InputError: nothing is there, it cannot be read, or it is a table.
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
    full = [f for f in files if f.stat().st_size]
    if len(full) < len(files):
        left_out["empty"] += len(files) - len(full)
    return full


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
        if hidden:
            left_out["hidden folders"] += len(hidden)
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
    """blake2b of a file's bytes, however large it is.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def hash_place(text):
    """A hash of the text as a number from 0 to 1."""
    hashed = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64
