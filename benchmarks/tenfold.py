"""Ten times the compute of chapter 23's largest run: said first, then tried.

    python benchmarks/tenfold.py --predict     only say it
    python benchmarks/tenfold.py               say it, and train (an hour)

Reads the runs of benchmarks/results/scaling.json and writes what their frontier
expects of ten times the largest run's compute to tenfold_prediction.json. A
prediction is never made when the run has begun. Then it trains, on two threads and
compiled, which changes nothing but the time, and writes tenfold.json. Stopped, the
same command goes on: the run lies in runs/scaling.
"""

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

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
)

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
from llama_tut.tools.files import InputError, read_json
from llama_tut.tools.machine import RESULTS, write_result
from llama_tut.tools.prepare import load_dataset_info


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


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data/docs", help="folder of tokens")
    parser.add_argument(
        "--runs", type=Path, default="runs/scaling", help="folder of runs"
    )
    parser.add_argument("--predict", action="store_true", help="only say it")
    args = parser.parse_args()
    info = load_dataset_info(args.data)
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
    one = replace(one, options=one.options | {"compile": True})
    (run,) = run_grid(args.runs, args.data, [one], workers=1, threads=2)
    print(f"the run gives {run['val_loss']:.3f} nats")
    write_result("tenfold", {"began_at": began.read_text(), "run": run})


if __name__ == "__main__":
    cli.run(main)
