"""Peak memory and time of the head loss: all logits, PyTorch's chunks, our tiles.

    python benchmarks/bench_head_loss.py [--rows 2048] [--repeats 3]

V 128,256 and D 256, one thread, seconds of the processor. Each contender runs
forward and backward in processes of its own, of which the median counts: the
allocator's part in the peak differs from one to the next. Memory is what the
process' peak stands above its start, with the gradients of hidden and weight
(127 MiB in float32). Writes benchmarks/results/head_loss.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from llama_tut.tools import cli
from llama_tut.tools.files import require
from llama_tut.tools.machine import write_result

V, D = 128_256, 256


def plain(hidden, weight, targets):
    """The loss with all its logits, in float32."""
    from torch.nn import functional as F

    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def chunks(hidden, weight, targets):
    """PyTorch's own loss in chunks of rows, with its defaults."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn import functional as F

    return F.linear_cross_entropy(
        hidden, weight, targets, options=LinearCrossEntropyOptions()
    )


def measure(name, dtype, rows):
    """Print the loss, the seconds and the growth of the peak, as JSON."""
    import psutil
    import torch

    from llama_tut.fast.training import head_loss

    torch.manual_seed(0)
    torch.set_num_threads(1)
    loss_of = {"plain": plain, "torch": chunks, "ours": head_loss}[name]
    dtype = getattr(torch, dtype)
    hidden = torch.randn(rows, D, dtype=dtype, requires_grad=True)
    # In place: a larger table here would stand in the peak below.
    weight = torch.randn(V, D, dtype=dtype).mul_(0.1).requires_grad_()
    targets = torch.randint(V, (rows,))
    small = torch.randn(8, D, dtype=dtype, requires_grad=True)
    loss_of(hidden[:2], small, targets[:2] % 8).backward()  # load the kernels
    before = psutil.Process().memory_info().rss
    start = time.process_time()
    loss = loss_of(hidden, weight, targets)
    loss.backward()
    seconds = time.process_time() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mib = (peak - before) / 2**20
    print(json.dumps({"loss": loss.item(), "seconds": seconds, "mib": mib}))


def child(name, dtype, rows):
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--rows", str(rows)]
    done = subprocess.run(
        [*command, "--contender", name, "--dtype", dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main():
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    require(min(args.rows, args.repeats) > 0, "numbers must be at least 1")
    if args.contender:
        measure(args.contender, args.dtype, args.rows)
        return
    results = {}
    for dtype in ("float32", "bfloat16"):
        for name in ("plain", "torch", "ours"):
            runs = [child(name, dtype, args.rows) for _ in range(args.repeats)]
            found = {
                key: statistics.median(run[key] for run in runs)
                for key in ("loss", "seconds", "mib")
            }
            found["mib_of_each"] = [run["mib"] for run in runs]
            results[f"{name} {dtype}"] = found
            print(f"{name} {dtype}: {found}", flush=True)
    ratios = {
        dtype: round(
            results[f"plain {dtype}"]["mib"] / results[f"ours {dtype}"]["mib"],
            1,
        )
        for dtype in ("float32", "bfloat16")
    }
    print("times less memory:", ratios)
    write_result(
        "head_loss",
        {
            "vocab_size": V,
            "hidden_size": D,
            "rows": args.rows,
            "results": results,
            "times_less_memory": ratios,
        },
    )


if __name__ == "__main__":
    cli.run(main)
