"""What each option does: a short run at two values, and what must differ.

A test that an option is read is not enough: it may be read and then ignored.
`test_every_option_has_a_test` asks for a test of each field of TrainConfig.
"""

import json
import math
import re
import runpy
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_setup import OPTIONS, ROOT, flags, metrics, tiny_data

from llama_tut import pretraining
from llama_tut.distributed import Layout
from llama_tut.model import LlamaForCausalLM
from llama_tut.optimizer import learning_rate_at
from llama_tut.pretraining import build_llama, train
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import InputError
from llama_tut.tools.options import TrainConfig, configure, llama_config


@pytest.fixture
def short(data, tmp_path):
    """A function that makes a short run: (folder, lines, what it saw)."""
    numbers = iter(range(100))

    def run(**changes):
        out = tmp_path / f"run{next(numbers)}"
        options = {**OPTIONS, "steps": 1, "samples": 0, "checkpoint_every": 0}
        options |= {"data": str(data), "out": str(out), **changes}
        seen = Seen()
        train(configure(options), seen.build)
        return out, metrics(out), seen

    return run


class Seen:
    """Builds a LLaMA and notes what passes through it."""

    def __init__(self):
        self.passes = []  # (training, shape, tokens that count, dtype)

    def build(self, config, info):
        seen = self

        class Model(LlamaForCausalLM):
            def forward(self, ids=None, *args, targets=None, **options):
                if ids.device.type != "meta":
                    count = 0 if targets is None else (targets >= 0).sum()
                    seen.passes.append(
                        (self.training, tuple(ids.shape), int(count))
                    )
                return super().forward(ids, *args, targets=targets, **options)

        self.model = Model(llama_config(config, info))

        def note(module, args, output):
            seen.dtypes.add((module.training, output.dtype))

        self.dtypes = set()
        self.model.model.layers[0].mlp.up_proj.register_forward_hook(note)
        return self.model

    def training(self):
        return [p for p in self.passes if p[0]]

    def measured(self):
        return [p for p in self.passes if not p[0]]


def saved(out, name):
    """{name: tensor} of a part of the last checkpoint: model, optimizer."""
    last = sorted((out / "checkpoints").iterdir())[-1]
    found = {}
    for file in sorted(last.glob("*.safetensors")):
        found |= load_file(file)
    return {
        key: value
        for key, value in found.items()
        if ("/" in key) == (name == "optimizer")  # PARAMETER/KEY
    }


def moments(out, which):
    """All of AdamW's first or second moments after one step, as a vector."""
    found = saved(out, "optimizer")
    return torch.cat([
        found[name].flatten()
        for name in sorted(found) if name.endswith(which)
    ])  # fmt: skip


def test_every_option_has_a_test():
    text = Path(__file__).read_text()
    for one in fields(TrainConfig):
        if one.name == "extra":  # the options of later chapters
            continue
        assert one.metadata["help"], one.name
        assert f"def test_{one.name}(" in text, f"--{one.name} has no test"


def test_data(short, tmp_path):
    other = tiny_data(tmp_path, seed=1)
    _, first, _ = short()
    _, second, _ = short(data=str(other))
    assert first[0]["loss"] != second[0]["loss"]


def test_out(short):
    out, _, _ = short()
    assert (out / "metrics.jsonl").is_file() and (out / "model").is_dir()


def test_preset():
    small, large = configure({}), configure({"preset": "h100"})
    assert (small.steps, large.steps) == (3000, 19_073)
    assert small.model != large.model and large.compile


def test_resume(short, data):
    out, _, _ = short(steps=2)
    again = configure({"out": str(out), "resume": True, "steps": 3})
    train(again)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    with pytest.raises(InputError, match="holds a run already"):
        train(replace(again, resume=False))


def test_steps(short):
    for steps in (1, 3):
        assert len(short(steps=steps)[1]) == steps


def test_sequence_length(short):
    for T in (16, 32):
        shapes = {shape for _, shape, _ in short(sequence_length=T)[2].passes}
        assert {shape[1] for shape in shapes} == {T}


def test_micro_batch_size(short):
    for B in (1, 4):
        _, _, seen = short(micro_batch_size=B)
        assert {shape for _, shape, _ in seen.training()} == {(B, 32)}


def test_tokens_per_step(short):
    for tokens in (128, 512):
        _, lines, seen = short(tokens_per_step=tokens)
        assert len(seen.training()) == tokens // 64
        assert lines[0]["tokens"] == tokens


def test_optimizer(short):
    kinds = {
        name: {key.rsplit(".", 1)[-1].rsplit("/", 1)[-1]
               for key in saved(short(optimizer=name)[0], "optimizer")}
        for name in ("adamw", "muon")
    }  # fmt: skip
    assert "momentum" in kinds["muon"] and "momentum" not in kinds["adamw"]


def test_learning_rate(short):
    for peak in (1e-3, 2e-3):
        line = short(learning_rate=peak, warmup_steps=1, steps=1)[1][0]
        assert line["lr"] == peak


def test_warmup_steps(short):
    for warmup in (2, 4):
        lines = short(steps=4, warmup_steps=warmup, learning_rate=0.01)[1]
        assert lines[0]["lr"] == pytest.approx(0.01 / warmup)
    default = short(steps=4)[1]
    assert default[0]["lr"] > 0  # 5 % of 4 steps: none


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_schedule(short, name):
    """Every step has its own learning rate, not that of the one before."""
    _, lines, _ = short(steps=5, schedule=name, warmup_steps=2)
    wanted = [
        learning_rate_at(step, 1e-2, 5, 2, name, 0.1) for step in range(5)
    ]
    assert [line["lr"] for line in lines] == pytest.approx(wanted)


def test_final_fraction(short):
    for low in (0.1, 0.5):
        lines = short(steps=3, warmup_steps=1, final_fraction=low)[1]
        assert lines[-1]["lr"] == pytest.approx(low * 1e-2)


def test_weight_decay(short):
    """Matrices shrink by lr * decay; gains do not."""
    none, strong = (
        saved(short(weight_decay=w, warmup_steps=1)[0], "model")
        for w in (0.0, 2.0)
    )
    torch.manual_seed(0)
    start = short()[2]
    torch.manual_seed(0)
    config = configure({**OPTIONS, "data": "x", "out": "y"})
    first = build_llama(config, SimpleNamespace(vocab_size=280, end_of_text=0))
    assert start is not None
    for name, p in first.state_dict().items():
        pull = 2.0 * 1e-2 * p if p.dim() == 2 else torch.zeros_like(p)
        torch.testing.assert_close(
            none[name] - strong[name], pull, rtol=1e-3, atol=1e-6
        )


def test_beta1(short):
    one, two = (moments(short(beta1=b)[0], "exp_avg") for b in (0.9, 0.5))
    torch.testing.assert_close(5 * one, two)  # m is (1 - beta1) g


def test_beta2(short):
    one, two = (moments(short(beta2=b)[0], "exp_avg_sq") for b in (0.95, 0.5))
    torch.testing.assert_close(10 * one, two)


def test_max_norm(short):
    """m after one step is 0.1 times the clipped gradient; 0 does not clip."""
    whole = short(max_norm=1e9)[1][0]["grad_norm"]
    assert whole > 0.02
    for limit, norm in ((0.01, 0.01), (0.02, 0.02), (0, whole)):
        out, lines, _ = short(max_norm=limit)
        assert lines[0]["grad_norm"] == pytest.approx(whole)
        size = moments(out, "exp_avg").norm().item()
        assert size == pytest.approx(0.1 * norm, rel=1e-3)


def test_seed(short):
    first = {seed: short(seed=seed)[1][0]["loss"] for seed in (0, 1)}
    assert first[0] != first[1]
    assert short(seed=1)[1][0]["loss"] == first[1]


def test_dtype(short):
    """Products run in it, in training and in validation."""
    for name in ("float32", "bfloat16"):
        _, _, seen = short(dtype=name)
        dtype = getattr(torch, name)
        assert seen.dtypes == {(True, dtype), (False, dtype)}
        assert {p.dtype for p in seen.model.parameters()} == {torch.float32}


def test_device(short):
    assert short(device="cpu")[1]
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device cuda"):
            short(device="cuda")


def test_compile(short, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda m: calls.append(m) or m)
    short(compile=False)
    assert not calls
    short(compile=True)
    assert {call.__name__ for call in calls} == {"forward", "next_token_loss"}


def test_plain(monkeypatch, data, tmp_path):
    """scripts/train.py swaps fast parts in, unless --plain is given."""
    given = []
    monkeypatch.setattr(
        pretraining, "train", lambda config, **how: given.append(how)
    )
    for extra in ([], ["--plain"]):
        line = flags({"data": data, "out": tmp_path / "run"})
        monkeypatch.setattr(sys, "argv", ["train.py", *line, *extra])
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    fast, plain = given
    assert fast["prepare_model"].__name__ == "speed_up"
    assert fast["score_batch"].__name__ == "score_packed"
    assert not {"prepare_model", "score_batch"} & plain.keys()


def test_fast_parts_are_swapped_in(data, tmp_path):
    options = {**OPTIONS, "data": str(data), "out": str(tmp_path / "run")}
    swapped = []

    def prepare_model(model, device, dtype):
        swapped.append((model, device.type, dtype))

    config = configure({**options, "steps": 1, "samples": 0})
    train(replace(config, dtype="bfloat16"), prepare_model=prepare_model)
    ((model, device, dtype),) = swapped
    assert isinstance(model, LlamaForCausalLM)
    assert (device, dtype) == ("cpu", torch.bfloat16)


def test_vocab_multiple(short):
    for multiple, V in ((1, 280), (64, 320)):
        out, _, seen = short(vocab_multiple=multiple)
        assert seen.model.config.vocab_size == V
        assert len(saved(out, "model")["model.embed_tokens.weight"]) == V


def test_eval_every(short):
    for every, wanted in ((0, [4]), (2, [2, 4]), (3, [3, 4])):
        _, lines, _ = short(steps=4, eval_every=every)
        assert [s["step"] for s in lines if "val_loss" in s] == wanted


def test_eval_rows(short):
    """So many rows, in eval mode, without the rows that pad a batch."""
    for rows in (2, 3):
        _, _, seen = short(eval_rows=rows)
        assert sum(count for _, _, count in seen.measured()) == 32 * rows


def test_hellaswag(short, monkeypatch):
    asked = []

    def score(model, tokenizer, examples, *args, **options):
        assert not model.training
        asked.append(len(examples))
        return [{"pred_sum": 0, "label": i % 2} for i in range(len(examples))]

    monkeypatch.setattr(pretraining, "score", score)
    assert "hellaswag" not in short()[1][-1] and not asked
    fits = {"hellaswag": "own", "sequence_length": 64}
    _, lines, _ = short(hellaswag_limit=6, **fits)
    assert lines[-1]["hellaswag"] == 0.5 and asked == [2, 6]


def test_hellaswag_limit(short, monkeypatch):
    asked = []

    def score(model, tokenizer, examples, *args, **options):
        asked.append(len(examples))
        return [{"pred_sum": 0, "label": 0}] * len(examples)

    monkeypatch.setattr(pretraining, "score", score)
    for limit in (3, 5):
        short(hellaswag="own", hellaswag_limit=limit, sequence_length=64)
    assert asked == [2, 3, 2, 5]


def test_choice(short, monkeypatch, tmp_path):
    """Items are scored in eval mode; the control exchanges their contexts."""
    lines = []
    for n in range(900):
        lines.append(" ".join("abcdefgh"[(n * k) % 8] for k in range(1, 10)))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    from llama_tut.tools.prepare import prepare

    folder = tmp_path / "stories"
    prepare([tmp_path / "text.txt"], folder, 1, vocab_size=270, val_share=0.3)
    calls = []

    def scores(model, choices, end):
        assert not model.training
        calls.append(choices)
        return torch.eye(4)[choices.answers]

    monkeypatch.setattr(pretraining, "choice_scores", scores)
    for count in (5, 8):
        calls.clear()
        lines = short(data=str(folder), sequence_length=64, choice=count)[1]
        assert lines[-1]["choice"] == 1
        before, after, control = calls
        assert len(before.answers) == count and before is after
        assert torch.equal(control.contexts, after.contexts.roll(1, 0))
        assert torch.equal(control.options, after.options)


def texts(out):
    return re.findall(r"--- sample \d ---", (out / "samples.txt").read_text())


def test_samples(short):
    for count in (0, 2):
        assert len(texts(short(samples=count)[0])) == count


@pytest.fixture
def asked(monkeypatch):
    """(ids, new tokens) of each text that a run asks for."""
    calls = []
    generate = pretraining.generate

    def note(model, ids, length, **options):
        assert not model.training
        calls.append((ids.tolist()[0], length))
        return generate(model, ids, length, **options)

    monkeypatch.setattr(pretraining, "generate", note)
    return calls


def test_sample_tokens(short, asked):
    for length in (3, 7):
        short(samples=1, sample_tokens=length)
    assert [length for _, length in asked] == [3, 7]


def test_prompt(short, data, asked):
    """One beginning, whatever the tokenizer would add."""
    info = load_dataset_info(data)
    short(samples=1, sample_tokens=2)
    short(samples=1, sample_tokens=2, prompt="the cat")
    assert asked[0][0] == [info.end_of_text]
    assert asked[1][0][0] == info.end_of_text and len(asked[1][0]) > 1
    assert asked[1][0].count(info.end_of_text) == 1


def steps_saved(out):
    return [int(p.name[5:]) for p in sorted((out / "checkpoints").iterdir())]


def test_checkpoint_every(short):
    for every, wanted in ((0, [4]), (3, [3, 4])):
        assert steps_saved(short(steps=4, checkpoint_every=every)[0]) == wanted


def test_keep_checkpoints(short):
    for keep in (1, 3):
        out = short(steps=4, checkpoint_every=1, keep_checkpoints=keep)[0]
        assert steps_saved(out) == [1, 2, 3, 4][-keep:]


def test_model(short):
    for D in (16, 32):
        assert short(hidden_size=D)[2].model.config.hidden_size == D


def test_gradients_are_sent_once_a_step(short, monkeypatch):
    sent, whole = [], Layout.sync

    def note(layout, model, last):
        sent.append(last)
        return whole(layout, model, last)

    monkeypatch.setattr(Layout, "sync", note)
    short(tokens_per_step=256)  # four micro batches
    assert sent == [False, False, False, True]


def test_mfu_counts_the_ranks(monkeypatch, data):
    """Twice the ranks at the same tokens a second is half the MFU."""
    config = configure({**OPTIONS, "data": str(data), "out": "run"})
    monkeypatch.setattr(pretraining, "peak_flops", lambda device: 1e12)
    model = build_llama(config, load_dataset_info(data))
    found = []
    for W in (1, 2):
        run = SimpleNamespace(
            config=config, step=3, model=model,
            ranks=SimpleNamespace(device=None, world_size=W),
        )  # fmt: skip
        found.append(pretraining.speed(run, 0.5))
    assert found[0]["mfu"] == pytest.approx(2 * found[1]["mfu"])
    flops = 512 / 0.5 * model.flops_per_token(32)
    assert found[0]["mfu"] == pytest.approx(flops / 1e12)
    assert found[0]["tokens"] == 3 * 512


def test_flops_of_a_token_by_hand(data):
    """6 for each number in a matrix, 12 LTHC for attention."""
    config = configure({**OPTIONS, "data": str(data), "out": "run"})
    model = build_llama(config, load_dataset_info(data))
    D, I, L, T, V = 32, 48, 2, 32, 280
    matrices = L * (4 * D * D + 3 * D * I) + D * V
    assert model.flops_per_token(T) == 6 * matrices + 12 * L * T * D


def test_bits_a_byte_are_of_the_validation_text(short, data):
    info, line = load_dataset_info(data), short()[1][-1]
    bits = line["val_loss"] / math.log(2) * info.val_tokens / info.val_bytes
    assert line["bits_per_byte"] == pytest.approx(bits, rel=0.02)


def test_what_writes_into_the_stream_starts_smaller(data):
    """By 1 / sqrt(2 L), in o_proj and down_proj, and nowhere else."""
    options = {**OPTIONS, "data": str(data), "out": "run"}
    options |= {"hidden_size": 128, "intermediate_size": 128}
    config = configure({**options, "num_hidden_layers": 8})
    torch.manual_seed(0)
    model = build_llama(config, load_dataset_info(data))
    for name, p in model.model.layers.named_parameters():
        if p.dim() == 2:
            writes = "o_proj" in name or "down_proj" in name
            std = 0.5 / 128**0.5 / (4 if writes else 1)
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_metrics_are_json(short):
    out, _, _ = short()
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
