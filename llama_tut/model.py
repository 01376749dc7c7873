# From notebooks/08_model.ipynb by scripts/export.py: edit the notebook.
"""The whole model, its initialisation, its loss, its size and its cost.

Letters: B batch, T time, D hidden_size, H heads, K kv heads, C head_dim,
I intermediate_size, V vocabulary, L layers; R rows and M words of one tile.
"""

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.block import LlamaDecoderLayer
from llama_tut.rmsnorm import LlamaRMSNorm
from llama_tut.rope import LlamaRotaryEmbedding

# From tokens to the stream and through it


class LlamaModel(nn.Module):
    """Without the head: ids to normalised stream; config: `LlamaConfig`."""

    def __init__(self, config):
        super().__init__()
        D, L = config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config) for _ in range(L)
        )
        self.norm = LlamaRMSNorm(D, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(self, ids, position_ids=None, attention_mask=None, cache=None):
        """ids [B, T] -> [B, T, D]; the rest as in `LlamaForCausalLM`."""
        if position_ids is None:
            start = 0 if cache is None else cache[0].length
            position_ids = torch.arange(ids.shape[1], device=ids.device)  # [T]
            position_ids = position_ids + start  # [T]
        x = self.embed_tokens(ids)  # [B, T, D]
        tables = self.rotary_emb(position_ids)  # cos and sin
        caches = [None] * len(self.layers) if cache is None else cache
        for layer, held in zip(self.layers, caches, strict=True):
            x = layer(x, *tables, attention_mask, held)  # [B, T, D]
        return self.norm(x)  # [B, T, D]


# The loss without the full logits


def tile_size(vocab_size, device):
    """Rows and words of one tile of logits: 4 or 8 MiB, on a GPU 256 MiB."""
    if device.type == "cuda":
        return 4096, 16_384
    return (512 if vocab_size <= 4096 else 256), 4096


def tile_of_logits(h, weight, targets, words):
    """Logits of some rows and some words, and where the targets are in them.

    Args:
        h: [R, D] in the dtype of the product; weight: [V, D].
        targets: [R, 1].
        words: slice of the vocabulary, M words.
    """
    w = weight[words].to(h.dtype)  # [M, D]
    logits = (h @ w.T).float()  # [R, M]
    place = targets - words.start  # [R, 1]
    here = ((place >= 0) & (place < len(w))).float()  # [R, 1]
    place = place.clamp(0, len(w) - 1)  # [R, 1]
    return w, logits, place, here  # [M, D], [R, M], [R, 1], [R, 1]


def first_pass(h, weight, targets, tiles):
    """Normaliser and target's logit of each row, and the last tile.

    Args:
        h: [R, D]; weight: [V, D]; targets: [R, 1].
        tiles: slices that cut up the vocabulary.
    """
    normaliser = torch.full_like(h[:, :1], -torch.inf).float()  # [R, 1]
    right = torch.zeros_like(normaliser)  # [R, 1]
    for words in tiles:
        last = logits = None  # frees a tile before the next is made
        last = tile_of_logits(h, weight, targets, words)
        _, logits, place, here = last  # [M, D], [R, M], [R, 1], [R, 1]
        part = logits.logsumexp(-1, keepdim=True)  # [R, 1]
        normaliser = torch.logaddexp(normaliser, part)  # [R, 1]
        right = right + here * logits.gather(1, place)  # [R, 1]
    return normaliser, right, last  # [R, 1], [R, 1]


def second_pass(h, weight, targets, tiles, normaliser, last, weights, sums):
    """Add the head's gradient to `sums`; return that of the rows, [R, D].

    Args:
        h: [R, D]; weight: [V, D]; targets, normaliser, weights: [R, 1].
        tiles, last: as in `first_pass`.
        sums: gradient of the head so far, float32 [V, D], changed in place.
    """
    grad = torch.zeros_like(h, dtype=torch.float32)  # [R, D]
    weighted = (h * weights).to(h.dtype)  # [R, D]
    for words in reversed(tiles):
        if words is not tiles[-1]:
            last = tile_of_logits(h, weight, targets, words)
        w, g, place, here = last  # [M, D], [R, M], [R, 1], [R, 1]
        g = g.sub_(normaliser).exp_()  # [R, M]
        g = g.scatter_add_(1, place, -here).to(h.dtype)  # [R, M]
        grad = grad + g @ w  # [R, D]
        sums[words] += g.T @ weighted
        del g, last  # before the next tile is made
    return grad * weights  # [R, D]


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of `hidden @ weight.T`, tile by tile.

    The forward pass makes the gradients too, if they are wanted.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, wanted):
        """hidden [B*T, D], weight [V, D], targets [B*T] -> float32 []."""
        R, M = tile_size(len(weight), weight.device)
        tiles = [slice(i, i + M) for i in range(0, len(weight), M)]
        counts = targets != -100  # [B*T]
        weights = (counts / counts.sum())[:, None]  # [B*T, 1]
        total = torch.zeros((), device=weight.device)  # []
        if wanted:
            grad = torch.empty_like(hidden)  # [B*T, D]
            sums = torch.zeros_like(weight, dtype=torch.float32)  # [V, D]
        for i in range(0, len(hidden), R):
            rows = slice(i, i + R)
            part = (hidden[rows].to(dtype), weight, targets[rows, None], tiles)
            n, right, last = first_pass(*part)  # [R, 1], [R, 1]
            total = total + ((n - right) * weights[rows]).sum()  # []
            if wanted:
                grad[rows] = second_pass(*part, n, last, weights[rows], sums)
        if wanted:
            ctx.save_for_backward(grad, sums.to(weight.dtype))
        return total  # []

    @staticmethod
    def backward(ctx, gradient):
        """gradient [] -> those of hidden [B*T, D] and weight [V, D]."""
        grad, sums = ctx.saved_tensors  # [B*T, D], [V, D]
        grad.mul_(gradient)
        sums.mul_(gradient)
        return grad, sums, None, None, None  # [B*T, D], [V, D]


def head_loss(hidden, weight, targets):
    """Mean cross entropy without ever holding all logits -> float32 [].

    Args:
        hidden: normalised stream, [B, T, D] (or any [..., D]).
        weight: the head, [V, D]; may be the tied embedding.
        targets: true next tokens, [B, T]; -100 does not count.
    """
    V, device = len(weight), weight.device
    dtype = weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    hidden = hidden.flatten(0, -2)  # [B*T, D]
    targets = targets.flatten()  # [B*T]
    apply = HeadLoss.apply
    if torch.compiler.is_compiling() and V > tile_size(V, device)[1]:
        apply = torch.compiler.disable(apply)
    wanted = torch.is_grad_enabled()
    return apply(hidden, weight, targets, dtype, wanted)  # []


# What it starts from


def initialize(model, generator=None):
    """Draw all parameters of a `LlamaForCausalLM` anew, in place.

    Matrices from N(0, initializer_range^2), those that write to the stream
    divided by sqrt(2L) (Radford et al., 2019, section 2.3); gains are 1.

    Args:
        generator: a `torch.Generator` on the model's device, or None.
    """
    std = model.config.initializer_range
    shrink = (2 * model.config.num_hidden_layers) ** -0.5
    for name, p in model.named_parameters():
        if p.dim() == 1:
            nn.init.ones_(p)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(p, std=std * shrink, generator=generator)
        else:
            nn.init.normal_(p, std=std, generator=generator)


# The class


class LlamaForCausalLM(nn.Module):
    """LLaMA: token ids to logits, or to the loss; config: `LlamaConfig`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        D, V = config.hidden_size, config.vocab_size
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, V, bias=False)
        initialize(self)

    @property
    def output_weight(self):
        """The head's matrix, [V, D]."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight  # [V, D]
        return self.lm_head.weight  # [V, D]

    def head(self, x):
        """The stream behind the body, [..., D], to logits, [..., V]."""
        return F.linear(x, self.output_weight)  # [..., V]

    def forward(
        self,
        input_ids,
        position_ids=None,
        attention_mask=None,
        cache=None,
        targets=None,
    ):
        """input_ids [B, T] -> logits [B, T, V], or with targets the loss [].

        Args:
            position_ids: [T] or [B, T]; default: from cache[0].length or 0.
            attention_mask: as in `LlamaAttention`; default: causal.
            cache: a list with one object for each layer (chapter 11).
            targets: [B, T], the next tokens; -100 does not count.
        """
        how = position_ids, attention_mask, cache
        x = self.model(input_ids, *how)  # [B, T, D]
        if targets is not None:
            return head_loss(x, self.output_weight, targets)  # []
        return self.head(x)  # [B, T, V]


# How big is it


def parameter_count(config, embeddings=True):
    """Number of parameters by formula.

    Args:
        embeddings: if False, without `embed_tokens` and `lm_head`, as
            scaling laws count.
    """
    D, C, I = config.hidden_size, config.head_dim, config.intermediate_size
    H, K = config.num_attention_heads, config.num_key_value_heads
    block = D * C * (2 * H + 2 * K) + 3 * D * I + 2 * D
    count = config.num_hidden_layers * block + D
    if embeddings:
        tables = 1 if config.tie_word_embeddings else 2
        count += tables * config.vocab_size * D
    return count


# What it costs


def flops_per_token(config, sequence_length, training=True):
    """FLOPs for each token of a text, by formula: 2N + 4LTHC, times 3.

    N counts the matrices with the head, without the table of embeddings. The
    future is counted too, though a causal kernel skips it.

    Args:
        sequence_length: T, how many tokens each token reads.
        training: forward and backward; if False, forward alone.
    """
    D, L = config.hidden_size, config.num_hidden_layers
    H, C = config.num_attention_heads, config.head_dim
    norms = (2 * L + 1) * D
    matrices = parameter_count(config, embeddings=False) - norms
    matrices += D * config.vocab_size
    forward = 2 * matrices + 4 * L * sequence_length * H * C
    return 3 * forward if training else forward
