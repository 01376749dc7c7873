# From notebooks/08_model.ipynb by scripts/export.py: edit the notebook.
"""The whole model, its initialisation, its loss, its size and its cost.

Letters: B batch, T time, D hidden_size, H heads, K kv heads, C head_dim,
I intermediate_size, V vocabulary, L layers, R rows of one piece.
"""

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.block import LlamaDecoderLayer
from llama_tut.rmsnorm import LlamaRMSNorm
from llama_tut.rope import LlamaRotaryEmbedding

# From tokens to the stream and through it


class LlamaModel(nn.Module):
    """The model without its head: token ids to normalised stream.

    Args:
        config: a `LlamaConfig`.
    """

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
        cos, sin = self.rotary_emb(
            position_ids
        )  # [..., T, C/2], [..., T, C/2]
        caches = [None] * len(self.layers) if cache is None else cache
        for layer, held in zip(self.layers, caches, strict=True):
            x = layer(x, cos, sin, attention_mask, held)  # [B, T, D]
        return self.norm(x)  # [B, T, D]


# The loss without the full logits


def piece_of_loss(h, w, targets):
    """Summed cross entropy of some rows, and the gradient of their logits.

    Args:
        h: [R, D] and w: [V, D], both in the dtype of the product.
        targets: [R]; a row with -100 adds no loss, but its gradient is not
            zero here: the caller must drop it.
    """
    logp = F.log_softmax((h @ w.T).float(), dim=-1)  # [R, V]
    loss = F.nll_loss(logp, targets, reduction="sum")  # []
    tokens = torch.arange(len(w), device=w.device)  # [V]
    hit = tokens == targets[:, None]  # [R, V]
    gradient = logp.exp_().add_(hit, alpha=-1)  # [R, V]
    return loss, gradient.to(h.dtype)  # [], [R, V]


LOGITS_AT_ONCE = 2**22  # 16 MiB in float32


def rows_of_a_piece(rows, vocab_size):
    """How many of the rows to take at a time."""
    pieces = 8 if torch.compiler.is_compiling() else 64
    return max(LOGITS_AT_ONCE // vocab_size, -(-rows // pieces), 1)


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of `hidden @ weight.T`, by pieces of rows.

    The forward pass makes the gradients too, while a piece's logits exist.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        """hidden [B*T, D], weight [V, D], targets [B*T] -> [], float32."""
        w = weight.to(dtype)  # [V, D]
        counted = (targets != -100).sum()  # []
        scale = ((targets != -100) / counted)[:, None]  # [B*T, 1]
        total = torch.zeros((), device=w.device)  # []
        grad_hidden = torch.empty_like(hidden)  # [B*T, D]
        grad_weight = torch.zeros_like(w, dtype=torch.float32)  # [V, D]
        blocks = 1 if torch.compiler.is_compiling() else 8
        R = rows_of_a_piece(len(hidden), len(w))
        for i in range(0, len(hidden), R):
            piece = slice(i, i + R)
            h = hidden[piece].to(dtype)  # [R, D]
            loss, g = piece_of_loss(h, w, targets[piece])  # [], [R, V]
            total = total + loss  # []
            grad_hidden[piece] = (g @ w) * scale[piece]
            h = (h * scale[piece]).to(dtype)  # [R, D]
            columns = g.chunk(blocks, dim=1)
            for rows, c in zip(
                grad_weight.chunk(blocks), columns, strict=True
            ):
                rows += c.T @ h
            del g, c, columns  # before the next piece is made
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total / counted  # []

    @staticmethod
    def backward(ctx, gradient):
        """gradient [] -> those of hidden and weight."""
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden.mul_(gradient)
        grad_weight.mul_(gradient)
        return grad_hidden, grad_weight, None, None


def head_loss(hidden, weight, targets):
    """Mean cross entropy without ever holding all logits -> float32 [].

    Args:
        hidden: normalised stream, [B, T, D] (or any [..., D]).
        weight: the head, [V, D]; may be the tied embedding.
        targets: true next tokens, [B, T]; -100 does not count.
    """
    hidden = hidden.flatten(0, -2)  # [B*T, D]
    targets = targets.flatten()  # [B*T]
    if torch.is_grad_enabled():
        device, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return HeadLoss.apply(hidden, weight, targets, dtype)  # []
    total = torch.zeros((), device=hidden.device)  # []
    R = rows_of_a_piece(len(hidden), len(weight))
    for h, t in zip(hidden.split(R), targets.split(R), strict=True):
        logits = F.linear(h, weight).float()  # [R, V]
        loss = F.cross_entropy(logits, t, reduction="sum")  # []
        total = total + loss  # []
    return total / (targets != -100).sum()  # []


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
    """LLaMA: token ids to logits, or to the loss; names as transformers'.

    Args:
        config: a `LlamaConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            D, V = config.hidden_size, config.vocab_size
            self.lm_head = nn.Linear(D, V, bias=False)
        initialize(self)

    @property
    def output_weight(self):
        """The head's matrix, [V, D]."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight  # [V, D]
        return self.lm_head.weight  # [V, D]

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
            position_ids: [T] or [B, T]; default: 0, 1, ..., or on from
                cache[0].length.
            attention_mask: bool, True = may read, broadcastable to
                [B, 1, T, S]; default: each token reads those before it.
            cache: a list with one object for each layer (chapter 10).
            targets: [B, T], the token that follows each input token; -100
                does not count. See `head_loss`.
        """
        x = self.model(
            input_ids, position_ids, attention_mask, cache
        )  # [B, T, D]
        if targets is not None:
            return head_loss(x, self.output_weight, targets)  # []
        return F.linear(x, self.output_weight)  # [B, T, V]
