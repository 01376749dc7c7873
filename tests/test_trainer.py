"""The trainer, in this process: options, presets, plan, steps, resume."""

import json
import math
import random
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_setup import OPTIONS, ROOT, losses, metrics, tiny_data

from llama_tut import trainer
from llama_tut.config import LlamaConfig
from llama_tut.distributed import Ranks
from llama_tut.loader import ShardLoader
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import build_optimizer
from llama_tut.tools.files import InputError
from llama_tut.tools.prepare import load_dataset_info, prepare
from llama_tut.trainer import (
    PRESETS,
    TrainConfig,
    build_llama,
    choice_accuracy,
    choice_items,
    choice_scores,
    configure,
    evaluate,
    flag,
    memory_plan,
    micro_steps,
    read_choices,
    train,
    train_step,
)

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(data, tmp_path):
    return configure(
        {"data": str(data), "out": str(tmp_path / "run"), **OPTIONS}
    )


def on_meta(name, vocab_size=50_257):
    info = SimpleNamespace(vocab_size=vocab_size, end_of_text=0)
    with torch.device("meta"):
        return build_llama(configure({"preset": name}), info)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_shared_out(name):
    config = configure({"preset": name})
    assert micro_steps(config, 1) >= 1
    if name == "laptop":
        assert micro_steps(config, 2) == 1
    else:
        assert config.tokens_per_step == 524_288
        assert micro_steps(config, 8) >= 1
        assert 9.99e9 < config.steps * config.tokens_per_step < 10.01e9


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("laptop", 1.05e6, 1.08e6),
        ("h100", 123e6, 125e6),
        ("8xh100-350m", 349e6, 352e6),
        ("llama3-8b", 8.03e9, 8.031e9),
    ],
)
def test_presets_have_the_size_of_their_names(name, low, high):
    V = {"laptop": 2048, "llama3-8b": 128_256}.get(name, 50_257)
    model = on_meta(name, V)
    assert low < sum(p.numel() for p in model.parameters()) < high


@pytest.mark.parametrize(
    "name, room", [("24gb", 24e9), ("h100", 80e9), ("8xh100-350m", 80e9)]
)
def test_presets_fit_the_gpu_of_their_names(name, room):
    plan = memory_plan(
        configure({"preset": name}),
        on_meta(name),
        torch.device("cuda"),
        torch.bfloat16,
    )
    assert sum(plan.values()) < 0.9 * room


def test_every_option_is_read_and_explained():
    source = (ROOT / "llama_tut" / "trainer.py").read_text()
    for one in fields(TrainConfig):
        assert one.metadata["help"], one.name
        read = rf"config\.{one.name}\b|\"{one.name}\"\)"
        used = re.search(read, source) or one.name in ("preset", "out", "data")
        assert used, f"{one.name} is read nowhere"


def test_the_command_line_has_every_option(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.delitem(sys.modules, "train", raising=False)
    import train as script

    text = script.build_parser().format_help()
    for one in (*fields(TrainConfig), *fields(LlamaConfig)):
        if one.name != "model":
            assert flag(one.name) in text
    line = ["--head-dim", "4", "--no-tie-word-embeddings", "--resume"]
    line += ["--warmup-steps", "3", "--learning-rate", "1e-3"]
    given = vars(script.build_parser().parse_args(line))
    assert given == {
        "head_dim": 4,
        "tie_word_embeddings": False,
        "resume": True,
        "warmup_steps": 3,
        "learning_rate": 1e-3,
    }


def test_given_options_win_over_the_preset():
    config = configure(
        {"preset": "h100", "steps": 7, "num_hidden_layers": 3, "beta2": 0.5}
    )
    assert (config.steps, config.beta2, config.seed) == (7, 0.5, 0)
    assert config.model == {
        **PRESETS["h100"]["model"],
        "num_hidden_layers": 3,
    }
    assert PRESETS["h100"]["model"]["num_hidden_layers"] == 12
    with pytest.raises(InputError, match="--hidden-sise is no option"):
        configure({"hidden_sise": 3})


def test_micro_batches_and_their_number_do_not_matter(config, data):
    info = load_dataset_info(data)

    def step(B):
        torch.manual_seed(0)
        model = build_llama(config, info)
        optimizer = build_optimizer(model, "adamw", 1e-2)
        loader = ShardLoader(data, "train", B, 32)
        batches = [loader.next_batch() for _ in range(16 // B)]
        loss, norm = train_step(model, optimizer, batches)
        return loss, norm, *model.parameters()

    whole = step(16)
    for B in (1, 4, 8):
        torch.testing.assert_close(step(B), whole, rtol=1e-4, atol=1e-5)


def test_validation_depends_neither_on_batch_nor_on_ranks(config, data):
    model = build_llama(config, load_dataset_info(data))
    loader = ShardLoader(data, "val", 1, 32, shuffle=False)
    rows = min(7, len(loader))
    expected = []
    for _ in range(rows):
        inputs, targets = loader.next_batch()
        with torch.no_grad():
            logits = model(inputs)
        expected.append(
            torch.nn.functional.cross_entropy(logits[0], targets[0])
        )
    expected = torch.stack(expected).mean().item()
    for B in (1, 2, 3, rows):
        loader.batch_size = B
        found = evaluate(model, loader, rows, ALONE)
        assert found == pytest.approx(expected, abs=1e-5)
    loader.batch_size, sums = 2, []
    for rank in (0, 1):  # each rank's share, added up by hand
        share = [r for i in range(rank * 2, rows, 4) for r in (i, i + 1)]
        share = [r for r in share if r < rows]
        sums.append(len(share))
    assert sum(sums) == rows and model.training


def test_a_run_leaves_what_it_promises(config):
    last = train(config)
    folder = Path(config.out)
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert all(
        line.keys()
        >= {"loss", "lr", "grad_norm", "tokens", "tokens_per_second"}
        for line in lines
    )
    assert lines[-1] == last and last["tokens"] == 16 * 512
    assert {"val_loss", "bits_per_byte"} <= last.keys()
    info = load_dataset_info(config.data)
    assert last["bits_per_byte"] == info.bits_per_byte(last["val_loss"])
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step_00000008", "step_00000012", "step_00000016"]
    assert (folder / "curves.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").glob("events*"))
    assert "sample 1" in (folder / "samples.txt").read_text()
    about = json.loads((folder / "config.json").read_text())
    assert about["config"]["steps"] == 16 and about["data"]["hash"]


def test_transformers_loads_the_model(config, data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llama_tut.tools.tokenizers import read_tokenizer
    from llama_tut.weights import load_pretrained

    train(replace(config, steps=2, samples=0))
    folder = Path(config.out) / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "the red cat sees a house"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    mine = read_tokenizer(data / "tokenizer").encode(text).ids
    assert ids.tolist() == [mine]
    ours = load_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits)
    end = load_dataset_info(data).end_of_text
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == end


class Crash(Exception):
    pass


def crashing(passes):
    """A builder of models that fail in one of their training passes."""

    class Model(LlamaForCausalLM):
        done = 0

        def forward(self, *args, **kwargs):
            self.done += self.training and torch.is_grad_enabled()
            if self.done == passes:
                raise Crash
            return super().forward(*args, **kwargs)

    def build(config, info):
        model = Model(trainer.llama_config(config, info))
        model.init_weights()
        return model

    return build


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_exact_across_an_epoch(config, tmp_path, optimizer, dtype):
    config = replace(config, optimizer=optimizer, dtype=dtype, samples=0)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    rows = 16 * 512 // 32
    assert len(ShardLoader(config.data, "train", 1, 32)) < rows
    for passes in (8 * 6 + 3, 8 * 5 + 1):  # in step 7; in step 10
        resume = Path(config.out).exists()
        with pytest.raises(Crash):
            train(replace(config, resume=resume), crashing(passes))
    train(replace(config, resume=True))
    assert losses(config.out) == losses(whole.out)
    for name in ("val_loss", "bits_per_byte"):
        last = [metrics(one)[-1][name] for one in (config.out, whole.out)]
        assert last[0] == last[1]


def test_resume_before_the_first_checkpoint(config, tmp_path, capsys):
    with pytest.raises(Crash):
        train(config, crashing(9))
    assert list(losses(config.out)) == [1]
    train(replace(config, resume=True, samples=0))
    assert "starting at step 0" in capsys.readouterr().out
    assert list(losses(config.out)) == list(range(1, 17))


def test_resume_takes_the_options_of_the_start(config):
    with pytest.raises(Crash):
        train(config, crashing(8 * 10))
    again = configure({"out": config.out, "resume": True})
    assert again == replace(config, resume=True)
    again = configure({"out": config.out, "resume": True, "eval_rows": 3})
    assert again == replace(config, resume=True, eval_rows=3)
    with pytest.raises(InputError, match="started with laptop"):
        configure({"out": config.out, "resume": True, "preset": "h100"})


def test_a_resumed_run_must_be_the_same_run(config, tmp_path, capsys):
    with pytest.raises(Crash):
        train(config, crashing(8 * 5))
    config = replace(config, resume=True)
    model = {**config.model, "num_attention_heads": 4}
    for changes, words in (
        ({"seed": 1}, "--seed was 0, now it is 1"),
        ({"tokens_per_step": 1024}, "--tokens-per-step was 512"),
        ({"sequence_length": 16}, "--sequence-length was 32"),
        ({"optimizer": "muon"}, "--optimizer was adamw"),
        ({"model": model}, "--head-dim was 16, now it is 8"),
        ({"data": str(tiny_data(tmp_path, seed=1))}, "the hash of --data"),
    ):
        before = (Path(config.out) / "metrics.jsonl").read_bytes()
        with pytest.raises(InputError, match=words) as error:
            train(replace(config, **changes))
        assert "\n" not in str(error.value)
        assert (Path(config.out) / "metrics.jsonl").read_bytes() == before
    train(replace(config, micro_batch_size=8, learning_rate=5e-3, samples=0))
    said = capsys.readouterr().out.splitlines()
    assert "--learning-rate was 0.01, from here on it is 0.005" in said
    assert not any(line.startswith("--seed") for line in said)


def test_damaged_checkpoint_is_skipped_and_said(config, capsys):
    train(config)
    whole = losses(config.out)
    file = Path(config.out) / "checkpoints/step_00000016/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 8
    file.write_bytes(data)
    train(replace(config, resume=True))
    said = capsys.readouterr()
    assert "step_00000016: model.safetensors" in said.err
    assert len(said.err.splitlines()) == 1
    assert "resumed at step 12" in said.out
    assert losses(config.out) == whole


def test_a_finished_run_can_be_finished_again(config, capsys):
    first = train(config)
    assert train(replace(config, resume=True)) == first
    assert len(metrics(config.out)) == 16
    with pytest.raises(InputError, match="--steps 15: .* further already"):
        train(replace(config, resume=True, steps=15))
    last = train(replace(config, resume=True, steps=18))
    assert last["step"] == 18 and len(metrics(config.out)) == 18


def test_metrics_cut_off_in_a_line(config):
    with pytest.raises(Crash):
        train(config, crashing(8 * 6))
    path = Path(config.out) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    train(replace(config, resume=True, samples=0))
    assert list(losses(config.out)) == list(range(1, 17))


def test_a_loss_that_is_no_number_ends_the_run(config):
    def build(config, info):
        model = build_llama(config, info)
        torch.nn.init.constant_(model.model.norm.weight, math.nan)
        return model

    with pytest.raises(InputError, match="the loss is nan at step 1"):
        train(config, build)


def test_it_learns_more_than_pairs(config):
    """Random words cannot be predicted: the loss ends near its floor."""
    info = load_dataset_info(config.data)
    last = train(replace(config, steps=60, samples=0, eval_rows=20))
    assert last["val_loss"] < info.unigram_nats
    assert last["val_loss"] == pytest.approx(info.bigram_nats, abs=0.3)


def test_compile_falls_back_with_one_line(config, monkeypatch, capsys):
    class NoCompiler(RuntimeError):
        pass

    def compile(model):
        def fail(*args, **kwargs):
            raise NoCompiler("No working C++ compiler found\nmore lines")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    train(replace(config, compile=True, steps=2, samples=0))
    out = capsys.readouterr().out
    line = "not compiled, going on without: No working C++ compiler found"
    assert line in out.splitlines()


def test_hellaswag_is_measured_when_asked_for(config):
    config = replace(config, hellaswag="own", hellaswag_limit=4, samples=0)
    with pytest.raises(InputError, match="the model's context only 32"):
        train(replace(config, steps=1000))
    config = replace(config, sequence_length=128, steps=1, resume=True)
    assert train(config)["hellaswag"] in (0, 0.25, 0.5, 0.75, 1)


def places_text(seed):
    """A text whose ids are places: (ids, line ends, document of each)."""
    draw = random.Random(seed)
    ids = np.arange(20_000)
    ids[[0, *(i for i in range(1, 20_000) if draw.random() < 1 / 300)]] = 0
    ends = np.array([draw.random() < 0.1 for _ in ids])
    return ids, ends, np.cumsum(ids == 0)


@pytest.mark.parametrize("seed", range(3))
def test_choice_items_are_cut_as_promised(seed):
    ids, ends, document = places_text(seed)
    items = choice_items(ids, ends, 0, 80, seed)
    assert [tuple(column.shape) for column in items] == [
        (80, 40),
        (80, 4, 20),
        (80,),
    ]
    used = []
    for context, options, answer in zip(*items, strict=True):
        spans = [context, *options]
        for span in spans:
            first, last = int(span[0]), int(span[-1])
            assert span.tolist() == list(range(first, last + 1))
            assert document[first] == document[context[0]] == document[last]
        assert options[answer, 0] == context[-1] + 1
        assert ends[options[:, 0] - 1].all()
        assert len(set(torch.cat(spans).tolist())) == 40 + 4 * 20
        used += [*context.tolist(), *options[answer].tolist()]
    assert len(set(used)) == len(used) == 80 * 60
    counts = torch.bincount(items.answers, minlength=4)
    assert counts.min() > 5


def test_choice_items_are_always_the_same():
    ids, ends, _ = places_text(0)
    whole = choice_items(ids, ends, 0, 80)
    for count in (1, 30, 80):
        again = choice_items(ids, ends, 0, count)
        for one, two in zip(whole, again, strict=True):
            assert torch.equal(one[:count], two)
    other = choice_items(ids, ends, 0, 80, seed=1)
    assert not torch.equal(whole.contexts, other.contexts)
    with pytest.raises(InputError, match="--choice 9999: .* only [1-9]"):
        choice_items(ids, ends, 0, 9999)


class Oracle(torch.nn.Module):
    """Logits of a text in which id + 1 follows id, as transformers' models."""

    def __init__(self, V):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(V))

    def forward(self, ids):
        V = len(self.bias)
        logits = torch.nn.functional.one_hot((ids + 1) % V, V) * 20.0
        return SimpleNamespace(logits=logits + self.bias)


def test_choice_of_an_oracle_and_of_its_control():
    ids, ends, _ = places_text(0)
    ids, V = ids[:3000].copy(), 3000
    torch.manual_seed(0)
    model, items = Oracle(V), choice_items(ids, ends[:3000], 0, 15)
    assert choice_accuracy(choice_scores(model, items, 0), items.answers) == (
        1,
        0,
    )
    rights = []
    for shift in range(1, 15):
        swapped = items._replace(contexts=items.contexts.roll(shift, 0))
        scores = choice_scores(model, swapped, 0)
        rights.append(choice_accuracy(scores, items.answers)[0])
    assert np.mean(rights) == pytest.approx(0.25, abs=0.1)


def test_choice_scores_by_hand_and_in_any_batch(config, data):
    info = load_dataset_info(data)
    ids, ends, _ = places_text(0)
    items = choice_items(ids, ends, 0, 7)
    items = items._replace(
        contexts=items.contexts % info.vocab_size,
        options=items.options % info.vocab_size,
    )
    model = build_llama(config, info).eval()
    expected = torch.zeros(7, 4)
    for n in range(7):
        for k in range(4):
            for sign, start in ((1, items.contexts[n]), (-1, [0])):
                row = torch.tensor([*start, *items.options[n, k]])
                with torch.no_grad():
                    logits = model(row[None, :-1])[0]
                nats = torch.nn.functional.cross_entropy(
                    logits[-20:], row[-20:], reduction="sum"
                )
                expected[n, k] -= sign * nats
    for rows in (1, 5, 28, 64):
        found = choice_scores(model, items, 0, rows)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A data folder with lines that share their letters with the next."""
    folder, draw = tmp_path_factory.mktemp("stories"), random.Random(0)
    topics = ["a b c d", "e f g h", "i j k l", "m n o p", "q r s t"]
    lines = []
    for n in range(3000):  # ten lines a topic
        words = topics[n // 10 % len(topics)].split()
        lines.append(" ".join(draw.choices(words, k=9)))
    (folder / "text.txt").write_text("\n".join(lines))
    how = dict(tokenizer="bpe", vocab_size=280, val_share=0.3)
    prepare([folder / "text.txt"], folder / "data", 1, **how)
    return folder / "data"


def test_a_run_measures_choice(config, stories, capsys):
    shape = dict(sequence_length=64, eval_every=1, steps=2, samples=0)
    config = replace(config, data=str(stories), choice=40, **shape)
    last = train(config)
    out = capsys.readouterr().out
    assert "step 0: choice" in out and "untrained" in out
    found = [line["choice"] for line in metrics(config.out)]
    assert len(found) == 2 and last["choice"] == found[-1]
    assert found[-1] * 40 == pytest.approx(round(found[-1] * 40))
    about = json.loads((Path(config.out) / "config.json").read_text())
    _, baselines = read_choices(stories, 40)
    assert about["choice"] == baselines and baselines["chance"] == 0.25
    assert baselines["word overlap"] > 0.35
    report = out[out.index("continuation choice, 40 items") :]
    for name in ("this model", "context of another item", *baselines):
        assert name in report
    assert f"{'this model':24}{last['choice']:6.1%}" in report
    again = train(replace(config, resume=True))
    assert again == last and report in capsys.readouterr().out


def test_choice_refuses_before_training(config, stories):
    with pytest.raises(InputError, match="rows of 60 tokens"):
        replace(config, choice=1)
    config = replace(config, sequence_length=64)
    with pytest.raises(InputError, match="--choice must be at least 0"):
        replace(config, choice=-1)
    with pytest.raises(InputError, match="has only 0 such items"):
        train(replace(config, choice=1))  # this text has no lines
    with pytest.raises(InputError, match="has only [1-9]"):
        train(replace(config, choice=10**6, data=str(stories)))
    assert not (Path(config.out) / "metrics.jsonl").exists()


def test_muon_needs_less_memory_than_planned(config, data):
    """The plan is an upper bound for either optimizer."""
    model = build_llama(config, load_dataset_info(data))
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, name)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        held = sum(
            value.numel() * 4
            for state in optimizer.state_dict()["state"].values()
            for value in state.values()
            if torch.is_tensor(value) and value.dim()
        )
        plan = memory_plan(config, model, ALONE.device, torch.float32)
        assert held <= plan["optimizer"]
