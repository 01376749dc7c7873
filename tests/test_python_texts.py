"""Outputs that come from the texts of Python itself, and conftest.py's rule for them."""

from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_they_are_compared_under_the_python_that_made_them(request):
    other_texts = next(
        plugin.other_texts
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(ROOT / "conftest.py")
    )
    there = {"language_info": {"name": "python", "version": "3.11.7"}}
    source = "from pydoc_data.topics import topics"
    reads = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source)], metadata=there
    )
    only_says = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(source)], metadata=there
    )
    assert other_texts(reads, "3.11.2") and not other_texts(reads, "3.11.7")
    assert not other_texts(only_says, "3.11.2")
    through = {
        path.stem[:2]
        for path in NOTEBOOKS
        if other_texts(nbformat.read(path, as_version=4), "3.11.2")
    }
    assert through == {"01", "12", "13", "18", "22", "23", "26", "27"}
