# From notebooks/11_generate.ipynb by scripts/export.py: edit the notebook.
"""Generation: a key/value cache, sampling, and the loop that uses them.

Letters: B batch, T tokens of one call, S tokens so far (the keys), K kv
heads, C head_dim, D hidden_size, V vocabulary.
"""

from itertools import chain, islice

import torch

from llama_tut.tools.files import require
from llama_tut.tools.requests import (
    check_finite,
    check_request,
    check_sampling,
)

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
    """One `LayerCache` a layer: what `LlamaForCausalLM` takes as `cache`.

    Args:
        config: a `LlamaConfig`; batch_size: B.
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

    def truncate(self, length):
        """Take tokens back: keep the first `length`, at most."""
        for layer in self:
            layer.length = min(layer.length, length)

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
        ranked[:, min(top_k, p.shape[-1]) :] = 0
        ranked = ranked / ranked.sum(-1, keepdim=True)  # [B, V]
    if top_p is not None:
        before = ranked.cumsum(-1) - ranked  # [B, V]
        ranked = ranked * (before < top_p)  # [B, V]
    ranked = ranked / ranked.sum(-1, keepdim=True)  # [B, V]
    return torch.zeros_like(p).scatter(-1, order, ranked)  # [B, V]


def choose(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """The next token of each row: logits [B, V] -> ids [B].

    Temperature 0 takes the likeliest. Raises InputError at a NaN logit.
    """
    check_finite(logits)
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

    attention_mask [B, S], True at tokens -> position_ids [B, T], which count
    tokens only, and the mask [B, 1, T, S], True where the query may read.
    """
    S = attention_mask.shape[1]
    counted = (attention_mask.cumsum(1) - 1).clamp(min=0)  # [B, S]
    keys = torch.arange(S, device=attention_mask.device)  # [S]
    queries = keys[start:, None]  # [T, 1]
    mask = (keys <= queries) & attention_mask[:, None, None]  # [B, 1, T, S]
    # A softmax over nothing is NaN, and NaN spreads: padding reads itself.
    mask = mask | (keys == queries)  # [B, 1, T, S]
    return counted[:, start:], mask  # [B, T], [B, 1, T, S]


# The loop with a cache


def next_logits(model, input_ids, cache, attention_mask=None):
    """Run T new tokens after those in the cache -> the next logits, [B, V].

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
    capacity, dtype = T + max_new_tokens, model.output_weight.dtype
    cache = KVCache(model.config, B, capacity, dtype, device)
    # Prefill: the prompt, in one piece or in chunks.
    for chunk in input_ids.split(min(chunk_size or T, T), dim=1):
        logits = next_logits(model, chunk, cache, attention_mask)
    tokens, ended = input_ids[:, -1], input_ids.new_zeros(B).bool()
    stops = torch.tensor(list(stop_tokens), dtype=torch.long, device=device)
    # Decode: one token a round.
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
        InputError: the request cannot work, see `llama_tut.tools.requests`,
            or the logits are not finite.
    """
    tokens = stream(model, input_ids, max_new_tokens, **options)
    return torch.cat([input_ids, *(t[:, None] for t in tokens)], dim=1)


# Guess ahead, and let the model check


def prompt_lookup(text, ahead, size=3):
    """Guess what follows from what followed the newest tokens before.

    Args:
        text: a list of ids; ahead: how many ids to guess.
        size: how many of the newest tokens must have occurred before.

    Returns:
        A list of `ahead` ids, or an empty one. Source: Saxena, 2023.
    """
    for start in range(len(text) - size - 1, -1, -1):
        if text[start : start + size] == text[-size:]:
            followed = text[start + size :]
            return [followed[i % len(followed)] for i in range(ahead)]
    return []


class Reader:
    """A model and one row of text that it read, `capacity` tokens at most."""

    def __init__(self, model, capacity):
        weight = model.output_weight
        self.model, self.device = model, weight.device
        self.cache = KVCache(
            model.config, 1, capacity, weight.dtype, weight.device
        )

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

    Source: Leviathan et al., 2022 (arXiv 2211.17192), the greedy case.

    Args:
        reader: an empty `Reader`, with room for `ahead` + 1 tokens more than
            are taken; prompt: a list of ids.
        ahead: the most tokens that are guessed in a round.
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
    """Yield the tokens that `stream` would at temperature 0, ids [1].

    Args:
        input_ids: one prompt, [1, T].
        ahead: see `speculate`.
        make_reader: (model, capacity) -> a `Reader`, or one like it.

    Raises:
        InputError: as `stream`; or there is more than one prompt.
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
