"""Run each notebook in a fresh kernel, one thread, and record its seconds.

    python benchmarks/notebook_times.py [22_gpt2 ...]

Without names all are run. Writes benchmarks/results/notebook_times.json, which
the README's table and its test read; others' times stay. The notebooks
themselves are not changed.
"""

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from execute import QUIET, execute  # noqa: E402
from machine import RESULTS, write_result  # noqa: E402


def main():
    os.environ.update(QUIET)
    seconds, names = {}, sys.argv[1:]
    if names:
        old = (RESULTS / "notebook_times.json").read_text()
        seconds = json.loads(old)["seconds"]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        start = time.time()
        execute(path)
        seconds[path.stem] = round(time.time() - start, 1)
        print(f"{path.stem}: {seconds[path.stem]} s", flush=True)
    write_result("notebook_times", {"seconds": seconds})


if __name__ == "__main__":
    main()
