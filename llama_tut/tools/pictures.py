"""Pictures and what they say: a folder that training reads, and one file."""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from llama_tut.tools.baselines import ngram_nats
from llama_tut.tools.data_folder import make_once
from llama_tut.tools.dataset import DatasetInfo
from llama_tut.tools.digits import DIGITS_WHEEL, digit_pairs
from llama_tut.tools.files import (
    InputError,
    digest,
    first_line,
    require,
    write_json,
)
from llama_tut.tools.printed_words import word_pictures
from llama_tut.tools.tokenizers import (
    Encoder,
    read_tokenizer,
    separator_id,
)

# The tokens of the answers


def check_same_tokenizer(data, folder):
    """Refuse a text model that has other tokens than the pictures' texts.

    Args:
        data: a folder of `prepare_pictures`.
        folder: the text model's.
    """
    ours = read_tokenizer(Path(data) / "tokenizer").get_vocab()
    require(
        read_tokenizer(folder).get_vocab() == ours,
        f"{folder} has another tokenizer than {data}: prepare the pictures "
        f"with --tokenizer {folder}",
    )


# A folder of pictures that training reads

CORPORA = {"digits": 24_000, "words": 48_000}  # training pictures
VAL_WORDS = 2_000


def make_pictures(corpus, split, count):
    """(pictures float32 [M, H, W], texts, groups) of a split."""
    if corpus == "words":
        return word_pictures(split, count if split == "train" else VAL_WORDS)
    pictures, texts = digit_pairs(split, count)
    return pictures, texts, [0] * len(texts)


def prepare_pictures(corpus, tokenizer, out, count=None):
    """Write a data folder: train.npz, val.npz, tokenizer/, dataset.json.

    Args:
        corpus: "digits" or "words".
        tokenizer: the text model's folder.
        out: the folder; missing or empty, or made by the same call.
        count: training pictures; None: as CORPORA says.

    Returns: its `DatasetInfo`. The baselines in it are those of the answers'
        tokens: what can be known of an answer without its picture.

    Raises: InputError.
    """
    out, source = Path(out), Path(tokenizer)
    count = count or CORPORA[corpus]
    core = read_tokenizer(source)
    name = digest((source / "tokenizer.json").read_bytes())
    key = digest(json.dumps([corpus, count, name, DIGITS_WHEEL]).encode())
    make = partial(write_folder, out, source, core, corpus, count, key)
    return make_once(out, key, make)


def write_folder(out, source, core, corpus, count, key):
    """Write pictures, tokenizer and examples, and last dataset.json."""
    streams, known, sums, encode = {}, {}, [], Encoder(core)
    end = separator_id(source, core)
    for split in ("train", "val"):
        pictures, texts, groups = make_pictures(corpus, split, count)
        pixels = (pictures * 255).round().to(torch.uint8).numpy()
        np.savez(
            out / f"{split}.npz",
            pictures=pixels,
            texts=np.array(texts),
            groups=np.array(groups),
        )
        streams[split] = np.array(
            [i for row in encode(texts) for i in (end, *row)]
        )
        sums += [pixels.tobytes(), "\n".join(texts).encode()]
        known |= {
            f"{split}_shards": 0,
            f"{split}_documents": len(texts),
            f"{split}_tokens": len(streams[split]),
            f"{split}_bytes": sum(len(t.encode()) for t in texts),
        }
    (out / "tokenizer").mkdir(exist_ok=True)
    for file in source.glob("tokenizer*.json"):
        shutil.copyfile(file, out / "tokenizer" / file.name)
    save_examples(pictures, texts, out / "examples")
    V = 1 + max(core.get_vocab().values())
    info = DatasetInfo(
        corpus=corpus,
        tokenizer=source.name,
        tokenizer_hash=digest((source / "tokenizer.json").read_bytes()),
        vocab_size=V,
        end_of_text=end,
        unigram_nats=ngram_nats(streams["train"], streams["val"], V, 1),
        bigram_nats=ngram_nats(streams["train"], streams["val"], V, 2),
        bytes_per_token=known["val_bytes"] / known["val_tokens"],
        hash=digest(*sums),
        settings=key,
        **known,
    )
    write_json(out / "dataset.json", asdict(info))


def save_examples(pictures, texts, folder, count=8):
    """Write some held-out pictures as files, dark ink on white paper."""
    folder.mkdir(exist_ok=True)
    for i in range(0, len(texts), max(1, len(texts) // count)):
        name = texts[i].strip().replace(" ", "_")
        write_picture(folder / f"{i:04d}_{name}.png", pictures[i])


def write_picture(path, picture):
    """Save a picture, [H, W] from 0 to 1, as a file with dark ink."""
    from PIL import Image

    pixels = 255 - (picture * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(path)


def read_pictures(folder, split):
    """Pictures float32 [M, H, W] from 0 to 1, texts and groups of a split.

    Raises:
        InputError: the folder holds no pictures, or damaged ones.
    """
    path = Path(folder) / f"{split}.npz"
    require(
        path.is_file(),
        f"{folder} holds no pictures: make them with scripts/prepare.py "
        "--corpus digits",
    )
    try:
        with np.load(path) as found:
            pictures = torch.from_numpy(found["pictures"]).float() / 255
            return pictures, found["texts"].tolist(), found["groups"]
    except Exception as error:  # zipfile and numpy raise many kinds
        raise InputError(
            f"{path} is damaged: {first_line(error)}; prepare it again"
        ) from error


# One file


def read_picture(path, height, width):
    """A picture file as ink: float32 [height, width], 0 is white paper.

    Raises:
        InputError: no such file, no picture, or one of another size.
    """
    from PIL import Image, UnidentifiedImageError

    require(Path(path).is_file(), f"there is no file {path}")
    try:
        with Image.open(path) as image:
            size = image.size
            image = image.convert("RGBA")
            paper = Image.new("RGBA", size, "white")
            grey = Image.alpha_composite(paper, image).convert("L")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise InputError(
            f"{path} is no picture that can be read: {first_line(error)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {first_line(error)}") from error
    require(
        size == (width, height),
        f"{path} is {size[0]} x {size[1]} pixels, the model reads "
        f"{width} x {height} (wide x high): resize it",
    )
    return 1 - torch.from_numpy(np.array(grey)).float() / 255
