"""The laptop speedrun: how soon does a 2-core machine reach 1.72 bits per byte?

    python benchmarks/speedrun.py                 the last record and the one before
    python benchmarks/speedrun.py --record NAME   an older one and the one before
    python benchmarks/speedrun.py --all           the whole table (an hour)
    python benchmarks/speedrun.py --others        what stands beside it

1.72 on the whole validation text of the default corpus is where the first
`make train` ended. Each record has a reason of its own; its options add to
those of the record before it. The mean of three seeds must reach the target,
and records take turns, seed by seed. Seconds are those of the whole command,
from its start to the model that it leaves. Only --all and --others write
benchmarks/results/speedrun.json.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from llama_tut.tools import cli
from llama_tut.tools.baselines import ngram_nats
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import read_json, require
from llama_tut.tools.machine import RESULTS, ROOT, write_result
from llama_tut.tools.options import flag
from llama_tut.tools.runs import read_metrics
from llama_tut.tools.shards import first_tokens

TARGET = 1.72  # bits per byte
SEEDS = 1, 2, 3


@dataclass(frozen=True)
class Record:
    """A row of the table: what it changes of the one before it, and why."""

    name: str
    why: str
    options: dict  # of scripts/train.py
    ranks: int = 1


RECORDS = [
    Record(
        "first version",
        "two ranks, a step of 1,024 tokens, and as many steps as it takes",
        {
            "preset": "laptop",
            "optimizer": "muon",
            "learning_rate": 4e-3,
            "dtype": "auto",
            "steps": 3_900,
        },
        ranks=2,
    ),
    Record(
        "larger steps",
        "one process with two threads exchanges no gradients and takes 16 rows "
        "at once; twice the tokens a step bear twice the rate, which falls to 0",
        {
            "micro_batch_size": 16,
            "tokens_per_step": 2_048,
            "learning_rate": 8e-3,
            "final_fraction": 0.0,
            "steps": 1_950,
        },
    ),
    Record(
        "start from counts",
        "embedding and head begin with the counts of pairs, which the first "
        "steps would have to learn",
        {
            "first_weights": "counts",
            "tie_word_embeddings": False,
            "steps": 1_250,
        },
    ),
]
NAMES = [record.name for record in RECORDS]
# Beside the last record, one seed each.
OTHERS = [
    Record(
        "no counts",
        "a head of its own as in the last record, but random first weights: "
        "is it the counts?",
        {"first_weights": "random"},
    ),
    Record(
        "for longer",
        "the last record with the steps of `make train`",
        {"steps": 2_400},
    ),
]
# Nothing but training and one validation on the whole text.
MEASURED = {"samples": 0, "eval_every": 0, "checkpoint_every": 0}


def options_of(record):
    """All options of a record: those of the records before it, and its own."""
    options = {}
    at = RECORDS.index(record) if record in RECORDS else len(RECORDS)
    for earlier in RECORDS[:at]:
        options |= earlier.options
    return options | record.options


def arguments(options):
    """The options as words of a command line."""
    for name, value in options.items():
        if isinstance(value, bool):
            yield flag(name if value else f"no_{name}")
        else:
            yield from (flag(name), str(value))


def train(record, data, rows, seed):
    """One run of a record, in a folder of its own -> its numbers."""
    options = options_of(record) | MEASURED | {"data": data, "seed": seed}
    options["eval_rows"] = rows // options.get("sequence_length", 128)
    start = [sys.executable, str(ROOT / "scripts" / "train.py")]
    if record.ranks > 1:
        start = ["bash", str(ROOT / "scripts" / "train_ddp.sh")]
    threads = str(max(1, 2 // record.ranks))
    more = {"NPROC": str(record.ranks), "NNODES": "1"}
    more |= {"OMP_NUM_THREADS": threads, "PYTHON": sys.executable}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [*start, *arguments(options | {"out": out})]
        began = time.perf_counter()
        done = subprocess.run(
            words, env=os.environ | more, capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        require(done.returncode == 0, f"{record.name}: {last}")
        lines = read_metrics(out / "metrics.jsonl")
    found = {
        "seed": seed,
        "seconds": round(seconds, 1),
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "val_loss": lines[-1]["val_loss"],
        "bits_per_byte": lines[-1]["bits_per_byte"],
    }
    print(
        f"{record.name:24} seed {seed}: {found['bits_per_byte']:.4f} bits per "
        f"byte, {seconds:.0f} s",
        flush=True,
    )
    return found


def measure(racers, data, rows, seeds=SEEDS):
    """Records in turn, seed by seed -> what the result file says of each."""
    runs = {racer.name: [] for racer in racers}
    for seed in seeds:
        for racer in racers:
            runs[racer.name].append(train(racer, data, rows, seed))
    return [
        {
            "name": racer.name,
            "why": racer.why,
            "ranks": racer.ranks,
            "options": options_of(racer),
            "runs": runs[racer.name],
        }
        for racer in racers
    ]


def five_gram(data, info):
    """Bits per byte of Kneser-Ney's counts of five tokens, on the same text."""
    train, val = (first_tokens(data, split) for split in ("train", "val"))
    return info.bits_per_byte(ngram_nats(train, val, info.vocab_size, 5))


def print_table(found):
    """Entry by entry: mean seconds, bits per byte, and times the first."""
    print(f"{'':24}{'seconds':>9}{'bits per byte':>15}{'times':>8}")
    first = mean(run["seconds"] for run in found[0]["runs"])
    for one in found:
        seconds = mean(run["seconds"] for run in one["runs"])
        bits = mean(run["bits_per_byte"] for run in one["runs"])
        print(f"{one['name']:24}{seconds:9.0f}{bits:15.4f}", end="")
        print(f"{first / seconds:8.2f}")


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/docs", help="folder of tokens")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--record", default=NAMES[-1], help="a name")
    group.add_argument("--all", action="store_true", help="the whole table")
    group.add_argument("--others", action="store_true", help="beside the last")
    args = parser.parse_args()
    require(
        args.record in NAMES,
        f"--record {args.record!r}: take one of {', '.join(NAMES)}",
    )
    info = load_dataset_info(args.data)
    run = partial(measure, data=args.data, rows=info.val_tokens)
    if not (args.all or args.others):
        at = NAMES.index(args.record)
        print_table(run(RECORDS[max(0, at - 1) : at + 1]))
        return
    path = RESULTS / "speedrun.json"
    kept = read_json(path) if path.exists() else {}
    if args.others:
        require(
            kept.get("data") == info.hash,
            f"{path} is of another text, or missing: begin with --all",
        )
        others = run(OTHERS, seeds=SEEDS[:1])
        print_table(others)
    else:
        kept = {"data": info.hash, "target": TARGET}
        kept["five_gram"] = five_gram(args.data, info)
        kept["records"] = run(RECORDS)
        print_table(kept["records"])
        others = []
    kept = {key: value for key, value in kept.items() if key != "machine"}
    write_result("speedrun", kept | {"others": others})


if __name__ == "__main__":
    cli.run(main)
