"""Options: every option of a training run, and the presets.

scripts/train.py makes its command line from the fields of `TrainConfig`.
"""

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

from llama_tut.config import LlamaConfig, RopeScaling, option
from llama_tut.tools.choice import ITEM_TOKENS
from llama_tut.tools.files import InputError, read_json, require


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run. Raises InputError for a value that cannot be."""

    data: str = option("", "folder with tokens, made by scripts/prepare.py")
    out: str = option("", "folder of this run")
    preset: str = option("laptop", "row of PRESETS that the others start from")
    resume: bool = option(False, "go on from the newest valid checkpoint")
    steps: int = option(100, "optimizer steps of the whole run")
    sequence_length: int = option(128, "T, tokens in a row")
    micro_batch_size: int = option(4, "B, rows a rank takes at once")
    tokens_per_step: int = option(1024, "tokens of one step, of all ranks")
    optimizer: Literal["adamw", "muon"] = option("adamw", "which optimizer")
    learning_rate: float = option(3e-3, "largest learning rate")
    warmup_steps: int | None = option(None, "steps of warm-up (None: 5 %)")
    schedule: Literal["cosine", "wsd"] = option("cosine", "after the warm-up")
    final_fraction: float = option(
        0.1, "last learning rate as a fraction of the largest"
    )
    weight_decay: float = option(0.1, "decay of the matrices")
    beta1: float = option(0.9, "memory of AdamW's mean of the gradient")
    beta2: float = option(0.95, "memory of AdamW's mean of its square")
    max_norm: float = option(
        1.0, "clip the gradient to this norm (0: do not clip)"
    )
    seed: int = option(0, "of the initialisation and the order of the rows")
    dtype: Literal["float32", "bfloat16", "auto"] = option(
        "float32", "of matrix products (auto: what is fast)"
    )
    device: str = option("auto", "auto, cpu, cuda or mps")
    compile: bool = option(False, "compile the model, if a compiler is here")
    plain: bool = option(False, "train the plain model, without fast parts")
    vocab_multiple: int = option(1, "round V up to a multiple of this")
    eval_every: int = option(0, "steps between validations (0: at the end)")
    eval_rows: int = option(256, "rows of validation text to measure")
    hellaswag: str = option("", "also measure it: own, a jsonl file or hub id")
    hellaswag_limit: int = option(200, "examples of it to measure")
    choice: int = option(
        0, "also measure continuation choice on so many items"
    )
    samples: int = option(2, "texts to write at the end")
    sample_tokens: int = option(100, "tokens of each text")
    prompt: str = option("", "how the texts begin")
    checkpoint_every: int = option(0, "steps between checkpoints (0: at end)")
    keep_checkpoints: int = option(3, "how many of them to keep")
    model: dict = field(default_factory=dict, metadata={"help": "its shape"})
    extra: dict = field(default_factory=dict, metadata={"help": "of others"})

    def __post_init__(self):
        for least, names in AT_LEAST.items():
            for name in names.split():
                check_size(self, name, least, AT_MOST.get(name, math.inf))
        check_choices(self)
        short = self.choice and self.sequence_length < ITEM_TOKENS
        require(
            not short,
            f"--choice takes rows of {ITEM_TOKENS} tokens: "
            f"--sequence-length {self.sequence_length} is too short",
        )


AT_LEAST = {
    1: "steps sequence_length micro_batch_size tokens_per_step eval_rows "
    "vocab_multiple hellaswag_limit sample_tokens keep_checkpoints",
    0: "learning_rate warmup_steps final_fraction weight_decay beta1 beta2 "
    "max_norm seed eval_every choice samples checkpoint_every",
}
AT_MOST = {
    "learning_rate": 10,
    "weight_decay": 10,
    "final_fraction": 1,
    "beta1": 0.99999,
    "beta2": 0.99999,
    "seed": 2**63 - 1,
    "vocab_multiple": 2**20,
    "samples": 1000,
}


def check_size(config, name, least, most):
    """Refuse a value that is no number, or none of `least` to `most`."""
    value, kind = getattr(config, name), config.__annotations__[name]
    if value is None and kind == int | None:
        return
    kinds = (int, float) if kind is float else int
    number = isinstance(value, kinds) and not isinstance(value, bool)
    above = f"at most {most}" if most < math.inf else "finite"
    require(
        number and least <= value <= most and value < math.inf,
        f"{flag(name)} must be at least {least} and {above}, not {value!r}",
    )


def check_choices(config):
    """Refuse a value that its field does not list.

    Raises:
        InputError: it names the option and what it allows.
    """
    for one in fields(config):
        value, allowed = getattr(config, one.name), choices(one)
        require(
            not allowed or value in allowed,
            f"{flag(one.name)} {value!r}: take {' or '.join(allowed)}",
        )


def choices(one):
    """The values that a field of TrainConfig allows; () for any."""
    return get_args(one.type) if get_origin(one.type) is Literal else ()


def flag(name):
    """The command line's spelling of an option."""
    return "--" + name.replace("_", "-")


def llama_shape(D, I, L, H, **others):
    """Options of a model, by the letters."""
    return {
        "hidden_size": D,
        "intermediate_size": I,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        **others,
    }


# "124m" and "350m" have the depth and width of GPT-2 small and medium, "1b" and
# "8b" are the shapes of Llama 3.2 1B and Llama 3 8B.
SHAPES = {
    "1m": llama_shape(128, 352, 4, 2, tie_word_embeddings=True),
    "124m": llama_shape(768, 2048, 12, 12, tie_word_embeddings=True),
    "350m": llama_shape(1024, 2688, 24, 16, tie_word_embeddings=True),
    "1b": llama_shape(
        2048,
        8192,
        16,
        32,
        num_key_value_heads=8,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
    ),
    "8b": llama_shape(
        4096, 14336, 32, 32, num_key_value_heads=8, rope_theta=500_000.0
    ),
}

# The tokens of a step are the same in every full-size row, and so are the ten
# billion tokens of the run: the hardware decides only the micro batch.
COLUMNS = (
    "shape sequence_length micro_batch_size tokens_per_step steps "
    "learning_rate eval_every eval_rows checkpoint_every"
).split()
ROWS = {
    "laptop": ("1m", 128, 4, 1_024, 3_000, 3e-3, 1_000, 2_048, 500),
    "24gb": ("124m", 1024, 8, 524_288, 19_073, 6e-4, 250, 512, 250),
    "24gb-350m": ("350m", 1024, 4, 524_288, 19_073, 3e-4, 250, 512, 250),
    "h100": ("124m", 1024, 32, 524_288, 19_073, 6e-4, 250, 512, 250),
    "h100-350m": ("350m", 1024, 16, 524_288, 19_073, 3e-4, 250, 512, 250),
    "8xh100": ("124m", 1024, 32, 524_288, 19_073, 6e-4, 250, 512, 1_000),
    "8xh100-350m": ("350m", 1024, 16, 524_288, 19_073, 3e-4, 250, 512, 1_000),
    "llama3-1b": ("1b", 8192, 2, 524_288, 19_073, 3e-4, 250, 64, 1_000),
    "llama3-8b": ("8b", 8192, 1, 524_288, 19_073, 3e-4, 250, 64, 1_000),
}


# Where the model lies, in chapter 24's options: Llama 3's rows are for eight
# ranks, which share the model.
LAYOUTS = {
    "llama3-1b": {"parallel": "fsdp"},
    "llama3-8b": {"parallel": "fsdp", "recompute": True},
}


def preset(name):
    """The options of one row of PRESETS."""
    row = dict(zip(COLUMNS, ROWS[name], strict=True))
    full_size = name != "laptop"
    return {
        "preset": name,
        "dtype": "bfloat16" if full_size else "float32",
        "compile": full_size,
        "vocab_multiple": 128 if full_size else 1,
        "model": SHAPES[row.pop("shape")],
        "extra": LAYOUTS.get(name, {}),
        **row,
    }


PRESETS = {name: preset(name) for name in ROWS}


def configure(options, extra=()):
    """A TrainConfig from the options that were given, as a dictionary.

    Names of LlamaConfig's fields go to `model`, those of the dataclasses in
    `extra`, which later chapters add, to `extra`. Given options win over the
    preset's, or with `resume` over those that the run was started with.

    Raises:
        InputError: an unknown preset, or a value that cannot be.
    """
    known = {f.name: "model" for f in fields(LlamaConfig)}
    known |= {f.name: "extra" for kind in extra for f in fields(kind)}
    known |= {f.name: "own" for f in fields(TrainConfig)}
    found = {"own": {}, "model": {}, "extra": {}}
    for name, value in options.items():
        require(name in known, f"{flag(name)} is no option")
        found[known[name]][name] = value
    own, model = found["own"], found["model"]
    started = own.get("resume") and started_with(own.get("out", ""))
    name = own.get("preset", started["preset"] if started else "laptop")
    require(
        name in PRESETS,
        f"--preset {name!r} is unknown: take {', '.join(PRESETS)}",
    )
    base = started or PRESETS[name]
    require(
        base["preset"] == name,
        f"--preset {name}: this run was started with {base['preset']}",
    )
    nested = {
        "model": base["model"] | model,
        "extra": base.get("extra", {}) | found["extra"],
    }
    config = TrainConfig(**base | own | nested)
    for kind in extra:  # refuses a value that cannot be
        extra_options(config, kind)
    return config


def extra_options(config, kind):
    """The options of a later chapter: `kind` is their dataclass."""
    names = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in config.extra.items() if k in names})


def started_with(out):
    """The options that a run in the folder `out` was started with, if any.

    An option that a newer version of this program has added takes its
    default.

    Raises:
        InputError: the folder's config.json is not that of a run, or holds an
            option that this version does not know.
    """
    path = Path(out) / "config.json"
    if not out or not path.is_file():
        return None
    about = read_json(path)
    found = about.get("config")
    require(
        isinstance(found, dict) and isinstance(found.get("model", {}), dict),
        f"{path} is not that of a training run: choose another --out",
    )
    known = default_options()
    for name in found.keys() - known.keys():
        raise InputError(
            f"{path} has the option {flag(name)}, which this version does "
            "not know: resume with the version that started the run"
        )
    return known | found


def default_options():
    """Every option with its default."""
    return {
        one.name: one.default_factory()
        if one.default is MISSING
        else one.default
        for one in fields(TrainConfig)
    }


def gradient_accumulation_steps(config, world_size):
    """Micro batches a rank takes in one step.

    Raises:
        InputError: the tokens of a step cannot be shared out.
    """
    B, T = config.micro_batch_size, config.sequence_length
    at_once = B * T * world_size
    require(
        config.tokens_per_step % at_once == 0,
        f"--tokens-per-step {config.tokens_per_step} is not a multiple "
        f"of micro batch {B} x sequence length {T} x {world_size} ranks "
        f"= {at_once}: change one of them",
    )
    return config.tokens_per_step // at_once


SAME = ("sequence_length", "tokens_per_step", "seed", "optimizer")


def saved_state(run):
    """The plain values of a checkpoint, as they are now."""
    return {
        "position": run.loader.position,
        "world_size": run.ranks.world_size,
        "data": run.info.hash,
        "model": getattr(run.model.config, "to_hf", dict)(),
        "config": asdict(run.config),
    }


def check_same_run(path, before, after):
    """Refuse to go on as another run.

    Args:
        path: the checkpoint, for the message.
        before, after: nested plain values, as `saved_state` gives them.

    Raises:
        InputError: one of them differs, or the data, or the model's shape.
    """
    after = json.loads(json.dumps(after))  # tuples become lists, as there
    old, new = default_options() | before["config"], after["config"]
    pairs = [(flag(name), old[name], new[name]) for name in SAME]
    pairs.append(("the hash of --data", before["data"], after["data"]))
    shape, now = before["model"], after["model"]
    if shape and shape != now:  # first by the options of later chapters
        was, extra = old["extra"], new["extra"]
        for name in sorted(was.keys() | extra.keys()):
            values = (one.get(name, "its default") for one in (was, extra))
            pairs.append((flag(name), *values))
    given = [name for name in new["model"] if name in shape]  # named first
    for name in dict.fromkeys([*given, *sorted(shape | now)] if shape else ()):
        pairs.append((flag(name), shape.get(name), now.get(name)))
    for name, was, now in pairs:
        require(
            was == now,
            f"cannot resume {path}: {name} was {was}, now it is {now}; "
            "give the old value, or start a new run with another --out",
        )


def changes(before, config):
    """A line for each option that is another than in the checkpoint."""
    old_options, new_options = before["config"], asdict(config)
    old_options = old_options | old_options.get("extra", {})
    new_options |= new_options.pop("extra")
    for name, new in new_options.items():
        old = old_options.get(name, new)
        if old != new and name not in ("data", "out", "resume"):
            yield f"{flag(name)} was {old}, from here on it is {new}"


def llama_config(config, info):
    """The LlamaConfig of a run on this data.

    Raises:
        InputError: the vocabulary or the context is too small.
    """
    multiple = config.vocab_multiple
    options = {
        "vocab_size": math.ceil(info.vocab_size / multiple) * multiple,
        "max_position_embeddings": config.sequence_length,
        "bos_token_id": info.end_of_text,
        "eos_token_id": info.end_of_text,
        **config.model,
    }
    if isinstance(options.get("rope_scaling"), dict):
        options["rope_scaling"] = RopeScaling(**options["rope_scaling"])
    llama = LlamaConfig(**options)
    require(
        llama.vocab_size >= info.vocab_size,
        f"--vocab-size {llama.vocab_size}: the data has "
        f"{info.vocab_size} different tokens",
    )
    require(
        llama.max_position_embeddings >= config.sequence_length,
        f"--sequence-length {config.sequence_length} is longer than "
        f"--max-position-embeddings {llama.max_position_embeddings}",
    )
    return llama
