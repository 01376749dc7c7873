# From notebooks/10_hellaswag.ipynb by scripts/export.py: edit the notebook.
"""HellaSwag: which of four endings does a model find the likeliest?

Letters: B examples of one batch, T tokens of the longest row, V vocabulary.
"""

import math
import re
from importlib.resources import files
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from llama_tut.tools.files import InputError, read_jsonl, require
from llama_tut.tools.predictions import check_items, read_hub
from llama_tut.tools.prompts import beginning, check_finite

# The text of an example


class Example(NamedTuple):
    """A context, four endings, and which of them is right (0 to 3)."""

    index: int
    context: str
    endings: tuple
    label: int


def clean(text):
    """The text without WikiHow's marks, as lm-evaluation-harness does it."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text).replace("  ", " ")
    # Half a surrogate pair is not a character, and tokenizers refuse it.
    return text.encode(errors="replace").decode()


def check_record(record, texts):
    """Refuse a dictionary that is not an example (InputError)."""
    missing = [n for n in [*texts, "endings", "label"] if n not in record]
    require(not missing, f"{', '.join(missing)} missing")
    for name in texts:
        require(isinstance(record[name], str), f"{name} is not a string")
    endings, label = record["endings"], str(record["label"])
    require(isinstance(endings, list), "endings is not a list")
    require(len(endings) == 4, f"{len(endings)} endings, must be 4")
    strings = all(isinstance(ending, str) for ending in endings)
    require(strings, "an ending is not a string")
    # Nothing may be left empty: a score by length divides by the length.
    require(all(clean(e).strip() for e in endings), "an empty ending")
    require(label in list("0123"), f"label {label!r}, not 0 to 3")


def make_example(index, record):
    """An Example from one dictionary of the data set.

    Args:
        record: `activity_label`, `endings`, `label`, and either `ctx_a` with
            `ctx_b` (as published) or `ctx` (where somebody joined them).

    Raises:
        InputError: a field is missing, or there are not four endings.
    """
    parts = ["ctx_a", "ctx_b"] if "ctx_a" in record else ["ctx"]
    check_record(record, ["activity_label", *parts])
    first, *second = [record[name] for name in parts]
    context = " ".join([first, *(text.capitalize() for text in second)])
    context = clean(record["activity_label"] + ": " + context)
    endings = tuple(map(clean, record["endings"]))
    return Example(index, context, endings, int(record["label"]))


HUB_NAME = "Rowan/hellaswag"


def read_examples(source=None, limit=None):
    """A list of Examples.

    Args:
        source: None for the 48 of the package, "Rowan/hellaswag" for the
            published validation set, or a jsonl file of the same fields.
        limit: take the first so many.

    Raises:
        InputError: what is wrong, and in which line of which file.
    """
    require(limit is None or limit >= 1, f"limit {limit}: must be 1 or more")
    if source is None:
        source = files("llama_tut") / "hellaswag_small.jsonl"
    hub = str(source) == HUB_NAME
    records = read_hub(HUB_NAME, "validation") if hub else read_jsonl(source)
    examples = []
    for number, record in records:
        try:
            examples.append(make_example(len(examples), record))
        except InputError as error:
            reason = f"{source}, line {number}: {error}"
            raise InputError(reason) from error
        if len(examples) == limit:
            break
    require(examples, f"{source} holds no example")
    return examples


# Where the ending begins


def encode(tokenizer, example):
    """The ids of an example: (context, four endings), as the harness cuts.

    Without a context the endings follow the beginning of text, or, where a
    tokenizer has none, the end of text.
    """

    def ids(texts):
        return tokenizer(texts, add_special_tokens=False).input_ids

    if not example.context:
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        require(first is not None, "the tokenizer has no special token")
        return [first], ids([" " + ending for ending in example.endings])
    start = beginning(tokenizer)
    context = [*start, *ids(example.context)]
    whole = ids([f"{example.context} {e}" for e in example.endings])
    return context, [[*start, *row][len(context) :] for row in whole]


# One row for each ending


@torch.no_grad()
def score_rows(model, items, limit=None):
    """Sums of log-probabilities, one row for each ending.

    Args:
        model: ours, or a transformers model; called with ids [4*B, T].
        items: pairs (context, four endings) of ids, see `encode`.
        limit: the model's context; longer rows lose tokens on the left.

    Returns:
        A list of four sums for each item.
    """
    device = next(model.parameters()).device
    pairs = [(c, e) for c, endings in items for e in endings]
    # An ending's last token predicts nothing that counts.
    rows = [(c + e)[:-1] for c, e in pairs]
    if limit is not None:
        rows = [row[-limit:] for row in rows]
    T = max(map(len, rows))
    filled = [row + [0] * (T - len(row)) for row in rows]
    out = model(torch.tensor(filled, device=device))
    logits = getattr(out, "logits", out)  # [4*B, T, V]
    sums = []
    for row, (_, ending), logit in zip(rows, pairs, logits, strict=True):
        places = logit[len(row) - len(ending) : len(row)].float()
        target = torch.tensor(ending, device=device)
        sums.append(-F.cross_entropy(places, target, reduction="sum").item())
    return [sums[i : i + 4] for i in range(0, len(sums), 4)]


# The scorer


def predict(example, sums, lengths):
    """One prediction, from four sums and the endings' lengths in tokens."""

    def best(divisors):
        means = [s / d for s, d in zip(sums, divisors, strict=True)]
        return means.index(max(means))

    return {
        "index": example.index,
        "label": example.label,
        "pred_sum": best([1] * 4),
        "pred_char": best([len(ending) for ending in example.endings]),
        "pred_token": best(lengths),
        "scores": sums,
    }


def score_items(
    model,
    examples,
    items,
    batch_size=None,
    score_batch=score_rows,
    progress=False,
):
    """As `score`, for examples that are already tokens (see `encode`).

    Args:
        batch_size: examples in one pass; None: 4 on a CPU, else 16.
        score_batch: (model, items, limit) -> four sums an item. The plain
            way, or `llama_tut.fast.scoring.score_packed`.
        progress: show a bar, if this is a terminal.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    check_items(items, limit, model.config.vocab_size)
    if batch_size is None:
        batch_size = 4 if next(model.parameters()).device.type == "cpu" else 16
    tokens = [len(sum(endings, context)) for context, endings in items]
    order = sorted(range(len(items)), key=lambda i: -tokens[i])
    predictions = [None] * len(items)
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, disable=None if progress else True):
        chosen = order[start : start + batch_size]
        found = score_batch(model, [items[i] for i in chosen], limit)
        for i, sums in zip(chosen, found, strict=True):
            check_finite(torch.tensor(sums))
            lengths = [len(ending) for ending in items[i][1]]
            predictions[i] = predict(examples[i], sums, lengths)
    return predictions


def score(model, tokenizer, examples, **options):
    """Predict the ending of each example.

    Args:
        model: our `LlamaForCausalLM` or a causal model of transformers.
        tokenizer: a transformers tokenizer.
        options: as in `score_items`.

    Returns:
        A list of dictionaries in the order of `examples`: `index`, `label`,
        `pred_sum`, `pred_char`, `pred_token` and the four `scores`.

    Raises:
        InputError: the model cannot score them, or its logits are NaN.
    """
    items = [encode(tokenizer, example) for example in examples]
    return score_items(model, examples, items, **options)


# How sure is an accuracy?


def accuracy(predictions, kind="sum"):
    """(accuracy, its standard error); kind: "sum", "char" or "token"."""
    n = len(predictions)
    a = sum(p[f"pred_{kind}"] == p["label"] for p in predictions) / n
    return a, math.sqrt(a * (1 - a) / max(n - 1, 1))
