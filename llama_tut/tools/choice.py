"""Continuation choice: which of four windows goes on with a text?

An item shows 40 tokens of a document that end at a line end, and four windows
of 20 tokens: one is what comes next, the others begin at other line starts of
the same document.

Letters: N items, V vocabulary.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import require
from llama_tut.tools.shards import first_tokens
from llama_tut.tools.tokenizers import read_tokenizer

CONTEXT_TOKENS, CONTINUATION_TOKENS = 40, 20
ITEM_TOKENS = CONTEXT_TOKENS + CONTINUATION_TOKENS


class Choices(NamedTuple):
    """Items: which of four options goes on with the context?"""

    contexts: torch.Tensor  # [N, 40]
    options: torch.Tensor  # [N, 4, 20]
    answers: torch.Tensor  # [N], which option is the true one


def boundary_positions(tokens, line_end, end_of_text):
    """Where an item can be cut out: (boundaries, the document of each).

    The tokens at boundary - 40 .. boundary + 19 are of one document, and a
    line ends in front of the boundary. Arguments as in `choice_items`.
    """
    document = np.cumsum(tokens == end_of_text)
    at = np.arange(CONTEXT_TOKENS, len(tokens) - CONTINUATION_TOKENS + 1)
    first, last = at - CONTEXT_TOKENS, at + CONTINUATION_TOKENS - 1
    inside = document[first] == document[last]
    inside &= tokens[first] != end_of_text
    at = at[inside & line_end[tokens[at - 1]]]
    return at, document[at]


def cut_item(tokens, boundary, boundaries, draw):
    """Context, options in a random order, and which is true; or None.

    The three false options are windows that touch neither the item nor each
    other.

    Args:
        boundaries: those of the same document.
    """
    false = []
    number = min(len(boundaries), 30)
    for place in draw.choice(boundaries, number, replace=False):
        after = place >= boundary + CONTINUATION_TOKENS
        before = place + CONTINUATION_TOKENS <= boundary - CONTEXT_TOKENS
        apart = all(
            abs(place - other) >= CONTINUATION_TOKENS for other in false
        )
        if (after or before) and apart:
            false.append(place)
    places = [boundary, *false[:3]]
    options = np.stack([tokens[p : p + CONTINUATION_TOKENS] for p in places])
    if len(np.unique(options, axis=0)) < 4:
        return None
    order = draw.permutation(4)
    context = tokens[boundary - CONTEXT_TOKENS : boundary]
    return context, options[order], order.argmin()


def choice_items(tokens, line_end, end_of_text, count, seed=0):
    """Draw items from a text; no two contexts or answers overlap.

    Args:
        tokens: ids, int64, with `end_of_text` in front of each document.
        line_end: for each id whether its text has a line break, bool [V].

    Returns:
        `Choices`.

    Raises:
        InputError: the text has not so many items.
    """
    at, document = boundary_positions(tokens, line_end, end_of_text)
    draw, items = np.random.default_rng(seed), []
    used = np.zeros(len(tokens), bool)
    for i in draw.permutation(len(at)):
        if len(items) == count:
            break
        first, last = np.searchsorted(document, document[i] + np.arange(2))
        item = cut_item(tokens, at[i], at[first:last], draw)
        whole = slice(at[i] - CONTEXT_TOKENS, at[i] + CONTINUATION_TOKENS)
        if item is None or used[whole].any():
            continue
        used[whole] = True
        items.append(item)
    require(
        len(items) == count,
        f"--choice {count}: the validation text has only {len(items)} "
        "such items: take fewer, or more text",
    )
    columns = zip(*items, strict=True)
    return Choices(*(torch.from_numpy(np.stack(c)) for c in columns))


@torch.no_grad()
def window_log_p(model, contexts, options, rows_at_once):
    """log p(option | context) -> [N]; contexts [N, S], options [N, 20]."""
    device, sums = next(model.parameters()).device, []
    for context, window in zip(
        contexts.split(rows_at_once), options.split(rows_at_once), strict=True
    ):
        ids = torch.cat((context, window[:, :-1]), 1).to(device)
        out = model(ids)
        logits = getattr(out, "logits", out)[:, -CONTINUATION_TOKENS:].float()
        nats = F.cross_entropy(
            logits.transpose(1, 2), window.to(device), reduction="none"
        )  # [B, 20]
        sums.append(-nats.sum(1).cpu())
    return torch.cat(sums)


def choice_scores(model, choices, end_of_text, rows_at_once=32):
    """log p(option | context) - log p(option | end of text), [N, 4].

    Args:
        model: maps ids [B, T] to logits [B, T, V]; ours or transformers'.
        rows_at_once: B; the largest tensor is its logits, [B, 59, V].
    """
    options = choices.options.flatten(0, 1)
    contexts = choices.contexts.repeat_interleave(4, 0)
    nothing = torch.full_like(contexts[:, :1], end_of_text)
    score = window_log_p(model, contexts, options, rows_at_once)
    score = score - window_log_p(model, nothing, options, rows_at_once)
    return score.view(-1, 4)


def choice_accuracy(scores, answers):
    """(accuracy, its standard error) of scores [N, 4]."""
    right = (scores.argmax(1) == answers).double().mean().item()
    return right, math.sqrt(right * (1 - right) / max(len(answers) - 1, 1))


def exchange_contexts(choices):
    """The control: each item is shown the context of another one."""
    return choices._replace(contexts=choices.contexts.roll(1, 0))


def choice_baselines(choices, train, tokenizer):
    """Accuracies that need no model of the text: {name: accuracy}.

    Args:
        train: ids of training text, int64, whose pairs are counted.
    """

    def words(ids):
        return set(re.findall(r"\w+", tokenizer.decode(ids).lower()))

    V = tokenizer.get_vocab_size()
    last, first = choices.contexts[:, -1:], choices.options[:, :, 0]
    wanted, where = np.unique(last * V + first, return_inverse=True)
    pairs = train[:-1] * V + train[1:]
    pairs = pairs[np.isin(pairs, wanted)]
    places = np.searchsorted(wanted, pairs)
    counts = np.bincount(places, minlength=len(wanted))
    pair_counts = torch.from_numpy(counts[where]).view(first.shape)  # [N, 4]
    shared = torch.tensor(
        [
            [len(words(option) & words(context)) for option in four]
            for context, four in zip(
                choices.contexts.tolist(),
                choices.options.tolist(),
                strict=True,
            )
        ]
    )
    answers = choices.answers
    return {
        "bigram at the boundary": choice_accuracy(pair_counts, answers)[0],
        "word overlap": choice_accuracy(shared, answers)[0],
        "chance": 0.25,
    }


def line_ends(tokenizer, vocab_size):
    """For each id whether its text has a line break, bool [V]."""
    texts = (tokenizer.decode([i]) for i in range(vocab_size))
    return np.array(["\n" in text for text in texts])


CHOICE_TOKENS = 10_000_000  # of each split


def read_choices(folder, count):
    """Items of a data folder's validation text: (`Choices`, baselines).

    Raises:
        InputError: it is no data folder, or its text has not so many items.
    """
    info = load_dataset_info(folder)
    tokenizer = read_tokenizer(Path(folder) / "tokenizer")
    require(info.val_shards, f"--choice is for text: {folder} holds pictures")
    ends = line_ends(tokenizer, info.vocab_size)
    val = first_tokens(folder, "val", CHOICE_TOKENS)
    choices = choice_items(val, ends, info.end_of_text, count)
    train = first_tokens(folder, "train", CHOICE_TOKENS)
    return choices, choice_baselines(choices, train, tokenizer)
