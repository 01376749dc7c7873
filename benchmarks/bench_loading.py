"""Loading time and peak memory beside transformers' from_pretrained.

    python benchmarks/bench_loading.py [--rounds 5]

Each load runs in a process of its own, in turn. After the imports it notes its
memory, loads the default model, reads every weight once (a mapped file costs
nothing before that) and notes the peak, all on Linux. The time is that of
loading and of the first reading. Writes benchmarks/results/loading.json.
"""

import argparse
import json
import statistics
import subprocess
import sys

from llama_tut.tools.machine import write_result
from llama_tut.tools.pretrained import find_pretrained

CHILD = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from llama_tut.weights import load_pretrained

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) / 1024

torch.set_num_threads(1)
who, folder, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
start = time.perf_counter()
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
if who == "llama_tut":
    model = load_pretrained(folder, dtype)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
loaded = time.perf_counter()
touched = sum(p.sum().item() for p in model.parameters())
print(json.dumps({
    "seconds": loaded - start,
    "seconds_touched": time.perf_counter() - start,
    "peak_mib": memory("VmHWM") - before,
    "weights_mib": sum(p.nbytes for p in model.parameters()) / 2**20,
}))
"""


def load(who, folder, dtype):
    """One load in a new process: its figures."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, who, str(folder), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = find_pretrained()
    cases = [
        (who, dtype)
        for dtype in ("float32", "bfloat16")
        for who in ("transformers", "llama_tut")
    ]
    found = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            found[case].append(load(case[0], folder, case[1]))
    rows = {}
    for (who, dtype), runs in found.items():
        rows[f"{who} {dtype}"] = {
            key: round(statistics.median(run[key] for run in runs), 3)
            for key in runs[0]
        }
        print(who, dtype, rows[f"{who} {dtype}"])
    write_result("loading", {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
