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

All in float32: bfloat16 makes the dense row faster and the experts slower on a
CPU (chapter 26 says why). A finished run is not made again; a stopped one starts again. Writes
benchmarks/results/moe.json after every run, and moe_speed.json.
"""

import json
import time
from functools import partial
from pathlib import Path

import torch

from llama_tut.config import LlamaConfig
from llama_tut.fast.training import speed_up
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
from llama_tut.tools.devices import autocast
from llama_tut.tools.files import write_json
from llama_tut.tools.machine import write_result
from llama_tut.tools.prepare import load_dataset_info
from llama_tut.trainer import evaluate, training_steps

B, T = 8, 128
STEPS, LONG, SHORT = 400, 1600, 150
SEEDS, TUNING = (1, 2, 3), 0
RATES = (2e-3, 4e-3, 8e-3)
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": T,
}
MIXTRAL = {"mlp": "mixtral", "experts": 8, "experts_per_token": 2}
DEEPSEEK = {
    "mlp": "deepseek",
    "experts": 32,
    "experts_per_token": 7,
    "shared_experts": 1,
}
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
    speed_up(model, "cpu", torch.float32)
    loader = ShardLoader(data, "train", B, T, seed=seed)
    learning_rate = partial(
        learning_rate_at, peak=rate, steps=steps, warmup_steps=steps // 20
    )
    return model, training_steps(
        model,
        build_optimizer(model, learning_rate=rate),
        loader.next_batch,
        learning_rate,
        steps,
        autocast=partial(autocast, torch.device("cpu"), torch.float32),
    )


def run(row, data, steps, rate, seed):
    """One run -> what the result file keeps of it."""
    torch.set_num_threads(1)
    model, lines = steps_of(row, data, steps, rate, seed)
    validation = ShardLoader(data, "val", B, T, shuffle=False)
    cast = partial(autocast, torch.device("cpu"), torch.float32)
    curve, loads, train = [], [], []
    for line in lines:
        experts = moe_layers(model)
        train.append(line["loss"])
        if experts and line["step"] % 10 == 0:
            shares = torch.stack([m.load / m.load.mean() for m in experts])
            loads.append([[round(x, 2) for x in r] for r in shares.tolist()])
        if experts:
            balance_experts(model, line)
        if line["step"] % 50 == 0 or line["step"] == steps:
            rows = 384 if line["step"] == steps else 64
            nats = evaluate(model, validation, rows, autocast=cast)
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


class Runs:
    """Runs that are made once: a file for each in a folder."""

    def __init__(self, folder, data):
        self.folder, self.data, self.found = Path(folder), data, []
        self.info = load_dataset_info(data)

    def __call__(self, row, steps, rate, seed):
        """The record of a run, made now if it is missing."""
        name = f"{row}-{steps}-{rate:g}-{seed}-{self.info.hash[:8]}.json"
        path = self.folder / name.replace(" ", "_").replace(",", "")
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            record = run(row, self.data, steps, rate, seed)
            write_json(path, record)
            print(
                f"{row:18} {steps:5} steps, seed {seed}, {rate:g}: "
                f"{record['val_loss']:.4f}",
                flush=True,
            )
        record = json.loads(path.read_text())
        self.found.append(record)
        self.write()
        return record

    def write(self):
        """All that is there so far, for the book."""
        info = self.info
        about = {"corpus": info.corpus, "hash": info.hash}
        write_result(
            "moe",
            {
                "data": about | {"versions": info.versions},
                "rows": list(ROWS),
                "steps": STEPS,
                "long": LONG,
                "runs": self.found,
            },
        )


def runs(folder, data):
    """All runs, in the order of the design."""
    make, best = Runs(folder, data), {}
    for row in ROWS:
        if row != "no balancing":
            tried = {r: make(row, SHORT, r, TUNING) for r in RATES}
            best[row] = min(tried, key=lambda r: tried[r]["val_loss"])
    best["no balancing"] = best["Mixtral"]
    for seed in SEEDS:
        for row in ROWS:
            make(row, STEPS, best[row], seed)
    for seed in SEEDS:
        for factor in (1.25, 1.5):
            make("dense", round(factor * STEPS), best["dense"], seed)
    for row in ("dense", "Mixtral"):
        make(row, LONG, best[row], SEEDS[0])


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
        print(f"{row:18} {1e3 * seconds:6.1f} ms a step")


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
