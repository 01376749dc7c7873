"""Statistics: how far two means can differ by chance."""

import numpy as np
from scipy import stats


def t_interval(values, level=0.95):
    """The mean of some runs, and half of its interval by Student's t.

    Args:
        values: one number a run, two or more.
        level: how often such an interval holds the true mean.

    Returns: two floats; the interval is mean - half to mean + half.
    """
    values = np.asarray(values, dtype=float)
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1)
    return float(values.mean()), float(half)


def paired_interval(first, second, level=0.95):
    """Mean of first - second at equal seed, and half of its interval.

    Worth it only where the two move together from seed to seed: it has half
    the degrees of freedom of `unpaired_interval`.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    return t_interval(first - second, level)


def unpaired_interval(first, second, level=0.95):
    """Difference of two means, and half of its interval.

    Welch's: the two groups may have different sizes and variances.

    Args:
        first, second: one number a run, two or more in each.

    Returns: mean(first) - mean(second), and half of the interval.
    """
    found = stats.ttest_ind(first, second, equal_var=False)
    low, high = found.confidence_interval(level)
    return float((low + high) / 2), float((high - low) / 2)
