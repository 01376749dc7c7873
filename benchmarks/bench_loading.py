"""Loading: seconds and peak memory of three ways to load the default model.

    python benchmarks/bench_loading.py [--rounds 5]

The ways: plain (build a model, read the file, copy), llama_tut, transformers.
Each load runs in a process of its own, in turn. The process first loads a tiny
model in the same way, so that imports do not count. Then it notes its memory,
loads the default model, reads every weight once (a mapped file costs nothing
before that), and notes the peak, all on Linux. Writes
benchmarks/results/loading.json, which chapter 9 reads.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools.machine import write_result
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.weights import save_pretrained

CHILD = """
import json, sys, time
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from llama_tut.model import LlamaForCausalLM
from llama_tut.weights import load_pretrained, read_config

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) / 1024

def plain(folder, dtype):
    model = LlamaForCausalLM(read_config(folder))
    model.load_state_dict(load_file(folder + "/model.safetensors"))
    return model.to(dtype)

def by_transformers(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

torch.set_num_threads(1)
way, tiny, folder, dtype = sys.argv[1:]
ways = {"plain": plain, "llama_tut": load_pretrained}
load = ways.get(way, by_transformers)
dtype = getattr(torch, dtype)
load(tiny, dtype)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
start = time.perf_counter()
model = load(folder, dtype)
loaded = time.perf_counter()
touched = sum(p.sum().item() for p in model.parameters())
print(json.dumps({
    "seconds": loaded - start,
    "seconds_touched": time.perf_counter() - start,
    "peak_mib": memory("VmHWM") - before,
    "weights_mib": sum(p.nbytes for p in model.parameters()) / 2**20,
}))
"""


def load(way, *args):
    """One load in a new process: its figures."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, way, *map(str, args)],
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
        (way, dtype)
        for dtype in ("float32", "bfloat16")
        for way in ("plain", "llama_tut", "transformers")
    ]
    found = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as tiny:
        save_pretrained(LlamaForCausalLM(LlamaConfig()), tiny)
        for _ in range(args.rounds):
            for way, dtype in cases:
                runs = found[way, dtype]
                runs.append(load(way, tiny, folder, dtype))
    rows = {}
    for (way, dtype), runs in found.items():
        row = {
            key: round(statistics.median(run[key] for run in runs), 3)
            for key in runs[0]
        }
        row["peak_ratio"] = round(row["peak_mib"] / row["weights_mib"], 2)
        rows[f"{way} {dtype}"] = row
        print(way, dtype, row)
    write_result("loading", {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
