"""Tokenizers: train one, save it, read anyone's, and GPT-2's from its ranks."""

import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_tut.tools.files import (
    InputError,
    first_line,
    read_json,
    require,
    write_atomic,
    write_json,
)

END_OF_TEXT = "<|endoftext|>"
BYTE_VOCABULARY = 257  # 256 bytes and the end of text


def byte_characters():
    """{byte: the character that stands for it in a tokenizer's files}.

    Source: OpenAI's GPT-2, `encoder.py`, `bytes_to_unicode`.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    table = {b: chr(b) for b in printable}
    table.update((b, chr(256 + n)) for n, b in enumerate(others))
    return table


def byte_level(model):
    """A tokenizer with GPT-2's pre-tokens, over bytes, around a model."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# Training


LONGEST_WORD = 1000  # letters without a space


def cut_long_words(text, limit=LONGEST_WORD):
    """A text in parts, so that no run without a space is above `limit`.

    The time to train grows with the square of a word's length: a genome on
    one line would take days. No merge is lost, for none is that long.
    """
    parts, at = [], 0
    for run in re.finditer(rf"\S{{{limit}}}|\s{{{limit}}}", text):
        parts.append(text[at : run.end()])
        at = run.end()
    return [*parts, text[at:]]


def train_bpe(texts, vocab_size):
    """An iterable of texts -> a byte-level BPE of at most `vocab_size`.

    Id 0 is the end of text, then come the 256 bytes, then the merges.
    """
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cuts = 0

    def parts():
        nonlocal cuts
        for text in texts:
            found = cut_long_words(text)
            cuts += len(found) - 1
            yield from found

    tokenizer.train_from_iterator(parts(), trainer)
    if cuts:
        print(
            f"cut {cuts:,} times for the tokenizer's training: runs of more "
            f"than {LONGEST_WORD:,} letters without a space",
            file=sys.stderr,
        )
    return tokenizer


# GPT-2's vocabulary


def last_merge(token, ranks):
    """The two byte strings that the vocabulary merges into `token`.

    Encode the token, but stop when two pieces are left: those two are the
    merge that made it. (minbpe has the same trick.)
    """
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        best = min(range(len(joined)), key=lambda i: ranks.get(joined[i], 1e9))
        pieces[best : best + 2] = [joined[best]]
    return tuple(pieces)


def tokenizer_from_ranks(ranks):
    """{byte string: rank} -> a `tokenizers` object with the same ids.

    tiktoken's vocabularies hold ranks and no merges; Hugging Face's files
    want merges, which `last_merge` recovers.
    """
    letters = byte_characters()

    def spell(token):
        return "".join(letters[b] for b in token)

    longer = (t for t in sorted(ranks, key=ranks.get) if len(t) > 1)
    merges = [tuple(map(spell, last_merge(t, ranks))) for t in longer]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = byte_level(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def load_tiktoken():
    """tiktoken's GPT-2 encoding, from its cache or from the network.

    Raises:
        InputError: it is in neither.
    """
    import tiktoken  # a machine that only trains need not have it

    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # every error of `requests` is one
        raise InputError(
            "GPT-2's vocabulary is neither in tiktoken's cache nor can it be "
            "fetched: connect to the network, or set TIKTOKEN_CACHE_DIR"
        ) from error


# Folders as `AutoTokenizer` reads them


def save_tokenizer(tokenizer, folder):
    """Write a `tokenizers` object as a Hugging Face folder.

    The end of text serves as the token at the beginning and at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        # Old versions of the library "cleaned up" spaces before commas.
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(True).encode())


def read_tokenizer(folder):
    """The `tokenizers` object of a folder, set to encode plain text.

    Raises:
        InputError: no tokenizer.json, or one that cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    require(
        os.path.lexists(path),
        f"{folder} holds no tokenizer.json (and is neither bpe nor gpt2)",
    )
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{path} cannot be read as a tokenizer: {first_line(error)}"
        ) from error
    return for_documents(tokenizer)


def for_documents(tokenizer):
    """Set a `tokenizers` object to encode documents as they are.

    Nothing is cut or padded, and a document that spells a special token gets
    its letters, not the token.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def separator_id(folder, tokenizer):
    """The id of the token that belongs in front of a document.

    `<|endoftext|>` where the vocabulary has it (GPT-2, SmolLM2, our own), or
    Llama 3's `<|begin_of_text|>`, or else the folder's bos or eos token.

    Raises:
        InputError: the vocabulary has none of them.
    """
    names = [END_OF_TEXT, "<|begin_of_text|>"]
    path = Path(folder) / "tokenizer_config.json"
    if os.path.lexists(path):
        settings = read_json(path)
        for token in (settings.get("bos_token"), settings.get("eos_token")):
            # Some folders hold {"content": "<s>", ...} in place of "<s>".
            names.append(
                token.get("content") if isinstance(token, dict) else token
            )
    for name in names:
        if isinstance(name, str) and tokenizer.token_to_id(name) is not None:
            return tokenizer.token_to_id(name)
    raise InputError(f"{folder}: this tokenizer has no end-of-text token")


def fast_twin(tokenizer):
    """The same tokenizer in the package fastokens, some ten times as fast.

    Returns:
        None where the package is not installed, does not know this kind of
        tokenizer, or gives other ids for a text that is hard to cut.
    """
    try:
        import fastokens

        twin = fastokens.Tokenizer.from_json_str(tokenizer.to_str())
    except Exception:  # whatever its parser raises: the other one is right
        return None
    hard = f" I'll  see\n\n\tNaïve 42²日本 ــ {END_OF_TEXT}_\u200d👩‍👧 \r\n  "
    wanted = tokenizer.encode(hard, add_special_tokens=False).ids
    return twin if encode_flat(twin, [hard])[0].tolist() == wanted else None


def encode_flat(twin, texts):
    """Texts -> a list of arrays, uint32, from one buffer of fastokens."""
    # A special token that a document spells stays text.
    ids, ends = twin.encode_batch_flat(texts, split_special_tokens=True)
    ids, ends = np.frombuffer(ids, np.uint32), np.frombuffer(ends, np.uint64)
    return [ids[first:last] for first, last in itertools.pairwise(ends)]


class Encoder:
    """Texts -> ids, many texts at a time, on RAYON_NUM_THREADS threads.

    Args:
        tokenizer: a `tokenizers` object, as `read_tokenizer` gives it.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.twin = tokenizer, fast_twin(tokenizer)

    def __call__(self, texts):
        """A list of texts -> a list of arrays, uint32."""
        if self.twin is not None:
            return encode_flat(self.twin, texts)
        encode = self.tokenizer.encode_batch_fast
        found = encode(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in found]

    def cut(self, text, count):
        """The beginning of a text, some `count` tokens long."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return text[: found.offsets[count - 1][1]] if count else ""


def encode_text(folder, text):
    """The ids of plain text, without what a tokenizer adds around it.

    Raises:
        InputError: the text is not UTF-8, or there is no such tokenizer.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"this text is not UTF-8: {text!a}") from error
    return read_tokenizer(folder).encode(text, add_special_tokens=False).ids


def encode_prompt(folder, text, end_of_text, most):
    """Ids that samples begin with: one end of text, then the prompt.

    Raises: InputError when they are not fewer than `most` tokens.
    """
    ids = [end_of_text, *encode_text(folder, text)]
    require(
        len(ids) < most,
        f"--prompt has {len(ids)} tokens, and the model reads {most}: "
        "take a shorter one, or --samples 0",
    )
    return ids


def transformers_tokenizer(folder):
    """The tokenizer of a folder as an object of transformers.

    Raises:
        InputError: transformers cannot open it, or only by running its code.
    """
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"transformers cannot open the tokenizer in {folder}: "
            f"{first_line(error)}"
        ) from error
