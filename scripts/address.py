"""Tell the book where it lives: buttons for Colab and Binder, and a first cell.

python scripts/address.py https://github.com/OWNER/NAME
python scripts/address.py ''        take it all back

Sets the address in _config.yml, which switches on the buttons, and gives each
notebook a cell that fetches and installs the book where it is missing, as on
Colab. The cell does nothing elsewhere and is not shown on the pages. Binder
reads environment.yml.
"""

import re
from pathlib import Path

import nbformat

from llama_tut.tools.cli import Parser, run
from llama_tut.tools.files import require

ROOT = Path(__file__).resolve().parent.parent
TAG = "remove-cell"
ADDRESS = re.compile(r"https://github\.com/[\w-]+/[\w.-]+")
# Lines of _config.yml: without an address, and with one.
SETTINGS = {
    "url": ('""', "{url}"),
    "binderhub_url": ('""', "https://mybinder.org"),
    "colab_url": ('""', "https://colab.research.google.com"),
    "use_repository_button": ("false", "true"),
    "use_issues_button": ("false", "true"),
}
CELL = """\
# Where the book is missing, as on Colab: fetch it, install it, go there.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("llama_tut") is None:
    if not os.path.exists("llama_tut_book"):
        fetch = ["git", "clone", "--quiet", "--depth=1"]
        fetch += ["{url}"]
        subprocess.run([*fetch, "llama_tut_book"], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "./llama_tut_book"], check=True)
    importlib.invalidate_caches()
if os.path.isdir("llama_tut_book/{folder}"):
    os.chdir("llama_tut_book/{folder}")"""


def checked(url):
    """The address without a slash or `.git` at its end; "" for none.

    Raises:
        InputError: it is no address of a repository on GitHub.
    """
    short = url.strip().removesuffix("/").removesuffix(".git")
    require(
        not short or ADDRESS.fullmatch(short),
        f"{url!r} is no address of a repository: "
        "give https://github.com/OWNER/NAME, or '' to take it back",
    )
    return short


def configure(text, url):
    """_config.yml's text with this address, or with none."""
    for key, values in SETTINGS.items():
        value = values[bool(url)].format(url=url)
        line = rf"^(  {key}:).*$"
        text, count = re.subn(line, rf"\1 {value}", text, flags=re.M)
        require(count == 1, f"_config.yml has {count} lines {key!r}, not 1")
    return text


def is_install(cell):
    """Whether this script has put the cell there."""
    mine = cell.source.startswith(CELL.splitlines()[0])
    return mine and TAG in cell.metadata.get("tags", [])


def with_cell(nb, stem, source):
    """The notebook with this first code cell, or without one (source "").

    It stands after the title. The counts of the other cells move on, as if the
    notebook had been executed with it.
    """
    cells = [cell for cell in nb.cells if not is_install(cell)]
    if source:
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": [TAG]})
        cells.insert(1, cell)
    nb.cells = cells
    name, count = stem.split("_", 1)[-1], 0
    for number, cell in enumerate(nb.cells, 1):
        cell.id = f"{name}-{number:02d}"
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    return nb


def set_address(root, url):
    """Write the address (checked, or "") into a checkout at `root`."""
    config = root / "_config.yml"
    text = configure(config.read_text(), url)
    for folder in ("notebooks", "book"):
        for path in sorted((root / folder).glob("*.ipynb")):
            nb = nbformat.read(path, as_version=4)
            source = CELL.format(url=url, folder=folder) if url else ""
            nbformat.write(with_cell(nb, path.stem, source), path)
    config.write_text(text)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "url", help="https://github.com/OWNER/NAME, or '' to take it back"
    )
    url = checked(parser.parse_args().url)
    set_address(ROOT, url)
    print(f"the book lives at {url}" if url else "the book has no address")


if __name__ == "__main__":
    run(main)
