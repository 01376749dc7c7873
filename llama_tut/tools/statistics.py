"""Statistics: how far two means can differ by chance."""

from scipy import stats

from llama_tut.tools.files import require


def share_interval(share, count, level=0.95):
    """Wilson's interval of a share of `count` independent trials.

    Returns:
        Two floats, its lower and its upper end, from 0 to 1.
    """
    z = stats.norm.ppf((1 + level) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    variance = share * (1 - share) / count + (z / (2 * count)) ** 2
    half = z * variance**0.5 / (1 + z**2 / count)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def unpaired_interval(first, second, level=0.95):
    """Difference of two means, and half of its interval.

    Welch's: the two groups may have different sizes and variances.

    Args:
        first, second: one number per run, two or more in each.

    Returns:
        mean(first) - mean(second), and half of the interval.
    """
    found = stats.ttest_ind(first, second, equal_var=False)
    low, high = found.confidence_interval(level)
    return float((low + high) / 2), float((high - low) / 2)


def mcnemar(first, second, kind="sum"):
    """McNemar's exact test of two lists of predictions of the same examples.

    Examples that both models get right, or both wrong, say nothing about the
    difference. If the models are equally good, each of the others is a fair
    coin (McNemar, 1947).

    Args:
        first, second: lists of dictionaries with `index`, `label` and
            `pred_KIND`, as `hellaswag.score` makes them.

    Returns:
        (b, c, p): right in the first only, right in the second only, and the
        two-sided probability of a split at least as uneven.

    Raises:
        InputError: the two are not about the same examples.
    """

    def hits(predictions):
        return [p[f"pred_{kind}"] == p["label"] for p in predictions]

    keys = [[(p["index"], p["label"]) for p in q] for q in (first, second)]
    require(keys[0] == keys[1], "the predictions differ in examples")
    pairs = list(zip(hits(first), hits(second), strict=True))
    b, c = pairs.count((True, False)), pairs.count((False, True))
    p = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    return b, c, float(p)
