"""A whole run, in this process: what it leaves, resume, faults."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_setup import losses, metrics, tiny_data

from llama_tut.loader import ShardLoader
from llama_tut.model import LlamaForCausalLM
from llama_tut.pretraining import build_llama, build_text_loader, train
from llama_tut.tools.choice import (
    read_choices,
)
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import InputError, fingerprint
from llama_tut.tools.options import (
    configure,
    llama_config,
)
from llama_tut.tools.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


PART = "shard-00001-model-00001-of-00001.safetensors"  # of the one rank


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
        return Model(llama_config(config, info))

    return build


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
        ({"model": model}, "--num-attention-heads was 2, now it is 4"),
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


def test_an_example_that_is_too_long_is_found_before_the_first_step(
    config, tmp_path
):
    short, long = "a b", "a b " * 30
    lines = [
        {"ind": i, "activity_label": "a", "ctx": "c", "label": 0}
        | {"endings": [end] * 4}
        for i, end in enumerate([short, short, long])
    ]
    file = tmp_path / "examples.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match="the model's context only 32"):
        train(replace(config, hellaswag=str(file)))
    assert not (Path(config.out) / "metrics.jsonl").exists()


def test_a_run_that_stopped_at_its_last_step_is_measured(config, capsys):
    with pytest.raises(Crash):
        train(config, crashing(8 * 5 + 1))  # saved at step 4
    last = train(replace(config, resume=True, steps=4))
    assert last["step"] == 4 and math.isfinite(last["val_loss"])
    assert "nan" not in capsys.readouterr().out
    again = train(replace(config, resume=True, steps=4))
    assert again == last  # nothing is measured or written twice


def test_damaged_checkpoint_is_skipped_and_said(config, capsys):
    train(config)
    whole = losses(config.out)
    file = Path(config.out) / "checkpoints" / "step_00000016" / PART
    data = bytearray(file.read_bytes())
    data[-5] ^= 8
    file.write_bytes(data)
    train(replace(config, resume=True))
    said = capsys.readouterr()
    assert f"step_00000016: {PART}" in said.err
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

    with pytest.raises(
        InputError, match="the loss is nan .* at step 1, which was not"
    ):
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


def test_compile_trains_what_was_compiled(config, monkeypatch, capsys):
    """With dynamo itself, whose wrapper is no plain module; same losses."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    plain = train(replace(config, steps=3, samples=0))
    compiled = partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compiled)
    out = Path(config.out).with_name("compiled")
    found = train(
        replace(config, compile=True, steps=3, samples=0, out=str(out))
    )
    assert graphs and "not compiled" not in capsys.readouterr().out
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_hellaswag_is_measured_when_asked_for(config):
    config = replace(config, hellaswag="own", hellaswag_limit=4, samples=0)
    with pytest.raises(InputError, match="the model's context only 32"):
        train(replace(config, steps=1000))
    config = replace(config, sequence_length=128, steps=1, resume=True)
    assert train(config)["hellaswag"] in (0, 0.25, 0.5, 0.75, 1)


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


def failing(how, passes):
    """A builder of models that go wrong in one of their training passes."""

    class Model(LlamaForCausalLM):
        done = 0

        def forward(self, *args, **kwargs):
            loss = super().forward(*args, **kwargs)
            if not (self.training and torch.is_grad_enabled()):
                return loss
            self.done += 1
            if self.done != passes:
                return loss
            if how == "infinite loss":
                return loss + math.inf
            loss.register_hook(lambda gradient: gradient * math.nan)
            return loss  # finite

    return lambda config, info: Model(llama_config(config, info))


def all_finite(folder):
    files = list(Path(folder).rglob("*.safetensors"))
    tensors = [t for file in files for t in load_file(file).values()]
    assert files
    return all(t.isfinite().all() for t in tensors if t.is_floating_point())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", ["gradient of NaN", "infinite loss"])
def test_what_is_broken_is_never_saved(config, monkeypatch, how, compiled):
    """One bad micro batch of eight, at a step where a checkpoint is due."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    config = replace(
        config, checkpoint_every=1, keep_checkpoints=1, compile=compiled
    )
    build = failing(how, 8 * 3 + 5 + compiled)  # compiling tries one batch
    words = "at step 4, which was not taken: .* --resume .* --learning-rate"
    with pytest.raises(InputError, match=words):
        train(config, build)
    out = Path(config.out)
    assert [p.name for p in (out / "checkpoints").iterdir()] == [
        "step_00000003"
    ]
    assert all_finite(out) and not (out / "model").exists()
    assert list(losses(out)) == [1, 2, 3]
    train(replace(config, resume=True, learning_rate=1e-3, samples=0))
    assert list(losses(out)) == list(range(1, 17)) and all_finite(out)


def test_a_bad_last_step_exports_nothing(config):
    config = replace(config, steps=2, checkpoint_every=0)
    with pytest.raises(InputError, match="at step 2, which was not taken"):
        train(config, failing("gradient of NaN", 16))
    assert not (Path(config.out) / "model").exists()


def test_weights_that_are_not_finite_are_not_saved(config, monkeypatch):
    """Loss and gradient were finite; the step itself made an infinity."""
    step = torch.optim.AdamW.step

    def overflow(self, closure=None):
        step(self)
        if pretraining_steps.count("x") == 5:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].fill_(math.inf)
        pretraining_steps.append("x")

    pretraining_steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    config = replace(config, checkpoint_every=2)
    with pytest.raises(InputError, match="not finite at step 6"):
        train(config)
    out = Path(config.out)
    kept = [p.name for p in sorted((out / "checkpoints").iterdir())]
    assert kept == ["step_00000002", "step_00000004"]
    assert all_finite(out) and not (out / "model").exists()


def test_an_old_checkpoint_of_nan_is_not_resumed(config):
    """As versions before this one wrote it: valid by its checksums."""
    with pytest.raises(Crash):
        train(config, crashing(8 * 5))
    folder = Path(config.out) / "checkpoints" / "step_00000004"
    with safe_open(folder / PART, "pt") as file:
        about = file.metadata()
    weights = load_file(folder / PART)
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / PART, about)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][PART] = fingerprint(folder / PART)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="NaN or infinity .* delete"):
        train(replace(config, resume=True))


def test_a_folder_of_somebody_else_is_not_touched(config):
    out = Path(config.out)
    (out / "model").mkdir(parents=True)
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "model" / "model.safetensors").write_text("precious")
    for resume in (False, True):
        with pytest.raises(InputError, match="holds no training run"):
            train(replace(config, resume=resume))
    found = {path.name for path in out.rglob("*")} - {".lock"}
    assert found == {"config.json", "model", "model.safetensors"}
    assert (out / "model" / "model.safetensors").read_text() == "precious"


def test_a_failed_start_does_not_block_the_folder(config):
    config = replace(config, sequence_length=128, steps=1, samples=0)
    with pytest.raises(InputError, match="tpyo"):
        train(replace(config, hellaswag="tpyo.jsonl"))
    assert not (Path(config.out) / "metrics.jsonl").exists()
    assert train(config)["step"] == 1


def damaged_tokenizer(data, tmp_path, how):
    copy = shutil.copytree(data, tmp_path / "copy")
    path = copy / "tokenizer" / "tokenizer_config.json"
    if how == "cut":
        path.write_text("{")
    else:
        settings = json.loads(path.read_text())
        settings["tokenizer_class"] = "QWenTokenizer"
        settings["auto_map"] = {
            "AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]
        }
        path.write_text(json.dumps(settings))
    return str(copy)


@pytest.mark.parametrize("how", ["cut", "auto_map"])
def test_a_tokenizer_is_opened_before_the_first_step(
    config, data, tmp_path, how
):
    folder = damaged_tokenizer(data, tmp_path, how)
    try:
        train(replace(config, data=folder, steps=1))
    except InputError as error:
        assert "tokenizer" in str(error) and "\n" not in str(error)
        assert not (Path(config.out) / "metrics.jsonl").exists()
    else:  # transformers knew what to do without asking
        assert (Path(config.out) / "model").is_dir()


def test_a_prompt_is_encoded_before_the_first_step(config):
    for prompt, words in (("caf\udce9", "UTF-8"), ("word " * 99, "--prompt")):
        with pytest.raises(InputError, match=words):
            train(replace(config, prompt=prompt))
        assert not (Path(config.out) / "metrics.jsonl").exists()


def test_a_run_of_another_version(config):
    with pytest.raises(Crash):
        train(config, crashing(8 * 5))
    path = Path(config.out) / "config.json"
    about = json.loads(path.read_text())
    del about["config"]["plain"], about["config"]["choice"]
    path.write_text(json.dumps(about))
    again = configure({"out": config.out, "resume": True})
    assert again == replace(config, resume=True)
    about["config"]["flux"] = 3
    path.write_text(json.dumps(about))
    with pytest.raises(InputError, match="--flux, which this version does"):
        configure({"out": config.out, "resume": True})
    for text in ("[" * 100_000, "[]", '{"config": 3}'):
        path.write_text(text)
        with pytest.raises(InputError) as error:
            configure({"out": config.out, "resume": True})
        assert "\n" not in str(error.value)


def test_a_later_chapter_passes_its_own_parts(config):
    """A model of two inputs, its loader, a hook after each step, an export."""

    class Shifted(LlamaForCausalLM):
        def forward(self, input_ids=None, shift=None, **others):
            if shift is not None:
                embedded = self.model.embed_tokens(input_ids) + shift
                return super().forward(inputs_embeds=embedded, **others)
            return super().forward(input_ids, **others)

    def build(config, info):
        model = Shifted(llama_config(config, info))
        model.register_buffer("steps", torch.zeros(()))
        return model

    def with_shift(config, info, ranks, split):
        loader = build_text_loader(config, info, ranks, split)
        rows = loader.batch_at

        def batch_at(position):
            inputs, targets = rows(position)
            targets[:, : position % 7] = -100
            return inputs, torch.ones(len(inputs), 1, 1), targets

        loader.batch_at = batch_at
        return loader

    def after_step(model, line):
        model.steps += 1
        line["steps_so_far"] = model.steps.item()

    def save_model(model, folder, tokenizer):
        folder.mkdir()
        (folder / "mine.txt").write_text(f"{model.steps.item():.0f}")

    parts = dict(
        build_model=build, build_loader=with_shift,
        after_step=after_step, save_model=save_model,
    )  # fmt: skip
    forward = Shifted.forward
    Shifted.forward = crashing_after(forward, 8 * 5 + 2)
    with pytest.raises(Crash):
        train(config, **parts)
    Shifted.forward = forward
    train(replace(config, resume=True), **parts)
    lines = metrics(config.out)
    assert [line["steps_so_far"] for line in lines] == list(range(1, 17))
    assert (Path(config.out) / "model" / "mine.txt").read_text() == "16"


def crashing_after(forward, passes):
    """A forward pass that fails at one of its training passes."""
    done = []

    def crash(self, *args, **kwargs):
        done.append(self.training and torch.is_grad_enabled())
        if sum(done) == passes:
            raise Crash
        return forward(self, *args, **kwargs)

    return crash
