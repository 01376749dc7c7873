# From notebooks/02_config.ipynb by scripts/export.py: edit the notebook.
"""Config: the numbers that make a LLaMA.

Letters: V vocab_size, D hidden_size, I intermediate_size, L layers, H heads,
K kv heads, C head_dim.
"""

import dataclasses

from llama_tut.tools.files import InputError, require

# A config that is checked


def check_number(name, value, whole=False):
    """Refuse what is not a number above 0; with `whole`, not an integer."""
    kinds, limit = (int, 2**31) if whole else ((int, float), 1e30)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not (number and value > 0):
        kind = "whole number of at least 1" if whole else "number above 0"
        raise InputError(f"{name} must be a {kind}, not {value!r}")
    require(value < limit, f"{name} {value} is too large")


def option(default, help):
    """A dataclass field with a default and one sentence of help."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model stretches its positions to a longer context (chapter 4).

    Type llama3 uses all fields, type linear only `factor`.
    """

    factor: float = option(8.0, "how many times longer the context becomes")
    low_freq_factor: float = option(1.0, "pairs with fewer turns are slowed")
    high_freq_factor: float = option(4.0, "pairs with more turns are kept")
    original_max_position_embeddings: int = option(8192, "context before it")
    rope_type: str = option("llama3", "llama3 or linear")

    def __post_init__(self):
        kind, low = self.rope_type, self.low_freq_factor
        require(kind in ("llama3", "linear"), f"rope type {kind!r}: not built")
        for field in dataclasses.fields(self)[:4]:
            check_number(f"rope {field.name}", getattr(self, field.name))
        require(self.factor >= 1, f"rope factor {self.factor} is below 1")
        high = self.high_freq_factor
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
    rope_scaling: RopeScaling | None = option(None, "stretched positions")
    tie_word_embeddings: bool = option(False, "head uses the embedding")
    initializer_range: float | None = option(None, "std (None: 0.5/sqrt(D))")
    bos_token_id: int | None = option(None, "id that starts a text")
    eos_token_id: int | tuple | None = option(None, "id or ids that end it")

    def __post_init__(self):
        complete(self)
        check_config(self)

    @classmethod
    def from_hf(cls, hf):
        """Read a transformers config or the dictionary of a config.json."""
        return cls(**read_hf(hf if isinstance(hf, dict) else hf.to_dict()))

    def to_hf(self):
        """The dictionary of a config.json; its dtype is left to the writer."""
        return write_hf(self)


# These have no default in Hugging Face's files.
NEEDED = ("vocab_size", "hidden_size", "intermediate_size")
NEEDED += ("num_hidden_layers", "num_attention_heads")
SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def complete(config):
    """Fill in what follows from other fields, in place."""
    for name in ("hidden_size", "num_attention_heads"):
        check_number(name, getattr(config, name), whole=True)
    D, H = config.hidden_size, config.num_attention_heads
    follows = {"num_key_value_heads": H, "head_dim": D // H}
    follows["initializer_range"] = 0.5 / D**0.5
    for name, value in follows.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)  # the class is frozen
    if isinstance(config.eos_token_id, list):
        object.__setattr__(config, "eos_token_id", tuple(config.eos_token_id))


def check_config(c):
    """Refuse, by name, a field of a LlamaConfig that does not fit."""
    for name in NEEDED + SIZES:
        check_number(name, getattr(c, name), whole=True)
    for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
        check_number(name, getattr(c, name))
    for name, unit in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        a, b = getattr(c, name), getattr(c, unit)
        require(a % b == 0, f"{name} {a} is not a multiple of {unit} {b}")
    C, D, tied = c.head_dim, c.hidden_size, c.tie_word_embeddings
    require(C % 2 == 0, f"head_dim must be even, not {C}: RoPE turns pairs")
    rows = max(c.vocab_size, c.intermediate_size, c.num_attention_heads * C)
    require(rows * D < 2**50, f"no memory holds a matrix of {rows} x {D}")
    require(isinstance(tied, bool), f"tie_word_embeddings is {tied!r}")
    eos = c.eos_token_id
    for id in (c.bos_token_id, *(eos if isinstance(eos, tuple) else [eos])):
        whole = isinstance(id, int) and not isinstance(id, bool)
        require(id is None or whole, f"bos_token_id or eos_token_id is {id!r}")


# Reading a config.json

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
        value = hf.get(name)
        # transformers turns GGUF into plain floats, and leaves a note.
        if isinstance(value, dict) and value.get("quant_method") == "gguf":
            continue
        require(
            value is None or value == built,
            f"config has {name} = {value!r}; this book builds only {built!r}",
        )


def read_rope(hf):
    """(rope_theta, RopeScaling or None) from either form of config.json."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    require(isinstance(rope, dict), f"config has rope_scaling = {rope!r}")
    refuse_unbuilt(rope)
    theta = rope.get("rope_theta", hf.get("rope_theta")) or 10_000.0
    check_number("rope_theta", theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "by layer"
    require(
        kind in ("default", "llama3", "linear"),
        f"config has rope type {kind!r}; "
        "this book builds 'default', 'llama3' and 'linear'",
    )
    if kind == "default":
        return float(theta), None
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    names = names[:4] if kind == "llama3" else names[:1]
    missing = [name for name in names if name not in rope]
    require(not missing, f"config's {kind} rope lacks {', '.join(missing)}")
    given = {name: rope[name] for name in names}
    return float(theta), RopeScaling(**given, rope_type=kind)


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
MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096}
MISTRAL["max_position_embeddings"] = 131_072


def read_hf(hf):
    """The fields of a LlamaConfig from the dictionary of a config.json."""
    if hf.get("model_type") == "mistral":  # without a window, a LLaMA
        hf = MISTRAL | hf | {"model_type": "llama"}
    refuse_unbuilt(hf)
    missing = [name for name in NEEDED if name not in hf]
    require(not missing, f"config lacks {', '.join(missing)}")
    fields = {name: hf[name] for name in NEEDED}
    fields |= {name: hf.get(name, HF_DEFAULTS[name]) for name in HF_DEFAULTS}
    fields["rope_theta"], fields["rope_scaling"] = read_rope(hf)
    return fields


def write_hf(config):
    """The dictionary of a config.json: our fields and what they imply."""
    hf = {"architectures": ["LlamaForCausalLM"]}
    for name in ("model_type", "hidden_act", "attention_bias", "mlp_bias"):
        hf[name] = BUILT[name]
    hf |= dataclasses.asdict(config)
    rope, eos = hf["rope_scaling"], hf["eos_token_id"]
    if rope and rope["rope_type"] == "linear":
        hf["rope_scaling"] = {"rope_type": "linear", "factor": rope["factor"]}
    if isinstance(eos, tuple):
        hf["eos_token_id"] = list(eos)
    return hf
