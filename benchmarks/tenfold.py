"""Ten times the compute of chapter 23's largest run: said first, then tried.

    python benchmarks/tenfold.py --predict     only say it
    python benchmarks/tenfold.py               say it, and train (an hour)

Reads the runs of benchmarks/results/scaling.json and writes what their frontier
expects of ten times the largest run's compute to tenfold_prediction.json. A
prediction is never made when the run has begun. Then it trains, on two threads and
compiled, which changes the time and the rounding, and writes tenfold.json. Stopped, the
same command goes on: the run lies in runs/scaling. At last it asks on which tokens of
the validation text the larger run has gained: those whose last words stand in the
training text, or the others. (For that the largest run is made again.)
"""

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from grid import run_grid
from scaling import (
    LAYERS_AND_HEADS,
    TOKENS_A_STEP,
    T,
    as_tensors,
    config_of,
    fingerprint,
    job,
    largest_job,
)
from torch.nn import functional as F

from llama_tut.model import flops_per_token, parameter_count
from llama_tut.scaling import (
    bootstrap_frontier,
    fit_frontier,
    fit_law,
    interval,
    power,
    predict_run,
)
from llama_tut.tools import cli
from llama_tut.tools.dataset import load_dataset_info
from llama_tut.tools.files import InputError, read_json
from llama_tut.tools.machine import RESULTS, write_result
from llama_tut.tools.shards import first_tokens
from llama_tut.weights import load_pretrained


def predict(saved, info):
    """What fifteen runs say of ten times the compute of the sixteenth."""
    V, grid = info.vocab_size, as_tensors(saved["runs"])
    fit, (many, _) = fit_frontier(*grid), bootstrap_frontier(*grid)
    before = saved["largest"]["slice"]
    c, wanted = 10 * before, math.log(fit.best_size(10 * before))
    sizes = {D: parameter_count(config_of(D, V)) for D in LAYERS_AND_HEADS}
    D = min(sizes, key=lambda D: abs(math.log(sizes[D]) - wanted))
    each = flops_per_token(config_of(D, V), T)
    steps = 8 * round(c / (8 * TOKENS_A_STEP * each))  # eight validations
    loss, low_high = predict_run(*grid, c, sizes[D])
    gain = power(many.loss, before) - power(many.loss, c)
    runs = [*saved["runs"], saved["largest"]]
    keys = ("parameters", "tokens", "val_loss")
    law, _ = fit_law(
        *(torch.tensor([r[k] for r in runs]).double() for k in keys)
    )
    tokens = steps * TOKENS_A_STEP
    return {
        "D": D,
        "N": sizes[D],
        "flops": c,
        "steps": steps,
        "tokens": tokens,
        "epochs": tokens / info.train_tokens,
        "val_loss": loss,
        "val_loss_95": low_high,
        "gain_95": interval(gain),
        "law_val_loss": law.loss(sizes[D], tokens),
    }


LENGTHS = 4, 8, 16, 32


def run_hashes(tokens, n):
    """A number for each run of n tokens, [len - n + 1]; equal runs, equal numbers."""
    found = np.zeros(len(tokens) - n + 1, np.uint64)
    for i in range(n):
        part = tokens[i : i + len(found)].astype(np.uint64)
        found = found * np.uint64(1_000_003) + part + np.uint64(1)
    return found


def longest_seen(train, val):
    """For each token of val the longest of LENGTHS that train has, [len(val)].

    That is, the n tokens that end with it stand somewhere in train; 0: none.
    """
    longest = np.zeros(len(val), int)
    for n in LENGTHS:
        here = np.isin(run_hashes(val, n), run_hashes(train, n))
        longest[n - 1 :][here] = n
    return longest


@torch.no_grad()
def token_losses(folder, data):
    """Nats of each token of the validation text but the first, by rows of T."""
    model = load_pretrained(folder).eval()
    rows = (len(data) - 1) // T
    ids = torch.from_numpy(data[: rows * T + 1])
    pairs = (ids[:-1].view(rows, T), ids[1:].view(rows, T))
    found = [
        F.cross_entropy(model(x).mT, y, reduction="none")
        for x, y in zip(*(side.split(32) for side in pairs), strict=True)
    ]
    return torch.cat(found).flatten().numpy()


def by_repetition(data, folders):
    """Share and loss of the tokens whose context was, or was not, read before.

    folders: {name: folder of a model}.
    """
    train, val = (first_tokens(data, split) for split in ("train", "val"))
    losses = {name: token_losses(path, val) for name, path in folders.items()}
    count = len(next(iter(losses.values())))
    longest = longest_seen(train, val)[1 : count + 1]
    rows = []
    for n in (0, *LENGTHS):
        own = longest == n
        row = {"longest": n, "share": float(own.mean())}
        rows.append(row | {k: float(x[own].mean()) for k, x in losses.items()})
    return rows


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/docs", help="folder of tokens")
    parser.add_argument(
        "--runs", type=Path, default="runs/scaling", help="folder of runs"
    )
    parser.add_argument("--predict", action="store_true", help="only say it")
    args = parser.parse_args()
    info = load_dataset_info(args.data)
    V = info.vocab_size
    saved = read_json(RESULTS / "scaling.json")
    if info.hash != saved["data"]["hash"]:
        raise InputError(
            f"{args.data} is another text than that of scaling.json: "
            "make scaling first"
        )
    path = RESULTS / "tenfold_prediction.json"
    began = args.runs / "tenfold.started"
    mark = fingerprint(saved["runs"])
    if not path.exists() or read_json(path)["grid"] != mark:
        if began.exists():
            raise InputError(
                f"{began}: the run has begun, and {path} is not of this "
                "grid: what was said now would be no prediction"
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_result(
            path.stem,
            {"predicted_at": now, "grid": mark, **predict(saved, info)},
        )
    said = read_json(path)
    low, high = said["val_loss_95"]
    print(
        f"{said['N']:,} parameters, {said['tokens']:,} tokens "
        f"({said['epochs']:.1f} epochs): predicted {said['val_loss']:.3f} "
        f"nats, {low:.3f} to {high:.3f}"
    )
    if args.predict:
        return
    if not began.exists():
        began.parent.mkdir(parents=True, exist_ok=True)
        began.write_text(datetime.now(UTC).isoformat(timespec="seconds"))
    name = f"tenfold-D{said['D']}"
    one = job(name, said["D"], said["steps"], 0, 8, slice=said["flops"])
    before = largest_job(saved["largest"]["options"]["hidden_size"], V)
    jobs = [
        replace(each, options=each.options | {"compile": True})
        for each in (before, one)
    ]
    runs = run_grid(args.runs, args.data, jobs, workers=1, threads=2)
    print(f"the run gives {runs[1]['val_loss']:.3f} nats")
    models = {
        name: each.folder(args.runs) / "model"
        for name, each in zip(("largest", "tenfold"), jobs, strict=True)
    }
    found = {"began_at": began.read_text(), "run": runs[1]}
    found["largest_again"] = runs[0]["val_loss"]
    found["repetition"] = by_repetition(args.data, models)
    write_result("tenfold", found)


if __name__ == "__main__":
    cli.run(main)
