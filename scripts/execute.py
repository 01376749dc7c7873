"""Format, run and tidy notebooks in place, so that a second run gives the same bytes.

python scripts/execute.py notebooks/03_rmsnorm.ipynb [...]
python scripts/execute.py --times notebooks/*.ipynb
    changes no notebook, and records its seconds in
    benchmarks/results/notebook_times.json, which the README's table reads
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from llama_tut.tools.files import read_json
from llama_tut.tools.machine import RESULTS, write_result

QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONHASHSEED": "0",
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
}
ROOT = Path(__file__).resolve().parent.parent


def tidy(nb, stem):
    """Reduce metadata to what a reader or the book needs; name the cells."""
    nb.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        # Some outputs come from Python's own texts: conftest.py asks for this.
        "language_info": {
            "name": "python",
            "version": platform.python_version(),
        },
    }
    name = stem.split("_", 1)[-1]
    for number, cell in enumerate(nb.cells, 1):
        cell.id = f"{name}-{number:02d}"
        cell.metadata = {
            key: cell.metadata[key]
            for key in ("mystnb", "tags")
            if key in cell.metadata
        }
        if "solution" in cell.metadata.get("tags", []):
            # JupyterLab folds it; in the book a dropdown does.
            cell.metadata["jupyter"] = {"source_hidden": True}
    return nb


def execute(path):
    """The notebook at `path`, executed in a fresh kernel and tidied."""
    nb = nbformat.read(path, as_version=4)
    nb.cells = [cell for cell in nb.cells if cell.source.strip()]
    NotebookClient(
        nb,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    return tidy(nb, path.stem)


def record_times(paths):
    """Run each notebook, and put its seconds into the committed table."""
    file = RESULTS / "notebook_times.json"
    seconds = read_json(file)["seconds"] if file.exists() else {}
    for path in paths:
        start = time.time()
        execute(path.resolve())
        seconds[path.stem] = round(time.time() - start, 1)
        print(f"{path.stem}: {seconds[path.stem]} s", flush=True)
        here = {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
        known = {stem: seconds[stem] for stem in sorted(here & set(seconds))}
        write_result("notebook_times", {"seconds": known})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument(
        "--times", action="store_true", help="only record how long each takes"
    )
    args = parser.parse_args()
    os.environ.update(QUIET)
    if args.times:
        return record_times(args.notebooks)
    for path in args.notebooks:
        subprocess.run(
            [sys.executable, "-m", "ruff", "format", "--quiet", path],
            check=True,
            cwd=ROOT,
        )
        start = time.time()
        nbformat.write(execute(path.resolve()), path)
        print(f"{path}: {time.time() - start:.1f} s")


if __name__ == "__main__":
    main()
