"""Run each notebook in a fresh kernel, one thread, and record its seconds.

    python benchmarks/notebook_times.py

Writes benchmarks/results/notebook_times.json, which the README's table and its
test read. The notebooks themselves are not changed.
"""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from execute import QUIET, execute  # noqa: E402
from machine import write_result  # noqa: E402


def main():
    os.environ.update(QUIET)
    seconds = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        start = time.time()
        execute(path)
        seconds[path.stem] = round(time.time() - start, 1)
        print(f"{path.stem}: {seconds[path.stem]} s", flush=True)
    write_result("notebook_times", {"seconds": seconds})


if __name__ == "__main__":
    main()
