"""Files: one way to refuse bad input, one atomic write, one reader of JSON lines."""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path


class InputError(Exception):
    """Bad input: one line that says what is wrong and what to do."""


def require(condition, message):
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def first_line(error):
    """The first line of what an exception says, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def digest(*parts):
    """blake2b of bytes, in hexadecimal (64 letters)."""
    h = hashlib.blake2b(digest_size=32)
    for part in parts:
        h.update(part)
    return h.hexdigest()


def fingerprint(path):
    """{"bytes": size, "sha256": checksum} of a file."""
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": Path(path).stat().st_size, "sha256": checksum}


def remove(*paths):
    """Delete files and folders, which may be absent.

    A folder first gets a name that begins with a dot, so that one that is cut
    off in the middle is not taken for a whole one.
    """
    for path in filter(Path.exists, paths):
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".tmp-old-{path.name}"))
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path, *parts):
    """Write bytes under another name, then rename: all of the file or none.

    Whenever the process dies, a file with its final name is complete: the old
    version or the new one.
    """
    path = Path(path)
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
    """Write a value as indented JSON, atomically.

    Raises:
        ValueError: the value holds an infinity or a NaN, which is no JSON.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def write_jsonl(path, records):
    """Write one JSON object a line, atomically; compressed if named .gz.

    Raises:
        InputError: the file cannot be written.
        ValueError: a value is an infinity or a NaN, which is no JSON.
    """
    lines = [json.dumps(record, allow_nan=False) for record in records]
    data = "".join(line + "\n" for line in lines).encode()
    if str(path).endswith(".gz"):
        data = gzip.compress(data, mtime=0)  # the same bytes each time
    try:
        write_atomic(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be written: {reason}") from error


def read_json(path):
    """The dictionary in a JSON file.

    Raises:
        InputError: no such file, or no JSON object in it; the line names it.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no readable JSON: {first_line(error)}"
        ) from error
    require(isinstance(found, dict), f"{path} holds no JSON object")
    return found


def read_jsonl(path, cut_off="refuse"):
    """Yield (line number, dictionary) for each line that is not blank.

    Lines end at "\\n" only: JSON may hold other line ends, such as U+2028. A
    byte order mark is skipped. A name that ends in .gz is decompressed.

    Args:
        cut_off: "drop" leaves out a last line without its line end, as a
            writer that was killed leaves it.

    Raises:
        InputError: the file cannot be read, or a line holds no JSON object.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:
            yield from read_lines(path, lines, cut_off)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: {reason}") from error


def read_lines(path, lines, cut_off="refuse"):
    """As `read_jsonl`, from lines of bytes; `path` is for the messages."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if cut_off == "drop" and not line.endswith(b"\n"):
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: not JSON ({first_line(error)})"
            ) from error
        require(
            isinstance(record, dict), f"{path}, line {number}: no JSON object"
        )
        yield number, record
