"""The grid of chapter 23: sizes and horizons, then a prediction, then its test.

python benchmarks/scaling.py          all of it, resumable
python benchmarks/scaling.py --plan   only say what it would do

1. The grid. Each slice has one budget of FLOPs, spent by several sizes, each
   with a full schedule of its own.
2. The fit of llama_tut.scaling. It predicts the largest run and writes
   benchmarks/results/scaling_prediction.json. A prediction is never made when
   the largest run has begun.
3. The largest run, and benchmarks/results/scaling.json with all runs.

Stopped, the same command goes on: what is done lies in runs/scaling.
"""

import hashlib
import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from grid import Job, run_grid

from llama_tut.config import LlamaConfig
from llama_tut.model import flops_per_token, parameter_count
from llama_tut.scaling import (
    bootstrap_frontier,
    bootstrap_law,
    fit_frontier,
    fit_law,
    interval,
    predict_run,
    redraw,
)
from llama_tut.tools import cli, machine
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import InputError, require

T, TOKENS_A_STEP = 128, 512
LAYERS_AND_HEADS = {
    32: (3, 1), 48: (3, 1), 64: (3, 1), 96: (3, 2),
    128: (4, 2), 192: (4, 3), 256: (4, 4),
}  # fmt: skip
FIRST = 2.4e12  # FLOPs of the smallest slice; each next has twice as many
SLICES = (
    (32, 48, 64, 96),
    (48, 64, 96, 128),
    (64, 96, 128, 192),
)
SEEDS = (2, 1, 1)  # runs of each point, by slice; of D 32 one
LARGEST = 4  # doublings from the smallest slice to the largest run
LIVE_STEPS = 200  # of the member that the notebook runs itself
# FLOPs per second of one core, for the estimate alone (an EPYC with
# avx512_bf16, bfloat16): small matrices do not keep it busy.
RATES = {
    32: 2.1e10, 48: 2.8e10, 64: 3.8e10, 96: 6.0e10,
    128: 7.9e10, 192: 1.0e11, 256: 1.25e11,
}  # fmt: skip


def shape(D):
    """Options of the model of width D; its MLP is 8/3 as wide."""
    L, H = LAYERS_AND_HEADS[D]
    return {
        "hidden_size": D,
        "intermediate_size": round(D / 3) * 8,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "tie_word_embeddings": True,
    }


def config_of(D, V):
    """The LlamaConfig of width D and vocabulary V."""
    return LlamaConfig(vocab_size=V, **shape(D))


def steps_of(D, V, doublings):
    """Steps that spend a slice's FLOPs: a power of two times a multiple of 4.

    So that a longer run has a validation where a shorter one ends.
    """
    each = flops_per_token(config_of(D, V), T)
    return round(FIRST / (4 * TOKENS_A_STEP * each)) * 4 * 2**doublings


def job(name, D, steps, seed, validations=4, rows=768, **about):
    """One run with a full cosine schedule of its own."""
    options = {
        "steps": steps,
        "sequence_length": T,
        "micro_batch_size": 4,
        "tokens_per_step": TOKENS_A_STEP,
        "learning_rate": min(8e-3, 0.4 / D),
        "eval_every": steps // validations,
        "eval_rows": rows,
        "checkpoint_every": max(500, steps // 4),
        "keep_checkpoints": 1,
        "seed": seed,
        "dtype": "bfloat16",
        "samples": 0,
        **shape(D),
    }
    return Job(name, options, about={**about, "seed": seed})


def grid_jobs(V):
    """All runs but the largest, the long ones first: two workers end alike."""
    jobs = [
        job(
            f"slice{k}-D{D}-seed{seed}",
            D,
            steps_of(D, V, k),
            seed,
            slice=FIRST * 2**k,
        )
        for k, widths in enumerate(SLICES)
        for seed in range(SEEDS[k])
        for D in widths
        if D > 32 or seed == 0
    ]
    jobs.append(job("live-D48", 48, LIVE_STEPS, 0, 1, 256, slice=None))
    return sorted(jobs, key=lambda j: -estimate(j, V))


def largest_job(D, V):
    """The run that is predicted."""
    steps = steps_of(D, V, LARGEST)
    return job(f"largest-D{D}", D, steps, 0, 8, slice=FIRST * 2**LARGEST)


def estimate(one, V):
    """Seconds that a run should take on one core."""
    o = one.options
    D, validations = o["hidden_size"], o["steps"] // o["eval_every"]
    tokens = o["steps"] * TOKENS_A_STEP
    tokens += validations * o["eval_rows"] * T / 3  # forward alone
    return tokens * flops_per_token(config_of(D, V), T) / RATES[D]


def as_tensors(records):
    """Slice, parameters and loss of each run, as the fits want them."""
    keys = ("slice", "parameters", "val_loss")
    columns = ([r[key] for r in records] for key in keys)
    return [torch.tensor(c, dtype=torch.float64) for c in columns]


def nearest_width(size, V, train_tokens):
    """The width nearest to `size` parameters whose largest run is one epoch.

    Beyond an epoch a token is worth less, and the grid knows nothing of that.
    """

    def distance(D):
        return abs(math.log(parameter_count(config_of(D, V)) / size))

    fresh = [
        D
        for D in LAYERS_AND_HEADS
        if steps_of(D, V, LARGEST) * TOKENS_A_STEP <= train_tokens
    ]
    return min(fresh, key=distance)


def predict_by_law(runs, spent, N, tokens):
    """The same by the law of three terms -> loss, [low, high], the law."""
    _, sizes, losses = runs
    law, _ = fit_law(sizes, spent, losses)
    many = bootstrap_law(sizes, spent, losses, law)
    residuals = losses - law.loss(sizes, spent)
    own = redraw(residuals, len(many.a), torch.Generator().manual_seed(1))
    return (
        law.loss(N, tokens),
        interval(many.loss(N, tokens) + own[:, -1]),
        law,
    )


def predict(records, info):
    """The fit of the grid, and what it says of the largest run."""
    V, runs = info.vocab_size, as_tensors(records)
    fit, (many, _) = fit_frontier(*runs), bootstrap_frontier(*runs)
    c = FIRST * 2**LARGEST
    D = nearest_width(fit.best_size(c).item(), V, info.train_tokens)
    N = parameter_count(config_of(D, V))
    loss, low_high = predict_run(*runs, c, N)
    if not all(map(math.isfinite, low_high)):
        raise InputError("the slices show no valley: nothing to predict")
    tokens = steps_of(D, V, LARGEST) * TOKENS_A_STEP
    spent = torch.tensor([r["tokens"] for r in records], dtype=torch.float64)
    law_loss, law_low_high, law = predict_by_law(runs, spent, N, tokens)
    scale, exponent = (p.item() for p in fit.size)
    return {
        "runs": len(records),
        "frontier": {
            "size_scale": scale,
            "size_exponent": exponent,
            "size_exponent_95": interval(many.size[1]),
            "loss_scale": fit.loss[0].item(),
            "loss_exponent": fit.loss[1].item(),
            "loss_exponent_95": interval(many.loss[1]),
            "curvature": fit.curvature.item(),
        },
        "largest": {"D": D, "N": N, "flops": c, "tokens": tokens},
        "val_loss": loss,
        "val_loss_95": low_high,
        "law": asdict(law),
        "law_val_loss": law_loss,
        "law_val_loss_95": law_low_high,
    }


def fingerprint(records):
    """A hash of what the prediction rests on."""
    text = json.dumps([(r["name"], r["val_loss"]) for r in records])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def write_prediction(records, info, root):
    """Predict the largest run, once, and before it begins -> the prediction."""
    path = machine.RESULTS / "scaling_prediction.json"
    mark = fingerprint(records)
    if path.exists():
        old = json.loads(path.read_text())
        if old["grid"] == mark:
            print(f"{path} stands, made at {old['predicted_at']}")
            return old
    if any(Path(root).glob("largest-*.started")):
        raise InputError(
            f"the largest run has begun in {root}, and {path} is not "
            "of this grid: what was said now would be no prediction"
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    numbers = {"predicted_at": now, "grid": mark, **predict(records, info)}
    machine.write_result("scaling_prediction", numbers)
    return numbers


def announce(jobs, V, workers):
    """Say what will be done and how long it should take."""
    seconds = sum(estimate(one, V) for one in jobs)
    slices = [one.about["slice"] or 0 for one in jobs]
    print(
        f"the grid: {len(jobs)} runs, {sum(slices):.3g} FLOPs, about "
        f"{seconds / 60:.0f} core-minutes"
    )
    for one in jobs:
        print(
            f"  {one.name:18} {one.options['steps']:6,} steps, "
            f"{one.options['steps'] * TOKENS_A_STEP / 1e6:.2f}M tokens, "
            f"about {estimate(one, V):4.0f} s"
        )
    last = estimate(largest_job(192, V), V)
    print(
        f"then the largest: {FIRST * 2**LARGEST:.3g} FLOPs, about "
        f"{last / 60:.0f} minutes on one core"
    )
    print(f"in all about {(seconds / workers + last) / 60:.0f} minutes")


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/docs", help="folder of tokens")
    parser.add_argument(
        "--runs", default="runs/scaling", help="folder of runs"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--plan", action="store_true", help="only say it")
    args = parser.parse_args()
    info = load_dataset_info(args.data)
    V = info.vocab_size
    jobs = grid_jobs(V)
    require(args.workers > 0, "--workers must be at least 1")
    announce(jobs, V, args.workers)
    if args.plan:
        return
    records = run_grid(args.runs, args.data, jobs, args.workers)
    live = [r for r in records if r["slice"] is None]
    records = sorted(
        (r for r in records if r["slice"]),
        key=lambda r: (r["slice"], r["parameters"], r["seed"]),
    )
    said = write_prediction(records, info, args.runs)
    low, high = said["val_loss_95"]
    print(f"predicted {said['val_loss']:.3f} nats, {low:.3f} to {high:.3f}")
    last = largest_job(said["largest"]["D"], V)
    folder = last.folder(args.runs)
    started = folder.with_name(folder.name + ".started")
    if not started.exists():
        started.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        started.write_text(now)
    (largest,) = run_grid(args.runs, args.data, [last], 1)
    print(f"the largest run gives {largest['val_loss']:.3f} nats")
    machine.write_result(
        "scaling",
        {
            "data": asdict(info),
            "largest_began_at": started.read_text(),
            "runs": records,
            "live": live[0],
            "largest": largest,
        },
    )


if __name__ == "__main__":
    cli.run(main)
