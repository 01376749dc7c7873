# From notebooks/27_multimodal.ipynb by scripts/export.py: edit the notebook.
"""Pictures: from patches to places in a text.

Letters: B batch, T time, D hidden_size, V vocabulary; H, W height and width
of a picture in pixels, P side of a patch, N patches, E width of the encoder,
R side of a group of patches that share a place in the text.
"""

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from llama_tut.block import LlamaDecoderLayer
from llama_tut.config import LlamaConfig
from llama_tut.generate import generate
from llama_tut.loader import ShardLoader, rows_at
from llama_tut.model import LlamaForCausalLM
from llama_tut.rmsnorm import LlamaRMSNorm
from llama_tut.rope import LlamaRotaryEmbedding
from llama_tut.tools.dataset import check_rows
from llama_tut.tools.devices import without_memory
from llama_tut.tools.files import require
from llama_tut.tools.options import extra_options
from llama_tut.tools.picture_config import (
    PictureConfig,
    PictureOptions,
    picture_flops,
    read_picture_config,
    write_processor,
)
from llama_tut.tools.pictures import check_same_tokenizer, read_pictures
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.tools.safetensors_folder import tensor_table
from llama_tut.tools.tokenizers import read_tokenizer
from llama_tut.weights import (
    load_pretrained,
    load_state,
    read_config,
    save_pretrained,
)

# From pixels to places


def patchify(pictures, P):
    """Pictures [B, H, W] -> their patches in reading order, [B, N, P * P]."""
    B, H, W = pictures.shape
    grid = pictures.reshape(B, H // P, P, W // P, P)  # [B, H/P, P, W/P, P]
    return grid.transpose(2, 3).reshape(B, -1, P * P)  # [B, N, P * P]


def pixel_shuffle(x, columns, R):
    """Join groups of R x R neighbours: [B, N, E] -> [B, N / R^2, R^2 * E].

    Args:
        columns: patches in a row of the picture, W / P.
    """
    B, N, E = x.shape
    grid = x.reshape(B, N // columns // R, R, columns // R, R * E)
    return grid.transpose(2, 3).reshape(B, -1, R * R * E)


# The encoder


class PictureEncoder(nn.Module):
    """Pictures to vectors for the text model's stream; `PictureConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config, c, E = config, config.encoder, config.encoder.hidden_size
        self.patches = nn.Linear(config.patch_size**2, E)
        self.positions = nn.Embedding(config.patches, E)
        L = range(c.num_hidden_layers)
        self.layers = nn.ModuleList(LlamaDecoderLayer(c) for _ in L)
        self.norm = LlamaRMSNorm(E, c.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(c)
        joined, D = config.shuffle**2 * E, config.text.hidden_size
        self.projector = nn.Linear(joined, D, bias=False)
        std = c.initializer_range
        nn.init.normal_(self.positions.weight, std=0.02)
        for part in (*self.layers, self.norm):
            part.init_weights(std, std / (2 * len(L)) ** 0.5)

    def forward(self, pictures):
        """[B, H, W], 0 is paper and 1 ink -> [B, N / R^2, D]."""
        c, N = self.config, self.config.patches
        x = self.patches(patchify(pictures, c.patch_size))  # [B, N, E]
        x = x + self.positions.weight  # [B, N, E]
        everything = x.new_ones(N, N, dtype=torch.bool)  # [N, N]
        tables = self.rotary_emb(x.new_zeros(N))  # cos 1 and sin 0
        for layer in self.layers:
            x = layer(x, *tables, everything)  # [B, N, E]
        x = pixel_shuffle(self.norm(x), c.width // c.patch_size, c.shuffle)
        return self.projector(x)  # [B, N / R^2, D]


# Into the text


class PictureLlama(nn.Module):
    """A finished text model, and an encoder beside it; `PictureConfig`."""

    def __init__(self, text, config):
        super().__init__()
        self.config, self.text = config, text
        self.encoder = PictureEncoder(config)

    def embed(self, input_ids, features):
        """Ids [B, T] -> [B, T, D], with features [B, N / R^2, D] in place.

        Raises: InputError when a row has more or fewer places than that.
        """
        here = input_ids == self.config.placeholder  # [B, T]
        found, wanted = here.sum(1), features.shape[1]  # [B]
        wrong = found[found != wanted].tolist()
        require(
            not wrong,
            f"a row has {(wrong or [0])[0]} placeholders and its picture "
            f"{wanted} vectors: nothing may cut a row with a picture in it",
        )
        words = self.text.model.embed_tokens(input_ids.masked_fill(here, 0))
        features = features.to(words.dtype)
        return words.masked_scatter(here[..., None], features)  # [B, T, D]

    def forward(self, input_ids, pictures=None, *, targets=None, **inputs):
        """As the text model; pictures [B, H, W] go to the placeholders."""
        if pictures is None:
            return self.text(input_ids, targets=targets, **inputs)
        x = self.embed(input_ids, self.encoder(pictures))  # [B, T, D]
        return self.text(inputs_embeds=x, targets=targets, **inputs)

    model = property(lambda self: self.text.model)
    head = property(lambda self: self.text.head)
    output_weight = property(lambda self: self.text.output_weight)

    def flops_per_token(self, sequence_length, training=True):
        """FLOPs of a row with its picture, for each of its T tokens."""
        eye = picture_flops(self.config) * (3 if training else 1)
        T = sequence_length
        return self.text.flops_per_token(T, training) + eye / T


# Rows with a picture in them


def picture_row(answer, config, end):
    """Ids and targets, two lists, of a picture and its answer's ids."""
    before = [end] + [config.placeholder] * config.places
    return before + answer, [-100] * config.places + [*answer, end]


@dataclass(eq=False)
class PictureLoader(ShardLoader):
    """A `ShardLoader` whose rows are pictures, and the text in each.

    Raises: InputError when T would cut a row, or no pictures are there.
    """

    config: PictureConfig | None = None  #: how many places, and their id
    end: int = 0  #: the id before and after a text

    def __post_init__(self):
        found = read_pictures(self.folder, self.split)
        self.pictures, self.texts, self.groups = found
        tokenizer = read_tokenizer(Path(self.folder) / "tokenizer")
        ids = {
            text: tokenizer.encode(text, add_special_tokens=False).ids
            for text in set(self.texts)
        }
        self.answers = [ids[text] for text in self.texts]
        longest = 1 + self.config.places + max(map(len, self.answers))
        require(
            longest <= self.sequence_length,
            f"--sequence-length {self.sequence_length} would cut rows of "
            f"{longest} tokens with pictures in them: take at least {longest}",
        )
        least = self.world_size * self.batch_size
        check_rows(self.folder, self.split, len(self), least)
        self.lock = threading.Lock()

    def __len__(self):
        """M: pictures of an epoch, of all ranks together."""
        return len(self.texts)

    def batch_at(self, position):
        """This rank's ids [B, T], pictures [B, H, W], targets [B, T]."""
        B, T = self.batch_size, self.sequence_length
        seed = self.seed if self.shuffle else None
        rows = rows_at(position + self.rank * B, B, len(self), seed)
        ids, targets = [], []
        for row in rows:
            own, wanted = picture_row(self.answers[row], self.config, self.end)
            ids.append(own + [self.end] * (T - len(own)))
            targets.append(wanted + [-100] * (T - len(own)))
        return torch.tensor(ids), self.pictures[rows], torch.tensor(targets)


# Training, with the trainer that we have


def picture_config(config):
    """The `PictureConfig` of a run: its text model, options and data."""
    options = extra_options(config, PictureOptions)
    text = read_config(find_pretrained(options.text_model))
    encoder = LlamaConfig(
        vocab_size=1,
        hidden_size=options.encoder_size,
        intermediate_size=4 * options.encoder_size,
        num_hidden_layers=options.encoder_layers,
        num_attention_heads=options.encoder_heads,
    )
    size = read_pictures(config.data, "val")[0].shape[1:]
    return PictureConfig(
        text, encoder, *size, options.patch_size, options.pixel_shuffle
    )


def build_pictures(config, info):
    """The text model of a run, with a random encoder beside it."""
    options = extra_options(config, PictureOptions)
    folder = find_pretrained(options.text_model)
    check_same_tokenizer(config.data, folder)
    text = load_pretrained(folder, torch.float32)  # as all that is trained
    text.requires_grad_(not options.freeze_text)
    return PictureLlama(text, picture_config(config))


def build_picture_loader(config, info, ranks, split):
    """The pictures of one rank: "train", or "val", which is not shuffled."""
    training = split == "train"
    loader = PictureLoader(
        config.data,
        split,
        config.micro_batch_size if training else 1,
        config.sequence_length,
        ranks.rank if training else 0,
        ranks.world_size if training else 1,
        config.seed,
        shuffle=training,
        config=picture_config(config),
        end=info.end_of_text,
    )
    if not training:
        loader.batch_size = min(config.micro_batch_size, len(loader))
    return loader


# The folder


def save_pictures(model, folder, tokenizer=None):
    """Write a `PictureLlama`: weights, config, and how pictures are read."""
    save_pretrained(model, folder, tokenizer)
    write_processor(model.config, folder)


def load_pictures(folder, dtype=None):
    """The `PictureLlama` of a folder that `save_pictures` wrote.

    With `dtype` it is cast; None keeps the dtype in which it is stored.
    """
    config = read_picture_config(folder)
    with without_memory():
        model = PictureLlama(LlamaForCausalLM(config.text), config)
    return load_state(model, tensor_table(folder), dtype)


# The model reads


class Looking:
    """A model that has pictures [B, H, W] before it, for `generate`."""

    def __init__(self, model, pictures):
        text, V = model.text, model.config.placeholder
        self.seeing, self.features = model, model.encoder(pictures)
        self.head, self.output_weight = text.head, text.output_weight
        self.config = replace(text.config, vocab_size=V + 1)

    def model(self, input_ids, *others):
        """As `LlamaModel`: ids [B, T] -> the stream [B, T, D]."""
        here = input_ids == self.seeing.config.placeholder  # [B, T]
        if not here.any():
            return self.seeing.text.model(input_ids, *others)
        x = self.seeing.embed(input_ids, self.features)  # [B, T, D]
        return self.seeing.text.model(None, *others, inputs_embeds=x)


@torch.no_grad()
def read(model, pictures, end, max_new_tokens=16):
    """Pictures [B, H, W] -> the likeliest text in each, as lists of ids."""
    prompt, _ = picture_row([], model.config, end)
    ids = torch.tensor([prompt] * len(pictures), device=pictures.device)
    looking = Looking(model.eval(), pictures)
    options = {"max_new_tokens": max_new_tokens, "stop_tokens": [end]}
    ids = generate(looking, ids, **options)[:, len(prompt) :]
    rows = ids.tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
