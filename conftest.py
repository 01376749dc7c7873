"""Settings for tests and notebooks: quiet libraries, one thread a worker, and
outputs of notebooks compared up to the last digits of a float. Where a notebook
reads the texts of Python itself, they are compared under the Python that made them."""

import json
import math
import os
import platform
import re
import warnings
from pathlib import Path

os.environ.update(
    TQDM_DISABLE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    PYTHONHASHSEED="0",
    PYTHONWARNINGS="ignore",
    OMP_NUM_THREADS="1",
    PYDEVD_DISABLE_FILE_VALIDATION="1",
)

import pytest  # noqa: E402

NUMBER = re.compile(r"[-+]?\d[\d,]*\.\d+(?:[eE][-+]?\d+)?")
RELATIVE, ABSOLUTE = 1e-3, 1e-5


def same_but_for_rounding(a, b):
    """Whether two texts are equal, decimal fractions within a tolerance.

    Processors differ in the last digits of a float; whole numbers and words
    must be the same.
    """
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
    return all(
        math.isclose(
            float(x.replace(",", "")),
            float(y.replace(",", "")),
            rel_tol=RELATIVE,
            abs_tol=ABSOLUTE,
        )
        for x, y in pairs
    )


def same_outputs(mine, reference):
    """Whether two {kind: [texts]} of a cell's outputs agree."""
    return mine.keys() == reference.keys() and all(
        len(mine[kind]) == len(reference[kind])
        and all(
            same_but_for_rounding(str(a), str(b))
            for a, b in zip(mine[kind], reference[kind], strict=True)
        )
        for kind in mine
    )


def flatten(outputs, skip):
    """{kind: [texts]} of a cell's outputs, with the streams joined."""
    flat = {}
    for output in transform_streams_for_comparison(outputs):
        fields = {**output, **output.get("data", {})}
        for key, value in fields.items():
            if key != "data" and key not in skip:
                flat.setdefault(key, []).append(value)
    return flat


# How a notebook reaches the docstrings and the manual of the Python that runs it
PYTHON_TEXTS = ("pydoc_data", 'get_path("stdlib")')


def other_texts(notebook, python):
    """Whether a notebook reads Python's texts, and those of `python` may differ.

    They change with every release, 3.11.2 to 3.11.7, too.
    """
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    reads = any(name in source for source in code for name in PYTHON_TEXTS)
    return reads and notebook.metadata.language_info.version != python


def compare_well(cell_class):
    """Let nbval accept other last digits, and what follows from other texts."""
    exact = cell_class.compare_outputs

    def compare_outputs(self, test, ref, skip_compare=None):
        skip = skip_compare or self.parent.skip_compare
        if same_outputs(flatten(test, skip), flatten(ref, skip)):
            return True
        python = platform.python_version()
        if not other_texts(self.parent.nb, python):
            return exact(self, test, ref, skip_compare)
        made_with = self.parent.nb.metadata.language_info.version
        warnings.warn(
            f"{self.parent.name} reads the texts of Python {made_with}, and this "
            f"is {python}: the outputs of cell {self.cell_num} differ",
            stacklevel=1,
        )
        return True

    cell_class.compare_outputs = compare_outputs


try:
    from nbval.plugin import IPyNbCell, transform_streams_for_comparison
except ImportError:
    IPyNbCell = ()
else:
    compare_well(IPyNbCell)

ROOT = Path(__file__).resolve().parent
TIMES = ROOT / "benchmarks" / "results" / "notebook_times.json"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker ends with one alone.

    Files with tests marked slow, then notebooks by their recorded seconds,
    then all others as they were collected.
    """
    seconds = json.loads(TIMES.read_text())["seconds"]
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def place(item):
        return -seconds.get(item.path.stem, 1000 * (item.path in slow))

    items.sort(key=place)


failed_notebooks = set()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Remember a notebook in which a cell raised."""
    report = (yield).get_result()
    if isinstance(item, IPyNbCell) and report.when == "call" and report.failed:
        failed_notebooks.add(item.parent.nodeid)


def pytest_runtest_setup(item):
    """After a failed cell the rest of its notebook would fail for no reason of its own."""
    if isinstance(item, IPyNbCell) and item.parent.nodeid in failed_notebooks:
        pytest.skip("an earlier cell of this notebook failed")
