# From notebooks/11_generate.ipynb by scripts/export.py: edit the notebook.
"""Generation: a key/value cache, sampling, and the loop that uses them.

Letters: B batch, T tokens of one call, S tokens so far (the keys), K kv
heads, C head_dim, D hidden_size, V vocabulary, N new tokens.
"""

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.tools.files import require

# The cache


class LayerCache:
    """Keys and values of one layer, in memory that is taken once.

    Args:
        shape: (B, K, capacity, C), for the keys and again for the values.
    """

    def __init__(self, shape, dtype=None, device=None):
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def update(self, k, v):
        """Append k, v [B, K, T, C] -> views of all so far, [B, K, S, C].

        Raises:
            ValueError: the cache is full.
        """
        start, end = self.length, self.length + k.shape[2]
        if end > self.keys.shape[2]:
            room = self.keys.shape[2]
            raise ValueError(f"the cache holds {room} tokens, not {end}")
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache(list):
    """One `LayerCache` a layer: what `LlamaForCausalLM` takes as `cache`.

    Args:
        config: a `LlamaConfig`.
        batch_size: B.
        capacity: the largest number of tokens that a row may reach.
    """

    def __init__(self, config, batch_size, capacity, dtype=None, device=None):
        heads, width = config.num_key_value_heads, config.head_dim
        shape = (batch_size, heads, capacity, width)
        layers = range(config.num_hidden_layers)
        super().__init__(LayerCache(shape, dtype, device) for _ in layers)

    @property
    def length(self):
        """S: the number of tokens held so far."""
        return self[0].length

    @property
    def nbytes(self):
        """The bytes of memory that all layers take together."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self)


# From logits to a token


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """What to draw from, after temperature, then top-k, then top-p.

    Args:
        logits: [B, V].
        temperature: above 0; divides the logits.
        top_k: keep the k likeliest tokens.
        top_p: keep the fewest likeliest tokens whose sum reaches top_p
            (Holtzman et al., 2019, arXiv 1904.09751).

    Returns:
        float32 [B, V], each row with sum 1.
    """
    p = (logits.float() / temperature).softmax(-1)  # [B, V]
    if top_k is None and top_p is None:
        return p  # [B, V]
    order = p.argsort(dim=-1, descending=True, stable=True)  # [B, V]
    ranked = p.gather(-1, order)  # [B, V]
    if top_k is not None:
        ranked[:, top_k:] = 0
        ranked = ranked / ranked.sum(-1, keepdim=True)  # [B, V]
    if top_p is not None:
        before = ranked.cumsum(-1) - ranked  # [B, V]
        ranked = ranked * (before < top_p)  # [B, V]
    ranked = ranked / ranked.sum(-1, keepdim=True)  # [B, V]
    return torch.zeros_like(p).scatter(-1, order, ranked)  # [B, V]


def choose(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """The next token of each row: logits [B, V] -> ids [B].

    Temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(-1)  # [B]
    p = probabilities(logits, temperature, top_k, top_p)  # [B, V]
    return torch.multinomial(p, 1, generator=generator)[:, 0]  # [B]


# Prompts of different lengths


def left_pad(prompts, pad_id=0):
    """Lists of ids -> input_ids [B, T], attention_mask [B, T] (True: token).

    The padding stands on the left, so that each row ends in its last token.
    """
    T = max(map(len, prompts))
    rows = [[pad_id] * (T - len(p)) + list(p) for p in prompts]
    mask = [[False] * (T - len(p)) + [True] * len(p) for p in prompts]
    return torch.tensor(rows), torch.tensor(mask)


def padded_positions(attention_mask, start=0):
    """Positions and mask of the queries start .. S of left-padded rows.

    Args:
        attention_mask: [B, S], True where a token stands, False at padding.

    Returns:
        position_ids [B, T], which count tokens only, and the mask
        [B, 1, T, S], True where the query may read. Padding reads itself.
    """
    S = attention_mask.shape[1]
    counted = (attention_mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
    keys = torch.arange(S, device=attention_mask.device)  # [S]
    queries = keys[start:, None]  # [T, 1]
    mask = (keys <= queries) & attention_mask[:, None, None]  # [B, 1, T, S]
    mask = mask | (keys == queries)  # [B, 1, T, S]
    return counted[:, start:], mask  # [B, T], [B, 1, T, S]


# One step


def next_logits(model, input_ids, cache, attention_mask=None):
    """Run T new tokens behind the cache -> logits of what follows, [B, V].

    Args:
        input_ids: [B, T], the tokens that the cache does not hold yet.
        attention_mask: None, or [B, at least S] of all tokens (`left_pad`).
    """
    position_ids = mask = None
    if attention_mask is not None:
        start, end = cache.length, cache.length + input_ids.shape[1]
        position_ids, mask = padded_positions(attention_mask[:, :end], start)
    hidden = model.model(input_ids, position_ids, mask, cache)  # [B, T, D]
    return model.head(hidden[:, -1])  # [B, V]


# Refuse what cannot work


def check_request(config, input_ids, new=1):
    """Refuse a prompt that cannot be continued by `new` tokens.

    Raises:
        InputError: it is empty, leaves no room in the context, or has ids
            outside the vocabulary.
    """
    require(input_ids.numel() > 0, "the prompt is empty: give some text")
    require(new >= 0, f"{new} new tokens: must be 0 or more")
    T, room = input_ids.shape[1], config.max_position_embeddings
    require(
        T + new <= room,
        f"{T} tokens of prompt and {new} new ones do not fit into the "
        f"model's context of {room}: shorten the prompt or ask for fewer",
    )
    low, high = input_ids.min().item(), input_ids.max().item()
    require(
        0 <= low and high < config.vocab_size,
        f"the prompt has tokens {low} to {high}, the model has "
        f"{config.vocab_size}: does the tokenizer belong to it?",
    )


def check_sampling(temperature=0.0, top_k=None, top_p=None, generator=None):
    """Refuse options of `choose` that are out of range (InputError)."""
    require(temperature >= 0, f"temperature {temperature}: must be 0 or more")
    require(top_k is None or top_k >= 1, f"top_k {top_k}: must be 1 or more")
    require(
        top_p is None or 0 < top_p <= 1,
        f"top_p {top_p}: must be above 0 and at most 1",
    )


# The loop


def prefill(model, input_ids, cache, chunk_size=None, attention_mask=None):
    """Fill the cache with the prompts [B, T] -> logits behind them [B, V]."""
    for chunk in input_ids.split(chunk_size or input_ids.shape[1], dim=1):
        logits = next_logits(model, chunk, cache, attention_mask)
    return logits


@torch.no_grad()
def stream(
    model,
    input_ids,
    max_new_tokens=100,
    stop_tokens=(),
    chunk_size=None,
    attention_mask=None,
    **sampling,
):
    """Yield the new tokens, ids [B] at a time; options as in `generate`."""
    (B, T), device = input_ids.shape, input_ids.device
    check_request(model.config, input_ids, max_new_tokens)
    check_sampling(**sampling)
    if attention_mask is not None:
        new = attention_mask.new_ones(B, max_new_tokens)
        attention_mask = torch.cat([attention_mask, new], dim=1).bool()
    room, dtype = T + max_new_tokens, model.model.embed_tokens.weight.dtype
    cache = KVCache(model.config, B, room, dtype, device)
    logits = prefill(model, input_ids, cache, chunk_size, attention_mask)
    tokens, ended = input_ids[:, -1], input_ids.new_zeros(B).bool()
    stops = torch.tensor(list(stop_tokens), dtype=torch.long, device=device)
    for left in reversed(range(max_new_tokens)):
        tokens = torch.where(ended, tokens, choose(logits, **sampling))
        yield tokens
        ended = ended | torch.isin(tokens, stops)
        if left == 0 or (len(stops) > 0 and ended.all()):
            return
        logits = next_logits(model, tokens[:, None], cache, attention_mask)


def generate(model, input_ids, max_new_tokens=100, **options):
    """Continue each row: input_ids [B, T] -> ids [B, T + new].

    Args:
        max_new_tokens: the most tokens to add. Fewer come when every row has
            met a stop token.
        temperature: 0 (the default) takes the likeliest token, above 0
            samples.
        top_k, top_p: keep the likeliest tokens only, see `probabilities`.
        generator: a `torch.Generator`, which makes samples repeatable.
        stop_tokens: ids that end a row; a row that has ended repeats its own.
        chunk_size: tokens of the prompt in one pass (None: all).
        attention_mask: [B, T], False at padding, which must stand on the
            left (`left_pad` makes both).

    Raises:
        InputError: see `check_request` and `check_sampling`.
    """
    tokens = stream(model, input_ids, max_new_tokens, **options)
    return torch.cat([input_ids, *(t[:, None] for t in tokens)], dim=1)


# From tokens to text


def text_pieces(tokenizer, tokens, before=()):
    """Yield the text that each token adds; "" while a character is unfinished.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: ids, one by one.
        before: the ids of the prompt; their text is not repeated. Some
            tokenizers drop the space in front of a text's first word.
    """

    def decode(ids):
        return tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    ids = list(before)
    shown = len(decode(ids))
    for token in tokens:
        ids.append(int(token))
        text = decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield ""
        else:
            yield text[shown:]
            shown = len(text)


# Faster: the order of a matrix in memory


class PackedLinear(nn.Module):
    """A linear layer in the order that oneDNN reads: inference on a CPU.

    Args:
        weight: [O, I], float32 or bfloat16; is copied.
    """

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
    """Whether oneDNN packs weights of this dtype on this processor."""
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack_weights(model):
    """Swap the linear layers of a finished model for packed ones, in place.

    Args:
        model: a `LlamaForCausalLM`.

    Returns:
        The model. It can compute logits, and nothing else, from now on. It is
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


# Faster: fewer operators


def packed_linear(weight):
    """weight [O, I] -> a layer in oneDNN's order, where `can_pack` allows."""
    if can_pack(weight):
        return PackedLinear(weight)
    linear = nn.Linear(*weight.T.shape, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


class FastLayer(nn.Module):
    """A `LlamaDecoderLayer` for one row of text, in few operators.

    Args:
        layer: the layer whose weights are copied.
        config: a `LlamaConfig`.
        linear: makes a linear layer of a weight [O, I].
    """

    def __init__(self, layer, config, linear):
        super().__init__()
        a, m = layer.self_attn, layer.mlp
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.width, self.eps = config.head_dim, config.rms_norm_eps
        self.gain = layer.input_layernorm.weight
        qkv = a.q_proj.weight, a.k_proj.weight, a.v_proj.weight
        self.qkv = linear(torch.cat(qkv))
        self.out = linear(a.o_proj.weight)
        self.mlp_gain = layer.post_attention_layernorm.weight
        gate_up = m.gate_proj.weight, m.up_proj.weight
        self.gate_up = linear(torch.cat(gate_up))
        self.down = linear(m.down_proj.weight)

    def forward(self, x, cos, sin, bias, places, keys, values):
        """x [T, D] -> [T, D]; the rest as `FastModel` makes it."""
        (T, D), (H, K), C = x.shape, self.heads, self.width
        y = self.qkv(F.rms_norm(x, (D,), self.gain, self.eps))
        qk, v = y.view(T, -1, C).split([H + K, K], dim=1)
        qk = (qk * cos + qk.roll(C // 2, -1) * sin).to(x.dtype)
        q, k = qk.transpose(0, 1).split([H, K])  # [H, T, C], [K, T, C]
        keys.index_copy_(2, places, k[None])
        values.index_copy_(2, places, v.transpose(0, 1)[None])
        q = q.reshape(1, K, -1, C)  # [1, K, G*T, C]
        y = F.scaled_dot_product_attention(q, keys, values, bias)
        y = y.view(H, T, C).transpose(0, 1).reshape(T, H * C)  # [T, H*C]
        x = x + self.out(y)  # [T, D]
        y = self.gate_up(F.rms_norm(x, (D,), self.mlp_gain, self.eps))
        gate, up = y.chunk(2, dim=-1)  # [T, I], [T, I]
        return x + self.down(F.silu(gate) * up)  # [T, D]


# Try the compiler's own kernels for the products beside PyTorch's.
COMPILE = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}


def compiled_step(forward):
    """Compile a step of weights that never change; sets global `freezing`."""
    torch._inductor.config.freezing = True
    return torch.compile(forward, dynamic=False, options=COMPILE)


class FastModel(nn.Module):
    """A finished model, rewritten to read one row of text; no gradients.

    Args:
        model: a `LlamaForCausalLM`, not packed; its matrices are copied.
        linear: makes the linear layers, each of a weight [O, I].
        head: makes the head, likewise.
        compiled: compile `step`, once for each number of tokens and each
            capacity; sets inductor's global `freezing`. Only `step` is.
    """

    def __init__(
        self, model, linear=packed_linear, head=packed_linear, compiled=False
    ):
        super().__init__()
        body, self.config = model.model, model.config
        self.embeddings = body.embed_tokens.weight
        self.layers = nn.ModuleList(
            FastLayer(layer, model.config, linear) for layer in body.layers
        )
        self.norm, self.rotary = body.norm, body.rotary_emb
        self.head = head(model.output_weight)
        self.step = compiled_step(self.forward) if compiled else self.forward

    def forward(self, ids, places, memory):
        """ids [T], places [T] -> logits [T, V].

        Args:
            places: the positions of the tokens, and where the memory takes
                them.
            memory: keys and values [1, K, S, C] of each layer.
        """
        c, S = self.config, memory[0][0].shape[2]
        cos, sin = self.rotary(places)  # [T, C/2], [T, C/2]
        cos = torch.cat([cos, cos], -1)[:, None]  # [T, 1, C]
        sin = torch.cat([-sin, sin], -1)[:, None]  # [T, 1, C]
        x = self.embeddings[ids]  # [T, D]
        hidden = torch.arange(S, device=ids.device) > places[:, None]  # [T, S]
        bias = x.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        groups = c.num_attention_heads // c.num_key_value_heads
        how = cos, sin, bias.repeat(groups, 1), places  # bias [G*T, S]
        for layer, held in zip(self.layers, memory, strict=True):
            x = layer(x, *how, *held)  # [T, D]
        return self.head(self.norm(x))  # [T, V]


class Reader:
    """A model and what it has read, one row of text.

    Args:
        model: a `FastModel`.
        capacity: the most tokens that it may hold.
    """

    def __init__(self, model, capacity):
        self.model, self.length = model, 0
        c, table = model.config, model.embeddings
        shape = 1, c.num_key_value_heads, capacity, c.head_dim
        self.memory = [
            (table.new_zeros(shape), table.new_zeros(shape))
            for _ in model.layers
        ]

    @torch.no_grad()
    def read(self, tokens, by=None):
        """Read a list of T ids -> logits behind each, [T, V].

        Args:
            by: another `FastModel` of the same shape that reads instead.
        """
        model = by or self.model
        start, self.length = self.length, self.length + len(tokens)
        device = model.embeddings.device
        # Fresh tensors: other strides would be another program.
        ids = torch.tensor(tokens, device=device)  # [T]
        places = torch.arange(start, self.length, device=device)  # [T]
        # Prompts come in all lengths: the first call is never compiled.
        step = model.step if start > 0 else model
        return step(ids, places, self.memory)  # [T, V]

    def forget(self, length):
        """Keep the first `length` tokens, at most."""
        self.length = min(self.length, length)


# A draft for nothing: the text itself


def look_up(text, ahead, size=3):
    """Guess what follows from where the text stood like this before.

    Source: Saxena, 2023, prompt lookup decoding.

    Args:
        text: a list of ids.
        ahead: how many ids to guess.
        size: how many of the newest tokens must have stood there.

    Returns:
        A list of `ahead` ids; an empty one if they never stood there.
    """
    for start in range(len(text) - size - 1, -1, -1):
        if text[start : start + size] == text[-size:]:
            behind = text[start + size :]
            return [behind[i % len(behind)] for i in range(ahead)]
    return []


# A draft for new text: the model in four bits

GROUP = 32  # neighbours that share a step and a middle


def to_levels(weight):
    """Round each group of a matrix to 16 levels between its extremes.

    Args:
        weight: [O, I], I a multiple of 32. G groups a row.

    Returns:
        levels, int32 [O, I], 0 to 15; scales, bfloat16 [G, O, 2]: step and
        middle. A number is about middle + (level - 8) * step.
    """
    groups = weight.detach().float().unflatten(1, (-1, GROUP))  # [O, G, 32]
    low, high = groups.aminmax(dim=-1, keepdim=True)  # [O, G, 1]
    step = ((high - low) / 15).clamp(min=1e-12).bfloat16()  # [O, G, 1]
    middle = (low + 8 * step).bfloat16()  # [O, G, 1]
    levels = ((groups - middle) / step + 8).round().clamp(0, 15)
    scales = torch.cat([step, middle], -1).transpose(0, 1)  # [G, O, 2]
    return levels.int().flatten(1), scales.contiguous()


class Bfloat16Linear(nn.Module):
    """A linear layer of bfloat16 weights; x keeps its own dtype.

    Args:
        weight: [O, I].
    """

    def __init__(self, weight):
        super().__init__()
        self.linear = packed_linear(weight.bfloat16())

    def forward(self, x):
        """x [..., I] -> [..., O]."""
        return self.linear(x.bfloat16()).to(x.dtype)


class FourBitLinear(nn.Module):
    """A linear layer of 16 levels (`to_levels`), for a CPU.

    Args:
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


def guess(reader, draft, text, ahead):
    """What may follow: ids that the draft takes, or that `look_up` finds.

    Args:
        reader: has read all of `text` but its last id; is left as it was.
        draft: a `FastModel` of the same shape as the reader's, or None.
        text: a list of ids.
        ahead: the most steps of the draft.

    Returns:
        2 * ahead ids if the text gave the last of them, ahead if the draft
        did. Without a draft it may be none.
    """
    start, guesses = reader.length, []
    while len(guesses) < ahead:
        known = text + guesses
        found = look_up(known, 2 * ahead - len(guesses))
        if found or draft is None:
            guesses += found
            break
        logits = reader.read(known[-1:], by=draft)  # [1, V]
        guesses.append(logits[0].argmax().item())
    reader.forget(start)
    return guesses


@torch.no_grad()
def speculate(reader, draft, prompt, ahead=8):
    """Yield the greedy continuation by the reader's model, in pieces.

    Source: Leviathan et al., 2022 (arXiv 2211.17192), the greedy case.

    Args:
        reader: an empty `Reader`; needs room for 2 * ahead + 1 tokens more
            than are taken.
        draft: a `FastModel` of the same shape. None: `look_up` alone.
        prompt: a list of ids.
        ahead: how many tokens the draft guesses in a round.

    Yields:
        A list of 1 id, then lists of 1 to 2 * ahead + 1, without end.
    """
    text = [*prompt, reader.read(prompt)[-1].argmax().item()]
    yield text[-1:]
    while True:
        guesses = guess(reader, draft, text, ahead)
        right = reader.read([text[-1], *guesses]).argmax(-1).tolist()
        agree = 0
        while agree < len(guesses) and guesses[agree] == right[agree]:
            agree += 1
        text += right[: agree + 1]
        reader.forget(len(text) - 1)
        yield right[: agree + 1]


def stream_greedy(
    model, draft, input_ids, max_new_tokens=100, stop_tokens=(), ahead=8
):
    """Yield the tokens that `stream` would at temperature 0, ids [1].

    Args:
        model: decides; a `FastModel`.
        draft: guesses; a faster `FastModel` of the same shape, or None.
        input_ids: one prompt, [1, T].
        ahead: see `speculate`.

    Raises:
        InputError: see `check_request`; or there is more than one prompt.
    """
    check_request(model.config, input_ids, max_new_tokens)
    require(len(input_ids) == 1, "guessing ahead takes one prompt at a time")
    if max_new_tokens == 0:
        return
    room = input_ids.shape[1] + max_new_tokens + 2 * ahead + 1
    reader, left = Reader(model, room), max_new_tokens
    for tokens in speculate(reader, draft, input_ids[0].tolist(), ahead):
        for token in tokens[:left]:
            yield input_ids.new_tensor([token])
            if token in stop_tokens:
                return
        left -= len(tokens)
        if left <= 0:
            return
