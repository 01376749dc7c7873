"""Requests: what a model cannot continue or score is refused in one line."""

from llama_tut.tools.files import require


def check_request(config, input_ids, new=1, attention_mask=None):
    """Refuse a prompt that cannot be continued by `new` tokens.

    Raises:
        InputError: it is empty, leaves no room in the context, has ids
            outside the vocabulary, or is padded elsewhere than on the left.
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
    if attention_mask is not None:
        mask = attention_mask.int()
        require(
            mask.shape == input_ids.shape
            and bool((mask[:, -1] == 1).all() and (mask.diff() >= 0).all()),
            "the attention mask must be False at padding on the left and "
            "True at every token after it (see left_pad)",
        )


def check_sampling(temperature=0.0, top_k=None, top_p=None, generator=None):
    """Refuse options of `choose` that are out of range (InputError)."""
    require(
        temperature == 0 or temperature >= 1e-6,
        f"temperature {temperature}: must be 0, or at least 0.000001",
    )
    require(top_k is None or top_k >= 1, f"top_k {top_k}: must be 1 or more")
    require(
        top_p is None or 0 < top_p <= 1,
        f"top_p {top_p}: must be above 0 and at most 1",
    )


def check_finite(logits):
    """Refuse logits of a damaged model: argmax would take a NaN's place."""
    require(
        logits.isfinite().all(),
        "the model's logits are not finite: its weights are damaged, or its "
        "dtype is too small for them",
    )


def check_items(items, limit, vocab_size):
    """Refuse what a model cannot score.

    Args:
        limit: the model's context, or None.

    Raises:
        InputError: an ending is empty or exceeds the context, or an id is
            outside the vocabulary.
    """
    for context, endings in items:
        lengths = [len(ending) for ending in endings]
        require(min(lengths) > 0, "an ending has no token of its own")
        require(
            limit is None or max(lengths) <= limit,
            f"an ending has {max(lengths)} tokens, the model's context only "
            f"{limit}",
        )
        highest = max(map(max, filter(None, [context, *endings])))
        require(
            highest < vocab_size,
            f"an example has token {highest}, the model only {vocab_size}: "
            "does the tokenizer belong to it?",
        )
