"""A sweep over the embedded and two tiny models: killed in the middle, resumed, gathered into one table."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import make, save_tiny

from staterank_utils.claims import CLAIMS
from training.recipes import WAVES

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "01_stratification"


def tiny(folder: Path, n_layers: int) -> Path:
    return save_tiny(folder, (["linear_attention", "full_attention"] * n_layers)[:n_layers])


def snakemake(settings: dict, folder: Path) -> list[str]:
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings))
    return [
        sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "sweep" / "Snakefile"), "--configfile", str(folder / "sweep.yaml"),
        "--directory", str(folder / "run"), "--cores", "2", "--rerun-incomplete",
    ]  # fmt: skip


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    models = {name: {"model": name} for name in ("hybrid", "pure")}
    models |= {f"tiny-{n}": {"model": str(tiny(tmp_path / f"tiny-{n}", n))} for n in (2, 3)}
    settings = {
        "models": models,
        "notebooks": [NOTEBOOK],
        "parameters": {NOTEBOOK: {"n_prompts": 2, "n_tokens": 160}},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    return make("sweep", CONFIG=tmp_path / "sweep.yaml", RUN=tmp_path / "run", CORES=2)


def results_in(run: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in run.glob(f"results/*/*/{NOTEBOOK}.json")}


def test_a_sweep_that_is_killed_goes_on_and_ends_in_one_table(command: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = tmp_path / "said.log"
    with said.open("w") as stream:
        first = subprocess.Popen(command, start_new_session=True, stdout=stream, stderr=stream)
    deadline = time.monotonic() + 240
    while "Finished job" not in said.read_text() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = results_in(run)
    assert 0 < len(before) < 4
    done = subprocess.run([*command, "UNLOCK=1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after = results_in(run)
    assert len(after) == 4
    kept = [file for file, changed in before.items() if after[file] == changed]
    assert kept, "the second run measured again what the first had finished"
    head, _, *rows = (run / "claims-0.md").read_text().splitlines()
    assert head.count("|") == 3 + 4 + 1
    assert head.endswith("| hybrid | pure | tiny-2 | tiny-3 |")
    assert len(rows) == len(CLAIMS)
    [bound] = [row for row in rows if row.startswith("| **C1b**")]
    assert bound.count("**holds**") == 4
    page = (run / "index.html").read_text()
    assert [name in page for name in ("hybrid", "pure", "tiny-2", "tiny-3")] == [True] * 4
    for name in ("hybrid", "pure", "tiny-2", "tiny-3"):
        rows = json.loads((run / "results" / "0" / name / f"{NOTEBOOK}.json").read_text())["rows"]
        [verdict] = [row["verdict"] for row in rows if row["claim"] == "C1"]
        assert f'aria-label="Heads fall into two groups, {name}: {html.escape(verdict)}"' in page
    links = re.findall(r'href="(pages/[^"]+)"', page)
    assert len(links) >= 4
    assert all((run / link).exists() for link in links if NOTEBOOK in link)


MINE = {"models": {"mine": {"model": "pure"}}, "notebooks": [NOTEBOOK]}


def test_nothing_is_run_that_the_configuration_does_not_list(tmp_path: Path) -> None:
    done = subprocess.run([*snakemake(MINE, tmp_path), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert "results/0/mine/" in said
    assert "results/0/hybrid/" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "names no models"),
        ({"models": ["hybrid", "pure"]}, "names no models"),
        ({"models": {"a/b": {"model": "pure"}}}, "expected a short name"),
        ({"models": {"a": "pure"}}, "expected a short name"),
        ({"models": {"a": {"model": "pure"}, "b": {"model": "pure"}}}, "have the same model"),
        ({"notebooks": ["01_stratificaton"]}, "unknown notebook 01_stratificaton"),
        ({"parameters": {"01_stratificaton": {}}}, "unknown notebook with parameters 01_stratificaton"),
        ({"model": {}}, "unknown entry in the configuration model"),
        ({"profile": "ful"}, "unknown profile ful: expected some of quick, full"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    done = subprocess.run([*snakemake(MINE | change, tmp_path), "--dry-run"], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_the_command_for_a_cluster_is_understood_by_its_plugin(tmp_path: Path) -> None:
    text = (ROOT / "sweep" / "README.md").read_text()
    [command] = re.findall(r"```bash\n([^`]*--executor slurm[^`]*)```", text)
    words = command.replace("\\\n", " ").split()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINE))
    given = {
        ".venv/bin/snakemake": f"{sys.executable} -m snakemake", "sweep/Snakefile": str(ROOT / "sweep" / "Snakefile"),
        "mine.yaml": str(tmp_path / "mine.yaml"), "/shared/run": str(tmp_path / "run"),
    }  # fmt: skip
    words = " ".join(given.get(word, word) for word in words).split()
    done = subprocess.run([*words, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [measured] = re.findall(r"rule measure:.*?resources: ([^\n]*)", done.stdout + done.stderr, re.DOTALL)
    assert {"gpu=1", "mem_mb=32000", "runtime=120"} <= set(measured.split(", "))


def test_jobs_share_out_the_gpus_of_a_host(tmp_path: Path) -> None:
    dry = subprocess.run(
        [*snakemake(MINE | {"gpus": 2}, tmp_path), "--dry-run", "--printshellcmds"], capture_output=True, text=True
    )
    [loop] = re.findall(r"for gpu in 0 1; do .*?; done; ", dry.stdout + dry.stderr)
    script = f"{loop} echo $CUDA_VISIBLE_DEVICES; sleep 2"
    jobs = [subprocess.Popen(["bash", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(job.communicate()[0].strip() for job in jobs) == ["0", "1"]
    refused = subprocess.run([*snakemake(MINE | {"gpus": -1}, tmp_path), "--dry-run"], capture_output=True, text=True)
    assert "gpus is -1" in refused.stdout + refused.stderr


def ladder(folder: Path, *config: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "sweep" / "Ladder"), "--directory", str(folder / "run"), "--cores", "2",
        "--resources", "gpu=1", "--dry-run", "--config", *config,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_wave_of_the_ladder_is_one_job_per_recipe(tmp_path: Path) -> None:
    done = ladder(tmp_path, "wave=2", f"books={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in WAVES[2]:
        assert f"results/{name}.json" in done.stdout
    assert done.stdout.count("resources: ") >= 4
    assert "gpu=1" in done.stdout


def test_a_wave_on_more_gpus_than_there_are_is_refused() -> None:
    command = ["make", "--old-file", ".venv/installed", "ladder", "GPUS=99", "BOOKS=."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(r"GPUS=99, and this machine has \d+$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("wave=9", "books=."), "there is no wave 9: expected --config wave=N with one of 1, 2, 3"),
        (("wave=1", "books=nowhere"), "there is no folder 'nowhere'"),
        (("wave=1",), "there is no folder None"),
    ],
)
def test_a_wave_that_cannot_be_run_is_refused(config: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = ladder(tmp_path, *config)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
