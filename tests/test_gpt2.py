"""GPT-2 out of our LLaMA: equal to transformers', and a fair ladder between the two."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ablation
import grid
import pytest
import torch
from small_model import caller, refused
from training_setup import TINY, tiny_data
from transformers import GPT2Config, GPT2LMHeadModel

from llama_tut.config import LlamaConfig
from llama_tut.generate import generate
from llama_tut.gpt2 import (
    BESIDE,
    LADDER,
    TWIN,
    LadderConfig,
    LadderForCausalLM,
    from_gpt2,
    rung,
    size_of,
    with_size,
)
from llama_tut.model import LlamaForCausalLM, flops_per_token
from llama_tut.tools.files import InputError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

ROWS = [*LADDER, TWIN, *BESIDE]
BASE = LadderConfig(300, 48, 192, 3, 2, 64)


def random_gpt2(**options):
    """A transformers GPT-2 in which no bias is 0 and no gain 1."""
    shape = dict(
        vocab_size=300, n_embd=48, n_layer=2, n_head=3, n_positions=40
    )
    model = GPT2LMHeadModel(GPT2Config(**shape | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("inner", [None, 100])
def test_logits_equal_transformers(inner):
    torch.manual_seed(0)
    theirs = random_gpt2(n_inner=inner)
    ours = from_gpt2(theirs)
    ids = torch.randint(300, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-4
        )


def test_loss_and_gradients_equal_transformers():
    torch.manual_seed(0)
    theirs = random_gpt2()
    ours = from_gpt2(theirs)
    ids = torch.randint(300, (3, 41))
    logits = theirs(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten()
    )
    loss = ours(ids[:, :-1], targets=ids[:, 1:])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    table = ours.model.embed_tokens
    wte = theirs.transformer.wte.weight.grad
    torch.testing.assert_close(table.weight.grad, wte, rtol=1e-4, atol=1e-6)
    wpe = theirs.transformer.wpe.weight.grad
    torch.testing.assert_close(table.positions.grad, wpe, rtol=1e-4, atol=1e-6)
    fc = theirs.transformer.h[1].mlp.c_fc.weight.grad.T
    up = ours.model.layers[1].mlp.up_proj.weight.grad
    torch.testing.assert_close(up, fc, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_every_parameter_of_a_row_learns(row):
    torch.manual_seed(0)
    model = LadderForCausalLM(rung(row, BASE))
    ids = torch.randint(300, (2, 65))
    model(ids[:, :-1], targets=ids[:, 1:]).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert not silent
    # A key bias shifts all scores of a query alike: its gradient is rounding.
    dead = [
        n
        for n, p in model.named_parameters()
        if not p.grad.any() and not n.endswith("k_proj.bias")
    ]
    assert not dead


def test_each_rung_changes_one_thing():
    fields = LadderConfig.__dataclass_fields__
    rows = [rung(name, BASE) for name in LADDER]
    for name, before, after in zip(
        list(LADDER)[1:], rows[:-1], rows[1:], strict=True
    ):
        changed = {
            f for f in fields if getattr(before, f) != getattr(after, f)
        }
        assert changed - {"intermediate_size"} == set(LADDER[name]), name


def test_rows_have_equal_parameters():
    base = LadderConfig(2048, 96, 384, 3, 4, 256)
    sizes = {name: size_of(rung(name, base)) for name in ROWS}
    for name in list(LADDER)[:6]:
        assert abs(sizes[name] / sizes["GPT-2"] - 1) < 1e-3, name
    for name in [TWIN, *BESIDE]:
        assert abs(sizes[name] / sizes["untied head"] - 1) < 1e-3, name


def test_last_rung_is_our_llama():
    torch.manual_seed(0)
    top = rung("untied head", replace(BASE, initializer_range=None))
    shape = (300, 48, top.intermediate_size, 3, 2, 1)
    llama = LlamaForCausalLM(LlamaConfig(*shape, max_position_embeddings=64))
    model = LadderForCausalLM(top)
    llama.load_state_dict(model.state_dict())
    ids = torch.randint(300, (2, 64))
    with torch.no_grad():
        assert torch.equal(model(ids), llama(ids))
    assert top.initializer_range == llama.config.initializer_range
    counted = grid.sizes(model, 64)
    assert counted["flops_per_token"] == flops_per_token(llama.config, 64)
    assert model.flops_per_token(64) == flops_per_token(llama.config, 64)


def test_without_positions_earlier_tokens_have_no_order():
    """One block: the last token reads the same set, in any order."""
    torch.manual_seed(0)
    wide = replace(BASE, initializer_range=None)
    config = replace(rung("no positions", wide), num_hidden_layers=1)
    model = LadderForCausalLM(config)
    ids = torch.randint(300, (1, 20))
    mixed = ids.clone()
    mixed[0, :19] = ids[0, torch.randperm(19)]
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0, -1], model(mixed)[0, -1])
        rotary = LadderForCausalLM(replace(config, positions="rotary"))
        moved = rotary(ids)[0, -1] - rotary(mixed)[0, -1]
    assert moved.abs().max() > 1e-2


@pytest.mark.parametrize(
    "change", [{"positions": "sine"}, {"norm": "batch"}, {"activation": "elu"}]
)
def test_unknown_parts_are_refused(change):
    with pytest.raises(InputError, match="take"):
        LadderConfig(**change)


@torch.no_grad()
def test_text_with_a_cache_is_that_without():
    """Learned positions go on after the cache."""
    torch.manual_seed(0)
    model = LadderForCausalLM(LadderConfig(60, 32, 64, 2, 2, 16)).eval()
    ids = torch.randint(60, (1, 5))
    found = generate(model, ids, 8)
    for _ in range(8):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, ids)


def test_unknown_row_is_refused():
    with pytest.raises(InputError, match="no such"):
        rung("no such", BASE)


def test_with_size_is_the_closest_width():
    goal = size_of(BASE) + 5000
    config = with_size(BASE, goal)
    width = config.intermediate_size
    error = abs(size_of(config) - goal)
    for other in (width - 1, width + 1):
        near = replace(config, intermediate_size=other)
        assert abs(size_of(near) - goal) >= error


def committed(name):
    return json.loads(
        (ROOT / "benchmarks" / "results" / f"{name}.json").read_text()
    )


def test_committed_ladder_is_complete_and_fair():
    found = committed("ablation")
    assert found["rows"] == ROWS
    ends = {(run["row"], run["seed"]): run for run in found["runs"]}
    for row in ROWS:
        seeds = {seed for name, seed in ends if name == row}
        assert seeds == set(ablation.SEEDS)
    first = ends["GPT-2", 1]
    for (row, _), run in ends.items():
        assert run["tokens"] == first["tokens"]
        assert run["options"]["learning_rate"] == found["rates"][row]
        shape = run["options"]
        base = LadderConfig(
            2048,
            shape["hidden_size"],
            4 * shape["hidden_size"],
            shape["num_hidden_layers"],
            shape["num_attention_heads"],
            shape["max_position_embeddings"],
            initializer_range=None,
        )
        with torch.device("meta"):
            model = LadderForCausalLM(rung(row, base))
        counted = grid.sizes(model, shape["sequence_length"])
        assert {key: run[key] for key in counted} == counted


def test_committed_rates_are_the_best_tried_and_inside():
    found = committed("ablation")
    assert not set(ablation.TUNING) & {run["seed"] for run in found["runs"]}
    for row in ROWS:
        tried = {}
        for run in found["tuning"]:
            if run["row"] == row:
                own = tried.setdefault(run["learning_rate"], {})
                own[run["seed"]] = run["val_loss"]
        assert all(set(x) == set(ablation.TUNING) for x in tried.values())
        means = {rate: sum(x.values()) for rate, x in tried.items()}
        best = min(means, key=means.get)
        assert found["rates"][row] == best
        assert min(tried) < best < max(tried), row


def test_committed_optimizers_are_complete_and_share_the_ladder():
    found, ladder = committed("optimizers"), committed("ablation")
    ratio = committed("optimizer_seconds")["ratio"]
    ends = {(run["row"], run["seed"]): run for run in found["runs"]}
    assert len(ends) == len(found["runs"]) == 5 * len(ablation.SEEDS)
    own = {r["seed"]: r for r in ladder["runs"] if r["row"] == ablation.TOP}
    for (row, seed), run in ends.items():
        longer = row == ablation.LONGER
        steps = round(ablation.STEPS * (ratio if longer else 1))
        assert run["tokens"] == 1024 * steps
        rate = "adamw, cosine" if longer else row
        assert run["learning_rate"] == found["rates"][rate]
        assert run["parameters"] == own[seed]["parameters"]
        if row == "adamw, cosine":
            assert run["val_loss"] == own[seed]["val_loss"]


def test_seconds_are_measured_once_and_kept_beside_the_runs(tmp_path):
    """A second measurement would give a row other steps, so other runs."""
    found = {"ratio": 1.5}
    (tmp_path / "optimizer_seconds.json").write_text(json.dumps(found))
    assert ablation.seconds(tmp_path, "no data is read") == found


def test_make_results_prints_every_table(monkeypatch, capsys):
    code, out, err = caller("results", monkeypatch, capsys)()
    assert (code, err) == (0, "")
    for words in (
        "The ladder",
        "to untied head",
        "Scaling",
        "predicted at",
        "Optimizers",
        "at equal seconds",
        "Continuation choice",
        "bigram at the boundary",
    ):
        assert words in out


def test_grid_is_resumable(tmp_path):
    """What is done is found, not made again; a changed option is a new run."""
    data = tiny_data(tmp_path)
    options = TINY | {"steps": 3, "eval_rows": 4, "eval_every": 2}
    jobs = [
        grid.Job(f"seed{s}", options | {"seed": s}, about={"seed": s})
        for s in (0, 1)
    ]
    first = grid.run_grid(tmp_path / "runs", data, jobs, workers=1)
    files = sorted((tmp_path / "runs").glob("*/metrics.jsonl"))
    times = [path.stat().st_mtime_ns for path in files]
    again = grid.run_grid(tmp_path / "runs", data, jobs, workers=1)
    assert again == first
    assert [path.stat().st_mtime_ns for path in files] == times
    damaged = jobs[0].folder(tmp_path / "runs") / "record.json"
    damaged.write_text(damaged.read_text()[:50])
    repaired = grid.run_job(jobs[0], tmp_path / "runs", data)
    assert repaired["val_loss"] == first[0]["val_loss"]
    assert [record["seed"] for record in first] == [0, 1]
    assert [tokens for tokens, _ in first[0]["curve"]] == [64, 96]
    changed = grid.Job("seed0", options | {"steps": 4}, about={"seed": 0})
    assert changed.folder("x") != jobs[0].folder("x")


ENDLESS = """
import sys
import grid
from training_setup import TINY
if __name__ == "__main__":
    root, data = sys.argv[1:]
    options = TINY | {"steps": 10**6}
    jobs = [grid.Job(f"seed{s}", options | {"seed": s}) for s in range(6)]
    grid.run_grid(root, data, jobs)
"""


@pytest.mark.parametrize(
    "send, number", [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_ctrl_c_and_kill_end_a_grid(tmp_path, send, number):
    """A worker has the next job at hand when its run is stopped."""
    script, root = tmp_path / "endless.py", tmp_path / "runs"
    script.write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, script, root, tiny_data(tmp_path)],
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 100
        while len(list(root.glob("*/metrics.jsonl"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        send(process.pid, number)  # a terminal's goes to the whole group
        out, _ = process.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out) == (
        130,
        "stopped: the same command goes on\n",
    )
    assert len(list(root.glob("*/metrics.jsonl"))) == 2
    assert len(list(root.glob("*/checkpoints/step_*"))) == 2


@pytest.mark.parametrize(
    "losses, unlucky, expected, tried",
    [
        # lowest inside the three rates that a row starts with
        ([9, 9, 5.0, 4.0, 5.0, 9], None, 3, {2, 3, 4}),
        # lowest at an edge: it goes on to that side, until a worse one
        ([9, 9, 6.0, 5.0, 4.0, 3.0, 8, 9], None, 5, {2, 3, 4, 5, 6}),
        # two close ones: the mean of the seeds decides
        ([9, 9, 4.02, 4.0, 5.0, 9], 3, 2, {1, 2, 3, 4}),
    ],
)
def test_tuning_goes_on_until_the_best_rate_is_inside(
    monkeypatch, losses, unlucky, expected, tried
):
    def run_grid(root, data, jobs):
        runs = []
        for row, rate, seed in jobs:
            i = ablation.RATES.index(rate)
            worse = i == unlucky and seed == ablation.TUNING[1]
            loss = losses[i] + worse
            runs.append(
                dict(row=row, learning_rate=rate, seed=seed, val_loss=loss)
            )
        return runs

    monkeypatch.setattr(ablation, "run_grid", run_grid)
    runs, best = ablation.tune("", "", ["a"], lambda *job: job)
    assert best == {"a": ablation.RATES[expected]}
    seeds = {}
    for run in runs:
        index = ablation.RATES.index(run["learning_rate"])
        seeds.setdefault(index, set()).add(run["seed"])
    assert set(seeds) == tried
    assert all(own == set(ablation.TUNING) for own in seeds.values())


def test_a_grid_of_other_text_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    data, other = tiny_data(tmp_path / "a"), tiny_data(tmp_path / "b", seed=1)
    run = tmp_path / "run"
    run.mkdir()
    info = json.loads((data / "dataset.json").read_text())
    (run / "config.json").write_text(json.dumps({"data": info}))
    grid.check_data(run, data)
    with pytest.raises(InputError, match="choose another --runs"):
        grid.check_data(run, other)


@pytest.mark.parametrize("script", ["ablation", "scaling"])
def test_grids_refuse_bad_input_in_one_line(
    script, tmp_path, monkeypatch, capsys
):
    call = caller(script, monkeypatch, capsys)
    for options in (["--data", tmp_path], ["--no-such"]):
        refused(call(*options))


def test_a_table_of_positions_has_an_end():
    model = LadderForCausalLM(LadderConfig(300, 48, 192, 1, 2, 8))
    with pytest.raises(InputError, match="9 tokens, but the table has 8"):
        model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize(
    "option",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_other_gpt2s_are_refused_by_name(option):
    with pytest.raises(InputError, match=next(iter(option))):
        from_gpt2(random_gpt2(**option))
