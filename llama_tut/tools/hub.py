"""Data sets of the Hugging Face hub, through the library `datasets`."""

from llama_tut.tools.files import InputError, first_line


def read_hub(name, split):
    """Yield (number, dictionary) for each record of a data set.

    Raises:
        InputError: it cannot be loaded; the line says why and what to do.
    """
    from datasets import load_dataset

    try:
        records = load_dataset(name, split=split)
    except Exception as error:  # the library's errors share no base class
        raise InputError(
            f"{name} cannot be loaded ({first_line(error)}): connect, or give "
            "a file"
        ) from error
    yield from enumerate(records, 1)
