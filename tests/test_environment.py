"""What is installed is what the one list says, and the package stands alone."""

import ast
import os
import re
import subprocess
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
    # triton comes with torch where torch is built for a GPU
    declared |= {"staterank_utils", "staterank_notebook", "triton"}
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


def test_workflows_run_what_this_repository_runs_itself() -> None:
    """Each job is one command in a fresh clone, so that a green run here is one there; beside `.ci/run` goes what takes longest."""
    for name, expected in {"publish.yml": [".ci/run"], "test.yml": [".ci/run", "make test-slow"]}.items():
        jobs = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"].values()
        assert [step["run"] for job in jobs for step in job["steps"] if "run" in step] == expected, name
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_blocks_of_workflows_are_run_in_a_clone(tmp_path: Path) -> None:
    flows = tmp_path / "repository" / ".github" / "workflows"
    flows.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path / "repository"), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    script = [sys.executable, str(ROOT / ".ci" / "workflows"), str(tmp_path / "repository")]
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for block, status in (("echo a; $PYTHON --version >> $SAID; pwd >> $SAID", 0), ("false | true; echo b", 1)):
        steps = [
            {"uses": "actions/checkout@v4"},
            {"uses": "actions/setup-python@v5", "with": {"python-version": "${{ matrix.python }}"}},
            {"run": block},
            {"run": block},
        ]
        job = {"strategy": {"matrix": {"python": [here, "2.5"]}}, "steps": steps}
        (flows / "test.yml").write_text(yaml.safe_dump({"jobs": {"all": job}}))
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "x"], check=True)
        done = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"SAID": str(tmp_path / "said")})
        assert done.returncode == status, done.stderr
        assert "actions/checkout@v4 (of GitHub)" in done.stdout
    assert "false | true; echo b ended with status 1" in done.stderr
    version, place = (tmp_path / "said").read_text().splitlines()  # one block, one run
    assert version.startswith(f"Python {here}")
    assert not Path(place).exists()


def test_each_job_of_a_workflow_has_a_clone_of_its_own_and_a_python_that_is_missing_is_named(tmp_path: Path) -> None:
    flows = tmp_path / "repository" / ".github" / "workflows"
    flows.mkdir(parents=True)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    jobs = {
        name: {"steps": [{"uses": "actions/setup-python@v5", "with": {"python-version": version}}, {"run": block}]}
        for name, version, block in (("a", here, "touch left"), ("b", here, "test ! -e left"), ("c", "2.5", "false"))
    }
    (flows / "test.yml").write_text(yaml.safe_dump({"jobs": jobs}))
    git = ["git", "-C", str(tmp_path / "repository"), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    script = [sys.executable, str(ROOT / ".ci" / "workflows"), str(tmp_path / "repository")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "-- test.yml, c, Python 2.5: left out, this machine has no python2.5" in done.stdout


def test_a_profile_given_to_make_sweep_goes_before_that_of_the_file() -> None:
    for given, expected in ((["PROFILE=full"], True), ([], False)):
        command = ["make", "--dry-run", "--old-file", ".venv/installed", "sweep", *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert ("--config profile=full" in done.stdout) == expected


def test_make_report_calls_the_command(tmp_path: Path) -> None:
    make = ["make", "--no-print-directory", "-o", ".venv/installed", "-C", str(ROOT), "BIN=bin"]
    done = subprocess.run([*make, "-n", "report", "MODEL=OWNER/NAME", "REVISION=abc"], capture_output=True, text=True)
    assert 'bin/staterank report "OWNER/NAME" --out "_build/report" --profile quick --revision abc' in done.stdout
    without = subprocess.run([*make, "report"], capture_output=True, text=True)
    assert without.returncode != 0
    assert "name the model: make report MODEL=FOLDER" in without.stderr
