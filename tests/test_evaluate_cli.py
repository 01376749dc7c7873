"""scripts/evaluate.py: what it prints and writes, and what it refuses in one line."""

import json

import pytest
from small_model import caller, damage, refused

from llama_tut.hellaswag import accuracy, read_examples


@pytest.fixture
def evaluate(monkeypatch, capsys):
    return caller("evaluate", monkeypatch, capsys)


def write(path, count=3, **changes):
    """A file of short examples."""
    record = {
        "activity_label": "a",
        "ctx": "He opens the door and",
        "endings": ["waits.", "goes in.", "sings.", "sleeps."],
        "label": "1",
    }
    lines = [json.dumps(record | {"label": i % 4}) for i in range(count - 1)]
    lines.append(json.dumps(record | changes))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_three_accuracies_and_a_file(folder, evaluate, tmp_path):
    out = tmp_path / "p.jsonl"
    file = write(tmp_path / "x.jsonl", 6)
    options = ("--hellaswag", file, "--limit", 5, "--predictions", out)
    code, text, err = evaluate("--model", folder, *options)
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["index"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["label"] for r in rows] == [
        e.label for e in read_examples(file, 5)
    ]
    names = ["index", "label", "pred_sum", "pred_char", "pred_token", "scores"]
    assert all(list(r) == names and len(r["scores"]) == 4 for r in rows)
    lines = text.splitlines()
    assert "5 examples" in lines[0]
    for line, (name, kind) in zip(
        lines[1:],
        [("acc", "sum"), ("acc_norm", "char"), ("acc_token", "token")],
        strict=True,
    ):
        a, error = accuracy(rows, kind)
        assert line.split()[:4] == [name, f"{a:.4f}", "+-", f"{error:.4f}"]
    assert sorted(tmp_path.iterdir()) == [out, file]


def test_every_way_gives_the_same_predictions(folder, evaluate, tmp_path):
    file, first = write(tmp_path / "x.jsonl"), tmp_path / "a.jsonl"
    always = ("--model", folder, "--hellaswag", file)
    assert evaluate(*always, "--predictions", first)[0] == 0
    for way in ("--plain", "--four-rows", "--transformers"):
        code, text, err = evaluate(*always, way, "--compare", first)
        assert (code, err) == (0, "")
        assert text.count("only 0, there only 0, p 1.000; 3 of 3") == 3


def test_bad_examples_are_one_line(folder, evaluate, tmp_path):
    cases = {
        ", line 3: 3 endings": {"endings": ["a", "b", "c"]},
        ", line 3: label '7'": {"label": 7},
    }
    for word, changes in cases.items():
        file, out = write(tmp_path / "x.jsonl", **changes), tmp_path / "out"
        options = ("--hellaswag", file, "--predictions", out)
        refused(evaluate("--model", folder, *options), word, str(file))
        assert not out.exists()
    file.write_text("no json\n")
    options = ("--model", folder, "--hellaswag")
    refused(evaluate(*options, file), "line 1: not JSON")
    refused(evaluate(*options, tmp_path / "none"), "none")


def test_the_hub_without_a_network_is_one_line(folder, evaluate, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    options = ("--model", folder, "--hellaswag", "Rowan/hellaswag")
    result = evaluate(*options, "--limit", 1)
    if result[0] == 0:
        pytest.skip("the data set is in this machine's cache")
    refused(result, "Rowan/hellaswag cannot be loaded")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--limit", 0], ["limit 0"]),
        (["--batch-size", 0], ["--batch-size"]),
        (["--predictions", "no/such/file"], ["no folder no/such"]),
        (["--compare", "none.jsonl"], ["none.jsonl"]),
        (["--dtype", "int3"], ["--dtype"]),
        (["--model", "./nowhere"], ["nowhere"]),
    ],
)
def test_bad_options_are_one_line(folder, evaluate, options, words):
    refused(evaluate("--model", folder, *options), *words)


def test_an_ending_longer_than_the_context_is_one_line(folder, evaluate):
    refused(evaluate("--model", folder), "an ending has", "context only 64")


def test_predictions_of_other_examples_are_refused(folder, evaluate, tmp_path):
    out = tmp_path / "p.jsonl"
    file = write(tmp_path / "x.jsonl")
    always = ("--model", folder, "--hellaswag", file, "--limit")
    assert evaluate(*always, 2, "--predictions", out)[0] == 0
    refused(evaluate(*always, 3, "--compare", out), "is about other examples")


def test_a_damaged_model_is_one_line(folder, evaluate, tmp_path):
    damaged = damage(folder, tmp_path / "damaged")
    file, out = write(tmp_path / "x.jsonl"), tmp_path / "p.jsonl"
    options = ("--hellaswag", file, "--predictions", out)
    for way in ((), ("--plain",), ("--transformers",)):
        found = evaluate("--model", damaged, *options, *way)
        refused(found, "the model's logits are not finite")
        assert not out.exists()


def test_predictions_may_be_compressed(folder, evaluate, tmp_path):
    file, out = write(tmp_path / "x.jsonl"), tmp_path / "p.jsonl.gz"
    always = ("--model", folder, "--hellaswag", file)
    assert evaluate(*always, "--predictions", out)[0] == 0
    code, text, _ = evaluate(*always, "--compare", out)
    assert code == 0 and text.count("3 of 3") == 3
