"""What README and the page "On your own model" tell readers to type, typed."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from typer.testing import CliRunner

import staterank
from staterank_utils import (
    effective_rank,
    harness,
    load_model,
    load_tokenizer,
    rank_and_norm,
    report,
    trace_states,
)

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "book/howto.md")}
BY_MAKE = ("book", "test", "report")  # run by `.ci/run`, and by test_environment.py
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("commands")]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, block) of every block of a language."""
    return [
        (page, block)
        for page, text in PAGES.items()
        for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    ]


def lines() -> list[str]:
    """Every line of a shell that a reader is told to type, comments and continuations taken out."""
    typed = [line for _, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("#")[0].split("&&")[0].strip() for line in typed if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), ["linear_attention", "full_attention", "linear_attention"])


def test_every_line_is_known() -> None:
    for line in lines():
        program, *words = line.split()
        assert (
            program in ("staterank", ".venv/bin/staterank", ".venv/bin/papermill")
            or (program == "make" and words[0] in BY_MAKE)
            or line.startswith("git clone")
        ), line


def test_the_clone_that_readers_make_is_one_of_this_repository(tmp_path: Path) -> None:
    [line] = [line for line in lines() if line.startswith("git clone")]
    address = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    assert address in line
    # git takes this repository where the address stands.
    here = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf", "GIT_CONFIG_VALUE_0": address}
    subprocess.run(shlex.split(line), cwd=tmp_path, env={**os.environ, **here}, check=True, capture_output=True)
    assert (tmp_path / address.rsplit("/", 1)[1] / "Makefile").exists()


def test_an_environment_of_conda_builds_the_book_without_another_installation(tmp_path: Path) -> None:
    [line] = re.findall(r"`(make -o [^`]*)`", PAGES["README.md"])
    called, programs = tmp_path / "called", tmp_path / "conda" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "jupyter-book"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {called}\n')
        (programs / name).chmod(0o755)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
    environment = {**os.environ, "CONDA_PREFIX": str(programs.parent)}
    subprocess.run(["bash", "-c", line], cwd=clone, env=environment, check=True, capture_output=True)
    assert [call.split()[:3] for call in called.read_text().splitlines()] == [
        ["python", "-m", "book.assemble"], ["jupyter-book", "build", "_build/stage"],
    ]  # fmt: skip
    assert not (clone / ".venv").exists()


def test_what_pip_is_told_to_install_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [name for text in PAGES.values() for name in re.findall(r"pip install '([^']+)'", text)]
    assert len(found) > 1
    for name in found:
        of_project = re.fullmatch(r"staterank-utils\[(\w+)\] @ git\+(.*)", name)
        assert of_project, name
        assert of_project[1] in project["optional-dependencies"]
        assert of_project[2] == project["urls"]["Repository"]


@pytest.mark.parametrize("line", sorted({line for line in lines() if "staterank" in line.split()[0]}))
def test_a_line_with_the_command(line: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("The state of a head is a matrix that forgets. " * 400)
    asked: list[Any] = []
    monkeypatch.setattr(report, "write_report", lambda *words, **options: asked.append((words, options)) or {})
    words = [str(folder) if word == "FOLDER" else word for word in shlex.split(line)[1:]]
    done = CliRunner().invoke(staterank.app, words)
    assert done.exit_code == 0, done.output
    assert bool(asked) == (words[0] == "report")  # test_report.py makes some
    if words[0] == "prune":
        assert (tmp_path / "smaller" / "README.md").exists()


def test_the_script_of_a_batch_system_types_a_report(folder: Path, tmp_path: Path, monkeypatch) -> None:
    [script] = [block for _, block in blocks("text") if block.startswith("#!/bin/bash")]
    environment, typed = tmp_path / ".venv" / "bin", tmp_path / "typed"
    environment.mkdir(parents=True)
    (environment / "activate").write_text(f"PATH={environment}:$PATH\n")
    (environment / "staterank").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {typed}\n')
    (environment / "staterank").chmod(0o755)
    asked = dict(re.findall(r"--(\S+?)=(\S+)", "".join(re.findall(r"#SBATCH (.*)", script))))
    assert set(asked) == {"job-name", "gpus", "cpus-per-task", "mem", "time"}
    # What the batch system does with a script: it runs it where it was submitted, and names the job.
    subprocess.run(
        ["bash", "-c", script.replace("FOLDER", str(folder))], cwd=tmp_path, check=True,
        env={**os.environ, "SLURM_JOB_NAME": asked["job-name"]},
    )  # fmt: skip
    made: list[Any] = []
    monkeypatch.setattr(report, "write_report", lambda *words, **options: made.append((words, options)) or {})
    done = CliRunner().invoke(staterank.app, typed.read_text().splitlines())
    assert done.exit_code == 0, done.output
    [(words, options)] = made
    assert (words, options["profile"]) == ((str(folder), Path(f"{folder}-report")), "full")


def test_commands_within_a_sentence_are_known() -> None:
    """Those that need a network, another client or a make are read here, and run by `.ci/run` or by tests of this file."""
    known = (
        "make ",
        "staterank ",
        "hf download OWNER/NAME",
        "python3 -m venv .venv",
        "conda env create -f environment.yml",
        "pip install ",
        "git ",
    )
    programs = ("make", "staterank", "python", "python3", "conda", "pip", "git", "hf", "papermill", "jupyter")
    for page, text in PAGES.items():
        for words in re.findall(r"(?<!`)`([^`\n]+ [^`\n]+)`", text):
            if words.split()[0] in programs:
                assert words.startswith(known), (page, words)


@pytest.mark.parametrize("line", sorted({line for line in lines() if "papermill" in line}))
def test_a_line_with_papermill(line: str, folder: Path, tmp_path: Path) -> None:
    words = shlex.split(line.replace("-p revision COMMIT", ""))[1:]
    given = {"FOLDER": str(folder), "OWNER/NAME": str(folder), "mine.ipynb": str(tmp_path / "mine.ipynb")}
    command = [sys.executable, "-m", "papermill", *(given.get(word, word) for word in words)]
    # So that the profile "full" stays small too.
    done = subprocess.run(
        [*command, "-p", "n_prompts", "2", "-p", "n_tokens", "256"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_code_of_the_page_runs_from_top_to_bottom(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scores: list[Any] = []
    # Its tasks fetch data over the network.
    monkeypatch.setattr(harness, "evaluate_in_harness", lambda *words, **options: scores.append(words))
    assert CliRunner().invoke(staterank.app, ["prune", str(folder), "--out", "smaller"]).exit_code == 0
    known: dict[str, Any] = {
        "FOLDER": str(folder), "load_model": load_model, "trace_states": trace_states, "rank_and_norm": rank_and_norm,
        "effective_rank": effective_rank, "tokenizer": load_tokenizer(str(folder)),
        "prompts": torch.randint(3, 8000, (1, 2048), generator=torch.Generator().manual_seed(0)),
        "ids": torch.randint(3, 8000, (1, 20)),
    }  # fmt: skip
    for page, block in blocks("python"):
        if page == "book/howto.md":
            exec(compile(block, page, "exec"), known)
    logged = [name for entry in known["trainer"].state.log_history for name in entry]
    for name in re.findall(
        r"`(?:train/staterank/layer_0/)?(effective_rank|nuclear_norm|half_life|share_outside)`", PAGES["book/howto.md"]
    ):
        assert logged.count(f"staterank/layer_0/{name}") == 2
    assert list(Path("training").rglob("events.out.tfevents*"))
    assert len(scores) == 2
    assert known["ranks"].shape == known["tokens"].shape
