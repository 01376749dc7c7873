"""Checkers of chapter 12."""

import math

from llama_tut.exercises import (
    exercise,
    expect,
    expect_close,
    wrong,
    wrong_variants,
)

MERGES = ["s t", "e st", "o w", "l ow", "w est", "n e"]
MERGES = [tuple(pair.split()) for pair in MERGES]
B_C_FIRST = [("b", "c"), ("a", "b")]


@exercise("tokens.encode")
def check_encode(answer):
    """Merges are replayed in the order in which they were learned."""
    found = list(answer("lowest", MERGES))
    expect(
        "".join(found) == "lowest",
        f"your tokens {found} do not spell the word lowest",
    )
    expect(
        found != ["l", "o", "west"],
        "you take the longest token that fits; the merges have an order, and "
        "o w comes before w est",
    )
    expect(
        list(answer("aaa", [("a", "a")])) != ["a", "aa"],
        "aaa with the merge a a is aa a: go through the word from the left",
    )
    expect(
        list(answer("aaa", [("a", "a")])) == ["aa", "a"],
        "aaa with the merge a a is aa a: a token that was joined is no longer "
        "an a",
    )
    expect(
        list(answer("abc", B_C_FIRST)) != ["ab", "c"],
        "with the merges b c and a b, in this order, abc is a bc: you look for "
        "a token from the left, but the merge that was learned first goes "
        "first, wherever it stands",
    )
    expect(
        list(answer("abc", [("b", "c"), ("ab", "c")])) == ["a", "bc"],
        "the merge ab c joins ab and c only: a and bc spell the same, and are "
        "another pair",
    )
    expect(
        list(answer("stst", MERGES)) == ["st", "st"],
        "a pair may occur twice in a word: join it at every place",
    )
    expect(found == ["low", "est"], f"lowest becomes low est, not {found}")
    expect(
        list(answer("x", MERGES)) == ["x"], "a letter without a merge stays"
    )


@wrong("tokens.encode", "the longest token")
def longest_first(word, merges):
    tokens = list(word)
    for left, right in sorted(merges, key=lambda p: -len("".join(p))):
        tokens = put_together(left + right, tokens)
    return tokens


def put_together(whole, tokens):
    """Join single letters to `whole` wherever they spell it."""
    at, out = 0, []
    while at < len(tokens):
        piece = tokens[at : at + len(whole)]
        if "".join(piece) == whole and all(len(t) == 1 for t in piece):
            out.append(whole)
            at += len(whole)
        else:
            out.append(tokens[at])
            at += 1
    return out


@wrong("tokens.encode", "look for a token from the left")
def longest_from_the_left(word, merges):
    known = {*word, *("".join(pair) for pair in merges)}
    tokens = []
    while word:
        size = max(n for n in range(1, len(word) + 1) if word[:n] in known)
        tokens.append(word[:size])
        word = word[size:]
    return tokens


@wrong("tokens.encode", "look for a token from the left")
def leftmost_pair_first(word, merges):
    tokens = list(word)
    at = 0
    while at < len(tokens) - 1:
        if (tokens[at], tokens[at + 1]) in merges:
            tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
            at = 0
        else:
            at += 1
    return tokens


@wrong("tokens.encode", "join it at every place")
def only_the_first(word, merges):
    tokens = list(word)
    for pair in merges:
        for i in range(len(tokens) - 1):
            if (tokens[i], tokens[i + 1]) == pair:
                tokens[i : i + 2] = ["".join(pair)]
                break
    return tokens


@wrong("tokens.encode", "do not spell the word")
def joins_and_keeps(word, merges):
    tokens = list(word)
    for pair in merges:
        for i in range(len(tokens) - 1):
            if (tokens[i], tokens[i + 1]) == pair:
                tokens[i] = "".join(pair)
    return tokens


@wrong("tokens.encode", "another pair")
def compares_the_spelling(word, merges):
    tokens = list(word)
    for left, right in merges:
        out = []
        for token in tokens:
            if out and out[-1] + token == left + right:
                out[-1] += token
            else:
                out.append(token)
        tokens = out
    return tokens


@wrong("tokens.encode", "from the left")
def from_the_right(word, merges):
    tokens = list(word)
    for pair in merges:
        for i in range(len(tokens) - 1, 0, -1):
            if (*tokens[i - 1 : i + 1],) == pair:
                tokens[i - 1 : i + 1] = ["".join(pair)]
    return tokens


WORDS = {"low": 5, "lower": 2, "widest": 3, "newest": 6}


@exercise("tokens.learn")
def check_learn(answer):
    """The most frequent pair of neighbours, and the words without it."""
    words = {tuple(word): count for word, count in WORDS.items()}
    pair, joined = answer(dict(words))
    expect(
        tuple(pair) != ("s", "t"),
        "e s and s t occur nine times each; e s is the smaller pair",
    )
    once = {tuple("ab"): 9, tuple("cd"): 1, tuple("cde"): 1, tuple("cdf"): 1}
    expect(
        tuple(answer(once)[0]) == ("a", "b"),
        "a pair counts as often as its word occurs: a word that occurs nine "
        "times counts nine",
    )
    expect(
        tuple(answer({tuple("baba"): 1, tuple("cb"): 1})[0]) == ("b", "a"),
        "b a occurs twice in baba: count every place, also within a word",
    )
    expect(
        tuple(answer({tuple("acb"): 5, tuple("ab"): 1})[0]) == ("a", "c"),
        "only neighbours count: in acb the a and the b are not",
    )
    expect(
        tuple(answer({("ab", "c"): 2, ("a", "bc"): 1})[0]) == ("ab", "c"),
        "ab c and a bc are two pairs: keep the tokens apart when you count",
    )
    expect(
        tuple(pair) == ("e", "s"), f"the most frequent pair is e s, not {pair}"
    )
    expect(
        sum(joined.values()) == 16,
        "the new words keep the numbers of times that the old ones occurred",
    )
    right = {tuple(w.replace("es", "*")): n for w, n in WORDS.items()}
    right = {
        tuple("es" if t == "*" else t for t in word): n
        for word, n in right.items()
    }
    expect(joined == right, "the new words must hold es where e s stood")
    expect(
        answer({tuple("aaa"): 1})[1] == {("aa", "a"): 1},
        "aaa becomes aa a: a token that was joined is no longer an a",
    )


def learn(words, weigh=True, choose=min, key=tuple, once=False):
    """A solution with switches for mistakes."""
    counts = {}
    for tokens, number in words.items():
        pairs = list(zip(tokens, tokens[1:], strict=False))
        for pair in set(pairs) if once else pairs:
            counts[pair] = counts.get(pair, 0) + (number if weigh else 1)
    most = max(counts.values())
    pair = choose(pair for pair in counts if counts[pair] == most)
    joined = {}
    for tokens, number in words.items():
        out = []
        for token in tokens:
            if out and (out[-1], token) == pair:
                out[-1] += token
            else:
                out.append(token)
        joined[tuple(out)] = number
    return pair, joined


wrong_variants(
    "tokens.learn",
    learn,
    {
        "each_word_once": (dict(weigh=False), "counts nine"),
        "the_greater_pair": (dict(choose=max), "the smaller pair"),
        "once_a_word": (dict(once=True), "count every place"),
    },
)


@wrong("tokens.learn", "hold es where")
def joins_only_the_pair(words):
    pair, _ = learn(words)
    return pair, words


@wrong("tokens.learn", "keep the numbers")
def forgets_the_counts(words):
    pair, joined = learn(words)
    return pair, dict.fromkeys(joined, 1)


@exercise("tokens.bits")
def check_bits(answer):
    """Bits per byte need no tokenizer."""
    text = "é" * 50
    found = answer(100 * math.log(2), text)
    expect(
        not math.isclose(found, math.log(2)),
        "these are nats: divide by ln 2 for bits",
    )
    expect(
        not math.isclose(found, math.log(2) ** 2),
        "divide by ln 2, do not multiply: a bit is less than a nat",
    )
    expect(
        not math.isclose(found, 2.0),
        "you count letters; é is one letter and two bytes",
    )
    expect(
        not math.isclose(found, 1 / math.log(2) / math.log(2), rel_tol=0.5)
        and found > 0,
        "divide by ln 2 once",
    )
    expect_close(found, 1.0, "100 bits for 100 bytes are one bit per byte")
    expect_close(
        answer(50 * math.log(2), text),
        0.5,
        "50 bits for 100 bytes are half a bit per byte: do not round",
    )


for hint, mistake in {
    "these are nats": lambda nats, text: nats / len(text.encode()),
    "count letters": lambda nats, text: nats / math.log(2) / len(text),
    "do not multiply": lambda nats, text: (
        nats * math.log(2) / len(text.encode())
    ),
    "divide by ln 2 once": lambda nats, text: (
        nats / math.log(2) ** 2 / len(text.encode())
    ),
    "do not round": lambda nats, text: (
        round(nats / math.log(2)) // len(text.encode())
    ),
}.items():
    wrong("tokens.bits", hint)(mistake)


@exercise("tokens.size")
def check_size(answer):
    """Shards are rounded up, headers count, and V decides the width."""
    shards, size = answer(250, 2048, 100)
    expect(shards != 2, "the last, shorter shard counts too")
    expect(shards == 3, f"{shards} shards for 250 tokens in hundreds: it is 3")
    expect(size != 500, "each shard has a header of 128 bytes")
    expect(size != 628, "every shard has a header, not only the first")
    expect(
        size != 984,
        "the last shard is shorter: it holds 50 tokens and no padding",
    )
    expect(size == 884, f"{size} bytes for 250 tokens in 3 shards: it is 884")
    expect(
        tuple(answer(200, 2048, 100)) == (2, 656),
        "200 tokens fill two shards of 100 exactly: there is no third",
    )
    expect(
        tuple(answer(100, 128_256, 100)) == (1, 528),
        "ids of 128,256 tokens need four bytes",
    )
    expect(
        tuple(answer(100, 65_536, 100)) == (1, 328),
        "the largest id of 65,536 tokens is 65,535, which fits in two bytes",
    )


def file_size(count, shards, width=2):
    return shards, 128 * shards + width * count


for hint, mistake in {
    "shorter shard": lambda n, V, each: file_size(n, n // each),
    "there is no third": lambda n, V, each: file_size(n, n // each + 1),
    "no padding": lambda n, V, each: file_size(
        -(-n // each) * each, -(-n // each)
    ),
    "header of 128": lambda n, V, each: (-(-n // each), 2 * n),
    "four bytes": lambda n, V, each: file_size(n, -(-n // each)),
    "fits in two bytes": lambda n, V, each: file_size(
        n, -(-n // each), 2 if V < 1 << 16 else 4
    ),
}.items():
    wrong("tokens.size", hint)(mistake)
