"""What is installed is what the one list says, and the package stands alone."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^;\s]+)", re.MULTILINE)


def pins() -> dict[str, str]:
    return dict(PINNED.findall((ROOT / "requirements.txt").read_text()))


def test_every_line_of_the_list_is_pinned() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(pins()) == len(lines)


def test_conda_users_get_the_versions_of_the_list() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [by_pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "-r requirements.txt" in by_pip
    assert "-e ." in by_pip
    written = [entry for entry in environment["dependencies"] if isinstance(entry, str)] + by_pip
    assert not set(PINNED.findall("\n".join(written))), "a version is written twice: keep it in requirements.txt"
    [python] = [entry for entry in written if entry.startswith("python=")]
    assert python.removeprefix("python=") in ("3.11", "3.12")


def test_the_makefile_installs_the_list() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "-r requirements.txt" in text
    assert not PINNED.findall(text)


def required() -> list[Requirement]:
    """What the package and its extras need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in (*project["dependencies"], *extras)]


def test_lower_bounds_admit_the_pinned_versions() -> None:
    for requirement in required():
        assert requirement.specifier.contains(pins()[requirement.name]), str(requirement)


def test_the_package_names_the_repository_of_the_book() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Repository"] == yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]


def test_every_import_of_the_package_is_declared() -> None:
    declared = {requirement.name.replace("-", "_") for requirement in required()}
    imported_as = {"vl_convert_python": "vl_convert", "ipython": "IPython", "pyyaml": "yaml"}
    declared = {imported_as.get(name, name) for name in declared}
    declared |= {"staterank_utils", "triton"}  # triton comes with torch where torch is built for a GPU
    for file in (ROOT / "staterank_utils").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                top = name.split(".")[0]
                assert top in declared or top in sys.stdlib_module_names, f"{file.name} imports {name}"
