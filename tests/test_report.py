"""A report on a model, and what a stop leaves behind."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import make, save_tiny
from packaging.requirements import Requirement

from staterank_utils import load_model, prune_heads, report
from staterank_utils.budget import duration_in_words
from staterank_utils.report import write_report
from staterank_utils.results import STORED

CHAPTER = "01_stratification"
SMALL = {"n_prompts": 2, "n_tokens": 256}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), ["linear_attention", "full_attention", "linear_attention"])


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "tiny"
    assert write_report(str(tiny), out, only=[CHAPTER], parameters=SMALL) == {}
    return out


def test_the_pages_open_from_disk_and_say_what_was_found(made: Path, tiny: Path) -> None:
    first = (made / "index.html").read_text()
    assert f"State ranks of {tiny.name}" in first
    assert "C1" in first
    assert "The same rule with fresh weights of the class" in first  # those that training began with are not known
    assert "not tested" in first  # the chapters that were not asked for
    assert "Measured with: profile quick, n_prompts 2, n_tokens 256." in first
    assert f"({tiny.name})" not in first
    assert "C1b" in first
    assert "C0a" not in first
    assert "<em>Which heads are needed?</em> (03_ablation_asymmetry): not asked for" in first
    page = (made / "notebooks" / f"{CHAPTER}.html").read_text()
    assert "Do heads fall into two groups?" in page
    assert "/book/ladder.html" not in page
    assert f'model = "{tiny.name}"' in html.unescape(re.sub(r"<[^>]+>", "", page))
    for words in (
        "hybrid, pure",
        "papermill notebooks",
        "the embedded",
        "stored curve",
        f"({tiny.name})",
    ):  # what the book says of its own models
        assert words not in page, words
    for text in (first, page):
        assert str(tiny.parent) not in text  # it says nothing of the machine
        for link in re.findall(r'(?:href|src)="([^"#?:]+)', text):
            start = made if text is first else made / "notebooks"
            assert (start / link).exists(), link
    assert json.loads((made / "work" / "results" / f"{CHAPTER}.json").read_text())["rows"]
    published = [file for file in made.rglob("*") if file.is_file() and made / "work" not in file.parents]
    places = (str(tiny), str(made), sys.prefix)
    assert [file for file in published for place in places if place.encode() in file.read_bytes()] == []


def test_the_time_that_is_told_grows_with_the_model_and_the_sizes() -> None:
    sources = report._chapters("quick", [])
    made = [json.loads((STORED / "quick" / f"{source.stem}.json").read_text())["provenance"] for source in sources]
    hybrid = load_model("hybrid")
    shares = [of["seconds"] * of["n_weights"]["hybrid"] / sum(of["n_weights"].values()) for of in made]
    alone = sum(max(report.LEAST, seconds) for seconds in shares)
    told = report._time(hybrid, {source: {} for source in sources}, "quick", "cpu")
    assert f"very roughly {duration_in_words(alone)}, by" in told
    n_prompts = {
        source: {"n_prompts": 100 * of["parameters"]["n_prompts"]} for source, of in zip(sources, made, strict=True)
    }
    assert f"very roughly {duration_in_words(100 * sum(shares))}, by" in report._time(hybrid, n_prompts, "quick", "cpu")
    for profile, device in (("full", "cpu"), ("quick", "cuda")):
        assert "How long it takes is known for" in report._time(hybrid, n_prompts, profile, device)


def test_make_writes_a_report(tiny: Path, tmp_path: Path) -> None:
    command = make("report", MODEL=tiny, OUT=tmp_path / "report", ONLY=CHAPTER, DEVICE="cpu", DTYPE="bfloat16")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"take [\d.,]+ [kM]B in bfloat16, .*; this machine has [\d.,]+ GB of memory\.", done.stderr)
    assert "up to 500.0 MB of disk. On two cores the chapters take very roughly 1 minute" in done.stderr
    assert "The report is in" in done.stdout
    assert "leaked" not in done.stderr  # every process of a chapter took down what it made
    stored = json.loads((tmp_path / "report" / "work" / "results" / f"{CHAPTER}.json").read_text())
    assert stored["provenance"]["parameters"]["dtype"] == "bfloat16"
    assert (tmp_path / "report" / "notebooks" / f"{CHAPTER}.html").exists()
    nameless = subprocess.run(make("report"), capture_output=True, text=True)
    assert "name the model: make report MODEL=FOLDER" in nameless.stderr


def test_the_same_call_again_runs_nothing_twice(made: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_run", lambda *args, **options: pytest.fail("it was run again"))
    before = (made / "work" / "notebooks" / f"{CHAPTER}.ipynb").stat().st_mtime
    assert write_report(str(tiny), made, only=[CHAPTER], parameters=SMALL) == {}
    assert (made / "work" / "notebooks" / f"{CHAPTER}.ipynb").stat().st_mtime == before


def test_a_chapter_that_fails_leaves_the_others_and_its_reason(
    made: Path, tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(report.BOOK / "book", tmp_path / "book", ignore=shutil.ignore_patterns("*.py"))
    shutil.copy(report.BOOK / "_config.yml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    source = report.BOOK / "notebooks" / f"{CHAPTER}.ipynb"
    shutil.copy(source, tmp_path / "notebooks")
    broken = json.loads(source.read_text())
    for cell in broken["cells"]:
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", []):
            cell["source"] = "raise ValueError('nothing can be compared')"
    (tmp_path / "notebooks" / "09_broken.ipynb").write_text(json.dumps(broken))
    monkeypatch.setattr(report, "BOOK", tmp_path)
    assert write_report(str(tiny), made, parameters=SMALL) == {"09_broken": "ValueError: nothing can be compared"}
    assert "(09_broken): ValueError: nothing can be compared" in (made / "index.html").read_text()
    assert (made / "notebooks" / f"{CHAPTER}.html").exists()
    assert not (made / "notebooks" / "09_broken.html").exists()


def test_chapters_that_are_there_stay_in_a_report_that_asks_for_another(made, tiny, monkeypatch) -> None:
    monkeypatch.setattr(report, "_run", lambda source, *args, **options: "lower batch_size")
    other, said = "02_input_invariance", "lower --prompts or --tokens"
    asked = {"in_words": lambda reason: reason.replace("batch_size", "--prompts or --tokens"), "parameters": SMALL}
    assert write_report(str(tiny), made, only=[other], **asked) == {other: said}
    first = (made / "index.html").read_text()
    assert f"notebooks/{CHAPTER}.html" in first
    assert f"({other}): {said}" in first


def test_a_folder_holds_one_report(made: Path, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "_run", lambda *args, **options: pytest.fail("it was run"))
    other = shutil.copytree(tiny, tmp_path / "other")
    with pytest.raises(FileExistsError, match="holds a report with model .*, not .*other: choose another folder"):
        write_report(str(other), made, only=[CHAPTER], parameters=SMALL)
    with pytest.raises(FileExistsError, match="with n_prompts 2, not 3: choose another"):
        write_report(str(tiny), made, only=[CHAPTER], parameters={**SMALL, "n_prompts": 3})
    with pytest.raises(FileExistsError, match="with n_tokens 256, not at its default: choose another"):
        write_report(str(tiny), made, only=[CHAPTER], parameters={"n_prompts": 2})
    kept = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        with pytest.raises(FileExistsError, match="files of the model that have changed since: choose another folder"):
            write_report(str(tiny), made, only=[CHAPTER], parameters=SMALL)
    finally:
        (tiny / "model.safetensors").write_bytes(kept)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    with pytest.raises(FileExistsError, match="photos is there already and is no report"):
        write_report(str(tiny), tmp_path / "photos")


def test_a_size_that_no_chapter_has_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chapter that was asked for has a size n_promts"):
        write_report(str(tiny), tmp_path / "out", only=[CHAPTER], parameters={"n_promts": 3})
    assert not (tmp_path / "out").exists()


def test_what_chapters_would_refuse_is_refused_before_any_runs(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_tokens must be at least 256, got 100"):
        write_report(str(tiny), tmp_path / "out", parameters={"n_tokens": 100})
    with pytest.raises(ValueError, match="n_prompts must be at least 2, got 1"):
        write_report(str(tiny), tmp_path / "out", parameters={"n_prompts": 1})
    with pytest.raises(ValueError, match="tokens, too few for 2 prompts of 100000"):
        write_report(str(tiny), tmp_path / "out", parameters={"n_tokens": 100_000})
    cut = shutil.copytree(tiny, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        write_report(str(cut), tmp_path / "out")
    with pytest.raises(ValueError, match="no dtype 'half' of a report: choose from float32, bfloat16"):
        write_report(str(tiny), tmp_path / "out", dtype="half")
    with pytest.raises(ValueError, match="'a, b' has a comma"):
        write_report("a, b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_report_without_any_chapter_is_an_error(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "_apart", lambda *args: "ValueError: nothing can be compared")
    with pytest.raises(ValueError, match=f"no chapter could be run: {CHAPTER}: ValueError: nothing can be compared"):
        write_report(str(tiny), tmp_path, only=[CHAPTER], parameters={"n_tokens": 300})
    assert not (tmp_path / "index.html").exists()
    left = tmp_path / "work" / "results" / "fig-of-another-model.csv"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    with pytest.raises(ValueError, match="nothing can be compared"):  # such a folder is still free
        write_report(str(tiny), tmp_path, only=[CHAPTER], parameters={"n_tokens": 301})
    assert not left.exists()


def test_a_model_or_device_that_cannot_be_measured_makes_no_folder(tiny: Path, tmp_path: Path) -> None:
    uneven = tmp_path / "uneven"
    prune_heads(load_model(str(tiny)), {0: [1]}).save_pretrained(uneven)
    with pytest.raises(ValueError, match="different numbers of them"):
        write_report(str(uneven), tmp_path / "out")
    with pytest.raises(ValueError, match="'cuda:99' is not there"):
        write_report(str(tiny), tmp_path / "out", device="cuda:99")
    assert not (tmp_path / "out").exists()


def test_what_is_stopped_leaves_no_half_page_and_goes_on(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "staterank", "report", str(tiny), "--out", "out", "--only", CHAPTER]
    # While the chapter's process starts, while its notebook runs, and as a batch system or a full memory ends a job.
    for moment, how in ((1, signal.SIGINT), (12, signal.SIGINT), (12, signal.SIGKILL)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True, text=True)
        for _ in range(240):
            if (tmp_path / "out" / "work" / "report.json").exists() or process.poll() is not None:
                break
            time.sleep(0.25)
        time.sleep(moment)
        os.killpg(process.pid, how)
        _, said = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "Traceback" not in said
        assert "leaked" not in said
        assert ("staterank: stopped; the same command goes on" in said) == (how == signal.SIGINT)
        assert "chapters" in said
        assert not (tmp_path / "out" / "index.html").exists()
        assert not list((tmp_path / "out").glob("work/notebooks/*"))
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out" / "index.html").exists()


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append((process / "cmdline").read_text())
        except OSError:
            pass
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_command_that_is_ended_alone(how: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    """As a batch system or a full memory does it; the terminal's Ctrl-C goes to all."""
    command = [sys.executable, "-m", "staterank", "report", str(tiny), "--out", "out", "--only", CHAPTER]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(processes_in(tmp_path)) < 3 and process.poll() is None:  # the command, the chapter and its kernel
        time.sleep(0.25)
    process.send_signal(how)
    process.wait(60)
    deadline = time.monotonic() + 30
    while processes_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.25)
    assert processes_in(tmp_path) == []
    if how == signal.SIGTERM:
        assert process.returncode == 130
        assert "staterank: stopped; the same command goes on" in process.stderr.read()
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["work"]
    process.stderr.close()


def test_a_stop_while_pages_are_built_leaves_no_half_site_and_goes_on(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "staterank", "report", str(tiny), "--out", "out", "--only", CHAPTER]
    out, stage = tmp_path / "out", tmp_path / "out" / "work" / "site" / "_config.yml"
    for how in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True, text=True)
        while not stage.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)  # in which the pages begin to be built
        os.killpg(process.pid, how)
        _, said = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "Traceback" not in said
        assert ("staterank: stopped; the same command goes on" in said) == (how == signal.SIGINT)
        lock = {report.LOCK} if how == signal.SIGKILL else set()  # nobody takes it away
        assert {file.name for file in out.iterdir()} == {"work"} | lock
        assert (out / "work" / "notebooks" / f"{CHAPTER}.ipynb").exists()
        stage.unlink()
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "100%" in done.stderr
    assert (out / "index.html").exists()


@pytest.mark.gpu
def test_a_report_in_bfloat16_on_a_gpu(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert write_report(str(tiny), tmp_path, device="cuda", dtype="bfloat16", parameters=SMALL) == {}
    said = capfd.readouterr().err
    assert "in bfloat16" in said
    assert re.search(r"this GPU has [\d.,]+ GB of memory\.", said)
    for source in report._all_chapters():
        assert (tmp_path / "notebooks" / f"{source.stem}.html").exists()
        of = json.loads((tmp_path / "work" / "results" / f"{source.stem}.json").read_text())["provenance"]
        assert (of["device"], of["parameters"]["dtype"]) == (torch.cuda.get_device_name(), "bfloat16")


def test_ctrl_c_is_heard_again_afterwards_and_reports_may_be_made_in_a_thread() -> None:
    def within() -> bool:
        with report._deaf():
            return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def pressed() -> None:
        with report._deaf():
            os.kill(os.getpid(), signal.SIGINT)

    assert within()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(KeyboardInterrupt):
        pressed()
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(within).result()


def test_chapters_call_a_folder_by_its_name_where_that_is_free(tmp_path: Path) -> None:
    for name in ("mine", "hybrid", "work", "work/results", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "mine").symlink_to(tmp_path / "gone")  # left by a stop
    for name, called in (("mine", "mine"), ("hybrid", f"{tmp_path}/hybrid"), ("results", f"{tmp_path}/results")):
        with report._called(f"{tmp_path}/{name}", tmp_path / "work") as found:
            assert found == called
            assert (tmp_path / "work" / found).samefile(tmp_path / name)
    assert [place.name for place in (tmp_path / "work").iterdir()] == ["results"]
    with report._called("OWNER/NAME", tmp_path / "work") as found:
        assert found == "OWNER/NAME"


def test_a_folder_that_another_command_writes_to_is_left_alone(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report, "_run", lambda *args, **options: pytest.fail("it was run"))
    with (
        report._alone_in(tmp_path / "out"),
        pytest.raises(FileExistsError, match="another command is writing a report to .*out: wait until it has ended"),
    ):
        write_report(str(tiny), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_all_that_the_extra_asks_for_is_looked_for() -> None:
    asked = [
        "torch",
        "papermill>=2; extra == 'report'",
        "papermill>=99; extra == 'report'",
        "no-such; extra == 'report'",
        "nor-this; extra == 'large'",
    ]
    assert [str(needed.specifier) or needed.name for needed in report._absent(asked)] == [">=99", "no-such"]
    assert not report._absent(report.metadata.requires(report.DISTRIBUTION))


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"ROOM": 10**18}, OSError, "has room for .* and a report needs"),
        (
            {"_absent": lambda _: [Requirement("papermill>=99")]},
            ModuleNotFoundError,
            r"a report needs papermill: pip install 'papermill>=99'",
        ),
    ],
)
def test_what_is_lacking_is_said_before_anything_runs(change, error, reason, tiny, tmp_path, monkeypatch) -> None:
    for name, value in change.items():
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report, "_run", lambda *args, **options: pytest.fail("it was run"))
    with pytest.raises(error, match=reason):
        write_report(str(tiny), tmp_path / "out")
