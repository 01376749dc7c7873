"""Chapter 23: the fits beyond the chapter's own checks, the planner, the grid."""

import json
import math

import numpy as np
import pytest
import scaling as grid
import tenfold
import torch

from llama_tut.scaling import (
    BESIROGLU,
    Frontier,
    Law,
    bootstrap_frontier,
    bootstrap_law,
    fit_frontier,
    fit_law,
    fit_power,
    interval,
    isoflop_minima,
    plan_run,
    power,
    predict_run,
)
from llama_tut.tools.files import InputError, read_json
from llama_tut.tools.machine import RESULTS

pytestmark = pytest.mark.slow


V = 2048
FIELDS = ("floor", "a", "b", "alpha", "beta")


def double(values):
    return torch.tensor(values).double()


def small_grid(law, noise=0.0, seed=0):
    """Slice, parameters, tokens and loss of a grid like that of the chapter."""
    sizes = double([1e5, 2e5, 4e5, 8e5, 1.6e6] * 4)
    slices = double([2.5e12, 5e12, 1e13, 2e13]).repeat_interleave(5)
    tokens = slices / 6 / sizes
    source = torch.Generator().manual_seed(seed)
    losses = law.loss(sizes, tokens)
    losses = losses + noise * torch.randn(20, generator=source).double()
    return slices, sizes, tokens, losses


def test_a_power_is_found_exactly():
    x = double([1.0, 3, 10, 50])
    scale, exponent = fit_power(x, torch.stack((2 * x**0.5, 7 * x**-0.1)))
    torch.testing.assert_close(scale, double([2, 7]))
    torch.testing.assert_close(exponent, double([0.5, -0.1]))
    torch.testing.assert_close(power((scale, exponent), x)[1], 7 * x**-0.1)
    torch.testing.assert_close(power((scale, exponent), 4.0)[0], double(4.0))


def test_many_fits_at_once_are_single_fits():
    law = Law(1.6, 48.0, 105.0, 0.31, 0.31)
    slices, sizes, _, _ = small_grid(law)
    losses = torch.stack([small_grid(law, 0.01, s)[3] for s in range(3)])
    many = fit_frontier(slices, sizes, losses)
    said = many.predict(slices, sizes)
    for i, own in enumerate(losses):
        one = fit_frontier(slices, sizes, own)
        torch.testing.assert_close(one.size[1], many.size[1][i])
        torch.testing.assert_close(one.loss[0], many.loss[0][i])
        torch.testing.assert_close(one.predict(slices, sizes), said[i])
        at = one.predict(8e13, 1e6)
        torch.testing.assert_close(at, many.predict(8e13, 1e6)[i])


def test_slices_may_come_in_any_order_and_size():
    law = Law(1.6, 48.0, 105.0, 0.31, 0.31)
    slices, sizes, _, losses = small_grid(law, 0.01)
    keep = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:17]
    a = isoflop_minima(slices[keep], sizes[keep], losses[keep])
    keep = keep.sort()[0]
    b = isoflop_minima(slices[keep], sizes[keep], losses[keep])
    torch.testing.assert_close(a, b)


def test_the_best_size_costs_nothing_and_others_the_curvature():
    frontier = Frontier(
        (double(0.01), double(0.6)), (double(20), double(-0.05)), double(0.1)
    )
    N = frontier.best_size(1e13)
    lowest = power(frontier.loss, 1e13)
    torch.testing.assert_close(frontier.predict(1e13, N), lowest)
    off = frontier.predict(1e13, N * math.e)
    torch.testing.assert_close(off, lowest + 0.1)


@pytest.mark.parametrize(
    "law",
    [BESIROGLU, Law(1.0, 20.0, 3000.0, 0.2, 0.5), Law(3, 1e4, 50, 0.7, 0.25)],
)
def test_planted_laws_come_back(law):
    N, d = torch.meshgrid(
        torch.logspace(6, 9, 6), torch.logspace(8, 11, 6), indexing="ij"
    )
    N, d = N.flatten().double(), d.flatten().double()
    found, misfit = fit_law(N, d, law.loss(N, d))
    assert misfit < 1e-12
    for name in FIELDS:
        assert getattr(found, name) == pytest.approx(getattr(law, name), 1e-3)


def test_a_ruined_run_hardly_moves_the_fit():
    N, d = torch.meshgrid(
        torch.logspace(6, 9, 6), torch.logspace(8, 11, 6), indexing="ij"
    )
    N, d = N.flatten().double(), d.flatten().double()
    losses = BESIROGLU.loss(N, d)
    losses[7] *= 1.5
    found, _ = fit_law(N, d, losses)
    for name in FIELDS:
        right = getattr(BESIROGLU, name)
        assert getattr(found, name) == pytest.approx(right, 0.02)


def test_a_held_floor_stays_and_costs():
    slices, sizes, tokens, losses = small_grid(Law(1.6, 48, 105, 0.31, 0.31))
    free, best = fit_law(sizes, tokens, losses)
    held, misfit = fit_law(sizes, tokens, losses, floor=1.0)
    assert held.floor == pytest.approx(1.0) and misfit > best
    assert free.floor == pytest.approx(1.6, abs=1e-3)


def test_the_best_of_a_law_is_the_lowest_of_its_budget():
    N, d = BESIROGLU.best(1e21)
    assert 6 * N * d == pytest.approx(1e21)
    lowest = BESIROGLU.loss(N, d)
    for factor in (0.9, 1.1):
        assert BESIROGLU.loss(N * factor, d / factor) > lowest
    larger, _ = BESIROGLU.best(1e23)
    assert larger / N == pytest.approx(100**BESIROGLU.exponent)


def test_a_bootstrap_is_seeded_and_as_wide_as_the_noise():
    law = Law(1.6, 48.0, 105.0, 0.31, 0.31)
    slices, sizes, tokens, losses = small_grid(law, 0.01)
    a, own = bootstrap_frontier(slices, sizes, losses, 500, seed=1)
    b, _ = bootstrap_frontier(slices, sizes, losses, 500, seed=1)
    assert torch.equal(a.size[1], b.size[1])
    assert 0.005 < own.std() < 0.04  # the misfit counts, too
    _, narrow = predict_run(slices, sizes, losses, 4e13, 1e6)
    noisy = small_grid(law, 0.05)[3]
    _, wide = predict_run(slices, sizes, noisy, 4e13, 1e6)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 2
    fit, _ = fit_law(sizes, tokens, losses)
    many = bootstrap_law(sizes, tokens, losses, fit, repeats=50)
    low, high = interval(many.floor)
    assert many.floor.shape == (50,) and low < high


def test_a_plan_is_its_formula():
    plan = plan_run("A100", 8, 0.5, price=2.0, size=1e9, tokens=20e9)
    assert plan.flops == pytest.approx(6 * 1e9 * 20e9)
    seconds = plan.flops / (8 * 312e12 * 0.5)
    assert plan.hours == pytest.approx(seconds / 3600)
    assert plan.cost == pytest.approx(plan.hours * 8 * 2)
    again = plan_run("A100", 8, 0.5, flops=plan.flops, size=1e9)
    assert again.tokens == pytest.approx(20e9) and again.cost is None
    free = plan_run("H100", flops=1e22)
    assert free.size * free.tokens * 6 == pytest.approx(1e22)
    assert free.state_bytes == pytest.approx(16 * free.size)
    large = plan_run("H100", size=70e9, tokens=1e12)
    assert large.least_devices == 14 and "14 or more" in str(large)


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(device="abacus", flops=1e20), "unknown"),
        (dict(device="H100"), "give flops"),
        (dict(device="H100", flops=1e20, size=1e9, tokens=1e9), "give flops"),
        (dict(device="H100", tokens=1e9), "give flops"),
        (dict(device="H100", flops=0), "above 0"),
        (dict(device="H100", flops=1e20, devices=0), "above 0"),
        (dict(device="H100", flops=1e20, mfu=1.2), "at most 1"),
        (dict(device="H100", flops=1e20, price=-1), "above 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        plan_run(**given)


def test_the_grid_spends_what_it_says():
    jobs = [j for j in grid.grid_jobs(V) if j.about["slice"]]
    widths = {j.options["hidden_size"] for j in jobs}
    assert len(widths) >= 5 and len({j.about["slice"] for j in jobs}) >= 3
    for job in [*jobs, grid.largest_job(192, V)]:
        config = grid.config_of(job.options["hidden_size"], V)
        tokens = job.options["steps"] * job.options["tokens_per_step"]
        flops = tokens * grid.flops_per_token(config, grid.T)
        assert flops == pytest.approx(job.about["slice"], rel=0.01)
        assert job.options["steps"] > 1250


def test_long_runs_are_validated_where_short_ones_end():
    ends = {}
    for job in grid.grid_jobs(V):
        ends.setdefault(job.options["hidden_size"], {})[job.about["slice"]] = (
            job.options["steps"],
            job.options["eval_every"],
        )
    pairs = 0
    for own in ends.values():
        for c, (steps, _) in own.items():
            if c and 2 * c in own:
                longer, every = own[2 * c]
                assert longer == 2 * steps and steps % every == 0
                pairs += 1
    assert pairs >= 5


def fake_records():
    law = Law(1.6, 48.0, 105.0, 0.31, 0.31)
    records = []
    for job in grid.grid_jobs(V):
        if not job.about["slice"]:
            continue
        config = grid.config_of(job.options["hidden_size"], V)
        N = grid.parameter_count(config)
        tokens = job.options["steps"] * grid.TOKENS_A_STEP
        noise = 0.01 * math.sin(N + job.about["seed"])
        record = dict(name=job.name, parameters=N, tokens=tokens, **job.about)
        records.append(record | {"val_loss": law.loss(N, tokens) + noise})
    return records


class Info:
    vocab_size, train_tokens = V, 8_000_000


def test_a_prediction_is_made_once_and_never_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(grid.machine, "RESULTS", tmp_path / "results")
    records, runs = fake_records(), tmp_path / "runs"
    first = grid.write_prediction(records, Info, runs)
    low, high = first["val_loss_95"]
    assert low < first["val_loss"] < high
    assert first["largest"]["tokens"] <= Info.train_tokens
    started = runs / "largest-D192-0.started"
    started.parent.mkdir(parents=True)
    started.write_text("now")
    path = tmp_path / "results" / "scaling_prediction.json"
    again = grid.write_prediction(records, Info, runs)  # the same grid
    kept = json.loads(path.read_text())
    assert again["predicted_at"] == kept["predicted_at"]
    records[0]["val_loss"] += 0.01
    with pytest.raises(InputError, match="the largest run has begun"):
        grid.write_prediction(records, Info, runs)
    assert json.loads(path.read_text()) == kept


def test_the_tenfold_run_was_said_before_and_spends_what_was_said():
    names = "tenfold_prediction", "tenfold", "scaling"
    said, found, saved = (read_json(RESULTS / f"{n}.json") for n in names)
    run = found["run"]
    assert said["grid"] == grid.fingerprint(saved["runs"])
    assert said["predicted_at"] < found["began_at"]
    assert run["parameters"] == said["N"]
    assert run["tokens"] == said["tokens"]
    assert run["flops"] == pytest.approx(said["flops"], rel=1e-3)
    assert said["flops"] == 10 * saved["largest"]["slice"]
    one = {**saved["largest"]["options"], "compile": True}
    other = ("steps", "learning_rate", "eval_every", "checkpoint_every")
    shape = [key for key in one if key.startswith(("hidden", "inter", "num_"))]
    for key in one.keys() - {*other, *shape}:
        assert run["options"][key] == one[key], key


def test_the_longest_run_of_tokens_that_was_read_before():
    rng = np.random.default_rng(0)
    train, val = rng.integers(900, size=(2, 300))
    val[100:140] = train[50:90]  # forty tokens: from the 32nd on, 32
    val[200:209] = train[10:19]
    found = tenfold.longest_seen(train, val)
    assert not found[:102].any() and not found[140:202].any()
    assert [found[100 + n - 1] for n in (4, 8, 16, 32)] == [4, 8, 16, 32]
    assert found[139] == 32 and found[208] == 8 and not found[209:].any()
