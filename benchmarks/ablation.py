"""The ladder from GPT-2 to LLaMA, and optimisers side by side: real runs.

    python benchmarks/ablation.py [--data data/docs] [--part ladder|optimizers]

First each row's learning rate is tuned: one seed at rates a factor of two
apart, until the best has a worse one on both sides. Where the two best are
closer than CLOSE, a second seed decides, as a rate at the edge of what is stable
can be lucky once. The chosen rate runs on three fresh seeds; rows whose seeds
lay far apart run on five. A seed decides the initialisation and the order of
the text, so rows of one seed see the same tokens in the same order.
Stop it with Ctrl-C; the same command goes on. Writes
benchmarks/results/ablation.json and optimizers.json.
"""

from functools import partial
from pathlib import Path

import torch
from grid import Job, run_grid
from safetensors.torch import load_file

from llama_tut.gpt2 import BESIDE, LADDER, TWIN, build_rung
from llama_tut.loader import ShardLoader
from llama_tut.tools import cli
from llama_tut.tools.choice import read_choices
from llama_tut.tools.machine import write_result
from llama_tut.tools.options import configure
from llama_tut.tools.prepare import load_dataset_info

TUNING, SEEDS, MORE = (0, 4), (1, 2, 3), (5, 6)
CLOSE = 0.04  # nats
RATES = [0.0005 * 2**i for i in range(7)]  # 0.5e-3 to 32e-3
CHOICE = 1200  # items of continuation choice
SHORT, LONG = 128, 256  # context in training, and twice that
ROWS = [*LADDER, TWIN, *BESIDE]
SPREAD = list(LADDER)[:6]  # initialised with 0.02

COMMON = {
    "sequence_length": SHORT,
    "micro_batch_size": 8,
    "tokens_per_step": 1024,
    "eval_rows": 384,
    "dtype": "bfloat16",
    "samples": 0,
    "keep_checkpoints": 1,
}
LADDER_RUN = COMMON | {
    "steps": 700,
    "eval_every": 100,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": LONG,
}
OPTIMIZER_RUN = COMMON | {
    "steps": 600,
    "eval_every": 200,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


def slug(text):
    """A name for a folder."""
    return text.lower().replace(" ", "-").replace("²", "2")


def ladder_job(row, rate, seed):
    """One run of a row of the ladder."""
    return Job(
        f"{slug(row)}-lr{rate:.0e}-seed{seed}",
        LADDER_RUN | {"learning_rate": rate, "seed": seed},
        partial(build_rung, name=row),
        {"row": row, "learning_rate": rate, "seed": seed},
    )


def optimizer_job(row, rate, seed, steps=None):
    """One run of an optimizer and a schedule, as "muon, wsd"."""
    optimizer, schedule = row.split(", ")[:2]
    about = {"optimizer": optimizer, "schedule": schedule}
    options = OPTIMIZER_RUN | about | {"learning_rate": rate, "seed": seed}
    if seed not in TUNING:
        options |= {"choice": CHOICE}
    if steps:
        options |= {"steps": steps}
    return Job(
        f"{slug(row.replace(',', ''))}-lr{rate:.0e}-seed{seed}",
        options,
        about={"row": row, "learning_rate": rate, "seed": seed},
    )


def tried(runs, row, seed):
    """{index into RATES: loss} of a row's tuning runs with a seed."""
    return {
        RATES.index(run["learning_rate"]): run["val_loss"]
        for run in runs
        if (run["row"], run["seed"]) == (row, seed)
    }


def two_best(runs, row):
    """The two best rates on the first seed, as indices into RATES."""
    losses = tried(runs, row, TUNING[0])
    return sorted(losses, key=losses.get)[:2]


def is_close(runs, row):
    """Whether one seed cannot decide between the two best rates."""
    losses = sorted(tried(runs, row, TUNING[0]).values())
    return losses[1] - losses[0] < CLOSE


def best_mean(runs, row):
    """The best rate; of two that were run twice, by the mean."""
    first, second = (tried(runs, row, seed) for seed in TUNING)
    return min(second or first, key=lambda i: first[i] + second.get(i, 0))


def tune(root, data, rows, make, start):
    """Tuning runs of all rows -> records, and the best rate of each row.

    A row starts with three neighbouring rates. It goes on until the rate that
    it takes has both neighbours.
    """

    def run_all(seed, indices):
        wanted = [(r, RATES[i]) for r in rows for i in sorted(indices[r])]
        return run_grid(root, data, [make(*pair, seed) for pair in wanted])

    rates = {row: {start - 1, start, start + 1} for row in rows}
    while True:
        runs = run_all(TUNING[0], rates)
        taken = {row: two_best(runs, row)[0] for row in rows}
        if all(neighbours(taken[row]) <= rates[row] for row in rows):
            close = {
                row: two_best(runs, row) if is_close(runs, row) else []
                for row in rows
            }
            runs += run_all(TUNING[1], close)
            taken = {row: best_mean(runs, row) for row in rows}
        missing = {r: neighbours(taken[r]) - rates[r] for r in rows}
        if not any(missing.values()):
            return runs, {row: RATES[taken[row]] for row in rows}
        rates = {row: rates[row] | missing[row] for row in rows}


def neighbours(index):
    """The indices beside one, inside RATES."""
    return {index - 1, index + 1} & set(range(len(RATES)))


@torch.no_grad()
def loss_by_position(job, root, data, rows=400):
    """Mean loss at each place of twice the trained context, in bins of 32."""
    config = configure({**job.options, "data": str(data)})
    model = job.build(config, load_dataset_info(data)).eval()
    path = job.folder(root) / "model" / "model.safetensors"
    model.load_state_dict(load_file(path))
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
    """The ladder and the rows beside it."""
    tuning, best = tune(root, data, ROWS, ladder_job, start=2)
    jobs = [
        ladder_job(row, best[row], seed)
        for row in ROWS
        for seed in SEEDS + MORE * (row in SPREAD)
    ]
    runs = run_grid(root, data, jobs)
    for job, run in zip(jobs, runs, strict=True):
        if run["row"] in ("initialisation", *BESIDE):
            run["loss_by_position"] = loss_by_position(job, root, data)
    return {"rows": ROWS, "rates": best, "tuning": tuning, "runs": runs}


OPTIMIZERS = ["adamw, cosine", "adamw, wsd", "muon, cosine"]
LONGER = "adamw, cosine, longer"


def optimizers(root, data):
    """AdamW and Muon, cosine and wsd, at equal tokens and equal seconds."""
    tuning, best = tune(root, data, OPTIMIZERS, optimizer_job, start=2)
    jobs = [optimizer_job(r, best[r], s) for r in OPTIMIZERS for s in SEEDS]
    runs = run_grid(root, data, jobs)
    # At equal seconds: as many more steps as Muon's take longer.
    seconds = {
        name: sum(r["seconds"] for r in runs if r["row"] == f"{name}, cosine")
        for name in ("adamw", "muon")
    }
    ratio = seconds["muon"] / seconds["adamw"]
    steps = round(OPTIMIZER_RUN["steps"] * ratio)
    rate = best["adamw, cosine"]
    more = [optimizer_job(LONGER, rate, seed, steps) for seed in SEEDS]
    runs += run_grid(root, data, more)
    return {
        "rows": [*OPTIMIZERS, LONGER],
        "rates": best,
        "seconds_ratio": round(ratio, 3),
        "choice_items": CHOICE,
        "baselines": read_choices(data, CHOICE)[1],
        "tuning": tuning,
        "runs": runs,
    }


PARTS = {
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
