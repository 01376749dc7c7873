# From notebooks/10_hellaswag.ipynb by scripts/export.py: edit the notebook.
"""HellaSwag: which of four endings does a model find the likeliest?

Letters: B examples of one batch, T tokens of the longest row, N tokens of
endings in the batch, D hidden_size, V vocabulary.
"""

import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from llama_tut.tools.files import InputError, require

# An example


class Example(NamedTuple):
    """A context, four endings, and which of them is right (0 to 3)."""

    index: int
    context: str
    endings: tuple
    label: int


def clean(text):
    """The text without WikiHow's marks, as lm-evaluation-harness does it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def check_record(record, texts):
    """Refuse a dictionary that is no example (InputError)."""
    missing = [n for n in [*texts, "endings", "label"] if n not in record]
    require(not missing, f"{', '.join(missing)} missing")
    for name in texts:
        require(isinstance(record[name], str), f"{name} is no text")
    endings, label = record["endings"], str(record["label"])
    require(isinstance(endings, list), "endings is no list")
    require(len(endings) == 4, f"{len(endings)} endings, must be 4")
    require(all(isinstance(e, str) and e for e in endings), "an empty ending")
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


# Reading a file

HUB_NAME = "Rowan/hellaswag"


def read_lines(path):
    """The dictionaries of a jsonl file. Raises InputError with the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            reason = f"{path} line {number}: not JSON ({error})"
            raise InputError(reason) from error
        require(
            isinstance(record, dict), f"{path} line {number}: no JSON object"
        )
        yield number, record


def read_hub(name=HUB_NAME):
    """The 10,042 published validation examples, through `datasets`."""
    from datasets import load_dataset

    try:
        records = load_dataset(name, split="validation")
    except Exception as error:  # the library's errors share no base class
        reason = str(error).splitlines()[0] if str(error) else "no reason"
        raise InputError(
            f"{name} cannot be loaded ({reason}): connect, or give a file"
        ) from error
    return enumerate(records, 1)


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
    examples = []
    for number, record in read_hub() if hub else read_lines(source):
        try:
            examples.append(make_example(len(examples), record))
        except InputError as error:
            reason = f"{source} line {number}: {error}"
            raise InputError(reason) from error
        if len(examples) == limit:
            break
    require(examples, f"{source} holds no example")
    return examples


# Where the ending begins


def encode(tokenizer, example):
    """The ids of an example: (context, four endings), as the harness cuts.

    Without a context the endings stand behind the tokenizer's first special
    token (beginning of text, else end of text).
    """
    if not example.context:
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        texts = [" " + ending for ending in example.endings]
        return [first], tokenizer(texts, add_special_tokens=False).input_ids
    context = tokenizer(example.context).input_ids
    texts = [f"{example.context} {ending}" for ending in example.endings]
    whole = tokenizer(texts).input_ids
    return context, [ids[len(context) :] for ids in whole]


# The plain way


def fill(rows, device):
    """Lists of ids -> one tensor [B, T], filled with 0 on the right."""
    T = max(map(len, rows))
    filled = [row + [0] * (T - len(row)) for row in rows]
    return torch.tensor(filled, device=device)  # [B, T]


def cut_rows(pairs, limit=None):
    """Context and ending without its last token, at most `limit` tokens.

    Raises:
        InputError: an ending alone exceeds the limit.
    """
    longest = max(len(ending) for _, ending in pairs)
    require(
        limit is None or longest <= limit,
        f"an ending has {longest} tokens, the model's context only {limit}",
    )
    return [(c + e)[:-1][-(limit or len(c + e)) :] for c, e in pairs]


@torch.no_grad()
def score_rows(model, items, limit=None):
    """Sums of log-probabilities, one row for each ending.

    Args:
        model: ours, or a transformers model; called with ids [B, T].
        items: pairs (context, four endings) of ids, see `encode`.
        limit: the model's context; longer rows lose tokens on the left.

    Returns:
        A list of four sums for each item.
    """
    device = next(model.parameters()).device
    pairs = [(c, e) for c, endings in items for e in endings]
    rows = cut_rows(pairs, limit)
    out = model(fill(rows, device))
    logits = getattr(out, "logits", out)  # [4*B, T, V]
    sums = []
    for row, (_, ending), logit in zip(rows, pairs, logits, strict=True):
        tail = logit[len(row) - len(ending) : len(row)].float()
        target = torch.tensor(ending, device=device)
        sums.append(-F.cross_entropy(tail, target, reduction="sum").item())
    return [sums[i : i + 4] for i in range(0, len(sums), 4)]


# The context once


class Packed(NamedTuple):
    """A batch of examples, one row each: context, then the endings."""

    ids: torch.Tensor  # [B, T]
    positions: torch.Tensor  # [B, T], restarting behind the context
    parts: torch.Tensor  # [B, T], 0: context, 1 to 4: which ending
    rows: torch.Tensor  # [N], place in B*T that predicts an ending's token
    targets: torch.Tensor  # [N], that token
    owners: torch.Tensor  # [N], 4 * example + ending


def packed_length(item):
    """The tokens of an example in one row."""
    context, endings = item
    return len(context) + sum(len(ending) - 1 for ending in endings)


def pack(items):
    """Put each example (see `encode`) into one row. Returns Packed."""
    T = max(packed_length(item) for item in items)
    ids, positions, parts, rows, targets, owners = [], [], [], [], [], []
    for b, (context, endings) in enumerate(items):
        n, row = len(context), list(context)
        position, part = list(range(n)), [0] * n
        for j, ending in enumerate(endings):
            start = len(row)
            places = [n - 1, *range(start, start + len(ending) - 1)]
            rows += [b * T + place for place in places]
            targets += ending
            owners += [4 * b + j] * len(ending)
            row += ending[:-1]
            position += range(n, n + len(ending) - 1)
            part += [j + 1] * (len(ending) - 1)
        fill = [0] * (T - len(row))
        ids.append(row + fill)
        positions.append(position + fill)
        parts.append(part + fill)
    columns = (ids, positions, parts, rows, targets, owners)
    return Packed(*map(torch.tensor, columns))


def packed_mask(parts):
    """Who reads whom: parts [B, T] -> bool [B, 1, T, T]."""
    T = parts.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=parts.device).tril()
    same = parts[:, :, None] == parts[:, None, :]  # [B, T, T]
    context = (parts == 0)[:, None, :]  # [B, 1, T]
    return (causal & (same | context))[:, None]  # [B, 1, T, T]


def body_and_head(model):
    """What `score_packed` needs of a model: (body, head, device), or None.

    body(ids, positions, mask) gives [B, T, D]; head(rows [N, D]) gives [N, V].
    None: this model cannot be given a packed row.
    """
    device = next(model.parameters()).device
    if hasattr(model, "head"):
        return model.model, model.head, device
    if getattr(model.config, "model_type", None) != "llama":
        return None

    def body(ids, positions, mask):
        low = torch.finfo(model.dtype).min
        bias = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
        return model.model(
            ids,
            position_ids=positions,
            attention_mask=bias.masked_fill(~mask, low),
            use_cache=False,
        ).last_hidden_state

    return body, model.get_output_embeddings(), device


@torch.no_grad()
def score_packed(body, head, device, items, rows_at_once=512):
    """As `score_rows`, but each context is computed once.

    Args:
        body, head, device: see `body_and_head`.
        items: pairs (context, endings) of ids, see `encode`.
    """
    batch = Packed(*(tensor.to(device) for tensor in pack(items)))
    mask = packed_mask(batch.parts)  # [B, 1, T, T]
    hidden = body(batch.ids, batch.positions, mask)  # [B, T, D]
    hidden = hidden.flatten(0, 1)[batch.rows]  # [N, D]
    losses = []
    for rows, targets in zip(
        hidden.split(rows_at_once),
        batch.targets.split(rows_at_once),
        strict=True,
    ):
        logits = head(rows).float()
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
    sums = torch.zeros(4 * len(items), device=device)
    sums.index_add_(0, batch.owners, -torch.cat(losses))
    return sums.view(-1, 4).tolist()


# The scorer


def fits(item, limit):
    """Whether the context and the longest ending fit into the model."""
    context, endings = item
    longest = len(context) + max(map(len, endings)) - 1
    return limit is None or longest <= limit


def predict(example, sums, lengths):
    """One prediction: a dictionary, ready to become a line of JSON."""

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


def score(
    model, tokenizer, examples, batch_size=None, packed=None, progress=False
):
    """Predict the ending of each example.

    Args:
        model: our `LlamaForCausalLM` or a causal model of transformers.
        tokenizer: a transformers tokenizer.
        batch_size: examples in one pass; None: 4 on a CPU, else 32.
        packed: one row for each example; None: where the model can.
        progress: show a bar, if this is a terminal.

    Returns:
        A list of dictionaries in the order of `examples`: `index`, `label`,
        `pred_sum`, `pred_char`, `pred_token` and the four `scores`.
    """
    items = [encode(tokenizer, example) for example in examples]
    return score_items(model, examples, items, batch_size, packed, progress)


def score_items(
    model, examples, items, batch_size=None, packed=None, progress=False
):
    """As `score`, for examples that are already tokens (see `encode`)."""
    limit = getattr(model.config, "max_position_embeddings", None)
    parts = None if packed is False else body_and_head(model)
    require(parts or not packed, "this model cannot take packed rows")
    order = sorted(range(len(items)), key=lambda i: -packed_length(items[i]))
    if batch_size is None:
        batch_size = 4 if next(model.parameters()).device.type == "cpu" else 32
    predictions = [None] * len(items)
    bar = tqdm(total=len(items), disable=None if progress else True)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [items[i] for i in chosen]
        if parts and all(fits(item, limit) for item in batch):
            sums = score_packed(*parts, batch)
        else:  # four examples are sixteen rows
            fours = [batch[i : i + 4] for i in range(0, len(batch), 4)]
            sums = [
                s for four in fours for s in score_rows(model, four, limit)
            ]
        for i, found in zip(chosen, sums, strict=True):
            lengths = [len(ending) for ending in items[i][1]]
            predictions[i] = predict(examples[i], found, lengths)
        bar.update(len(chosen))
    bar.close()
    return predictions


# The score, and how sure it is


def accuracy(predictions, kind="sum"):
    """(accuracy, its standard error); kind: "sum", "char" or "token"."""
    n = len(predictions)
    a = sum(p[f"pred_{kind}"] == p["label"] for p in predictions) / n
    return a, math.sqrt(a * (1 - a) / max(n - 1, 1))


# Two models: McNemar's test


def mcnemar(first, second, kind="sum"):
    """Compare two lists of predictions of the same examples.

    Returns:
        (b, c, p): right in the first only, in the second only, and the chance
        of a split as uneven if both are equally good (two-sided, exact).

    Raises:
        InputError: the two are not about the same examples.
    """

    def key(predictions):
        return [(p["index"], p["label"]) for p in predictions]

    require(key(first) == key(second), "the predictions differ in examples")
    hits = [
        [p[f"pred_{kind}"] == p["label"] for p in predictions]
        for predictions in (first, second)
    ]
    b = sum(x and not y for x, y in zip(*hits, strict=True))
    c = sum(y and not x for x, y in zip(*hits, strict=True))
    n, small = b + c, min(b, c)
    tail = sum(math.comb(n, i) for i in range(small + 1))
    return b, c, min(1.0, 2 * tail / 2**n)


# Files of predictions


def write_predictions(path, predictions):
    """Write predictions as jsonl, all or nothing."""
    path = Path(path)
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("w") as file:
            file.writelines(json.dumps(p) + "\n" for p in predictions)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error}") from error


def read_predictions(path):
    """Read what `write_predictions` wrote. Raises InputError with the line."""
    names = ("index", "label", "pred_sum", "pred_char", "pred_token")
    predictions = []
    for number, record in read_lines(path):
        missing = [name for name in names if name not in record]
        require(not missing, f"{path} line {number}: no {', '.join(missing)}")
        predictions.append(record)
    require(predictions, f"{path} holds no prediction")
    return predictions
