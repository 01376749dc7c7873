"""Format, run and tidy notebooks in place, so that a second run gives the same bytes.

python scripts/execute.py notebooks/03_rmsnorm.ipynb [...]
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

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
        "language_info": {"name": "python"},
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    args = parser.parse_args()
    os.environ.update(QUIET)
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
