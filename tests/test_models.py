"""What scripts share that use a finished model: the right thing is blamed."""

import json

import pytest
from small_model import caller, refused, save_small_model


@pytest.fixture
def folder(tmp_path):
    return save_small_model(tmp_path / "m")


@pytest.fixture
def sample(monkeypatch, capsys):
    return caller("sample", monkeypatch, capsys)


def write(path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden_size", "32"),
        ("rope_scaling", "llama3"),
        ("quantization_config", "fp8"),
        ("num_attention_heads", 0),
        ("tie_word_embeddings", None),
        ("eos_token_id", "0"),
        ("hidden_act", ["silu"]),
    ],
)
def test_a_wrong_config_is_not_blamed_on_the_tokenizer(
    name, value, folder, sample
):
    write(folder / "config.json", **{name: value})
    found = sample("--model", folder, "--prompt", "x")
    refused(found, name)
    assert "tokenizer" not in found[2]


@pytest.mark.parametrize(
    "text, said",
    [("", "no readable JSON"), ("[" * 200_000, "recursion"), ("[]", "object")],
    ids=["empty", "deep", "list"],
)
def test_a_config_that_is_no_json(text, said, folder, sample):
    (folder / "config.json").write_text(text)
    refused(sample("--model", folder, "--prompt", "x"), "config.json", said)


def test_a_byte_order_mark(folder, sample):
    path = folder / "config.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    refused(sample("--model", folder, "--prompt", "x"), "byte order mark")


def test_a_damaged_tokenizer_says_why(folder, sample):
    (folder / "tokenizer.json").write_text("{")
    refused(sample("--model", folder, "--prompt", "x"), "tokenizer", "cannot")


def test_a_token_that_the_model_does_not_know_is_a_warning(folder, sample):
    """Mirrors of Llama 2 have a padding token with the id 32,000."""
    path = folder / "tokenizer.json"
    extra = json.loads(path.read_text())["added_tokens"]
    token = {"id": 257, "content": "<pad>", "special": True}
    token |= dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    write(path, added_tokens=[*extra, token])
    options = ("--model", folder, "--max-new-tokens", "2")
    code, out, err = sample(*options, "--prompt", "the cat")
    assert code == 0 and out.startswith("the cat")
    assert err.startswith("warning: the tokenizer") and err.count("\n") == 1
    code, out, err = sample(*options, "--prompt", "a<pad>b")
    assert code == 2 and out == "" and "257" in err
