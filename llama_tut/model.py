# From notebooks/08_model.ipynb by scripts/export.py: edit the notebook.
"""The whole model, its initialisation, its loss, its size and its cost.

Letters: B batch, T time, D hidden_size, H heads, K kv heads, C head_dim,
I intermediate_size, V vocabulary, L layers.
"""

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.block import LlamaDecoderLayer
from llama_tut.rmsnorm import LlamaRMSNorm
from llama_tut.rope import LlamaRotaryEmbedding

# The body


class LlamaModel(nn.Module):
    """The body: token ids to the normalised stream; config: `LlamaConfig`."""

    def __init__(self, config):
        super().__init__()
        D, L = config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        layers = (LlamaDecoderLayer(config) for _ in range(L))
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(D, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def init_weights(self, std, output_std, generator=None):
        """Draw the embedding and the blocks; `output_std`: what writes."""
        nn.init.normal_(self.embed_tokens.weight, std=std, generator=generator)
        for part in (*self.layers, self.norm):
            part.init_weights(std, output_std, generator)

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        cache=None,
        inputs_embeds=None,
    ):
        """input_ids [B, T], or inputs_embeds [B, T, D] -> [B, T, D].

        position_ids: [T] or [B, T]; default: from cache[0].length or 0.
        attention_mask: as in `attend`. cache: one object for each layer.
        """
        x = inputs_embeds  # [B, T, D]
        if x is None:
            x = self.embed_tokens(input_ids)  # [B, T, D]
        if position_ids is None:
            start = 0 if cache is None else cache[0].length
            position_ids = torch.arange(x.shape[1], device=x.device)  # [T]
            position_ids = position_ids + start  # [T]
        tables = self.rotary_emb(position_ids)  # cos and sin
        caches = [None] * len(self.layers) if cache is None else cache
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, *tables, attention_mask, layer_cache)  # [B, T, D]
        return self.norm(x)  # [B, T, D]


# The loss


def next_token_loss(hidden, weight, targets):
    """Mean cross entropy in float32 -> [].

    Args:
        hidden: normalised stream, [B, T, D]; weight: the head, [V, D].
        targets: the true next tokens, [B, T]; -100 does not count.
    """
    logits = F.linear(hidden, weight).float()  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())  # []


# The class


class LlamaForCausalLM(nn.Module):
    """Token ids to logits, or to the loss; config: `LlamaConfig`."""

    compute_loss = staticmethod(next_token_loss)  # replaceable: chapter 19

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, LlamaModel(config)
        D, V = config.hidden_size, config.vocab_size
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, V, bias=False)
        self.init_weights()

    def init_weights(self, generator=None):
        """Draw all parameters, in place, as section 2.3 of Radford, 2019."""
        std = self.config.initializer_range
        output_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        self.model.init_weights(std, output_std, generator)
        if not self.config.tie_word_embeddings:
            nn.init.normal_(self.lm_head.weight, std=std, generator=generator)

    @property
    def output_weight(self):
        """The head's matrix, [V, D]; in a tied model the embedding."""
        tied = self.config.tie_word_embeddings
        table = self.model.embed_tokens if tied else self.lm_head
        return table.weight  # [V, D]

    def head(self, x):
        """The normalised stream, [..., D], to logits, [..., V]."""
        return F.linear(x, self.output_weight)  # [..., V]

    def forward(self, input_ids=None, *, targets=None, **inputs):
        """Logits [B, T, V], or with targets [B, T] the loss [].

        A target of -100 does not count. `inputs`: as in `LlamaModel`.
        """
        x = self.model(input_ids, **inputs)  # [B, T, D]
        if targets is None:
            return self.head(x)  # [B, T, V]
        return self.compute_loss(x, self.output_weight, targets)  # []

    def flops_per_token(self, sequence_length, training=True):
        """FLOPs for each token of a text, by the function of this name."""
        return flops_per_token(self.config, sequence_length, training)


# How big is it


def parameter_count(config, embeddings=True):
    """Number of parameters; scaling laws count without `embeddings`."""
    D, C, I = config.hidden_size, config.head_dim, config.intermediate_size
    H, K = config.num_attention_heads, config.num_key_value_heads
    block = D * C * (2 * H + 2 * K) + 3 * D * I + 2 * D
    tables = (1 if config.tie_word_embeddings else 2) if embeddings else 0
    return (
        config.num_hidden_layers * block + D + tables * config.vocab_size * D
    )


# What it costs


def flops_per_token(config, sequence_length, training=True):
    """FLOPs for each token of a text: 2N + 4LTHC forward, times 3 to train.

    N counts the matrices with the head, without the table of embeddings. The
    future is counted too, though a causal kernel skips it.
    """
    D, L, T = config.hidden_size, config.num_hidden_layers, sequence_length
    norms = (2 * L + 1) * D
    matrices = parameter_count(config, embeddings=False) - norms
    matrices += D * config.vocab_size
    width = config.num_attention_heads * config.head_dim
    forward = 2 * matrices + 4 * L * T * width
    return 3 * forward if training else forward
