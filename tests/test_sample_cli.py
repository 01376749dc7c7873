"""scripts/sample.py: what it writes, and what it refuses in one line."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from small_model import (
    ROOT,
    byte_tokenizer,
    caller,
    damage,
    refused,
    special_tokenizer,
)

from llama_tut.generate import generate
from llama_tut.weights import load_pretrained


@pytest.fixture
def sample(monkeypatch, capsys):
    return caller("sample", monkeypatch, capsys)


def test_greedy_text_is_that_of_generate(folder):
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer("To be").input_ids])
    model = load_pretrained(folder)
    new = generate(model, ids, max_new_tokens=20, stop_tokens=[256])[
        0, 5:
    ].tolist()
    command = [sys.executable, ROOT / "scripts/sample.py", "--model", folder]
    command += ["--prompt", "To be", "--max-new-tokens", "20", "--stats"]
    command += ["--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert done.stdout.rstrip("\n") == "To be" + text.rstrip("\ufffd\n")
    assert "tokens, " in done.stderr


def test_a_seed_repeats_the_text(folder, sample):
    always = ("--model", folder, "--prompt", "a", "--seed")
    texts = [sample(*always, seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_text_fills_the_context_and_ends(folder, sample):
    code, _, err = sample("--model", folder, "--prompt", "x" * 60, "--stats")
    assert code == 0
    assert err.startswith("4 tokens")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--prompt", "x" * 65], ["65 tokens of prompt", "context of 64"]),
        (["--prompt", "x", "--max-new-tokens", 64], ["1 tokens", "64 new"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt", "x", "--top-p", 2], ["top_p"]),
        (["--prompt", "x", "--chat"], ["chat template"]),
        (["--prompt", "x", "--max-new-tokens", 0], ["--max-new-tokens"]),
        (["--prompt", "x", "--chunk-size", 0], ["--chunk-size"]),
        (["--prompt", "x", "--seed", 10**20], ["--seed", "64 bits"]),
        (["--prompt", "x\udcff"], ["--prompt", "UTF-8"]),
        (["--prompt", "x", "--temperature", 1e-30], ["temperature"]),
        (
            ["--prompt", "x", "--temperature", 0, "--fast", "--plain"],
            ["--fast and --plain"],
        ),
        (["--prompt", "x", "--colour", "red"], ["--colour"]),
        (["--prompt", "x", "--device", "cuda:77"], ["device"]),
        (["--prompt", "x", "--device", "meta"], ["--device meta", "cpu"]),
        ([], ["--prompt"]),
    ],
)
def test_bad_options_are_one_line(folder, sample, options, words):
    refused(sample("--model", folder, *options), *words)


def test_bad_folders_are_one_line(folder, sample, tmp_path):
    def copy(name, *left_out):
        out = tmp_path / name
        shutil.copytree(folder, out)
        for file in left_out:
            (out / file).unlink()
        return out

    cases = {
        "config.json": copy("a", "config.json"),
        "no tokenizer": copy("b", "tokenizer.json"),
        "safetensors": copy("c", "model.safetensors"),
        "there is no folder": tmp_path / "nowhere",
    }
    damaged = copy("d")
    (damaged / "tokenizer.json").write_text("{")
    cases["cannot be read"] = damaged
    other = copy("e")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    cases["99"] = other
    for word, path in cases.items():
        refused(sample("--model", path, "--prompt", "x"), word)


@pytest.mark.parametrize(
    "way",
    [
        ("--plain",),
        ("--fast",),
        ("--fast", "--device", "cpu:0"),
        ("--chunk-size", 2),
    ],
)
def test_every_way_gives_the_same_text(folder, sample, way):
    always = ("--model", folder, "--prompt", "To be", "--temperature", "0")
    code, text, err = sample(*always)
    assert (code, err) == (0, "")
    assert sample(*always, *way)[1] == text


def test_plain_samples_are_those_of_packed_weights(folder, sample):
    always = ("--model", folder, "--prompt", "To be", "--seed", 3)
    assert sample(*always)[1] == sample(*always, "--plain")[1]


def test_large_numbers_are_no_tracebacks(folder, sample):
    always = ("--model", folder, "--prompt", "x", "--max-new-tokens", 2)
    large = ("--top-k", 10**20, "--chunk-size", 10**20)
    assert sample(*always, *large)[0] == 0


@pytest.mark.parametrize(
    "options", [(), ("--temperature", 0), ("--temperature", 0, "--fast")]
)
def test_a_damaged_model_is_one_line(folder, sample, tmp_path, options):
    damaged = damage(folder, tmp_path / "damaged")
    found = sample("--model", damaged, "--prompt", "the", *options)
    refused(found, "the model's logits are not finite")


def test_stops_named_for_generation_count(folder, sample, tmp_path):
    """Chat models often name the end of an answer only there."""
    always = ("--prompt", "To be", "--temperature", "0", "--stats")
    always += ("--max-new-tokens", 12)
    tokenizer, model = byte_tokenizer(), load_pretrained(folder)
    ids = torch.tensor([tokenizer("To be").input_ids])
    new = generate(model, ids, 12)[0, 5:].tolist()
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    text = json.dumps({"eos_token_id": [256, new[3]]})
    (other / "generation_config.json").write_text(text)
    wanted = new.index(new[3]) + 1
    assert sample("--model", other, *always)[2].startswith(f"{wanted} tokens")
    (other / "generation_config.json").write_text("{")
    refused(sample("--model", other, *always), "generation_config.json")


def test_a_tokenizer_that_ends_texts_does_not_end_the_prompt(
    folder, sample, tmp_path
):
    texts = []
    for after in ([], ["</s>"]):
        other = tmp_path / f"other{len(after)}"
        shutil.copytree(folder, other)
        special_tokenizer(["<s>"], after).save_pretrained(other)
        always = ("--model", other, "--prompt", "To be", "--temperature", 0)
        texts.append(sample(*always))
        assert texts[-1][0] == 0
    assert texts[0] == texts[1]


def test_a_token_outside_the_vocabulary_is_one_line(folder, sample, tmp_path):
    """Refused only where the prompt really holds it."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(other)
    assert sample("--model", other, "--prompt", "a b")[0] == 0
    code, out, err = sample("--model", other, "--prompt", "a<pad>b")
    assert (code, out) == (2, "")
    assert err.startswith("warning: the tokenizer") and err.count("\n") == 2
    assert "error: the prompt has tokens 64 to 257, the model has 257" in err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fast_on_cuda_writes_the_same_text(folder, sample):
    greedy = ("--prompt", "aba", "--temperature", "0", "--device", "cuda")
    ways = ("--fast", "--plain")
    fast, plain = (sample("--model", folder, *greedy, way) for way in ways)
    assert fast == plain


@pytest.mark.parametrize(
    "options", [(), ("--temperature", "0.5"), ("--device", "meta")]
)
def test_fast_is_for_the_greedy_choice(folder, sample, options):
    found = sample("--model", folder, "--prompt", "a", "--fast", *options)
    refused(found, "--temperature 0")
