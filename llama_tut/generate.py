# From notebooks/10_generate.ipynb by scripts/export.py: edit the notebook.
"""Generation: a key/value cache, sampling, and the loop that uses them.

Letters: B batch, T tokens in one call, S tokens so far (the keys), K kv
heads, C head_dim, D hidden_size, V vocabulary, L layers.
"""

import torch
from torch.nn import functional as F

from llama_tut.config import InputError

# The cache


class LayerCache:
    """Keys and values of one layer, in memory that is taken once.

    Args:
        shape: (B, K, capacity, C), the room for keys and as much for values.
    """

    def __init__(self, shape, dtype=None, device=None):
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def update(self, k, v):
        """Append k, v [B, K, T, C] -> views of all so far, [B, K, S, C].

        Raises:
            InputError: the cache is full.
        """
        start, end = self.length, self.length + k.shape[2]
        if end > self.keys.shape[2]:
            room = self.keys.shape[2]
            raise InputError(
                f"the cache has room for {room} tokens, not {end}"
            )
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache(list):
    """One `LayerCache` a layer: what `LlamaForCausalLM` takes as `cache`.

    Args:
        config: a `LlamaConfig`.
        batch_size: B.
        capacity: the largest number of tokens a row may have.
    """

    def __init__(self, config, batch_size, capacity, dtype=None, device=None):
        shape = (
            batch_size,
            config.num_key_value_heads,
            capacity,
            config.head_dim,
        )
        layers = range(config.num_hidden_layers)
        super().__init__(LayerCache(shape, dtype, device) for _ in layers)

    @property
    def length(self):
        """S: the number of tokens held so far."""
        return self[0].length

    def nbytes(self):
        """The bytes of memory that all layers take."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self)


# From logits to a token


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution to draw from: temperature, then top-k, then top-p.

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
    order = p.argsort(dim=-1, descending=True, stable=True)  # [B, V]
    ranked = p.gather(-1, order)  # [B, V]
    if top_k is not None:
        ranked[:, top_k:] = 0
        ranked = ranked / ranked.sum(-1, keepdim=True)  # [B, V]
    if top_p is not None:
        before = ranked.cumsum(-1) - ranked  # [B, V]
        ranked = ranked.masked_fill(before >= top_p, 0)  # [B, V]
    ranked = ranked / ranked.sum(-1, keepdim=True)  # [B, V]
    return torch.zeros_like(p).scatter(-1, order, ranked)  # [B, V]


def choose(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """The next token of each row: logits [B, V] -> ids [B].

    Temperature 0 takes the likeliest token (greedy).
    """
    if temperature == 0:
        return logits.argmax(-1)  # [B]
    p = probabilities(logits, temperature, top_k, top_p)  # [B, V]
    return torch.multinomial(p, 1, generator=generator)[:, 0]  # [B]


# Prompts of different lengths


def left_pad(prompts, pad_id=0):
    """Lists of ids -> input_ids [B, T], attention_mask [B, T] (True: token).

    The padding stands on the left, so that every row ends in its last token.
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
        position_ids [B, T] that count tokens only, and the mask [B, 1, T, S].
        Padding reads itself: a row with nothing to read has no softmax.
    """
    S = attention_mask.shape[1]
    counted = attention_mask.cumsum(1) - 1  # [B, S]
    keys = torch.arange(S, device=attention_mask.device)  # [S]
    queries = keys[start:, None]  # [T, 1]
    mask = (keys <= queries) & attention_mask[:, None, None, :]  # [B, 1, T, S]
    mask = mask | (keys == queries)  # [B, 1, T, S]
    return counted.clamp(min=0)[:, start:], mask


# The loop


def next_logits(model, input_ids, cache, attention_mask=None):
    """Run T new tokens behind the cache -> logits of what follows, [B, V].

    Args:
        input_ids: [B, T], the tokens that the cache does not hold yet.
        attention_mask: None, or [B, S] of all tokens so far (see `left_pad`).
    """
    position_ids = mask = None
    if attention_mask is not None:
        end = cache.length + input_ids.shape[1]
        position_ids, mask = padded_positions(
            attention_mask[:, :end], cache.length
        )  # [B, T], [B, 1, T, S]
    hidden = model.model(input_ids, position_ids, mask, cache)  # [B, T, D]
    return F.linear(hidden[:, -1], model.output_weight)  # [B, V]


def check_request(
    config, input_ids, max_new_tokens, temperature, top_k, top_p
):
    """Refuse what cannot be generated.

    Raises:
        InputError: an empty prompt, one that leaves no room for the new
            tokens, ids outside the vocabulary, sampling options out of range.
    """
    B, T = input_ids.shape
    room = config.max_position_embeddings
    if T == 0 or B == 0:
        raise InputError("the prompt is empty: give at least one token")
    if T + max_new_tokens > room:
        raise InputError(
            f"{T} tokens of prompt and {max_new_tokens} new ones do not fit "
            f"into the model's context of {room}: shorten one of them"
        )
    if input_ids.min() < 0 or input_ids.max() >= config.vocab_size:
        raise InputError(
            f"token {input_ids.max()} is outside the vocabulary of "
            f"{config.vocab_size}: does the tokenizer belong to this model?"
        )
    if temperature < 0:
        raise InputError(f"temperature {temperature}: must be 0 or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k {top_k}: must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p}: must be above 0 and at most 1")


@torch.no_grad()
def stream(
    model,
    input_ids,
    max_new_tokens=100,
    temperature=0.0,
    top_k=None,
    top_p=None,
    generator=None,
    stop_tokens=(),
    chunk_size=None,
    attention_mask=None,
):
    """Yield the new tokens, ids [B] at a time; arguments as `generate`."""
    check_request(
        model.config, input_ids, max_new_tokens, temperature, top_k, top_p
    )
    (B, T), device = input_ids.shape, input_ids.device
    room = T + max_new_tokens
    if attention_mask is not None:
        attention_mask = F.pad(
            attention_mask.bool(), (0, room - T), value=True
        )
    cache = KVCache(model.config, B, room, model.output_weight.dtype, device)
    for chunk in input_ids.split(chunk_size or T, dim=1):
        logits = next_logits(model, chunk, cache, attention_mask)  # [B, V]
    stops = torch.tensor(list(stop_tokens), dtype=torch.long, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)  # [B]
    tokens = input_ids[:, -1]  # [B]
    for step in range(max_new_tokens):
        if step > 0:
            logits = next_logits(model, tokens[:, None], cache, attention_mask)
        chosen = choose(logits, temperature, top_k, top_p, generator)  # [B]
        tokens = torch.where(ended, tokens, chosen)  # [B]
        yield tokens
        ended = ended | torch.isin(tokens, stops)  # [B]
        if len(stops) and ended.all():
            return


def generate(
    model,
    input_ids,
    max_new_tokens=100,
    temperature=0.0,
    top_k=None,
    top_p=None,
    generator=None,
    stop_tokens=(),
    chunk_size=None,
    attention_mask=None,
):
    """Continue each row: input_ids [B, T] -> ids [B, T + new].

    Args:
        model: a `LlamaForCausalLM`.
        max_new_tokens: the most tokens to add. Fewer come when every row has
            met a stop token; a row that met one earlier repeats it.
        temperature: 0 takes the likeliest token, above 0 samples.
        top_k, top_p: keep the likeliest tokens only, see `probabilities`.
        generator: a `torch.Generator` that makes the samples repeatable.
        stop_tokens: ids that end a row.
        chunk_size: run the prompt in pieces of so many tokens.
        attention_mask: [B, T], False at padding, which must be on the left
            (`left_pad` makes both).

    Raises:
        InputError: see `check_request`.
    """
    tokens = stream(
        model,
        input_ids,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        generator,
        stop_tokens,
        chunk_size,
        attention_mask,
    )
    new = [t[:, None] for t in tokens]
    return torch.cat([input_ids, *new], dim=1)  # [B, T+N]
