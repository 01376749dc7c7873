"""Tokenizers: train one, save it, read anyone's, and GPT-2's from its ranks."""

import itertools
import json
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_tut.tools.files import (
    InputError,
    first_line,
    write_atomic,
    write_json,
)


def byte_characters():
    """{byte: the character that stands for it in a tokenizer's files}.

    Source: OpenAI's GPT-2, `encoder.py`, `bytes_to_unicode`.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    table = {b: chr(b) for b in printable}
    table.update((b, chr(256 + n)) for n, b in enumerate(others))
    return table


END_OF_TEXT = "<|endoftext|>"
BYTE_VOCABULARY = 257  # 256 bytes and the end of text


def byte_level(model):
    """A tokenizer with GPT-2's pre-tokens, over bytes, around a model."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


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
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """Write a `tokenizers` object as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(True).encode())


def last_merge(token, ranks):
    """The two byte strings that the vocabulary merges into `token`."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        best = min(range(len(joined)), key=lambda i: ranks.get(joined[i], 1e9))
        pieces[best : best + 2] = [joined[best]]
    return tuple(pieces)


def tokenizer_from_ranks(ranks):
    """{byte string: rank} -> a `tokenizers` object with the same ids."""
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
    """tiktoken's GPT-2 encoding, from its cache or from the network."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:  # every error of `requests` is one
        raise InputError(
            "GPT-2's vocabulary is neither in tiktoken's cache nor can it be "
            "fetched: connect to the network, or set TIKTOKEN_CACHE_DIR"
        ) from error


def read_tokenizer(folder):
    """The `tokenizers` object of a folder, set to encode plain text.

    Raises:
        InputError: no tokenizer.json, or one that cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: neither bpe nor gpt2, nor a folder with tokenizer.json"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def separator_id(folder, tokenizer):
    """The id of the token that belongs in front of a document.

    `<|endoftext|>` where the vocabulary has it (GPT-2, SmolLM2, our own), or
    Llama 3's `<|begin_of_text|>`, or else the folder's bos or eos token.
    """
    names = [END_OF_TEXT, "<|begin_of_text|>"]
    path = Path(folder) / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text())
        for token in (settings.get("bos_token"), settings.get("eos_token")):
            # Some folders hold {"content": "<s>", ...} in place of "<s>".
            names.append(
                token.get("content") if type(token) is dict else token
            )
    for name in filter(None, names):
        if tokenizer.token_to_id(name) is not None:
            return tokenizer.token_to_id(name)
    raise InputError(f"{folder}: this tokenizer has no end-of-text token")


class Encoder:
    """Texts -> ids, with the tokenizer of a Hugging Face folder.

    Args:
        folder: holds tokenizer.json.
        name: "gpt2" encodes with tiktoken, which gives the same ids.
    """

    def __init__(self, folder, name=None):
        self.tokenizer = read_tokenizer(folder)
        self.tiktoken = load_tiktoken() if name == "gpt2" else None

    def __call__(self, texts):
        """A list of texts -> a list of arrays, uint32."""
        if self.tiktoken:
            ids = [self.tiktoken.encode_ordinary(text) for text in texts]
        else:
            encode = self.tokenizer.encode_batch_fast
            ids = [e.ids for e in encode(texts, add_special_tokens=False)]
        return [np.array(one, np.uint32) for one in ids]


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
