# From notebooks/12_tokens.ipynb by scripts/export.py: edit the notebook.
"""Tokens: byte pair encoding that trains, encodes and decodes.

Letters: V vocab_size.
"""

import itertools
import math
from collections import Counter

import regex

# Merges, by hand


def join(tokens, pair, new):
    """A list of tokens with each `pair` of neighbours replaced by `new`."""
    out = []
    for token in tokens:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out


# Pre-tokens: where merges may not go

GPT2_PATTERN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Train

END_OF_TEXT = b"<|endoftext|>"
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = printable + [b for b in range(256) if b not in printable]
BYTE_IDS = {byte: 1 + n for n, byte in enumerate(BYTES)}
FIRST_MERGE = 257  # 0 is the end of text, then come 256 bytes


def count_words(texts, pattern=GPT2_PATTERN):
    """Texts -> how often each pre-token occurs, as a Counter."""
    words = Counter()
    for text in texts:
        words.update(pattern.findall(text))
    return words


def train(words, vocab_size):
    """Learn merges from {pre-token: occurrences}.

    Returns:
        A list of pairs of ids. The pair at index n becomes token 257 + n.
    """
    pieces = {
        tuple(BYTE_IDS[byte] for byte in word.encode()): count
        for word, count in words.items()
    }
    merges = []
    while FIRST_MERGE + len(merges) < vocab_size:
        counts = Counter()
        for tokens, count in pieces.items():
            for pair in itertools.pairwise(tokens):
                counts[pair] += count
        if not counts:
            break  # every word is a single token already
        best = max(counts, key=lambda p: (counts[p], -p[0], -p[1]))
        new = FIRST_MERGE + len(merges)
        pieces = {tuple(join(t, best, new)): n for t, n in pieces.items()}
        merges.append(best)
    return merges


# Encode and decode


class BPE:
    """A byte pair encoding: text to ids and back.

    Args:
        merges: pairs of ids, in the order in which they were learned.
        pattern: cuts a text into pre-tokens.
    """

    def __init__(self, merges, pattern=GPT2_PATTERN):
        self.pattern = pattern
        self.merges = {pair: FIRST_MERGE + n for n, pair in enumerate(merges)}
        self.tokens = [END_OF_TEXT, *(bytes([byte]) for byte in BYTES)]
        for left, right in merges:
            self.tokens.append(self.tokens[left] + self.tokens[right])

    def encode(self, text):
        """The ids of a text, as a list."""
        ids = []
        for word in self.pattern.findall(text):
            ids += self.encode_word(word)
        return ids

    def encode_word(self, word):
        """The ids of one pre-token: the earliest merge goes first."""
        ids = [BYTE_IDS[byte] for byte in word.encode()]
        while True:
            best = min(itertools.pairwise(ids), key=self.rank, default=None)
            if best not in self.merges:
                return ids
            ids = join(ids, best, self.merges[best])

    def rank(self, pair):
        """When a pair was learned; infinity if it never was."""
        return self.merges.get(pair, math.inf)

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 become U+FFFD (�)."""
        data = b"".join(self.tokens[token] for token in ids)
        return data.decode(errors="replace")
