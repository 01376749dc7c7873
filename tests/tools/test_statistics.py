"""Intervals: by hand, and how often they hold the truth."""

import numpy as np
import pytest
from scipy import stats

from llama_tut.tools.statistics import (
    share_interval,
    unpaired_interval,
)


def test_equal_groups_by_hand():
    """Two groups of 3 with variance 1: error sqrt(2/3), t(4) is 2.7764."""
    gap, half = unpaired_interval([1.0, 2, 3], [4.0, 5, 6])
    assert gap == pytest.approx(-3)
    assert half == pytest.approx(2.7764 * (2 / 3) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("sizes", [(3, 3), (3, 5)])
def test_intervals_hold_the_truth_as_often_as_they_say(sizes):
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        first, second = (random.normal(0, 1, n) for n in sizes)
        gap, half = unpaired_interval(first + 0.3, second)
        held += abs(gap - 0.3) < half
    assert 0.93 < held / 2000 < 0.98


def test_pairing_by_noise_alone_widens_the_interval():
    """Uncorrelated pairs: fewer degrees of freedom, a wider interval."""
    random = np.random.default_rng(1)
    draws = [random.normal(0, 1, (2, 3)) for _ in range(500)]
    t = stats.t.ppf(0.975, 2)
    paired = np.mean([t * stats.sem(a - b) for a, b in draws])
    unpaired = np.mean([unpaired_interval(*d)[1] for d in draws])
    assert paired > 1.2 * unpaired


@pytest.mark.parametrize(("right", "count"), [(0, 20), (7, 20), (191, 191)])
def test_share_interval_is_wilsons(right, count):
    found = share_interval(right / count, count)
    wanted = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-12)
