"""tools/docs_corpus: docstrings without imports, duplicates or leaks."""

import re

import numpy as np
import pytest

from llama_tut.tools import docs_corpus
from llama_tut.tools.files import InputError


def test_docstrings_without_import(tmp_path):
    text = "What it does. " * 20
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "no.py").write_text(f'"""{text}"""')
    (tmp_path / "bad.py").write_text("{{ template }}")
    (tmp_path / "good.py").write_text(
        f'"""{text}module"""\nraise SystemExit\n'
        f'class A:\n    """{text}class"""\n'
        f'    async def f():\n        """{text}function"""\n'
        '    def g():\n        """short"""\n'
    )
    files = list(docs_corpus.python_files(tmp_path, "pkg"))
    assert [name for name, _ in files] == ["pkg/bad.py", "pkg/good.py"]
    found = docs_corpus.read_docstrings(files)
    ends = [(name, re.search(r"\w+$", text)[0]) for name, text in found]
    assert ends == [
        ("pkg/good.py", "module"),
        ("pkg/good.py", "class"),
        ("pkg/good.py", "function"),
    ]


def test_duplicates_and_leaks_are_dropped():
    rng = np.random.default_rng(0)

    def prose(n=80):
        return " ".join(f"w{i}" for i in rng.integers(5000, size=n))

    shared, documents = prose(), []
    for n in range(400):
        own = prose()
        documents.append((f"m{n}.py", f"{own}\n\n{shared}"))
        documents.append((f"x{n}.py", own.upper() + "!"))
    kept = list(docs_corpus.deduplicate(documents))
    assert len(kept) == 400, "the copy in capitals is a duplicate"
    assert sum(shared in text for _, text in kept) == 1

    borrowed = [(f"n{n}.py", kept[n][1] + prose(20)) for n in range(400)]
    rows = list(docs_corpus.split_by_module(kept + borrowed, 0.5))
    train = {text for split, text in rows if split == "train"}
    known = set().union(*map(docs_corpus.windows, train))
    for split, text in rows:
        if split == "val":
            own = docs_corpus.windows(text)
            assert len(own & known) <= 0.1 * len(own)


def test_docs_versions_name_all_packages(monkeypatch):
    assert set(docs_corpus.docs_versions()) == {
        "python",
        *docs_corpus.PACKAGES,
    }
    monkeypatch.setattr(docs_corpus, "PACKAGES", ("no_such_package",))
    with pytest.raises(InputError, match="no_such_package"):
        docs_corpus.docs_versions()
