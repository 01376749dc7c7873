"""Baselines: losses of models that only count tokens, or runs of them."""

import numpy as np


def ngram_nats(train, val, vocab_size, order):
    """Mean of -log p(token | the order - 1 tokens before) over val[1:].

    Interpolated Kneser-Ney with one discount d for each length. A run of
    tokens, h and then b, gives up d of its count, and what the runs after h
    gave up is shared out by p of the run without its first token:

        p(b | h) = (max(count(h, b) - d, 0) + d * kinds(h) * p(b | h')) / count(h)

    Only the longest runs are counted as they occur. A shorter one counts the
    different tokens that it was seen after, and a single token once more, so
    that none is impossible.

    Source: Chen and Goodman 1998, section 2.7; d is n1 / (n1 + 2 n2) from
    the numbers of runs that count once and twice.

    Args:
        train, val: ids, int64. The context of val begins in train.
        order: 1 for single tokens, 2 for pairs, and so on.
    """
    V, n = vocab_size, len(train)
    both = np.concatenate((train, val))
    at = np.arange(n + 1, len(both))
    runs = [both]  # runs[k - 1][i]: which k tokens end at i, as a number
    for k in range(1, order):
        longer = runs[-1][k - 1 : -1] * V + both[k:]
        number = np.unique(longer, return_inverse=True)[1]
        runs.append(np.concatenate((np.zeros(k, int), number)))
    p = None
    for k in range(1, order + 1):
        ids, size = runs[k - 1], runs[k - 1].max() + 1
        counted = ids[k - 1 : n]
        if k < order:  # each run of k + 1 tokens counts once
            counted = ids[k:n][np.unique(runs[k][k:n], return_index=True)[1]]
        if k == 1:
            counts = np.bincount(counted, minlength=V) + 1
            p = counts[both[at]] / counts.sum()
            continue
        counts = np.bincount(counted, minlength=size)
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        # Text that is given several times has no run that occurs once.
        # Without a discount, a run never seen would be impossible.
        d = once / (once + 2 * twice) if once else 0.5
        kind, first = np.unique(ids[k - 1 : n], return_index=True)
        before = runs[k - 2][first + k - 2]
        many = runs[k - 2].max() + 1
        followed = np.bincount(before, counts[kind], many)
        kinds = np.bincount(before, counts[kind] > 0, many)
        h = runs[k - 2][at - 1]
        share = np.maximum(counts[ids[at]] - d, 0) + d * kinds[h] * p
        p = np.where(followed[h] > 0, share / np.maximum(followed[h], 1), p)
    return float(-np.log(p).mean())
