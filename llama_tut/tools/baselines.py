"""Baselines: losses of models that only count tokens or pairs of them."""

import numpy as np


def unigram_nats(train, val, vocab_size):
    """Mean of -log p(token) over val[1:], with counts from `train`.

    Args:
        train, val: ids, int64.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1
    return float(-np.log(counts[val[1:]] / counts.sum()).mean())


def bigram_nats(train, val, vocab_size):
    """Mean of -log p(token | token before) over val[1:], Kneser-Ney."""
    V = vocab_size
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    d = once / max(once + 2 * twice, 1)
    c = np.bincount(pairs // V, counts, V)  # tokens seen behind each token
    k = np.bincount(pairs // V, minlength=V)  # different ones
    lower = np.bincount(pairs % V, minlength=V) + 1
    lower = lower / lower.sum()
    a, b = val[:-1], val[1:]
    place = np.searchsorted(pairs, a * V + b).clip(max=len(pairs) - 1)
    seen = np.where(pairs[place] == a * V + b, counts[place] - d, 0)
    rest = np.where(c[a] > 0, d * k[a], 1)  # a token never seen: all to p_k
    p = (seen + rest * lower[b]) / np.maximum(c[a], 1)
    return float(-np.log(p).mean())
