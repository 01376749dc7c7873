"""Chapter 26's runs: a dense LLaMA and mixtures of experts, side by side.

    python benchmarks/moe.py [--data data/docs] [--part speed]

DESIGN, written before the runs. Question: at equal active FLOPs, does a
mixture of experts reach a lower validation loss than the dense model? ROWS
lists the five models. Same text in the same order for one seed, same schedule.

1. tune: each row's learning rate on a seed of its own, short runs; "no
   balancing" takes Mixtral's, since it is the same model.
2. equal tokens: STEPS steps, SEEDS. Primary: validation loss at the last step,
   unpaired 95 % intervals of the differences to "dense".
3. equal seconds: "dense" also runs for 1.25 and 1.5 times the steps, each with
   its own schedule. Its loss at the seconds of another row is read from these
   by the logarithm of the steps; the seconds of a step are measured in turn
   on a quiet machine (--part speed), not taken from the runs.
   Processor seconds are measured, since they depend less on what else runs.
4. a longer pair: "dense" and "Mixtral" for LONG steps, one seed.

All in float32: in bfloat16 a CPU was faster for the dense row and slower for
the experts. A finished run is not made again; a stopped one starts again.
Writes benchmarks/results/moe.json after every run, and moe_speed.json.

CHANGED before these runs, after a first try was stopped in its second seed: it had
a tied head, matrices of 0.02 and a warm-up of 5 % (15 of 300 steps), and seeds of
one row lay up to 0.12 nats apart. On two trial seeds of the dense row and of Mixtral,
a warm-up of 75 steps alone brought the distance from 0.08 and 0.15 down to 0.01
(300 steps at 0.004: dense 4.508, 4.588, then 4.409, 4.398; Mixtral 4.786, 4.940,
then 4.448, 4.456).
Now: an untied head, matrices of 0.5/sqrt(D), WARM_UP steps, 400 steps for 300.

ADDED after the longer pair was seen: Mixtral ended 0.12 nats below dense, but dense had
0.008, a rate tuned on 200 steps, and Mixtral 0.004. So dense runs for LONG steps at
0.004 too, both on a second seed, and so does the control of equal size (LONGER).
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from llama_tut.config import LlamaConfig
from llama_tut.loader import ShardLoader
from llama_tut.model import LlamaForCausalLM
from llama_tut.moe import (
    MoEConfig,
    MoEForCausalLM,
    balance_experts,
    moe_layers,
)
from llama_tut.optimizer import build_optimizer, learning_rate_at
from llama_tut.tools import cli
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import read_json, write_json
from llama_tut.tools.machine import write_result
from llama_tut.trainer import evaluate, training_steps

B, T = 8, 128
STEPS, LONG, SHORT = 400, 1600, 200
WARM_UP = 100
SEEDS, TUNING = (1, 2, 3), 0
RATES = (2e-3, 4e-3, 8e-3, 16e-3)
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "initializer_range": 0.5 / 128**0.5,
    "max_position_embeddings": T,
}
MIXTRAL = {"mlp": "mixtral", "experts": 8, "experts_per_token": 2}
DEEPSEEK = {
    "mlp": "deepseek",
    "experts": 32,
    "experts_per_token": 7,
    "shared_experts": 1,
    # DeepSeek-V3 has 0.001 and hundreds of thousands of steps; in 400 steps
    # that would move a bias by 0.4 at most.
    "balance": 0.01,
}
LONGER = [
    ("dense", LONG, 4e-3, SEEDS[0]),
    ("dense, equal size", LONG, 4e-3, SEEDS[0]),
    ("Mixtral", LONG, 4e-3, SEEDS[1]),
    ("dense", LONG, 4e-3, SEEDS[1]),
]
ROWS = {
    "dense": {},
    "Mixtral": MIXTRAL,
    "no balancing": MIXTRAL | {"balance": 0.0},
    "DeepSeek": DEEPSEEK,
    "dense, equal size": {"intermediate_size": 4 * 384},
}


def build(row, info):
    """The model of a row, with random weights."""
    options = SHAPE | ROWS[row] | {"vocab_size": info.vocab_size}
    if "mlp" in options:
        return MoEForCausalLM(MoEConfig(**options))
    return LlamaForCausalLM(LlamaConfig(**options))


def steps_of(row, data, steps, rate, seed):
    """The model, and its training steps as in chapter 15."""
    torch.manual_seed(seed)
    model = build(row, load_dataset_info(data))
    loader = ShardLoader(data, "train", B, T, seed=seed)
    learning_rate = partial(
        learning_rate_at, peak=rate, steps=steps, warmup_steps=WARM_UP
    )
    return model, training_steps(
        model,
        build_optimizer(model, learning_rate=rate),
        loader.next_batch,
        learning_rate,
        steps,
    )


def run(row, data, steps, rate, seed):
    """One run -> what the result file keeps of it."""
    torch.set_num_threads(1)
    model, lines = steps_of(row, data, steps, rate, seed)
    validation = ShardLoader(data, "val", B, T, shuffle=False)
    curve, loads, train = [], [], []
    for line in lines:
        experts = moe_layers(model).values()
        train.append(line["loss"])
        if experts and line["step"] % 10 == 0:
            shares = torch.stack([m.load / m.load.mean() for m in experts])
            loads.append([[round(x, 2) for x in r] for r in shares.tolist()])
        if experts:
            balance_experts(model, line)
        if line["step"] % 50 == 0 or line["step"] == steps:
            rows = 384 if line["step"] == steps else 64
            nats = evaluate(model, validation, rows)
            curve.append([line["step"], round(nats, 5)])
    return {
        "row": row,
        "steps": steps,
        "learning_rate": rate,
        "seed": seed,
        "tokens": steps * B * T,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": model.flops_per_token(T),
        "val_loss": curve[-1][1],
        "curve": curve,
        "train": [
            round(sum(train[i : i + 50]) / 50, 4)
            for i in range(0, steps - 49, 50)
        ],
        "loads": loads if seed == SEEDS[0] and steps == STEPS else [],
    }


def make(job, folder, data):
    """The record of a run: made now, or read if it was made before."""
    row, steps, rate, seed = job
    name = f"{row}-{steps}-{rate:g}-{seed}-{load_dataset_info(data).hash[:8]}"
    path = Path(folder) / (name.replace(" ", "_").replace(",", "") + ".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, run(row, data, steps, rate, seed))
    return read_json(path)


def runs(folder, data, workers=2):
    """All runs, in the order of the design, two at a time."""
    info, found = load_dataset_info(data), {}
    about = {"corpus": info.corpus, "hash": info.hash}
    about |= {"versions": info.versions}

    def make_all(jobs):
        pending = {pool.submit(make, job, folder, data): job for job in jobs}
        for future in as_completed(pending):
            job = pending[future]
            found[job] = future.result()
            print(*job, found[job]["val_loss"], flush=True)
            write_result(
                "moe",
                {
                    "data": about,
                    "rows": list(ROWS),
                    "steps": STEPS,
                    "long": LONG,
                    "tuning_seed": TUNING,
                    "runs": [found[job] for job in sorted(found)],
                },
            )

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        tuned = [row for row in ROWS if row != "no balancing"]
        make_all([(row, SHORT, r, TUNING) for row in tuned for r in RATES])
        best = {
            row: min(
                RATES,
                key=lambda r: found[row, SHORT, r, TUNING]["val_loss"],
            )
            for row in tuned
        }
        best["no balancing"] = best["Mixtral"]
        equal = [(r, STEPS, best[r], seed) for seed in SEEDS for r in ROWS]
        more = [round(factor * STEPS) for factor in (1.25, 1.5)]
        dense = "dense", best["dense"]
        equal += [(dense[0], n, dense[1], s) for s in SEEDS for n in more]
        pair = [(r, LONG, best[r], SEEDS[0]) for r in ("dense", "Mixtral")]
        make_all(equal + pair + LONGER)


def speed(data, rounds=7, steps=4):
    """Seconds of a step of every row, measured in turn; the median."""
    torch.set_num_threads(1)
    times = {row: [] for row in ROWS}
    going = {row: steps_of(row, data, 10**6, 1e-3, 0) for row in ROWS}
    for _ in range(rounds):
        for row, (model, lines) in going.items():
            began = time.process_time()
            for _ in range(steps):
                next(lines)
                if moe_layers(model):
                    balance_experts(model, {})
            times[row].append((time.process_time() - began) / steps)
    middle = {row: sorted(ts)[rounds // 2] for row, ts in times.items()}
    write_result("moe_speed", {"seconds": middle, "all": times})
    for row, seconds in middle.items():
        print(f"{row:18} {1e3 * seconds:6.1f} ms per step")


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/docs", help="folder of tokens")
    parser.add_argument("--runs", default="runs/moe", help="folder of runs")
    parser.add_argument(
        "--part",
        choices=("speed", "runs"),
        action="append",
        help="only this one",
    )
    args = parser.parse_args()
    for part in args.part or ("speed", "runs"):
        if part == "speed":
            speed(args.data)
        else:
            runs(args.runs, args.data)


if __name__ == "__main__":
    cli.run(main)
