"""What the committed runs say, from their result files alone.

    python benchmarks/results.py

Prints the ladder from GPT-2 to LLaMA, the frontier of losses and its
prediction against the run, the optimizers side by side, and the accuracy of
continuation choice with its baselines. Nothing is trained.
"""

import json

import numpy as np

from llama_tut.gpt2 import LADDER, TWIN
from llama_tut.tools import cli
from llama_tut.tools.files import InputError
from llama_tut.tools.machine import RESULTS
from llama_tut.tools.statistics import unpaired_interval


def read(name):
    """A result file. Raises: InputError if it is not there, or damaged."""
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {error}; restore it, or make it again (make help)"
        ) from error


def by_row(found, key="val_loss"):
    """{row: {seed: number}} of the runs."""
    rows = {row: {} for row in found["rows"]}
    for run in found["runs"]:
        rows[run["row"]][run["seed"]] = run[key]
    return rows


def compare(losses, row, other):
    """Difference of two rows, as text: mean ± half of Welch's interval."""
    own, others = (list(losses[name].values()) for name in (row, other))
    gap, half = unpaired_interval(own, others)
    seeds = f"{len(own)} and {len(others)} seeds"
    return f"{gap:+.3f} ± {half:.3f}, {seeds}, to {other}"


def mean(numbers):
    """Mean of {seed: number}."""
    return sum(numbers.values()) / len(numbers)


def first_runs(found):
    """{row: one of its runs}, in the order of the rows."""
    own = {run["row"]: run for run in found["runs"]}
    return {row: own[row] for row in found["rows"]}


def origin(found):
    """One line on where a result file comes from."""
    machine = found["machine"]
    return (
        f"{machine['command']}, {machine['date']}, {machine['processor']}, "
        f"{machine['cores']} cores, torch {machine['torch']}"
    )


def reference(row):
    """The row that a row of the ladder file is compared with."""
    ladder = list(LADDER)
    if row == ladder[0]:
        return None
    if row in ladder:
        return ladder[ladder.index(row) - 1]
    return "untied head" if row == TWIN else ladder[-1]


def print_ladder():
    """Rung, parameters, FLOPs, seeds, difference, interval."""
    found = read("ablation")
    losses, firsts = by_row(found), first_runs(found)
    print(f"The ladder, {firsts[found['rows'][0]]['tokens']:,} tokens per run")
    print(origin(found))
    print(
        f"{'row':20}{'parameters':>11}{'MFLOPs/token':>13}{'rate':>8}"
        f"{'nats':>8}   difference (95 %, unpaired)"
    )
    for row, run in firsts.items():
        line = (
            f"{row:20}{run['parameters']:11,}"
            f"{run['flops_per_token'] / 1e6:13.2f}"
            f"{found['rates'][row]:8g}{mean(losses[row]):8.3f}"
        )
        other = reference(row)
        print(line + (f"   {compare(losses, row, other)}" if other else ""))


def print_scaling():
    """The frontier of the grid, and its prediction against the run."""
    found, said = read("scaling"), read("scaling_prediction")
    runs, largest = found["runs"], found["largest"]
    print(f"\nScaling, {len(runs)} runs of {len(by_size(runs))} sizes")
    print(origin(found))
    for budget in sorted({run["slice"] for run in runs}):
        sizes = by_size([run for run in runs if run["slice"] == budget])
        best = min(sizes, key=sizes.get)
        text = ", ".join(f"{n / 1e6:.2f}M {x:.3f}" for n, x in sizes.items())
        print(f"{budget:8.2e} FLOPs: {text}; best {best / 1e6:.2f}M")
    line = said["frontier"]
    for name, letter in (("size", "N"), ("loss", "loss")):
        exponent = line[f"{name}_exponent"]
        low, high = line[f"{name}_exponent_95"]
        print(f"best {letter} ~ C^{exponent:.3f} ({low:.3f} to {high:.3f})")
    low, high = said["val_loss_95"]
    inside = "inside" if low <= largest["val_loss"] <= high else "outside"
    print(
        f"the largest, {largest['parameters']:,} parameters (embeddings "
        f"counted), {largest['tokens']:,} tokens, {largest['flops']:.2e} FLOPs:"
    )
    print(
        f"predicted at {said['predicted_at']}: {said['val_loss']:.3f} nats "
        f"({low:.3f} to {high:.3f}, 95 %)"
    )
    print(
        f"begun at {found['largest_began_at']}: {largest['val_loss']:.3f} nats, "
        f"{inside} the interval"
    )
    ten, run = read("tenfold_prediction"), read("tenfold")["run"]
    low, high = ten["val_loss_95"]
    print(
        f"ten times its compute, {ten['N']:,} parameters, {ten['tokens']:,} "
        f"tokens: predicted {ten['val_loss']:.3f} nats ({low:.3f} to "
        f"{high:.3f}), by the law {ten['law_val_loss']:.3f}; the run "
        f"{run['val_loss']:.3f}"
    )


def by_size(runs):
    """{parameters: mean validation loss}, from small to large."""
    sizes = sorted({run["parameters"] for run in runs})
    return {
        n: float(
            np.mean([r["val_loss"] for r in runs if r["parameters"] == n])
        )
        for n in sizes
    }


def print_optimizers():
    """Optimizers and schedules at equal tokens and at equal seconds."""
    found = read("optimizers")
    losses, firsts = by_row(found), first_runs(found)
    bits, seconds = by_row(found, "bits_per_byte"), by_row(found, "seconds")
    rows = found["rows"]
    print(f"\nOptimizers, {firsts[rows[0]]['parameters']:,} parameters")
    print(origin(found))
    print(
        f"{'row':24}{'rate':>7}{'tokens':>10}{'seconds':>9}{'nats':>8}"
        f"{'bits/byte':>11}   difference (95 %, unpaired)"
    )
    for row in rows:
        rate = firsts[row]["options"]["learning_rate"]
        line = (
            f"{row:24}{rate:7g}{firsts[row]['tokens']:10,}"
            f"{mean(seconds[row]):9.0f}"
            f"{mean(losses[row]):8.3f}{mean(bits[row]):11.4f}"
        )
        if row != rows[0]:
            line += f"   {compare(losses, row, rows[0])}"
        print(line)
    print("at equal seconds: muon, cosine", end=" ")
    print(compare(losses, "muon, cosine", rows[-1]))
    print_choice(found)


def print_choice(found):
    """Accuracy of continuation choice at the end, beside its baselines."""
    print(f"\nContinuation choice, {found['choice_items']:,} items")
    for name, share in found["baselines"].items():
        print(f"{name:24}{share:7.1%}")
    for row, shares in by_row(found, "choice").items():
        low, high = min(shares.values()), max(shares.values())
        print(f"{row:24}{mean(shares):7.1%} ({low:.1%} to {high:.1%})")


def main():
    cli.Parser(description=__doc__.split("\n")[0]).parse_args()
    print_ladder()
    print_scaling()
    print_optimizers()


if __name__ == "__main__":
    cli.run(main)
