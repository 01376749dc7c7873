"""The contents, the README's chapter table and the rendered pages agree with the notebooks."""

import ast
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urldefrag

import llama_book
import map as book_map
import nbformat
import pytest
import yaml
from docutils import nodes

pytestmark = pytest.mark.slow

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


def module_name(stem):
    """What the tables call a chapter's module: `attention`, `fast/training`."""
    if not (ROOT / "llama_tut" / module_path(stem)).exists():
        return "–"
    return f"`{module_path(stem).removesuffix('.py')}`"


def module_path(stem):
    """The file in llama_tut that a notebook exports."""
    return stem.split("_", 1)[1].replace("fast_", "fast/", 1) + ".py"


def test_the_readme_lists_every_chapter():
    rows = table_rows(README)
    assert list(rows) == STEMS
    times = json.loads(
        (ROOT / "benchmarks/results/notebook_times.json").read_text()
    )["seconds"]
    for stem, (chapter, module, seconds, proves) in rows.items():
        assert f"notebooks/{stem}.ipynb" in chapter
        assert module == module_name(stem)
        assert seconds == f"{times[stem]:.0f} s", f"{stem}: {times[stem]}"
        assert len(proves.split()) >= 4


def test_contributing_lists_every_module_with_its_imports():
    rows = table_rows(CONTRIBUTING)
    assert list(rows) == STEMS
    for stem, (_, module, *_) in rows.items():
        assert module == module_name(stem)


def test_the_modules_page_lists_every_module():
    page = (ROOT / "book" / "modules.md").read_text()
    listed = re.findall(r"automodule:: llama_tut\.([\w.]+)", page)
    chapters = [s for s in STEMS if module_name(s) != "–"]
    tools = sorted((ROOT / "llama_tut" / "tools").glob("[a-z]*.py"))
    assert listed == [
        *(module_name(s).strip("`").replace("/", ".") for s in chapters),
        *(f"tools.{path.stem}" for path in tools),
    ]


def test_notation_covers_every_letter():
    page = (ROOT / "book" / "notation.md").read_text()
    explained = set(re.findall(r"^\| ([A-Z]) \|", page, re.M))
    package = ROOT / "llama_tut"
    for path in sorted([*package.glob("*.py"), *package.glob("fast/*.py")]):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        used = set(re.findall(r"\b[A-Z]\b", text.partition("Letters:")[2]))
        shapes = re.findall(r"# (\[[^\]]*\])$", path.read_text(), re.M)
        used |= set(re.findall(r"\b[A-Z]\b", " ".join(shapes)))
        assert used <= explained, (path.name, used - explained)


def test_every_cited_paper_is_under_references():
    page = (ROOT / "book" / "references.md").read_text()
    sources = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("book/*.ipynb")]
    for path in sources:
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells)
        cited = set(re.findall(r"(?i)arxiv(?:\.org/abs/| )(\d{4}\.\d+)", text))
        missing = {number for number in cited if number not in page}
        assert not missing, (path.name, missing)


def test_each_word_of_the_glossary_has_its_chapter():
    page = (ROOT / "book" / "glossary.md").read_text()
    body = page.partition("```{glossary}")[2].partition("```")[0]
    entries = re.findall(r"^(\S.*)\n((?:  .*\n)+)", body, re.M)
    words = [word.lower() for word, _ in entries]
    assert words == sorted(words) and len(words) == len(set(words))
    assert len(words) > 80
    for word, text in entries:
        assert re.search(r"\]\([^)]+\.ipynb\)\.$", text.strip()), word


def test_the_map_is_what_its_script_draws():
    drawn = (ROOT / "book" / "_static" / "map.svg").read_text()
    assert drawn == book_map.svg(), "run: python book/map.py"
    shown = [stem for *_, stem, _ in book_map.CHAPTERS + book_map.AROUND]
    assert sorted(shown) == STEMS
    for *_, stem, text in book_map.CHAPTERS + book_map.AROUND:
        assert text.startswith(f"{int(stem[:2])} ")


def test_the_museum_shows_every_fault():
    museum = nbformat.read(ROOT / "book" / "museum.ipynb", as_version=4)
    shown = "".join(
        output.get("data", {}).get("text/markdown", "")
        for cell in museum.cells
        for output in cell.get("outputs", [])
    )
    faults = 0
    for stem in STEMS:
        cells = nbformat.read(
            ROOT / "notebooks" / f"{stem}.ipynb", as_version=4
        ).cells
        for cell in cells:
            faults += len(re.findall("^\\| seen in \\| ", cell.source, re.M))
    assert shown.count("| seen in | ") == faults, (
        "run: python scripts/execute.py book/museum.ipynb"
    )


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
        if module_name(stem) == "–":
            continue
        module = module_name(stem).strip("`")
        text = (html / "notebooks" / f"{stem}.html").read_text()
        assert f">llama_tut/{module}.py</a>" in text
        assert (html / "_modules" / "llama_tut" / f"{module}.html").exists()


def test_names_in_the_text_lead_to_their_entries(html):
    """Inline code that names a public object is a link, and its target exists."""
    modules = Page((html / "book" / "modules.html").read_text())
    found = {}
    for path in [*html.glob("notebooks/*.html"), *html.glob("book/*.html")]:
        for link, name in re.findall(
            r'<a [^>]*href="[^"]*modules\.html#([\w.]+)"[^>]*>\s*<code.*?>'
            r"\s*<span[^>]*>([\w.]+)",
            path.read_text(),
        ):
            assert link in modules.anchors
            assert link.endswith("." + name), (path.name, link, name)
            found.setdefault(path.stem, set()).add(name)
    assert "LlamaConfig" in found["02_config"]
    assert "save_pretrained" in found["09_weights"]
    assert "train_step" in found["15_trainer"]


def test_each_entry_leads_to_the_section_that_builds_it(html, pages):
    text = (html / "book" / "modules.html").read_text()
    entries = re.findall(
        r'<dt class="sig sig-object py" id="llama_tut\.'
        r'((?:fast\.)?(?!fast|tools)\w+\.\w+)">(.*?)</dt>',
        text,
        re.S,
    )
    assert len(entries) > 100
    for full, signature in entries:
        link = re.search(
            r'class="built-in[^"]*" href="\.\./([^"#]+)#([^"]+)"', signature
        )
        assert link, f"{full} does not say where it is built"
        file, anchor = link.groups()
        module = full.rpartition(".")[0].replace(".", "_")
        assert file.endswith(f"_{module}.html"), (full, file)
        assert anchor in pages[html / file].anchors, (full, link[0])


@pytest.mark.parametrize(
    "text, docname, wanted",
    [
        ("`attend` does it", "notebooks/05_attention", True),
        ("`attend` does it", "notebooks/07_block", False),  # any word
        ("`attend(q, k, v)` does it", "notebooks/07_block", True),
        ("one `LlamaAttention` a block", "notebooks/07_block", True),
        ("`attention.LlamaAttention` too", "book/intro", True),
        ("transformers' `LlamaAttention`", "notebooks/05_attention", False),
        ("`LlamaAttention` of transformers", "notebooks/05_attention", False),
        ("`no_such_name` and `config.json`", "notebooks/02_config", False),
        ("two `forward` passes", "notebooks/05_attention", False),
    ],
)
def test_which_names_are_linked(text, docname, wanted):
    env = SimpleNamespace(get_domain=lambda name: DOMAIN)
    builder = SimpleNamespace(get_relative_uri=lambda a, b: "modules.html")
    before, literal, after = re.fullmatch("(.*?)`(.*?)`(.*)", text).groups()
    doctree = nodes.paragraph("", "", nodes.Text(before or " "))
    doctree += nodes.literal("", literal)
    doctree += nodes.Text(after)
    app = SimpleNamespace(env=env, builder=builder)
    llama_book.link_names(app, doctree, docname)
    assert bool(list(doctree.findall(nodes.reference))) == wanted


def entry(kind, name):
    return SimpleNamespace(
        objtype=kind, docname="book/modules", node_id=f"llama_tut.{name}"
    )


DOMAIN = SimpleNamespace(
    objects={
        "llama_tut.attention": entry("module", "attention"),
        "llama_tut.attention.attend": entry("function", "attention.attend"),
        "llama_tut.attention.LlamaAttention": entry("class", "attention.L"),
        "llama_tut.attention.LlamaAttention.forward": entry("method", "x"),
        "other.find": entry("function", "x"),
    }
)


def test_without_an_address_there_is_no_launch_button(html):
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    if config["repository"]["url"]:
        pytest.skip("this book has an address")
    for path in html.glob("notebooks/*.html"):
        for word in ("launch-buttons", "mybinder", "colab.research"):
            assert word not in path.read_text(), (path.name, word)


def test_search_knows_words_and_names(html):
    """The index that the search box reads, without a browser."""
    index = (html / "searchindex.js").read_text()
    for name in ("score_items", "llama_tut.rmsnorm", "notebooks/14_optimizer"):
        assert name in index, name
    assert (html / "search.html").exists()


def test_nothing_is_fetched_from_outside(html):
    """Pages show without a network: scripts, styles and maths lie beside them."""
    for path in html.glob("notebooks/*.html"):
        for tag in re.findall(
            r"<(?:script|link|img)\b[^>]*>", path.read_text()
        ):
            source = re.search(r'(?:src|href)="(https?:[^"]+)"', tag)
            assert not source or 'rel="canonical"' in tag, tag
    assert (html / "_static" / "mathjax" / "tex-mml-chtml.js").exists()
