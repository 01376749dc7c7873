# From notebooks/22_gpt2.ipynb by scripts/export.py: edit the notebook.
"""GPT-2 out of the book's LLaMA, and the ladder between the two.

Letters: B batch, T time, D hidden_size, I intermediate_size, V vocabulary,
P rows of a table of positions.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.config import option
from llama_tut.model import LlamaForCausalLM
from llama_tut.rope import LlamaRotaryEmbedding
from llama_tut.tools.files import require
from llama_tut.tools.gpt2_weights import check_gpt2, translate_gpt2
from llama_tut.tools.options import check_choices, llama_config

# The switches

Positions = Literal["learned", "rotary", "none"]
Activation = Literal["gelu", "relu2", "swiglu"]


@dataclass(frozen=True)
class LadderConfig:
    """A shape, and which part stands where; the defaults are GPT-2 small."""

    vocab_size: int = option(50_257, "V, tokens in the vocabulary")
    hidden_size: int = option(768, "D, numbers in a token's vector")
    intermediate_size: int = option(3072, "I, hidden neurons of an MLP")
    num_hidden_layers: int = option(12, "L, blocks")
    num_attention_heads: int = option(12, "H, heads")
    max_position_embeddings: int = option(1024, "P, rows of the table")
    positions: Positions = option("learned", "where a token's position enters")
    share_keys: int = option(1, "query heads that share a key head")
    norm: Literal["layer", "rms"] = option("layer", "LayerNorm or RMSNorm")
    activation: Activation = option("gelu", "swiglu has a gate")
    bias: bool = option(True, "whether linear layers have one")
    tie_word_embeddings: bool = option(True, "head uses the embedding")
    initializer_range: float | None = option(0.02, "std (None: 0.5/sqrt(D))")

    rms_norm_eps = 1e-5
    rope_theta, rope_scaling = 10_000.0, None
    num_key_value_heads = property(
        lambda self: self.num_attention_heads // self.share_keys
    )
    head_dim = property(lambda s: s.hidden_size // s.num_attention_heads)

    def __post_init__(self):
        check_choices(self)
        if self.initializer_range is None:
            std = 0.5 / self.hidden_size**0.5
            object.__setattr__(self, "initializer_range", std)

    def to_hf(self):
        """For `save_pretrained`; transformers knows no such model."""
        ends = {"bos_token_id": None, "eos_token_id": None}
        return {"model_type": "llama_tut_ladder", **asdict(self), **ends}


# Positions: a table, or nothing


class LearnedPositions(nn.Module):
    """Embedding plus a learned vector of the position."""

    def __init__(self, config):
        super().__init__()
        V, D = config.vocab_size, config.hidden_size
        P = config.max_position_embeddings
        self.weight = nn.Parameter(torch.empty(V, D))  # [V, D]
        self.positions = nn.Parameter(torch.empty(P, D))  # [P, D]
        self.start = 0  # how many tokens a cache has before these

    def forward(self, ids):
        """ids [B, T] -> [B, T, D]; InputError beyond the table."""
        end, P = self.start + ids.shape[1], len(self.positions)
        require(end <= P, f"{end} tokens, but the table has {P} positions")
        table = self.positions[self.start : end]  # [T, D]
        return F.embedding(ids, self.weight) + table  # [B, T, D]


def count_on(body, inputs, options):
    """Before a pass of a `LlamaModel`: positions go on after its cache."""
    cache = options.get("cache", inputs[3] if len(inputs) > 3 else None)
    body.embed_tokens.start = cache[0].length if cache else 0


class NoRotation(LlamaRotaryEmbedding):
    """Tables that rotate nothing: every token stands at position 0."""

    def forward(self, position_ids):
        """Positions -> cos 1 and sin 0, shapes as in the class above it."""
        return super().forward(torch.zeros_like(position_ids))


# MLP: two matrices

ACTIVATIONS = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),  # [..., I]
}


class PlainMLP(nn.Module):
    """down(activation(up(x))), without a gate; config: `LadderConfig`."""

    def __init__(self, config):
        super().__init__()
        D, I = config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)

    def init_weights(self, std, output_std, generator=None):
        """Draw both matrices; `output_std` is for down_proj, which writes."""
        draw = partial(nn.init.normal_, generator=generator)
        draw(self.up_proj.weight, std=std)
        draw(self.down_proj.weight, std=output_std)

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]."""
        hidden = self.activation(self.up_proj(x))  # [B, T, I]
        return self.down_proj(hidden)  # [B, T, D]


# Put together


class LayerNorm(nn.LayerNorm):
    """PyTorch's, with the method that `model.init_weights` calls."""

    def init_weights(self, std=None, output_std=None, generator=None):
        """Gain 1, bias 0; a norm draws nothing at random."""
        self.reset_parameters()


def swap_parts(model, config):
    """Give a `LlamaForCausalLM` the parts that a `LadderConfig` names."""
    body = model.model
    if config.positions == "learned":
        body.embed_tokens = LearnedPositions(config)
        body.register_forward_pre_hook(count_on, with_kwargs=True)
    if config.positions != "rotary":
        body.rotary_emb = NoRotation(config)
    if config.norm == "layer":
        norm = partial(LayerNorm, config.hidden_size, config.rms_norm_eps)
        body.norm = norm()
        for layer in body.layers:
            layer.input_layernorm = norm()
            layer.post_attention_layernorm = norm()
    for layer in body.layers:
        if config.activation != "swiglu":
            layer.mlp = PlainMLP(config)
        if config.bias:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    bias = torch.zeros(module.out_features)
                    module.bias = nn.Parameter(bias)


class LadderForCausalLM(LlamaForCausalLM):
    """A LLaMA with the parts that a `LadderConfig` names."""

    def __init__(self, config):
        super().__init__(config)
        swap_parts(self, config)
        self.init_weights()
        if config.positions == "learned":
            table = self.model.embed_tokens.positions
            nn.init.normal_(table, std=config.initializer_range)

    def flops_per_token(self, sequence_length, training=True):
        """FLOPs for each token of a text, counted from the matrices."""
        c = self.config
        layers = self.model.layers.parameters()
        weights = sum(p.numel() for p in layers if p.ndim == 2)
        weights += c.vocab_size * c.hidden_size  # the head
        read = 4 * c.num_hidden_layers * sequence_length * c.hidden_size
        return (3 if training else 1) * (2 * weights + read)


# Check: equal to transformers' GPT-2


def from_gpt2(theirs):
    """Our model with the weights of a transformers `GPT2LMHeadModel`.

    Raises: InputError where its config asks for what is not built here.
    """
    c = theirs.config
    check_gpt2(c)
    model = LadderForCausalLM(
        LadderConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.n_inner or 4 * c.n_embd,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            max_position_embeddings=c.n_positions,
        )
    )
    model.load_state_dict(translate_gpt2(theirs.state_dict()))
    return model


# The ladder

LADDER = {
    "GPT-2": {},
    "rotary positions": {"positions": "rotary"},
    "RMSNorm": {"norm": "rms"},
    "SwiGLU": {"activation": "swiglu"},
    "no biases": {"bias": False},
    "shared key heads": {"share_keys": 2},
    "untied head": {"tie_word_embeddings": False},
}


def size_of(config):
    """Parameters of a `LadderConfig`, without the table of positions."""
    with torch.device("meta"):
        model = LadderForCausalLM(config)
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if not n.endswith(".positions"))


def with_size(config, size):
    """The config with the width whose model comes closest to `size`."""
    one, two = (size_of(replace(config, intermediate_size=I)) for I in (1, 2))
    width = 1 + (size - one) / (two - one)
    return replace(config, intermediate_size=max(1, round(width)))


BESIDE = {
    "learned positions": {"positions": "learned"},
    "no positions": {"positions": "none"},
    "ReLU² for SwiGLU": {"activation": "relu2"},
}
TWIN = "tied twin"


def changes_of(name):
    """All that a row changes. Raises: InputError for an unknown row."""
    names, known = list(LADDER), ", ".join([*LADDER, *BESIDE, TWIN])
    require(name in {**LADDER, **BESIDE}, f"row {name!r}: take {known}")
    last = name if name in LADDER else names[-1]
    changes = {}
    for each in names[: names.index(last) + 1]:
        changes |= LADDER[each]
    return changes | BESIDE.get(name, {})


def rung(name, base):
    """The `LadderConfig` of a row, on the ladder that starts from `base`."""
    if name == TWIN:
        names = "untied head", "shared key heads"
        untied, tied = (rung(one, base) for one in names)
        deeper = replace(tied, num_hidden_layers=tied.num_hidden_layers + 2)
        return with_size(deeper, size_of(untied))
    changes = changes_of(name)
    # fit the width with a tied head; a head of its own comes on top
    tied = changes.pop("tie_word_embeddings", True)
    config = with_size(replace(base, **changes), size_of(base))
    return replace(config, tie_word_embeddings=tied)


def build_rung(config, info, name):
    """A row's model for `train`; the options give D, L, H and P."""
    c = llama_config(config, info)
    base = LadderConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=4 * c.hidden_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        max_position_embeddings=c.max_position_embeddings,
        initializer_range=None,
    )
    return LadderForCausalLM(rung(name, base))
