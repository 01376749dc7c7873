# From notebooks/02_config.ipynb by scripts/export.py: edit the notebook.
"""Config: the numbers that make a LLaMA.

Letters: V vocab_size, D hidden_size, I intermediate_size, L layers, H heads,
K kv heads, C head_dim.
"""

import dataclasses

from llama_tut.tools.files import require

# The sizes must fit

# The first five have no default in Hugging Face's files.
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


def check_positive(name, value):
    """Refuse what is not a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        number and 0 < value < float("inf"),
        f"{name} must be a number above 0, not {value!r}",
    )


def check_multiple(config, name, unit):
    """Refuse a size that is not a multiple of another one."""
    a, b = getattr(config, name), getattr(config, unit)
    require(a % b == 0, f"{name} {a} is not a multiple of {unit} {b}")


def resolve(config):
    """Fill in what follows from other fields, in place."""

    def fill(name, value):
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)  # the class is frozen

    check_size("num_attention_heads", config.num_attention_heads)
    check_size("hidden_size", config.hidden_size)
    check_multiple(config, "hidden_size", "num_attention_heads")
    fill("num_key_value_heads", config.num_attention_heads)
    fill("head_dim", config.hidden_size // config.num_attention_heads)
    fill("initializer_range", 0.5 / config.hidden_size**0.5)
    if isinstance(config.eos_token_id, list):
        eos = tuple(config.eos_token_id)
        object.__setattr__(config, "eos_token_id", eos)


def check_config(config):
    """Refuse, by name, a field that does not fit the others."""
    for name in SIZES:
        check_size(name, getattr(config, name))
    check_multiple(config, "num_attention_heads", "num_key_value_heads")
    C, tied = config.head_dim, config.tie_word_embeddings
    require(C % 2 == 0, f"head_dim must be even, not {C}: RoPE turns pairs")
    for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
        check_positive(name, getattr(config, name))
    require(tied in (True, False), f"tie_word_embeddings is {tied!r}")


# The class


def option(default, help):
    """A dataclass field with a default and one sentence of help."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How LLaMA 3.1 and later stretch their positions (rope type llama3)."""

    factor: float = option(8.0, "how many times slower the slow pairs turn")
    low_freq_factor: float = option(1.0, "pairs with fewer turns are slowed")
    high_freq_factor: float = option(4.0, "pairs with more turns are kept")
    original_max_position_embeddings: int = option(8192, "context before it")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_positive(f"rope {field.name}", getattr(self, field.name))
        require(self.factor >= 1, f"rope factor {self.factor} is below 1")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(low < high, f"rope low_freq_factor {low} is not below {high}")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """All that decides the shape of a LLaMA, with Hugging Face's names.

    Raises:
        InputError: these numbers do not make a model that can be built.
    """

    vocab_size: int = option(2048, "V, tokens in the vocabulary")
    hidden_size: int = option(128, "D, numbers in a token's vector")
    intermediate_size: int = option(352, "I, hidden neurons of an MLP")
    num_hidden_layers: int = option(4, "L, blocks on top of each other")
    num_attention_heads: int = option(2, "H, query heads")
    num_key_value_heads: int | None = option(None, "K, kv heads (None: H)")
    head_dim: int | None = option(None, "C, width of a head (None: D/H)")
    max_position_embeddings: int = option(2048, "longest context in tokens")
    rms_norm_eps: float = option(1e-5, "added to the mean square in a norm")
    rope_theta: float = option(10_000.0, "base of the position angles")
    rope_scaling: RopeScaling | None = option(None, "llama3 stretching")
    tie_word_embeddings: bool = option(False, "head uses the embedding")
    initializer_range: float | None = option(None, "std (None: 0.5/sqrt(D))")
    bos_token_id: int | None = option(None, "id that starts a text")
    eos_token_id: int | tuple | None = option(None, "id or ids that end it")

    def __post_init__(self):
        resolve(self)
        check_config(self)

    @classmethod
    def from_hf(cls, hf):
        """Read a transformers config or the dictionary of a config.json."""
        return cls(**read_hf(hf if isinstance(hf, dict) else hf.to_dict()))

    def to_hf(self):
        """The dictionary of a config.json; its dtype is left to the writer."""
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
            # transformers turns GGUF into plain floats, and leaves a note.
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
    by_layer = any(isinstance(value, dict) for value in rope.values())
    require(
        kind in ("default", "llama3") and not by_layer,
        f"config has rope type {'by layer' if by_layer else repr(kind)}; "
        "this book builds 'default' and 'llama3'",
    )
    refuse_unbuilt(rope)
    if kind == "default":
        return float(theta), None
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [name for name in names if name not in rope]
    require(not missing, f"config's llama3 rope lacks {', '.join(missing)}")
    return float(theta), RopeScaling(**{name: rope[name] for name in names})


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
    needed = SIZES[:5]
    missing = [name for name in needed if name not in hf]
    require(not missing, f"config lacks {', '.join(missing)}")
    fields = {name: hf[name] for name in needed}
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
        **hf,
    }
