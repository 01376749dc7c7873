# From notebooks/20_fast_scoring.ipynb by scripts/export.py: edit the notebook.
"""Packed scoring: the context once, the four endings after it in one row.

Letters: B examples of one batch, T tokens of the longest packed row, N tokens
of endings in the batch, D hidden_size, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.hellaswag import score_rows
from llama_tut.model import LlamaForCausalLM

# Two rules make one row equal to four


def pack_row(context, endings):
    """One example in one row.

    Returns:
        Four lists with an entry for each token: its id, its position, its
        part (0: context, 1 to 4: which ending); and for each ending the list
        of places in the row that predict its tokens.
    """
    n = len(context)
    ids, positions, parts = list(context), list(range(n)), [0] * n
    places = []
    for number, ending in enumerate(endings, 1):
        read = ending[:-1]  # the last token predicts nothing
        places.append([n - 1, *range(len(ids), len(ids) + len(read))])
        ids += read
        positions += range(n, n + len(read))
        parts += [number] * len(read)
    return ids, positions, parts, places


class Packed(NamedTuple):
    """A batch of examples, one row each: the context, then the endings."""

    ids: torch.Tensor  # [B, T]
    positions: torch.Tensor  # [B, T], starting again after the context
    parts: torch.Tensor  # [B, T], 0: context, 1 to 4: which ending
    rows: torch.Tensor  # [N], place in B*T that predicts an ending's token
    targets: torch.Tensor  # [N], that token
    owners: torch.Tensor  # [N], 4 * example + ending


def pack(items):
    """Put each example (see `hellaswag.encode`) into a row. Returns Packed."""
    packed = [pack_row(context, endings) for context, endings in items]
    T = max(len(ids) for ids, *_ in packed)
    table = torch.zeros(3, len(items), T, dtype=torch.long)
    rows, targets, owners = [], [], []
    for b, (ids, positions, parts, places) in enumerate(packed):
        table[:, b, : len(ids)] = torch.tensor([ids, positions, parts])
        endings = items[b][1]
        for j, (ending, at) in enumerate(zip(endings, places, strict=True)):
            rows += [b * T + place for place in at]
            targets += ending
            owners += [4 * b + j] * len(ending)
    return Packed(*table, *map(torch.tensor, (rows, targets, owners)))


# The mask


def packed_mask(parts):
    """Who reads whom: parts [B, T] -> bool [B, 1, T, T]."""
    T = parts.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=parts.device).tril()
    same = parts[:, :, None] == parts[:, None, :]  # [B, T, T]
    context = (parts == 0)[:, None, :]  # [B, 1, T]
    return (causal & (same | context))[:, None]  # [B, 1, T, T]


# Which models can read such a row?


def can_pack_rows(model):
    """Whether a model takes positions and a mask as `read_packed` gives them.

    Ours does, and transformers' LLaMA. Others may add positions to their
    embeddings, count them in another way, or cap their logits.
    """
    if isinstance(model, LlamaForCausalLM):
        return isinstance(model.model.embed_tokens, nn.Embedding)
    return getattr(model.config, "model_type", None) == "llama"


def read_packed(model, batch):
    """The normed stream of a packed batch, [B, T, D], and the head."""
    mask = packed_mask(batch.parts)  # [B, 1, T, T]
    if isinstance(model, LlamaForCausalLM):
        hidden = model.model(batch.ids, batch.positions, mask)  # [B, T, D]
        return hidden, model.head
    # transformers adds its mask to the scores: 0 or the lowest number.
    bias = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    bias = bias.masked_fill(~mask, torch.finfo(model.dtype).min)
    out = model.model(
        batch.ids,
        position_ids=batch.positions,
        attention_mask=bias,
        use_cache=False,
    )
    return out.last_hidden_state, model.get_output_embeddings()


# Score a batch


@torch.no_grad()
def score_packed(model, items, limit=None, rows_at_once=None):
    """As `hellaswag.score_rows`, but each context is computed once.

    Models that take no packed rows, and batches with an example that exceeds
    the model's context, go to `score_rows`.

    Args:
        items: pairs (context, four endings) of ids, see `hellaswag.encode`.
        limit: the model's context, or None.
        rows_at_once: rows that go through the head in one product; None: 96
            on a CPU, where that was measured to be faster, else 512.
    """
    longest = max(len(c) + max(map(len, endings)) - 1 for c, endings in items)
    if not can_pack_rows(model) or (limit and longest > limit):
        return score_rows(model, items, limit)
    device = next(model.parameters()).device
    batch = Packed(*(tensor.to(device) for tensor in pack(items)))
    hidden, head = read_packed(model, batch)  # [B, T, D]
    hidden = hidden.flatten(0, 1)[batch.rows]  # [N, D]
    rows_at_once = rows_at_once or (96 if device.type == "cpu" else 512)
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
