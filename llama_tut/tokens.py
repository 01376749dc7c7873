# From notebooks/12_tokens.ipynb by scripts/export.py: edit the notebook.
"""Tokens: byte pair encoding in plain code.

Letters: V vocab_size.
"""

import itertools
from collections import Counter

# Merges, by hand


def join(word, pair):
    """Put the two tokens of `pair` together wherever they meet."""
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)


def learn_merges(words, count, tie=lambda pair: pair):
    """{word: occurrences} -> the first `count` merges."""
    words = {tuple(word): n for word, n in words.items()}
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        merges.append(max(pairs, key=lambda pair: (pairs[pair], tie(pair))))
        words = {join(word, merges[-1]): n for word, n in words.items()}
    return merges
