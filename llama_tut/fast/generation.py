# From notebooks/21_fast_generation.ipynb by scripts/export.py: edit the notebook.
"""Faster generation: reordered weights, few operators, and drafts in four bits.

Letters: T tokens of one call, S places of the cache, K kv heads, H heads,
G = H/K heads of a group (in `to_levels`: groups of a row), C head_dim,
D hidden_size, I and O the sides of a matrix, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.generate import prompt_lookup

# The order of a matrix in memory


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's order, for a CPU; weight [O, I] is copied."""

    def __init__(self, weight):
        super().__init__()
        reorder = torch.ops.mkldnn._reorder_linear_weight
        # A buffer: the compiler takes no other reordered tensor.
        packed = reorder(weight.detach().contiguous())
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x):
        """x [..., I] -> [..., O]."""
        product = torch.ops.mkldnn._linear_pointwise
        return product(x, self.packed, None, "none", [], "")


def can_pack(weight):
    """Whether oneDNN reorders weights of this dtype on this processor."""
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def packed_linear(weight):
    """weight [O, I] -> a layer in oneDNN's order, where `can_pack` allows."""
    if can_pack(weight):
        return PackedLinear(weight)
    linear = nn.Linear(*weight.T.shape, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def pack_weights(model):
    """Swap the linear layers of a `LlamaForCausalLM` in place, for oneDNN.

    Returns the model, which can only compute logits from now on. It is
    unchanged where `can_pack` says no.
    """
    if not can_pack(model.output_weight):
        return model
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight))
    # An attribute of the object stands before the method of its class.
    model.head = PackedLinear(model.output_weight).forward
    return model


# Fewer operators


class FastLayer(nn.Module):
    """A copy of a `LlamaDecoderLayer` for one row of text, in few operators.

    `linear` makes a linear layer of a weight [O, I].
    """

    def __init__(self, layer, config, linear):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.config = config
        self.gain = layer.input_layernorm.weight
        self.mlp_gain = layer.post_attention_layernorm.weight
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv = linear(torch.cat([q.weight, k.weight, v.weight]))
        self.out = linear(attention.o_proj.weight)
        gate, up = mlp.gate_proj, mlp.up_proj
        self.gate_up = linear(torch.cat([gate.weight, up.weight]))
        self.down = linear(mlp.down_proj.weight)

    def forward(self, x, cos, sin, bias, places, keys, values):
        """x [T, D] -> [T, D]; the rest as `FastModel` makes it."""
        c, (T, D) = self.config, x.shape
        H, K, C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        y = self.qkv(F.rms_norm(x, (D,), self.gain, c.rms_norm_eps))
        qk, v = y.view(T, -1, C).split([H + K, K], dim=1)
        qk = (qk * cos + qk.roll(C // 2, -1) * sin).to(x.dtype)
        q, k = qk.transpose(0, 1).split([H, K])  # [H, T, C], [K, T, C]
        keys.index_copy_(2, places, k[None])
        values.index_copy_(2, places, v.transpose(0, 1)[None])
        q = q.reshape(1, K, -1, C)  # [1, K, G*T, C]
        y = F.scaled_dot_product_attention(q, keys, values, bias)
        y = y.reshape(H, T, C).transpose(0, 1).reshape(T, H * C)  # [T, H*C]
        x = x + self.out(y)  # [T, D]
        y = F.rms_norm(x, (D,), self.mlp_gain, c.rms_norm_eps)
        gate, up = self.gate_up(y).chunk(2, dim=-1)  # [T, I], [T, I]
        return x + self.down(F.silu(gate) * up)  # [T, D]


# Try the compiler's own kernels for the products beside PyTorch's.
COMPILE = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}


class FastModel(nn.Module):
    """A copy of a `LlamaForCausalLM` that reads one row of text.

    `linear` and `head` make a layer of a weight [O, I]. With `compiled`,
    `step` is compiled once for each number of tokens and each capacity,
    and inductor's global `freezing` is set.
    """

    def __init__(
        self, model, linear=packed_linear, head=packed_linear, compiled=False
    ):
        super().__init__()
        body, self.config = model.model, model.config
        self.embeddings = body.embed_tokens.weight
        layers = [FastLayer(x, self.config, linear) for x in body.layers]
        self.layers = nn.ModuleList(layers)
        self.norm, self.rotary = body.norm, body.rotary_emb
        self.head = head(model.output_weight)
        self.step = self.forward
        if compiled:
            torch._inductor.config.freezing = True
            self.step = torch.compile(
                self.forward, dynamic=False, options=COMPILE
            )

    def forward(self, ids, places, cache, last):
        """ids [T] at places [T] -> logits after the `last` of them.

        `cache` holds keys and values [1, K, S, C] of each layer.
        """
        c, S = self.config, cache[0][0].shape[2]
        cos, sin = self.rotary(places)  # [T, C/2], [T, C/2]
        cos = torch.cat([cos, cos], -1)[:, None]  # [T, 1, C]
        sin = torch.cat([-sin, sin], -1)[:, None]  # [T, 1, C]
        hidden = torch.arange(S, device=ids.device) > places[:, None]  # [T, S]
        x = self.embeddings[ids]  # [T, D]
        bias = x.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        bias = bias.repeat(c.num_attention_heads // c.num_key_value_heads, 1)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x = layer(x, cos, sin, bias, places, keys, values)  # [T, D]
        return self.head(self.norm(x[-last:]))  # [last, V]


class FastReader:
    """A `generate.Reader` for a `FastModel`; its cache holds `capacity` tokens.

    draft: a cheaper `FastModel` of its shape, or None: only the text guesses.
    """

    def __init__(self, model, capacity, draft=None):
        self.model, self.draft, self.length = model, draft, 0
        K, C = model.config.num_key_value_heads, model.config.head_dim
        new, shape = model.embeddings.new_zeros, (1, K, capacity, C)
        self.cache = [(new(shape), new(shape)) for _ in model.layers]

    @torch.no_grad()
    def read(self, tokens, last, by=None):
        """As `Reader.read`; `by`: another model that reads instead."""
        model = by or self.model
        start, self.length = self.length, self.length + len(tokens)
        device = model.embeddings.device
        # Fresh tensors: other strides would be another program.
        ids = torch.tensor(tokens, device=device)  # [T]
        places = torch.arange(start, self.length, device=device)  # [T]
        step = model.step if start else model  # prompts: never compiled
        return self.run(step, ids, places, last)  # [last, V]

    def run(self, step, ids, places, last):
        """ids [T] at places [T] -> logits [last, V]."""
        return step(ids, places, self.cache, last)  # [last, V]

    def truncate(self, length):
        """Take tokens back: keep the first `length`, at most."""
        self.length = min(self.length, length)

    def propose(self, text, ahead):
        """Guess: ahead/2 ids by the draft, or up to ahead from the text."""
        start, guesses = self.length, []
        while len(guesses) < ahead // 2:
            known = text + guesses
            found = prompt_lookup(known, ahead - len(guesses))
            if found or self.draft is None:
                guesses += found
                break
            logits = self.read(known[-1:], 1, by=self.draft)  # [1, V]
            guesses.append(logits[0].argmax().item())
        self.truncate(start)
        return guesses


# A draft for new text: the model in four bits

GROUP = 32  # neighbours that share a step and a middle


def to_levels(weight):
    """Round each group of a matrix to 16 levels between its extremes.

    weight [O, I], I a multiple of 32 -> levels, int32 [O, I], 0 to 15, and
    scales, bfloat16 [G, O, 2] for G groups a row: step and middle. A number
    is about middle + (level - 8) * step.
    """
    groups = weight.detach().float().unflatten(1, (-1, GROUP))  # [O, G, 32]
    low, high = groups.aminmax(dim=-1, keepdim=True)  # [O, G, 1]
    step = ((high - low) / 15).clamp(min=1e-12).bfloat16()  # [O, G, 1]
    middle = (low + 8 * step).bfloat16()  # [O, G, 1]
    levels = ((groups - middle) / step + 8).round().clamp(0, 15)
    scales = torch.cat([step, middle], -1).transpose(0, 1)  # [G, O, 2]
    return levels.int().flatten(1), scales.contiguous()


class Bfloat16Linear(nn.Module):
    """A linear layer of bfloat16 weights [O, I]; x keeps its own dtype."""

    def __init__(self, weight):
        super().__init__()
        self.linear = packed_linear(weight.bfloat16())

    def forward(self, x):
        """x [..., I] -> [..., O]."""
        return self.linear(x.bfloat16()).to(x.dtype)


class FourBitLinear(nn.Module):
    """A linear layer of 16 levels, for a CPU.

    weight: [O, I], O a multiple of 16 and I of 32.
    """

    def __init__(self, weight):
        super().__init__()
        levels, scales = to_levels(weight)
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.register_buffer("levels", pack(levels, 1), persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x):
        """x [T, I] -> [T, O]."""
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        y = product(x.bfloat16(), self.levels, GROUP, self.scales)  # [T, O]
        return y.to(x.dtype)  # [T, O]


def four_bit_linear(weight):
    """weight [O, I] -> a `FourBitLinear`, or `Bfloat16Linear` if it cannot."""
    fits = weight.shape[0] % 16 == 0 and weight.shape[1] % GROUP == 0
    on_cpu = weight.device.type == "cpu"
    return (FourBitLinear if fits and on_cpu else Bfloat16Linear)(weight)


def four_bit_draft(model, compiled=False):
    """A cheap copy of a model that guesses: layers in 4 bits, head in 16."""
    return FastModel(model, four_bit_linear, Bfloat16Linear, compiled)


# On a GPU: record the launches


class RecordedReader(FastReader):
    """A `FastReader` on a GPU that replays its steps as CUDA graphs.

    A step for so many tokens is recorded when it comes for the first time.
    """

    def __init__(self, model, capacity, draft=None):
        super().__init__(model, capacity, draft)
        self.recorded = {}

    def run(self, step, ids, places, last):
        """ids [T] at places [T] -> logits [last, V]."""
        if self.length == len(ids):  # a prompt: its length will not come again
            return step(ids, places, self.cache, last)  # [last, V]
        key = step, len(ids), last
        if key not in self.recorded:
            self.recorded[key] = self.record(step, ids, places, last)
        graph, kept_ids, kept_places, logits = self.recorded[key]
        kept_ids.copy_(ids)
        kept_places.copy_(places)
        graph.replay()
        return logits.clone()  # [last, V]

    def record(self, step, ids, places, last):
        """A graph, the tensors that it reads, and the one that it writes."""
        aside = torch.cuda.Stream()  # once outside the graph, to set up
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step(ids, places, self.cache, last)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(ids, places, self.cache, last)  # [last, V]
        return graph, ids, places, logits
