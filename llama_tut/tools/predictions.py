"""Predictions: the examples that a model answers, and files of its answers."""

from llama_tut.tools.files import InputError, first_line, read_jsonl, require

NAMES = ("index", "label", "pred_sum", "pred_char", "pred_token")


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


def check_items(items, limit, vocab_size):
    """Refuse what a model cannot score.

    Args:
        limit: the model's context, or None.

    Raises:
        InputError: an ending is empty or exceeds the context, or an id is
            outside the vocabulary.
    """
    for context, endings in items:
        lengths = [len(ending) for ending in endings]
        require(min(lengths) > 0, "an ending has no token of its own")
        require(
            limit is None or max(lengths) <= limit,
            f"an ending has {max(lengths)} tokens, the model's context only "
            f"{limit}",
        )
        highest = max(map(max, filter(None, [context, *endings])))
        require(
            highest < vocab_size,
            f"an example has token {highest}, the model only {vocab_size}: "
            "does the tokenizer belong to it?",
        )


def read_predictions(path):
    """The list of predictions that `files.write_jsonl` wrote.

    Raises:
        InputError: the file cannot be read; with the line that is wrong.
    """
    predictions = []
    for number, record in read_jsonl(path):
        missing = [name for name in NAMES if name not in record]
        require(not missing, f"{path}, line {number}: no {', '.join(missing)}")
        predictions.append(record)
    require(predictions, f"{path} holds no prediction")
    return predictions
