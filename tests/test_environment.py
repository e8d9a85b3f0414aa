"""What is installed is what the one list says, and the package stands alone."""

import ast
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
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
    imported_as = {"vl_convert_python": "vl_convert", "ipython": "IPython"}
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


@pytest.mark.filterwarnings("ignore")
def test_the_wheel_installs_in_an_empty_environment_and_says_what_it_lacks(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    quiet = ["--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "requirements.txt")]
    subprocess.run([python, "-m", "pip", "install", *quiet, str(wheel)], check=True, cwd=tmp_path)
    program = (
        "import staterank_utils, torch; print(staterank_utils.__file__);"
        "print(staterank_utils.effective_rank(torch.eye(3)).item());"
        "staterank_utils.load_model('hybrid')"
    )
    done = subprocess.run(
        [python, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    where, rank = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert Path(where).with_name("py.typed").is_file(), "without it, type checkers do not read the annotations"
    assert rank == "3"
    assert "FileNotFoundError: the embedded model 'hybrid' is part of the repository" in done.stderr
