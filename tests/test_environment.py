"""pyproject.toml, constraints.txt and environment.yml speak of the same versions."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins():
    """{package: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(x) for x in lines if x and x[0] != "#"]
    return {
        canonicalize_name(r.name): str(r.specifier).removeprefix("==")
        for r in requirements
    }


def wanted():
    extras = PROJECT["optional-dependencies"]
    return [
        Requirement(line)
        for line in PROJECT["dependencies"] + extras["book"] + extras["test"]
    ]


def test_every_dependency_is_pinned_to_an_allowed_version():
    pinned = pins()
    for requirement in wanted():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), requirement


def test_every_pin_is_exact_and_local():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert "==" in line and "+" not in line and "://" not in line, line


def test_torch_is_the_build_that_pip_finds():
    assert pins()["torch"] == "2.13.0"


def test_conda_reads_the_same_files():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = env["dependencies"]
    assert PROJECT["requires-python"] == f">={python.removeprefix('python=')}"
    assert pip == {"pip": ["-c constraints.txt", "-e .[book,test,fast]"]}


def test_make_installs_from_the_same_files():
    makefile = (ROOT / "Makefile").read_text()
    assert "-c constraints.txt -e '.[book,test,fast]'" in makefile
