"""Continuation choice."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.choice import (
    choice_accuracy,
    choice_items,
    choice_scores,
    exchange_contexts,
)
from llama_tut.tools.files import InputError


def places_text(seed):
    """A text whose ids are places: (ids, line ends, document of each)."""
    draw = random.Random(seed)
    ids = np.arange(20_000)
    ids[[0, *(i for i in range(1, 20_000) if draw.random() < 1 / 300)]] = 0
    ends = np.array([draw.random() < 0.1 for _ in ids])
    return ids, ends, np.cumsum(ids == 0)


@pytest.mark.parametrize("seed", range(3))
def test_choice_items_are_cut_as_promised(seed):
    ids, ends, document = places_text(seed)
    items = choice_items(ids, ends, 0, 80, seed)
    assert [tuple(column.shape) for column in items] == [
        (80, 40),
        (80, 4, 20),
        (80,),
    ]
    used = []
    for context, options, answer in zip(*items, strict=True):
        spans = [context, *options]
        for span in spans:
            first, last = int(span[0]), int(span[-1])
            assert span.tolist() == list(range(first, last + 1))
            assert document[first] == document[context[0]] == document[last]
        assert options[answer, 0] == context[-1] + 1
        assert ends[options[:, 0] - 1].all()
        assert len(set(torch.cat(spans).tolist())) == 40 + 4 * 20
        used += [*context.tolist(), *options[answer].tolist()]
    assert len(set(used)) == len(used) == 80 * 60
    counts = torch.bincount(items.answers, minlength=4)
    assert counts.min() > 5


def test_choice_items_are_always_the_same():
    ids, ends, _ = places_text(0)
    whole = choice_items(ids, ends, 0, 80)
    for count in (1, 30, 80):
        again = choice_items(ids, ends, 0, count)
        for one, two in zip(whole, again, strict=True):
            assert torch.equal(one[:count], two)
    other = choice_items(ids, ends, 0, 80, seed=1)
    assert not torch.equal(whole.contexts, other.contexts)
    with pytest.raises(InputError, match="--choice 9999: .* only [1-9]"):
        choice_items(ids, ends, 0, 9999)


class Oracle(torch.nn.Module):
    """Logits of a text in which id + 1 follows id, as transformers' models."""

    def __init__(self, V):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(V))

    def forward(self, ids):
        V = len(self.bias)
        logits = torch.nn.functional.one_hot((ids + 1) % V, V) * 20.0
        return SimpleNamespace(logits=logits + self.bias)


def test_choice_of_an_oracle_and_of_its_control():
    ids, ends, _ = places_text(0)
    ids, V = ids[:3000].copy(), 3000
    torch.manual_seed(0)
    model, items = Oracle(V), choice_items(ids, ends[:3000], 0, 15)
    assert choice_accuracy(choice_scores(model, items, 0), items.answers) == (
        1,
        0,
    )
    control = exchange_contexts(items)
    assert torch.equal(control.options, items.options)
    for i in range(15):  # each item has the context of another one
        assert torch.equal(control.contexts[i], items.contexts[i - 1])
    rights = []
    for shift in range(1, 15):
        swapped = items._replace(contexts=items.contexts.roll(shift, 0))
        scores = choice_scores(model, swapped, 0)
        rights.append(choice_accuracy(scores, items.answers)[0])
    assert np.mean(rights) == pytest.approx(0.25, abs=0.1)


def test_choice_scores_by_hand_and_in_any_batch():
    V = 280
    ids, ends, _ = places_text(0)
    items = choice_items(ids, ends, 0, 7)
    items = items._replace(
        contexts=items.contexts % V,
        options=items.options % V,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(V, 32, 48, 2, 2)).eval()
    expected = torch.zeros(7, 4)
    for n in range(7):
        for k in range(4):
            for sign, start in ((1, items.contexts[n]), (-1, [0])):
                row = torch.tensor([*start, *items.options[n, k]])
                with torch.no_grad():
                    logits = model(row[None, :-1])[0]
                nats = torch.nn.functional.cross_entropy(
                    logits[-20:], row[-20:], reduction="sum"
                )
                expected[n, k] -= sign * nats
    for rows in (1, 5, 28, 64):
        found = choice_scores(model, items, 0, rows)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
