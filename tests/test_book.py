"""The contents, the README's chapter table and the rendered pages agree with the notebooks."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
STEMS = sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))


def table_rows(markdown):
    """The cells of every row whose first cell names a notebook."""
    rows = {}
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        name = re.search(r"\d\d_\w+", cells[0])
        if line.startswith("|") and name:
            rows[name[0]] = cells
    return rows


def test_the_contents_list_every_notebook_in_order():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    files = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    notebooks = [f for f in files if f.startswith("notebooks/")]
    assert notebooks == [f"notebooks/{stem}" for stem in STEMS]


def test_the_readme_lists_every_chapter():
    rows = table_rows(README)
    assert list(rows) == STEMS
    times = json.loads(
        (ROOT / "benchmarks/results/notebook_times.json").read_text()
    )["seconds"]
    for stem, (chapter, module, seconds, proves) in rows.items():
        assert f"notebooks/{stem}.ipynb" in chapter
        assert module == f"`{stem.split('_', 1)[1]}`"
        assert seconds == f"{times[stem]:.0f} s", f"{stem}: {times[stem]}"
        assert len(proves.split()) >= 4


def test_contributing_lists_every_module_with_its_imports():
    rows = table_rows(CONTRIBUTING)
    assert list(rows) == STEMS
    for stem, (_, module, *_) in rows.items():
        assert module == f"`{stem.split('_', 1)[1]}`"


def test_the_modules_page_lists_every_module():
    page = (ROOT / "book" / "modules.md").read_text()
    listed = re.findall(r"automodule:: llama_tut\.(\w+)", page)
    assert listed == [stem.split("_", 1)[1] for stem in STEMS]


class Page(HTMLParser):
    """Links, anchors and pictures of one rendered page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.pictures = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.anchors.add(attributes["id"])
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "img":
            self.pictures.append(attributes)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The rendered book, built as `make book` builds it."""
    out = tmp_path_factory.mktemp("book")
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [str(tool), "build", "."]
    command += ["--toc", "book/_toc.yml", "--config", "_config.yml"]
    command += ["--path-output", str(out), "-W", "--keep-going"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, "\n".join(
        x for x in log.splitlines() if "WARNING" in x or "ERROR" in x
    )
    return out / "_build" / "html"


@pytest.fixture(scope="module")
def pages(html):
    names = [*html.glob("book/*.html"), *html.glob("notebooks/*.html")]
    names += html.glob("_modules/**/*.html")
    return {path: Page(path.read_text()) for path in names}


def test_every_local_link_leads_somewhere(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, fragment = urldefrag(unquote(link))
            if re.match(r"[a-z]+:", target) or "genindex" in target:
                continue
            file = (path.parent / target).resolve() if target else path
            if not file.exists():
                broken.append(f"{path.name}: {link}")
            elif fragment and file in pages:
                if fragment not in pages[file].anchors | {""}:
                    broken.append(f"{path.name}: {link}")
    assert not broken


def test_every_picture_is_described(pages):
    for path, page in pages.items():
        for picture in page.pictures:
            assert len(picture.get("alt", "")) > 20, (path.name, picture)


def test_exported_cells_name_their_file(pages, html):
    for stem in STEMS:
        module = stem.split("_", 1)[1]
        text = (html / "notebooks" / f"{stem}.html").read_text()
        assert f">llama_tut/{module}.py</a>" in text
        assert (html / "_modules" / "llama_tut" / f"{module}.html").exists()


def test_nothing_is_fetched_from_outside(html):
    """Pages show without a network: scripts, styles and maths lie beside them."""
    for path in html.glob("notebooks/*.html"):
        for tag in re.findall(
            r"<(?:script|link|img)\b[^>]*>", path.read_text()
        ):
            source = re.search(r'(?:src|href)="(https?:[^"]+)"', tag)
            assert not source or 'rel="canonical"' in tag, tag
    assert (html / "_static" / "mathjax" / "tex-mml-chtml.js").exists()
