"""What every script shares: a parser with one-line errors, and exit code 2 for bad input."""

import argparse
import os
import sys

# Retries are told in pages; the error at their end is one line.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")

from llama_tut.tools.files import InputError  # noqa: E402


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def __init__(self, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault(
            "formatter_class", argparse.ArgumentDefaultsHelpFormatter
        )
        super().__init__(**kwargs)

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def run(main):
    """Call `main()`; bad input becomes one line on stderr and exit code 2.

    A reader that goes away, as in `script | head`, ends it quietly.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a locale without UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
