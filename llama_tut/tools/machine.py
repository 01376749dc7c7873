"""Machine: what it is, and result files that say on which one they were measured."""

import os
import platform
import re
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from llama_tut.tools.files import write_json

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def processor():
    """The processor's name and the instruction sets that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    known = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    sets = sorted(known & set(flags[1].split())) if flags else []
    return f"{name[1] if name else 'unknown'} ({', '.join(sets)})"


def core_count():
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe():
    """The machine, the versions, the command and the day, as a dictionary."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python", *map(os.path.relpath, sys.argv[:1])]),
        "arguments": sys.argv[1:],
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": core_count(),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def write_result(name, numbers):
    """Write benchmarks/results/NAME.json and say so."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"machine": describe(), **numbers})
    print(f"wrote {path}")
