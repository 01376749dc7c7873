"""Loading: seconds and peak memory of three ways to load the default model.

    python benchmarks/bench_loading.py [--rounds 5]

The ways: plain (build a model, read the file, copy), llama_tut, transformers.
The default model's file is in float32; it is loaded as it is, cast to bfloat16,
and, from a copy that is stored in bfloat16, as it is again. Each load runs in a
process of its own, in turn. The process first loads a tiny model in the same
way, so that imports do not count. Then it notes its memory, loads the model,
reads every weight once (a mapped file costs nothing before that), and notes the
peak, all on Linux. Threads are as they come: transformers starts some for its
loading, whatever PyTorch is told. Writes benchmarks/results/loading.json, which
chapter 9 reads.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from llama_tut.config import LlamaConfig
from llama_tut.model import LlamaForCausalLM
from llama_tut.tools import cli
from llama_tut.tools.files import require
from llama_tut.tools.machine import write_result
from llama_tut.tools.pretrained import find_pretrained
from llama_tut.weights import load_pretrained, save_pretrained

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
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    require(args.rounds > 0, "--rounds must be at least 1")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        tiny, half = Path(scratch, "tiny"), Path(scratch, "half")
        save_pretrained(LlamaForCausalLM(LlamaConfig()), tiny)
        save_pretrained(load_pretrained(dtype=torch.bfloat16), half)
        whole = find_pretrained()
        cases = {
            "float32": (whole, "float32"),
            "float32 to bfloat16": (whole, "bfloat16"),
            "bfloat16": (half, "bfloat16"),
        }
        for _ in range(args.rounds):
            for case, (folder, dtype) in cases.items():
                for way in ("plain", "llama_tut", "transformers"):
                    runs = found.setdefault(f"{way}, {case}", [])
                    runs.append(load(way, tiny, folder, dtype))
    rows = {}
    for name, runs in found.items():
        row = {
            key: round(statistics.median(run[key] for run in runs), 3)
            for key in runs[0]
        }
        row["peak_ratio"] = round(row["peak_mib"] / row["weights_mib"], 2)
        rows[name] = row
        print(name, row)
    write_result("loading", {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
