"""List every exercise, and prove its checker on the solution and on wrong answers.

python scripts/exercises.py             every chapter
python scripts/exercises.py 03_rmsnorm  one

Exits 1 where a chapter has fewer than two exercises, a checker refuses the
chapter's solution, or it lets a wrong answer pass or gives it the wrong hint.
Exercises with fewer than three wrong answers are listed.
"""

import ast
import re
import sys
from importlib import import_module

import nbformat
from export import NOTEBOOKS, module_path, modules

from llama_tut import exercises
from llama_tut.tools.cli import Parser, run
from llama_tut.tools.files import require

LEAST = 2  # exercises a chapter
LEAST_WRONG = 3  # wrong answers an exercise


def tagged(notebook, tag):
    """The sources of the cells with that tag."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [c.source for c in cells if tag in c.metadata.get("tags", [])]


def chapters():
    """{notebook's stem: (its path, its name)} of chapters with exercises."""
    notebooks = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    return {n.stem: (n, n.stem.split("_", 1)[1]) for n in notebooks}


def imports(notebook):
    """The import statements of a notebook's cells."""
    found = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        # a cell with a magic command is not Python, and imports nothing here
        if cell.cell_type == "code" and not re.search(
            r"^\s*[%!]", cell.source, re.M
        ):
            found += [
                ast.unparse(node)
                for node in ast.parse(cell.source).body
                if isinstance(node, ast.Import | ast.ImportFrom)
            ]
    return "\n".join(found)


def solutions(notebook):
    """{exercise: verdict}: what its checker says of the folded solution.

    A solution cell sees what its chapter imports and exports, and `check`.
    """
    said = {}

    def record(name, answer):
        said[name] = exercises.verdict(name, answer)

    space = {}
    exec(imports(notebook), space)
    if notebook in modules():
        path = module_path(notebook.stem).removesuffix(".py")
        space.update(
            vars(import_module(f"llama_tut.{path.replace('/', '.')}"))
        )
    for source in tagged(notebook, "solution"):
        exec(source, {**space, "__name__": "solution", "check": record})
    return said


def faults(notebook, chapter):
    """Print the exercises of one chapter; return what is wrong with them."""
    found = []
    try:
        import_module(f"llama_tut.exercises.{chapter}")
    except ModuleNotFoundError:
        return [f"{notebook.stem}: no exercises"]
    names = [n for n in exercises.EXERCISES if n.split(".")[0] == chapter]
    if len(names) < LEAST:
        found.append(f"{notebook.stem}: {len(names)} exercises, not {LEAST}")
    try:
        solved = solutions(notebook)
    except Exception as error:  # a cell may do anything
        kind = type(error).__name__
        return [f"{notebook.stem}: its solutions cannot run: {kind}: {error}"]
    for name in sorted({*solved, *names}):
        if name not in names or name not in solved:
            found.append(f"{name}: exercise without solution, or the reverse")
    for name in names:
        found += report(notebook, name, solved.get(name))
    return found


def few_wrong_answers(names):
    """The exercises whose checker is tried on too few wrong answers."""
    counts = {name: len(exercises.EXERCISES[name].wrong) for name in names}
    return [
        f"{name}: {count} wrong answers, not {LEAST_WRONG}"
        for name, count in counts.items()
        if count < LEAST_WRONG
    ]


def report(notebook, name, solved):
    """Print one exercise; return what is wrong with it."""
    one = exercises.EXERCISES[name]
    found = []
    checker = f"{one.checker.__module__}.{one.checker.__name__}"
    print(f"{notebook.stem}  {name}  ({checker})")
    print(f"    solution: {solved}")
    if solved != "right":
        found.append(f"{name}: the solution gets {solved!r}")
    found += few_wrong_answers([name])
    for answer, hint in one.wrong:
        said = exercises.verdict(name, answer)
        print(f"    {answer.__name__}: {said}")
        if said == "right":
            found.append(f"{name}: {answer.__name__} passes")
        elif hint not in said:
            found.append(f"{name}: {answer.__name__} is not told {hint!r}")
    return found


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "chapters", nargs="*", help="as 03_rmsnorm (default: every chapter)"
    )
    args = parser.parse_args()
    table = chapters()
    unknown = set(args.chapters) - set(table)
    require(
        not unknown,
        f"no chapter {', '.join(sorted(unknown))}: "
        f"choose from {', '.join(table)}",
    )
    found = []
    for name in args.chapters or table:
        found += faults(*table[name])
    print(f"{len(exercises.EXERCISES)} exercises, {len(found)} faults")
    for fault in found:
        print(f"fault: {fault}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    run(main)
