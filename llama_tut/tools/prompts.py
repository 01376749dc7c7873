"""Prompts: text to ids and back, the ids that end a text, and what cannot be continued."""

import json
from pathlib import Path

from llama_tut.tools.files import InputError, first_line, read_json, require


def beginning(tokenizer):
    """The ids that the tokenizer puts before every text, such as [BOS].

    Some tokenizers also append an end of text. In a prompt the end would tell
    the model that nothing follows, so only what stands *before* the text
    counts here.
    """
    whole = tokenizer("a").input_ids
    text = tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start]
    return []


def encode_prompt(tokenizer, text):
    """A text that something will follow -> ids: the beginning, no end."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [*beginning(tokenizer), *ids]


def encode_chat(tokenizer, text):
    """A user's message, in the tokenizer's chat template -> ids.

    Raises:
        InputError: there is no template, or it refuses the message.
    """
    require(
        tokenizer.chat_template,
        "this tokenizer has no chat template: leave --chat out",
    )
    message = [{"role": "user", "content": text}]
    try:
        prompt = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise anything
        raise InputError(
            f"the chat template refuses this: {first_line(error)}"
        ) from error
    return tokenizer(prompt, add_special_tokens=False).input_ids


def stop_tokens(folder, tokenizer):
    """The ids that end a text, as a set.

    The union of what config.json, generation_config.json and the tokenizer
    say: chat models often name the end of an answer in one of them only.

    Raises:
        InputError: a file is damaged, or its `eos_token_id` is no id.
    """
    ids = {tokenizer.eos_token_id} - {None}
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        found = found if isinstance(found, list) else [found]
        for one in found:
            require(
                one is None or type(one) is int,
                f"{path}: eos_token_id {json.dumps(one)} is no token's id",
            )
        ids.update(one for one in found if one is not None)
    return ids


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
