"""tools/prompts: text to ids, ids to text, and the ids that end a text."""

import json

import pytest
from small_model import byte_tokenizer, special_tokenizer

from llama_tut.tools.files import InputError
from llama_tut.tools.prompts import (
    beginning,
    encode_chat,
    encode_prompt,
    stop_tokens,
    text_pieces,
)


@pytest.mark.parametrize("before", [[], ["<s>"], ["<s>", "<s>"]])
@pytest.mark.parametrize("after", [[], ["</s>"]])
def test_a_prompt_begins_and_does_not_end(before, after):
    tokenizer = special_tokenizer(before, after)
    assert beginning(tokenizer) == [0] * len(before)
    for text in ("the cat", ""):
        ids = encode_prompt(tokenizer, text)
        assert tokenizer.convert_ids_to_tokens(ids) == [
            *before,
            *text.replace(" ", "Ġ"),
        ]


TEMPLATES = {
    "{{ raise_exception('needs a system message') }}": "a system message",
    "{% for m in messages %}": "the chat template refuses this: ",
    "{{ a.b }}": "'a' is undefined",
    "": "no chat template",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_refuses_is_one_line(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=TEMPLATES[template]) as caught:
        encode_chat(tokenizer, "hi")
    assert "\n" not in str(caught.value)


def test_a_chat_is_what_the_template_says():
    tokenizer = special_tokenizer(["<s>"], ["</s>"])
    tokenizer.chat_template = "<s>{{ messages[0]['content'] }}!"
    ids = encode_chat(tokenizer, "hi")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "h", "i", "!"]


@pytest.mark.parametrize(
    "config, generation, stops",
    [
        (None, None, {256}),
        ({}, {}, {256}),
        ({"eos_token_id": 3}, {"eos_token_id": [4, 5]}, {3, 4, 5, 256}),
        ({"eos_token_id": None}, {"eos_token_id": 0}, {0, 256}),
    ],
)
def test_stops_are_those_of_all_three(tmp_path, config, generation, stops):
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
    ):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert stop_tokens(tmp_path, byte_tokenizer()) == stops


@pytest.mark.parametrize("text", ["{", "[1]", '{"eos_token_id": "</s>"}'])
def test_a_damaged_config_of_generation_is_one_line(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match="generation_config.json"):
        stop_tokens(tmp_path, byte_tokenizer())


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def test_text_is_held_back_until_its_character_is_whole():
    text = "a π 🦙 z"
    pieces = list(text_pieces(Bytes(), text.encode()))
    assert "".join(pieces) == text
    assert pieces.count("") == 1 + 3
    rest = text_pieces(Bytes(), text.encode()[2:], text.encode()[:2])
    assert "".join(rest) == text[2:]
