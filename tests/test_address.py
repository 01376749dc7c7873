"""One setting, the repository's address, switches on the buttons and the first cell."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import address
import export
import nbformat
import pytest
import test_notebooks
import yaml
from small_model import caller, refused

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

URL = "https://github.com/owner/a-book"
RULES = [
    rule
    for name, rule in vars(test_notebooks).items()
    if name.startswith("test_")
]


def copy_book(target):
    """What `set_address` changes, and what a page needs."""
    keep = shutil.ignore_patterns("_build", "__pycache__", "data")
    for folder in ("notebooks", "book"):
        shutil.copytree(ROOT / folder, target / folder, ignore=keep)
    shutil.copy(ROOT / "_config.yml", target)
    return target


def contents(root):
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def addressed(tmp_path_factory):
    root = copy_book(tmp_path_factory.mktemp("book"))
    address.set_address(root, URL)
    return root


def read(path):
    nb = nbformat.read(path, as_version=4)
    nb.path = path
    return nb


def test_without_an_address_nothing_is_switched_on():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    if config["repository"]["url"]:
        pytest.skip("this book has an address")
    assert not config["launch_buttons"]["colab_url"]
    assert not config["launch_buttons"]["binderhub_url"]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert not any(map(address.is_install, read(path).cells)), path.name


def test_twice_is_once_and_it_can_be_undone(tmp_path):
    root = copy_book(tmp_path)
    address.set_address(root, "")
    before = contents(root)
    address.set_address(root, URL)
    once = contents(root)
    address.set_address(root, URL)
    assert contents(root) == once
    changed = {p.name for p in before if before[p] != once[p]}
    notebooks = {p.name for p in root.rglob("*.ipynb")}
    assert changed == notebooks | {"_config.yml"}
    address.set_address(root, "")
    assert contents(root) == before


def test_the_config_knows_the_address(addressed):
    config = yaml.safe_load((addressed / "_config.yml").read_text())
    assert config["repository"] == {"url": URL, "branch": "main"}
    assert config["launch_buttons"]["binderhub_url"] == "https://mybinder.org"
    assert config["html"]["use_repository_button"] is True


STEMS = [path.stem for path in test_notebooks.NOTEBOOKS]


@pytest.mark.parametrize("stem", STEMS)
def test_notebooks_with_the_cell_keep_the_rules(addressed, stem):
    nb = read(addressed / "notebooks" / f"{stem}.ipynb")
    cells = [cell for cell in nb.cells if address.is_install(cell)]
    assert cells == [nb.cells[1]] and URL in cells[0].source
    for rule in RULES:
        try:
            rule(nb)
        except pytest.skip.Exception:
            continue


@pytest.mark.parametrize("stem", STEMS[2:4])
def test_notebooks_with_the_cell_export_the_same(addressed, stem):
    path = addressed / "notebooks" / f"{stem}.ipynb"
    module = export.modules()[ROOT / "notebooks" / f"{stem}.ipynb"]
    assert export.export(path) == module.read_text()


@pytest.mark.parametrize("stem", STEMS)
def test_nothing_else_in_a_notebook_changes(addressed, stem):
    def rest(root):
        nb = read(root / "notebooks" / f"{stem}.ipynb")
        return [
            (cell.cell_type, cell.source, cell.metadata, kinds(cell))
            for cell in nb.cells
            if not address.is_install(cell)
        ]

    def kinds(cell):
        return [output.get("data") for output in cell.get("outputs", [])]

    assert rest(addressed) == rest(ROOT)


def test_the_buttons_lead_to_the_notebook(addressed, tmp_path):
    """A book of two pages, built with the address."""
    toc = "format: jb-book\nroot: book/references\nchapters:\n"
    (tmp_path / "toc.yml").write_text(toc + "  - file: notebooks/03_rmsnorm\n")
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [tool, "build", ".", "--toc", tmp_path / "toc.yml"]
    command += ["--config", "_config.yml", "--path-output", tmp_path]
    done = subprocess.run(
        command, cwd=addressed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    page = tmp_path / "_build" / "html" / "notebooks" / "03_rmsnorm.html"
    links = re.findall(r'href="(https://[^"]+)"', page.read_text())
    place = "main/notebooks/03_rmsnorm.ipynb"
    colab = "https://colab.research.google.com/github/owner/a-book/blob/"
    assert colab + place in links
    binder = "https://mybinder.org/v2/gh/owner/a-book/main?urlpath=lab/tree/"
    assert binder + "notebooks/03_rmsnorm.ipynb" in links
    assert "llama_tut_book" not in page.read_text()


def clone_of_the_book(folder):
    """A git repository with what an installation and a chapter read."""
    keep = shutil.ignore_patterns("__pycache__", "_build")
    for name in ("llama_tut", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=keep)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=folder, check=True)


def test_the_cell_installs_the_book_where_it_is_missing(tmp_path):
    """In a new environment and folder, without a network: packages as here."""
    source = tmp_path / "source"
    source.mkdir()
    clone_of_the_book(source)
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python3*/site-packages"))
    # The packages of this environment, but not its own llama_tut.
    (site / "here.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    cell = address.CELL.format(url=source.as_uri(), folder="notebooks")
    (tmp_path / "work").mkdir()
    tell = (
        "\nimport llama_tut.rmsnorm, pathlib\n"
        "print(llama_tut.__file__)\nprint(pathlib.Path.cwd().resolve())\n"
    )
    for _ in range(2):  # a second session finds it installed
        done = subprocess.run(
            [python, "-c", cell + tell],
            cwd=tmp_path / "work",
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PIP_NO_DEPS": "1",
                "PIP_NO_BUILD_ISOLATION": "0",  # pip: 0 turns isolation off
                "PIP_NO_INDEX": "1",
                "PYTHONPATH": "",
            },
        )
        assert done.returncode == 0, done.stderr
        file, folder = done.stdout.split()[-2:]
        assert Path(file).is_relative_to(site.resolve())
        clone = tmp_path / "work" / "llama_tut_book"
        assert Path(folder) == (clone / "notebooks").resolve()
        assert (Path(folder) / "03_rmsnorm.ipynb").exists()


@pytest.mark.parametrize(
    "url",
    [
        "github.com/owner/name",
        "https://github.com/owner",
        "https://github.com/owner/name/tree/main",
        "https://gitlab.example/owner/name",
        'https://github.com/owner/na"me',
        "nonsense",
    ],
)
def test_a_bad_address_is_refused(url, monkeypatch, capsys):
    before = (ROOT / "_config.yml").read_text()
    refused(caller("address", monkeypatch, capsys)(url))
    assert (ROOT / "_config.yml").read_text() == before


def test_a_good_address_in_several_spellings():
    for text in (URL, URL + "/", URL + ".git", f" {URL} "):
        assert address.checked(text) == URL
    assert address.checked("") == ""


def test_binder_finds_the_environment():
    assert (ROOT / "environment.yml").exists()
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^address:.*\n\t.*scripts/address\.py", makefile, re.M)
