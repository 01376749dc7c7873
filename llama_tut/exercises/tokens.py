"""Checkers of chapter 12."""

import math

from llama_tut.exercises import exercise, expect, expect_close, wrong

MERGES = ["s t", "e st", "o w", "l ow", "w est", "n e"]
MERGES = [tuple(pair.split()) for pair in MERGES]


@exercise("tokens.encode")
def check_encode(answer):
    """Merges are replayed in the order in which they were learned."""
    found = list(answer("lowest", MERGES))
    expect(
        found != ["l", "o", "west"],
        "you take the longest token that fits; the merges have an order, and "
        "o w comes before w est",
    )
    expect(
        found != ["lo", "west"] and "".join(found) == "lowest",
        f"your tokens {found} do not spell the word",
    )
    expect(found == ["low", "est"], f"lowest becomes low est, not {found}")
    expect(
        list(answer("stst", MERGES)) == ["st", "st"],
        "a pair may occur twice in a word: join it at every place",
    )
    expect(
        list(answer("aaa", [("a", "a")])) == ["aa", "a"],
        "aaa with the merge a a is aa a: a token that was joined is no longer "
        "an a",
    )
    expect(
        list(answer("x", MERGES)) == ["x"], "a letter without a merge stays"
    )


@wrong("tokens.encode", "the longest token")
def longest_first(word, merges):
    tokens = list(word)
    for left, right in sorted(merges, key=lambda p: -len("".join(p))):
        tokens = spread(left + right, "".join(tokens), tokens)
    return tokens


def spread(whole, word, tokens):
    """Put `whole` together wherever the word spells it, if it is free."""
    at, out = 0, []
    while at < len(tokens):
        size = len(whole)
        piece = tokens[at : at + size]
        if "".join(piece) == whole and all(len(t) == 1 for t in piece):
            out.append(whole)
            at += size
        else:
            out.append(tokens[at])
            at += 1
    return out


@wrong("tokens.encode", "at every place")
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


@exercise("tokens.bits")
def check_bits(answer):
    """Bits a byte need no tokenizer."""
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
    expect_close(found, 1.0, "100 bits for 100 bytes are one bit a byte")


@wrong("tokens.bits", "these are nats")
def nats_a_byte(total, text):
    return total / len(text.encode())


@wrong("tokens.bits", "count letters")
def letters(total, text):
    return total / math.log(2) / len(text)


@wrong("tokens.bits", "do not multiply")
def multiplied(total, text):
    return total * math.log(2) / len(text.encode())


@exercise("tokens.size")
def check_size(answer):
    """Shards are rounded up, headers count, and V decides the width."""
    shards, size = answer(250, 2048, 100)
    expect(shards != 2, "the last, shorter shard counts too")
    expect(shards == 3, f"{shards} shards for 250 tokens in hundreds: it is 3")
    expect(size != 500, "each shard has a header of 128 bytes")
    expect(size != 628, "every shard has a header, not only the first")
    expect(size == 884, f"{size} bytes for 250 tokens in 3 shards: it is 884")
    expect(
        tuple(answer(100, 128_256, 100)) == (1, 528),
        "ids of 128,256 tokens need four bytes",
    )
    expect(
        tuple(answer(100, 65_536, 100)) == (1, 328),
        "the largest id of 65,536 tokens is 65,535, which fits in two bytes",
    )


@wrong("tokens.size", "shorter shard")
def rounded_down(count, vocab_size, shard_tokens):
    shards = count // shard_tokens
    return shards, 128 * shards + 2 * count


@wrong("tokens.size", "header of 128")
def no_header(count, vocab_size, shard_tokens):
    return -(-count // shard_tokens), 2 * count


@wrong("tokens.size", "four bytes")
def always_two(count, vocab_size, shard_tokens):
    shards = -(-count // shard_tokens)
    return shards, 128 * shards + 2 * count


@wrong("tokens.size", "fits in two bytes")
def off_by_one(count, vocab_size, shard_tokens):
    shards = -(-count // shard_tokens)
    width = 2 if vocab_size < 1 << 16 else 4
    return shards, 128 * shards + width * count
