"""Train a model: one process, or one rank under torchrun (scripts/train_ddp.sh).

    python scripts/train.py --data data/docs --out runs/first
    python scripts/train.py --out runs/first --resume
    python scripts/train.py --data data/digits --text-model runs/first/model ...

Every option is a field of TrainConfig, of the model's LlamaConfig, or of a
later chapter's dataclass in EXTRA.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import fields
from types import UnionType
from typing import get_args

import torch

from llama_tut.config import LlamaConfig, RopeScaling
from llama_tut.fast.scoring import score_packed
from llama_tut.fast.training import speed_up, start_from_counts
from llama_tut.moe import balance_experts, build_moe
from llama_tut.multimodal import (
    build_picture_loader,
    build_pictures,
    save_pictures,
)
from llama_tut.parallel import ParallelLayout
from llama_tut.pretraining import train
from llama_tut.tools.cli import Parser, run
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import InputError, require
from llama_tut.tools.moe_config import MoeOptions
from llama_tut.tools.options import (
    PRESETS,
    TrainConfig,
    choices,
    configure,
    extra_options,
    flag,
    llama_config,
)
from llama_tut.tools.parallel_config import ParallelOptions
from llama_tut.tools.picture_config import PictureOptions
from llama_tut.tools.shards import first_tokens
from llama_tut.tools.start_config import StartOptions, check_start

# Dataclasses of options that later chapters add; their values are in
# TrainConfig's `extra`, and `extra_options` makes an instance of them.
EXTRA = (ParallelOptions, MoeOptions, PictureOptions, StartOptions)


def rope_scaling(text):
    """RopeScaling's fields from JSON."""
    try:
        value = json.loads(text)
        RopeScaling(**value)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"not a RopeScaling: {error}"
        ) from error
    return value


def kind(field):
    """The argparse settings for the type of a dataclass field."""
    if choices(field):
        return {"choices": choices(field)}
    types = get_args(field.type) if isinstance(field.type, UnionType) else ()
    plain = (types or (field.type,))[0]
    if plain is bool:
        return {"action": argparse.BooleanOptionalAction}
    if plain is RopeScaling:
        return {"type": rope_scaling, "metavar": "JSON"}
    return {"type": plain, "metavar": plain.__name__.upper()}


def build_parser():
    """A parser with an option for each field; only given ones are kept."""
    parser = Parser(
        description=__doc__.split("\n")[0],
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.HelpFormatter,
    )
    groups = [("run", TrainConfig), ("model", LlamaConfig)]
    groups += [(config.__doc__.split("\n")[0], config) for config in EXTRA]
    for title, config in groups:
        group = parser.add_argument_group(title)
        for field in fields(config):
            if field.name in ("model", "extra"):  # what other groups fill
                continue
            text = field.metadata["help"].replace("%", "%%")
            if config is not LlamaConfig and field.default not in ("", None):
                text += f" (default: {field.default})"
            group.add_argument(
                flag(field.name),
                dest=field.name,
                help=text,
                **kind(field),
            )
    parser.epilog = "presets: " + ", ".join(PRESETS)
    return parser


def picture_parts(config):
    """What `train` needs to train on pictures (chapter 27), else nothing."""
    if not config.extra.get("text_model"):
        return {}
    require(
        config.extra.get("mlp", "dense") == "dense",
        "--mlp is not for --text-model: leave one of them out",
    )
    require(not config.hellaswag, "--hellaswag is not for --text-model")
    usual = PRESETS[config.preset]["model"]
    for name in config.model.keys() | usual.keys():
        require(
            config.model.get(name) == usual.get(name),
            f"{flag(name)}: the text model brings its shape, leave it out",
        )

    def speed_up_text(model, device, dtype):
        speed_up(model.text, device, dtype)

    return {
        "build_model": build_pictures,
        "build_loader": build_picture_loader,
        "save_model": save_pictures,
    } | ({} if config.plain else {"prepare_model": speed_up_text})


def expert_parts(config):
    """What `train` needs to train experts (chapter 26), else nothing."""
    if config.extra.get("mlp", "dense") == "dense":
        extra_options(config, MoeOptions)  # refuses --experts without --mlp
        return {}
    return {"build_model": build_moe, "after_step": balance_experts}


def start_parts(config, layout):
    """What `train` needs to start from counts (chapter 19), else nothing."""
    if (
        extra_options(config, StartOptions).first_weights == "random"
        or config.plain
    ):
        return {}
    require(
        layout == ParallelOptions()
        and config.extra.get("mlp", "dense") == "dense"
        and not config.extra.get("text_model"),
        "--first-weights counts is for a whole LLaMA of text: leave it out beside "
        "--parallel fsdp, --tensor-parallel, --recompute, --mlp and "
        "--text-model",
    )

    require(config.data, "--data is missing: name a folder")
    check_start(llama_config(config, load_dataset_info(config.data)))

    def counted(model, device, dtype):
        # The model may not be on the device yet.
        where = model.output_weight.device
        tokens = torch.from_numpy(first_tokens(config.data, "train"))
        start_from_counts(model, tokens.to(where), dtype)
        speed_up(model, device, dtype)

    return {"prepare_model": counted}


def main():
    try:
        config = configure(vars(build_parser().parse_args()), EXTRA)
        parts = {"build_layout": ParallelLayout}
        if not config.plain:
            parts |= {"prepare_model": speed_up, "score_batch": score_packed}
        layout = extra_options(config, ParallelOptions)
        if layout.parallel == "fsdp":
            parts.pop("score_batch", None)  # it calls pieces of the model
        require(
            not config.extra.get("text_model") or layout == ParallelOptions(),
            "a model of pictures is not cut: leave out --parallel fsdp, "
            "--tensor-parallel and --recompute",
        )
        parts |= expert_parts(config) | picture_parts(config)
        parts |= start_parts(config, layout)
        train(config, **parts)
    except InputError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # rank 0 says it; torchrun then ends us
            sys.exit(2)
        raise


if __name__ == "__main__":
    run(main)
