"""Baselines: losses of models that only count tokens, or pairs of them."""

import numpy as np


def unigram_nats(train, val, vocab_size):
    """Mean of -log p(token) over val[1:], with counts from `train`.

    Every token counts once more than it was seen, so none is impossible.

    Args:
        train, val: ids, int64.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1
    return float(-np.log(counts[val[1:]] / counts.sum()).mean())


def bigram_nats(train, val, vocab_size):
    """Mean of -log p(token | the token before) over val[1:].

    Interpolated Kneser-Ney with a single discount d. Each pair that was seen
    gives up d of its count, and what the pairs after a token a gave up is
    shared out by p_k, the share of different tokens that b was seen after:

        p(b | a) = (max(count(a, b) - d, 0) + d * kinds(a) * p_k(b)) / count(a)

    Source: Chen and Goodman 1998, section 2.7; d is n1 / (n1 + 2 n2) from
    the numbers of pairs that occur once and twice.
    """
    V = vocab_size
    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    # Text that is given several times has no pair that occurs once. Without
    # a discount, a pair never seen would be impossible and the loss infinite.
    d = once / (once + 2 * twice) if once else 0.5
    before, after = np.divmod(pairs, V)
    followed = np.bincount(before, counts, V)  # tokens seen after each token
    kinds = np.bincount(before, minlength=V)  # different ones
    p_k = np.bincount(after, minlength=V) + 1
    p_k = p_k / p_k.sum()
    a, b = val[:-1], val[1:]
    index = np.searchsorted(pairs, a * V + b).clip(max=len(pairs) - 1)
    count = np.where(pairs[index] == a * V + b, counts[index] - d, 0)
    spare = np.where(followed[a] > 0, d * kinds[a], 1)  # never seen: all p_k
    p = (count + spare * p_k[b]) / np.maximum(followed[a], 1)
    return float(-np.log(p).mean())
