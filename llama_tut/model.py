# From notebooks/08_model.ipynb by scripts/export.py: edit the notebook.
"""The whole model. Letters: B batch, T time, D hidden_size, V vocabulary."""

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.block import LlamaDecoderLayer
from llama_tut.rmsnorm import LlamaRMSNorm
from llama_tut.rope import LlamaRotaryEmbedding

# The code


class LlamaModel(nn.Module):
    """Token ids to the normalised stream; config: `LlamaConfig`."""

    def __init__(self, config):
        super().__init__()
        c, D, L = config, config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(c.vocab_size, D)
        self.layers = nn.ModuleList(LlamaDecoderLayer(c) for _ in range(L))
        self.norm = LlamaRMSNorm(D, c.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(c)

    def forward(
        self, input_ids=None, position_ids=None, attention_mask=None,
        cache=None, inputs_embeds=None,
    ):  # fmt: skip
        """input_ids [B, T], or inputs_embeds [B, T, D] -> [B, T, D]."""
        x = inputs_embeds  # [B, T, D]
        x = self.embed_tokens(input_ids) if x is None else x  # [B, T, D]
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)  # [T]
            position_ids += cache[0].length if cache else 0  # [T]
        tables = self.rotary_emb(position_ids)  # cos and sin
        caches = cache or [None] * len(self.layers)
        for layer, part in zip(self.layers, caches, strict=True):
            x = layer(x, *tables, attention_mask, part)  # [B, T, D]
        return self.norm(x)  # [B, T, D]


def next_token_loss(hidden, weight, targets):
    """[B, T, D], head [V, D], targets [B, T] (-100: none) -> mean loss []."""
    logits = F.linear(hidden, weight).float()  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())  # []


class LlamaForCausalLM(nn.Module):
    """Token ids to logits, or to the loss; config: `LlamaConfig`."""

    compute_loss = staticmethod(next_token_loss)  # replaceable: chapter 19

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, LlamaModel(config)
        D, V = config.hidden_size, config.vocab_size
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(D, V, bias=False)
        self.init_weights()

    def init_weights(self, generator=None):
        """Draw all parameters, in place, as section 2.3 of Radford, 2019."""
        std, body = self.config.initializer_range, self.model
        writes = std / (2 * self.config.num_hidden_layers) ** 0.5
        nn.init.normal_(body.embed_tokens.weight, std=std, generator=generator)
        for part in (*body.layers, body.norm):
            part.init_weights(std, writes, generator)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=std, generator=generator)

    @property
    def output_weight(self):
        """The head's matrix, [V, D]; in a tied model the embedding."""
        return (self.lm_head or self.model.embed_tokens).weight  # [V, D]

    def head(self, x):
        """The normalised stream, [..., D], to logits, [..., V]."""
        return F.linear(x, self.output_weight)  # [..., V]

    def forward(self, input_ids=None, *, targets=None, **inputs):
        """Logits [B, T, V], or with targets [B, T] the loss []."""
        x = self.model(input_ids, **inputs)  # [B, T, D]
        if targets is None:
            return self.head(x)  # [B, T, V]
        return self.compute_loss(x, self.output_weight, targets)  # []

    def flops_per_token(self, sequence_length, training=True):
        """FLOPs for each token, by the function of this name."""
        return flops_per_token(self.config, sequence_length, training)


def parameter_count(config, embeddings=True):
    """Number of parameters; scaling laws count without `embeddings`."""
    c, D, L = config, config.hidden_size, config.num_hidden_layers
    heads = c.num_attention_heads + c.num_key_value_heads
    block = 2 * D * c.head_dim * heads + 3 * D * c.intermediate_size + 2 * D
    tables = (1 if c.tie_word_embeddings else 2) if embeddings else 0
    return L * block + D + tables * c.vocab_size * D


def flops_per_token(config, sequence_length, training=True):
    """FLOPs per token, 2N + 4LTHC (N: matrices and head); times 3 to train."""
    c, D, L = config, config.hidden_size, config.num_hidden_layers
    N = parameter_count(c, False) - (2 * L + 1) * D + c.vocab_size * D
    reads = 4 * L * sequence_length * c.num_attention_heads * c.head_dim
    return (2 * N + reads) * (3 if training else 1)
