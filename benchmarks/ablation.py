"""The ladder from GPT-2 to LLaMA, and optimizers side by side: real runs.

    python benchmarks/ablation.py [--data data/docs] [--part ladder]

benchmarks/ablation_design.md, written before the runs, says what is compared and
how. Stop it with Ctrl-C; the same command goes on. Writes
benchmarks/results/ablation.json, optimizers.json and optimizer_seconds.json.
"""

import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from grid import Job, run_grid
from safetensors.torch import load_file

from llama_tut.fast.training import speed_up
from llama_tut.gpt2 import BESIDE, LADDER, TWIN, build_rung
from llama_tut.loader import ShardLoader
from llama_tut.optimizer import build_optimizer
from llama_tut.tools import cli
from llama_tut.tools.choice import (
    choice_accuracy,
    choice_scores,
    read_choices,
)
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import read_json, write_json
from llama_tut.tools.machine import write_result
from llama_tut.tools.options import configure
from llama_tut.trainer import train_step

TUNING, SEEDS = (11, 12, 13), (1, 2, 3, 4, 5)
RATES = [0.0005 * 2**i for i in range(8)]  # 0.5e-3 to 64e-3
START = 2, 3, 4  # indices of the rates that each row starts with
STEPS, TUNING_STEPS = 2_000, 600
CHOICE = 1200  # items of continuation choice
SHORT, LONG = 128, 256  # context in training, and twice that
ROWS = [*LADDER, TWIN, *BESIDE]
SPREAD = "RMSNorm", "untied head"

COMMON = {
    "sequence_length": SHORT,
    "micro_batch_size": 8,
    "tokens_per_step": 1024,
    "eval_rows": 2048,
    "warmup_steps": 200,
    "dtype": "bfloat16",
    "samples": 0,
    "checkpoint_every": 500,
    "keep_checkpoints": 1,
}
LADDER_RUN = COMMON | {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LONG,
}
TOP = list(LADDER)[-1]


def slug(text):
    """A name for a folder."""
    return text.lower().replace(" ", "-").replace("²", "2").replace(",", "")


def length(seed, steps=STEPS):
    """The options of a run of the comparison, or of the tuning."""
    if seed in TUNING:
        return {"steps": TUNING_STEPS, "seed": seed}
    return {"steps": steps, "seed": seed, "eval_every": 500}


def ladder_job(row, rate, seed, width=LADDER_RUN["hidden_size"]):
    """One run of a row of the ladder."""
    about = {"row": row, "learning_rate": rate, "seed": seed, "width": width}
    return Job(
        f"{slug(row)}-D{width}-lr{rate:.0e}-seed{seed}",
        LADDER_RUN
        | length(seed)
        | {"learning_rate": rate, "hidden_size": width},
        partial(build_rung, name=row),
        about,
    )


def build_small(config, info, name):
    """A row's model, its matrices drawn with 0.02 whatever their width."""
    model = build_rung(config, info, name)
    model.config = replace(model.config, initializer_range=0.02)
    model.init_weights()
    return model


def build_half_table(config, info):
    """GPT-2 with a table of positions half as wide as the embedding."""
    model = build_rung(config, info, "GPT-2")
    with torch.no_grad():
        model.model.embed_tokens.positions.mul_(0.5)
    return model


def half_table_job(rate, seed):
    """The GPT-2 row, its table drawn as in GPT-2's own code."""
    job = ladder_job("GPT-2", rate, seed)
    about = job.about | {"row": "GPT-2, half the table"}
    name = job.name.replace("gpt-2", "gpt-2-half-table")
    return replace(job, name=name, build=build_half_table, about=about)


def spread_job(row, seed, warm_up, small):
    """A tuning run with another warm-up, and with small or wide matrices."""
    job = ladder_job(row, 0.004, seed)
    how = "small" if small else "wide"
    return replace(
        job,
        name=f"{slug(row)}-warm-up{warm_up}-{how}-seed{seed}",
        options=job.options | {"warmup_steps": warm_up},
        build=partial(build_small if small else build_rung, name=row),
        about=job.about | {"warm_up": warm_up, "initialisation": how},
    )


def optimizer_job(row, rate, seed, steps=STEPS):
    """The last rung with an optimizer and a schedule, as "muon, wsd".

    AdamW with a cosine is the ladder's own run.
    """
    job = ladder_job(TOP, rate, seed)
    if row == "adamw, cosine":
        return job
    optimizer, schedule = row.split(", ")[:2]
    about = {"optimizer": optimizer, "schedule": schedule}
    return replace(
        job,
        name=f"{slug(row)}-lr{rate:.0e}-seed{seed}",
        options=job.options | length(seed, steps) | about,
    )


def mean_losses(runs, row):
    """{index into RATES: mean loss over the tuning seeds} of a row."""
    losses = {}
    for run in runs:
        if run["row"] == row:
            index = RATES.index(run["learning_rate"])
            losses.setdefault(index, []).append(run["val_loss"])
    return {i: statistics.mean(values) for i, values in losses.items()}


def runs_of(root, data, wanted, make):
    """`make(row, ...)` of each of `wanted` -> records, named by their row."""
    records = run_grid(root, data, [make(*one) for one in wanted])
    return [
        {**record, "row": row}
        for (row, *_), record in zip(wanted, records, strict=True)
    ]


def tune(root, data, rows, make):
    """Tuning runs of all rows -> records, and the best rate of each row.

    All rows start with the same three rates, each on all tuning seeds. A row
    goes on until its best rate has a worse neighbour on both sides.
    """
    inside = set(range(len(RATES)))
    indices = {row: set(START) for row in rows}
    while True:
        wanted = [
            (row, RATES[i], seed)
            for row in rows
            for i in sorted(indices[row])
            for seed in TUNING
        ]
        runs = runs_of(root, data, wanted, make)
        best = {}
        for row in rows:
            means = mean_losses(runs, row)
            best[row] = min(means, key=means.get)
        missing = {
            row: {best[row] - 1, best[row] + 1} & inside - indices[row]
            for row in rows
        }
        if not any(missing.values()):
            return runs, {row: RATES[best[row]] for row in rows}
        indices = {row: indices[row] | missing[row] for row in rows}


def trained_model(job, root, data):
    """The model that a finished run has saved."""
    config = configure({**job.options, "data": str(data)})
    model = job.build(config, load_dataset_info(data)).eval()
    path = job.folder(root) / "model" / "model.safetensors"
    model.load_state_dict(load_file(path))
    return model


@torch.no_grad()
def loss_by_position(job, root, data, rows=400):
    """Mean loss at each place of twice the trained context, in bins of 32."""
    model = trained_model(job, root, data)
    loader = ShardLoader(data, "val", 8, LONG, shuffle=False)
    total, count = torch.zeros(LONG), 0
    while count < min(rows, len(loader) - 8):
        inputs, targets = loader.next_batch()  # [B, T], [B, T]
        logits = model(inputs).mT  # [B, V, T]
        losses = torch.nn.functional.cross_entropy(
            logits, targets, reduction="none"
        )  # [B, T]
        total, count = total + losses.sum(0), count + len(inputs)
    bins = (total / count).view(-1, 32).mean(1)
    return [round(x, 4) for x in bins.tolist()]


def ladder(root, data):
    """The ladder, the rows beside it, and two widths for the transfer."""
    tuning, best = tune(root, data, ROWS, ladder_job)
    jobs = [ladder_job(row, best[row], seed) for row in ROWS for seed in SEEDS]
    runs = run_grid(root, data, jobs)
    for job, run in zip(jobs, runs, strict=True):
        if run["row"] in (TOP, "learned positions", "no positions"):
            run["loss_by_position"] = loss_by_position(job, root, data)
    transfer = [
        ladder_job(TOP, RATES[i], seed, width)
        for width in (64, 128)
        for i in (2, 3, 4, 5)
        for seed in TUNING[:2]
    ]
    spread = [
        spread_job(row, seed, warm_up, small)
        for row in SPREAD
        for warm_up in (30, 200)
        for small in (True, False)
        for seed in TUNING
    ]
    half_table = [half_table_job(best["GPT-2"], seed) for seed in SEEDS]
    return {
        "rows": ROWS,
        "rates": best,
        "tuning": tuning,
        "runs": runs,
        "transfer": run_grid(root, data, transfer),
        "spread": run_grid(root, data, spread),
        "half_table": run_grid(root, data, half_table),
    }


OPTIMIZERS = ["adamw, cosine", "adamw, wsd", "muon, cosine", "muon, wsd"]
LONGER = "adamw, cosine, longer"


def seconds(root, data, rounds=150):
    """Seconds of a step of each optimizer, step by step in turn.

    They are measured once and kept beside the runs: a row's steps depend on
    them, so a second measurement would make other runs.
    """
    kept = Path(root) / "optimizer_seconds.json"
    if kept.exists():
        return read_json(kept)
    torch.set_num_threads(1)
    config = configure({**LADDER_RUN, "data": str(data)})
    loader = ShardLoader(data, "train", 8, SHORT)
    racers, times = {}, {"adamw": [], "muon": []}
    for name in times:
        model = build_rung(config, load_dataset_info(data), TOP)
        speed_up(model, "cpu", torch.bfloat16)
        racers[name] = model, build_optimizer(model, name)
    cast = partial(torch.autocast, "cpu", torch.bfloat16)
    for _ in range(rounds):
        for name, (model, optimizer) in racers.items():
            batch = [loader.next_batch()]
            began = time.perf_counter()
            train_step(model, optimizer, batch, autocast=cast)
            times[name].append(time.perf_counter() - began)
    times = {name: all_[5:] for name, all_ in times.items()}
    ratios = [
        m / a for m, a in zip(times["muon"], times["adamw"], strict=True)
    ]
    quarter, ratio, three = statistics.quantiles(ratios, n=4)
    print(
        f"a step of Muon takes {ratio:.3f} of AdamW's ({quarter:.3f} to {three:.3f})"
    )
    found = {"seconds": times, "ratio": ratio, "quartiles": [quarter, three]}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, found)
    return found


def optimizers(root, data):
    """AdamW and Muon, cosine and wsd, at equal tokens and equal seconds."""
    ratio = seconds(root, data)["ratio"]
    tuning, best = tune(root, data, OPTIMIZERS, optimizer_job)
    steps, rate = round(STEPS * ratio), best["adamw, cosine"]
    wanted = [(row, best[row], seed) for row in OPTIMIZERS for seed in SEEDS]
    wanted += [(LONGER, rate, seed, steps) for seed in SEEDS]
    runs = runs_of(root, data, wanted, optimizer_job)
    choices, baselines = read_choices(data, CHOICE)
    end = load_dataset_info(data).end_of_text
    for one, run in zip(wanted, runs, strict=True):
        model = trained_model(optimizer_job(*one), root, data)
        scores = choice_scores(model, choices, end)
        run["choice"] = choice_accuracy(scores, choices.answers)[0]
    return {
        "rows": [*OPTIMIZERS, LONGER],
        "rates": best,
        "choice_items": CHOICE,
        "baselines": baselines,
        "tuning": tuning,
        "runs": runs,
    }


PARTS = {
    "seconds": ("optimizer_seconds", seconds),
    "ladder": ("ablation", ladder),
    "optimizers": ("optimizers", optimizers),
}


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/docs", help="folder of tokens")
    parser.add_argument(
        "--runs", type=Path, default="runs/ablation", help="folder of runs"
    )
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="only this one"
    )
    args = parser.parse_args()
    info = load_dataset_info(args.data)
    about = {
        "corpus": info.corpus,
        "hash": info.hash,
        "versions": info.versions,
    }
    about |= {"train_tokens": info.train_tokens, "val_tokens": info.val_tokens}
    for part in args.part or PARTS:
        name, make = PARTS[part]
        write_result(name, {"data": about, **make(args.runs, args.data)})


if __name__ == "__main__":
    cli.run(main)
