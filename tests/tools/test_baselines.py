"""Baselines that only count, against their formulas."""

import collections
import math

import numpy as np
import pytest

from llama_tut.tools import baselines, prepare


def plain_bigram(train, val, V):
    """Kneser-Ney by dictionaries, from the formula."""
    pairs = collections.Counter(zip(train, train[1:], strict=False))
    n1 = sum(c == 1 for c in pairs.values())
    n2 = sum(c == 2 for c in pairs.values())
    d = n1 / (n1 + 2 * n2)
    loss = 0
    for a, b in zip(val, val[1:], strict=False):
        k = {x: 1 + sum(p[1] == x for p in pairs) for x in range(V)}
        lower = k[b] / sum(k.values())
        c = sum(n for p, n in pairs.items() if p[0] == a)
        if c:
            kinds = sum(p[0] == a for p in pairs)
            p = (max(pairs[a, b] - d, 0) + d * kinds * lower) / c
        else:
            p = lower
        loss -= math.log(p)
    return loss / (len(val) - 1)


def test_bigram_floor_equals_the_formula():
    rng = np.random.default_rng(1)
    train = rng.choice(6, 60, p=[0.5, 0.2, 0.1, 0.1, 0.1, 0]).astype(np.int64)
    val = rng.integers(6, size=40)
    ours = baselines.bigram_nats(train, val, 6)
    assert ours == pytest.approx(plain_bigram(train.tolist(), val.tolist(), 6))


def test_unigram_floor():
    train, val = np.array([0, 0, 1]), np.array([2, 0, 2])
    expected = -(math.log(3 / 6) + math.log(1 / 6)) / 2
    assert baselines.unigram_nats(train, val, 3) == pytest.approx(expected)


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
    assert 0 < baselines.bigram_nats(train, val, 11) < 10
    assert np.isfinite(baselines.bigram_nats(train, train, 11))
