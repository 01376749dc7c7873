"""The commands that README.md shows exist, and take the options that it shows."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
from small_model import caller

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "book/intro.md", "notebooks/18_pretraining.ipynb"]


def read(page):
    """The text of a page; of a notebook, its prose."""
    if page.endswith(".md"):
        return (ROOT / page).read_text()
    cells = nbformat.read(ROOT / page, as_version=4).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def commands(page):
    """Each command in the page's shell blocks, as words, variables left out."""
    text = read(page)
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


ALL = [(page, words) for page in PAGES for words in commands(page)]
MAKE = [words for _, words in ALL if words[0] == "make"]
SCRIPTS = [
    (page, words)
    for page, words in ALL
    if any(word.startswith("scripts/") for word in words)
]


def test_the_two_commands_are_there():
    assert ["make", "train"] in MAKE and ["make", "test"] in MAKE


def test_every_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for words in MAKE:
        assert re.search(rf"^{re.escape(words[1])}:", makefile, re.M), words


def test_ci_runs_the_same_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def options(monkeypatch, capsys):
    """{script: its options}, from --help; train_ddp.sh passes train.py's on."""
    found = {}
    for name in ("prepare", "train", "sample", "evaluate"):
        code, out, err = caller(name, monkeypatch, capsys)("--help")
        assert (code, err) == (0, "")
        found[f"{name}.py"] = set(re.findall(r"--[a-z0-9-]+", out))
    return found | {"train_ddp.sh": found["train.py"]}


def test_every_option_exists(options):
    assert len(SCRIPTS) >= 5
    for page, words in SCRIPTS:
        script = next(w for w in words if w.startswith("scripts/"))
        assert (ROOT / script).exists(), (page, script)
        if Path(script).name not in options:
            continue
        given = {word.split("=")[0] for word in words if word[:2] == "--"}
        unknown = given - options[Path(script).name]
        assert not unknown, (page, script, unknown)


def test_every_command_refuses_in_one_line():
    """Other tests call main() through `cli.run`, as these lines do."""
    for name in (
        *("scripts/address", "scripts/evaluate", "scripts/exercises"),
        *("scripts/prepare", "scripts/sample", "scripts/train"),
        *("benchmarks/ablation", "benchmarks/results", "benchmarks/scaling"),
    ):
        end = r'\nif __name__ == "__main__":\n    (cli\.)?run\(main\)\n$'
        assert re.search(end, (ROOT / f"{name}.py").read_text()), name


def test_every_file_that_is_named_exists():
    for page in [*PAGES, "CONTRIBUTING.md"]:
        folder = (ROOT / page).parent
        for link in re.findall(r"\]\(([^)#]+)\)", read(page)):
            if not re.match(r"[a-z]+:", link):
                assert (folder / link).exists(), (page, link)
