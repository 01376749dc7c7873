# From notebooks/11_generate.ipynb by scripts/export.py: edit the notebook.
"""Generation: a key/value cache, sampling, and the loop that uses them.

Letters: B batch, T tokens of one call, S tokens so far (the keys), K kv
heads, C head_dim, D hidden_size, V vocabulary.
"""

from itertools import chain, islice

import torch

from llama_tut.tools.files import require
from llama_tut.tools.prompts import check_finite, check_request, check_sampling

# The cache


class LayerCache:
    """Keys and values of one layer, each of shape (B, K, capacity, C)."""

    def __init__(self, shape, dtype=None, device=None):
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def update(self, k, v):
        """Append k, v [B, K, T, C] -> views of all so far, [B, K, S, C]."""
        start, end = self.length, self.length + k.shape[2]
        if end > self.keys.shape[2]:
            room = self.keys.shape[2]
            raise ValueError(f"the cache holds {room} tokens, not {end}")
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache(list):
    """A `LayerCache` for each layer of a config: the model's `cache`."""

    def __init__(self, config, batch_size, capacity, dtype=None, device=None):
        heads, width = config.num_key_value_heads, config.head_dim
        shape = (batch_size, heads, capacity, width)
        for _ in range(config.num_hidden_layers):
            self.append(LayerCache(shape, dtype, device))

    @property
    def length(self):
        """S: the number of tokens held so far."""
        return self[0].length

    def truncate(self, length):
        """Take tokens back: keep the first `length`, at most."""
        for layer in self:
            layer.length = min(layer.length, length)


# From logits to a token


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits [B, V] -> what to draw from: float32 [B, V], rows of sum 1.

    `temperature` above 0 divides the logits; `top_k` keeps so many
    of the likeliest; `top_p` keeps the likeliest, as few as together reach it
    (Holtzman et al., 2019).
    """
    p = (logits.float() / temperature).softmax(-1)  # [B, V]
    if top_k is None and top_p is None:
        return p  # [B, V]
    order = p.argsort(dim=-1, descending=True, stable=True)  # [B, V]
    ranked = p.gather(-1, order)  # [B, V]
    if top_k is not None:
        ranked[:, min(top_k, p.shape[-1]) :] = 0
        ranked = ranked / ranked.sum(-1, keepdim=True)  # [B, V]
    if top_p is not None:
        before = ranked.cumsum(-1) - ranked  # [B, V]
        ranked = ranked * (before < top_p)  # [B, V]
    ranked = ranked / ranked.sum(-1, keepdim=True)  # [B, V]
    return torch.zeros_like(p).scatter(-1, order, ranked)  # [B, V]


def choose(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """Logits [B, V] -> the next ids [B]; temperature 0: the likeliest."""
    check_finite(logits)
    if temperature == 0:
        return logits.argmax(-1)  # [B]
    p = probabilities(logits, temperature, top_k, top_p)  # [B, V]
    return torch.multinomial(p, 1, generator=generator)[:, 0]  # [B]


# Prompts of different lengths


def left_pad(prompts, pad_id=0):
    """Lists of ids -> ids and mask (True: a token), padded left, [B, T]."""
    T = max(map(len, prompts))
    rows = [[pad_id] * (T - len(p)) + list(p) for p in prompts]
    mask = [[False] * (T - len(p)) + [True] * len(p) for p in prompts]
    return torch.tensor(rows), torch.tensor(mask)


def padded_positions(attention_mask, start=0):
    """Positions and mask of the queries start .. S of left-padded rows.

    attention_mask [B, S] -> position_ids [B, T], which count tokens only,
    and the mask [B, 1, T, S], True where a query may read a key.
    """
    S = attention_mask.shape[1]
    counted = (attention_mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
    keys = torch.arange(S, device=attention_mask.device)  # [S]
    queries = keys[start:, None]  # [T, 1]
    mask = (keys <= queries) & attention_mask[:, None, None]  # [B, 1, T, S]
    # A softmax over nothing may be NaN, which spreads: padding reads itself.
    mask = mask | (keys == queries)  # [B, 1, T, S]
    return counted[:, start:], mask  # [B, T], [B, 1, T, S]


# The loop with a cache


def next_logits(model, input_ids, cache, attention_mask=None):
    """Run the tokens [B, T] that the cache lacks -> the next logits [B, V].

    `attention_mask`: None, or [B, at least S], of held tokens and new ones.
    """
    position_ids = mask = None
    if attention_mask is not None:
        start, end = cache.length, cache.length + input_ids.shape[1]
        position_ids, mask = padded_positions(attention_mask[:, :end], start)
    hidden = model.model(input_ids, position_ids, mask, cache)  # [B, T, D]
    return model.head(hidden[:, -1])  # [B, V]


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
    check_request(model.config, input_ids, max_new_tokens, attention_mask)
    check_sampling(**sampling)
    if attention_mask is not None:
        new = attention_mask.new_ones(B, max_new_tokens)
        attention_mask = torch.cat([attention_mask, new], dim=1).bool()
    dtype = model.output_weight.dtype
    cache = KVCache(model.config, B, T + max_new_tokens, dtype, device)
    for chunk in input_ids.split(min(chunk_size or T, T), dim=1):
        logits = next_logits(model, chunk, cache, attention_mask)
    tokens, ended = input_ids[:, -1], input_ids.new_zeros(B).bool()
    stops = torch.tensor(list(stop_tokens), dtype=torch.long, device=device)
    for left in reversed(range(max_new_tokens)):
        tokens = torch.where(ended, tokens, choose(logits, **sampling))
        yield tokens
        ended = ended | torch.isin(tokens, stops)
        if left == 0 or ended.all():
            return
        logits = next_logits(model, tokens[:, None], cache, attention_mask)


def generate(model, input_ids, max_new_tokens=100, **options):
    """Continue each row: input_ids [B, T] -> ids [B, T + new].

    Args:
        temperature: 0 (the default) takes the likeliest token, above 0 draws.
        top_k, top_p: see `probabilities`; generator: a `torch.Generator`.
        stop_tokens: ids that end a row; a row that has ended repeats its own.
        chunk_size: tokens of the prompt in one pass (None: all).
        attention_mask: [B, T], False at padding on the left (`left_pad`).

    Raises:
        InputError: the request cannot work, or a logit is not finite.
    """
    tokens = stream(model, input_ids, max_new_tokens, **options)
    return torch.cat([input_ids, *(t[:, None] for t in tokens)], dim=1)


# Guess ahead, and let the model check


def prompt_lookup(text, ahead, size=3):
    """A list of ids -> `ahead` ids that may follow, or [] (Saxena, 2023).

    The guess is what followed the newest `size` ids where they stood before.
    """
    for start in range(len(text) - size - 1, -1, -1):
        if text[start : start + size] == text[-size:]:
            followed = text[start + size :]
            return [followed[i % len(followed)] for i in range(ahead)]
    return []


class Reader:
    """A model and one row of text that it read, `capacity` tokens at most."""

    def __init__(self, model, capacity):
        self.model, self.device = model, model.output_weight.device
        dtype = model.output_weight.dtype
        self.cache = KVCache(model.config, 1, capacity, dtype, self.device)

    @torch.no_grad()
    def read(self, tokens, last):
        """Read a list of ids -> logits after the `last` of them, [last, V]."""
        ids = torch.tensor([tokens], device=self.device)  # [1, T]
        hidden = self.model.model(ids, cache=self.cache)  # [1, T, D]
        return self.model.head(hidden[0, -last:])  # [last, V]

    def truncate(self, length):
        """Take tokens back: keep the first `length`, at most."""
        self.cache.truncate(length)

    def propose(self, text, ahead):
        """Guess up to `ahead` ids that may follow a list of ids."""
        return prompt_lookup(text, ahead)


def speculate(reader, prompt, ahead=16):
    """Yield the greedy continuation, a list of ids for each pass, without end.

    The reader is empty, and has room for `ahead` + 1 tokens more than are
    taken. Source: Leviathan et al., 2022 (arXiv 2211.17192), the greedy case.
    """
    text, unread, guesses = list(prompt), list(prompt), []
    while True:
        logits = reader.read([*unread, *guesses], len(guesses) + 1)
        check_finite(logits)
        answers = logits.argmax(-1).tolist()
        agree = 0
        while agree < len(guesses) and guesses[agree] == answers[agree]:
            agree += 1
        text += answers[: agree + 1]
        reader.truncate(len(text) - 1)
        yield answers[: agree + 1]
        unread, guesses = text[-1:], reader.propose(text, ahead)


def stream_guessing(
    model,
    input_ids,
    max_new_tokens=100,
    stop_tokens=(),
    ahead=16,
    make_reader=Reader,
):
    """One prompt [1, T]: yield what `stream` would at temperature 0, ids [1].

    `make_reader`: (model, capacity) -> a `Reader`, or one like it.
    """
    check_request(model.config, input_ids, max_new_tokens)
    require(len(input_ids) == 1, "guessing takes one prompt at a time")
    prompt = input_ids[0].tolist()
    reader = make_reader(model, len(prompt) + max_new_tokens + ahead + 1)
    tokens = chain.from_iterable(speculate(reader, prompt, ahead))
    for token in islice(tokens, max_new_tokens):
        yield input_ids.new_tensor([token])
        if token in stop_tokens:
            return
