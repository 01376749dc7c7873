"""Baselines that only count, against their formulas."""

import collections
import math

import numpy as np
import pytest

from llama_tut.tools import baselines, prepare


def plain_ngram(train, val, V, order):
    """Kneser-Ney by dictionaries, from the formula."""

    def runs(k):
        return (tuple(train[i : i + k]) for i in range(len(train) - k + 1))

    def counts(k):
        if k == order:
            return collections.Counter(runs(k))
        return collections.Counter(run[1:] for run in set(runs(k + 1)))

    tables = {k: counts(k) for k in range(1, order + 1)}

    def p(run):
        table = tables[len(run)]
        if len(run) == 1:
            return (table[run] + 1) / (sum(table.values()) + V)
        n1, n2 = (sum(c == n for c in table.values()) for n in (1, 2))
        d = n1 / (n1 + 2 * n2)
        seen = [c for other, c in table.items() if other[:-1] == run[:-1]]
        if not seen:
            return p(run[1:])
        own = max(table[run] - d, 0)
        return (own + d * len(seen) * p(run[1:])) / sum(seen)

    text = train + val
    at = range(len(train) + 1, len(text))
    losses = [-math.log(p(tuple(text[i - order + 1 : i + 1]))) for i in at]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_floors_equal_the_formula(order):
    rng = np.random.default_rng(1)
    train = rng.choice(6, 99, p=[0.5, 0.2, 0.1, 0.1, 0.1, 0]).astype(np.int64)
    val = rng.integers(6, size=40)
    ours = baselines.ngram_nats(train, val, 6, order)
    theirs = plain_ngram(train.tolist(), val.tolist(), 6, order)
    assert ours == pytest.approx(theirs)


def test_unigram_floor():
    train, val = np.array([0, 0, 1]), np.array([2, 0, 2])
    expected = -(math.log(3 / 6) + math.log(1 / 6)) / 2
    assert baselines.ngram_nats(train, val, 3, 1) == pytest.approx(expected)


def test_bits_per_byte():
    fields = dict.fromkeys(prepare.DatasetInfo.__dataclass_fields__, 0)
    info = prepare.DatasetInfo(**{**fields, "bytes_per_token": 4.5})
    assert round(info.bits_per_byte(2.9555), 3) == 0.948


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_text_given_several_times_has_a_finite_baseline(copies):
    """No pair occurs once, so the estimate of the discount would be 0."""
    text = np.arange(60) * 7 % 11
    train = np.tile(text, copies)
    val = np.array([0, 1, 2, 3, 0, 5])
    for order in (2, 3, 5):
        assert 0 < baselines.ngram_nats(train, val, 11, order) < 10
        assert np.isfinite(baselines.ngram_nats(train, train, 11, order))
