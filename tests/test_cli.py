"""The command `staterank`, as a shell calls it."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, ssd
from conftest import save_tiny, save_with_tokenizer
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import staterank
import staterank_utils
from staterank_utils import evaluation, load_model, models, tracing
from staterank_utils.spectra import effective_rank
from staterank_utils.studies.handover import RULES
from staterank_utils.tasks import domain_prompts
from staterank_utils.tracing import trace_states

RUN = CliRunner()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), ["linear_attention", "full_attention", "linear_attention"])


def test_a_dtype_that_is_too_narrow_for_its_states_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch
) -> None:
    model = ssd.MODELS["minimax"]()
    model.resize_token_embeddings(8192)
    folder = save_with_tokenizer(model, tmp_path / "minimax")
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    done = RUN.invoke(staterank.app, ["trace", str(folder), "--dtype", "bfloat16"])
    assert done.exit_code == 1
    assert "keeps its states in torch.bfloat16" in done.stderr
    assert "--dtype float32" in done.stderr


def test_the_version_is_told_without_a_command() -> None:
    done = RUN.invoke(staterank.app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"{staterank_utils.__version__}\n")


def test_trace_prints_layers_and_writes_every_head(tiny: Path, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("The state of a head is a matrix. " * 60)
    done = RUN.invoke(
        staterank.app,
        ["trace", str(tiny), "--text", "notes.txt", "--tokens", "32", "--prompts", "2", "--out", "heads.csv"],
    )
    assert done.exit_code == 0, done.output
    assert "| 2 | " in done.stdout
    assert "8 heads in heads.csv" in done.stdout
    with Path("heads.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    ids = domain_prompts("./notes.txt", tokenizer, n_prompts=2, n_tokens=32, seed=0)
    expected = (
        trace_states(load_model(str(tiny)), ids, positions=[32], reduce=effective_rank)
        .values.double()
        .mean(1)
        .flatten()
    )
    assert [float(row["effective_rank"]) for row in rows] == pytest.approx(expected.tolist())
    assert [(row["layer"], row["head"]) for row in rows[3:5]] == [("0", "3"), ("2", "0")]


def test_prune_writes_a_model_that_loads(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    (tiny / "README.md").write_text("---\nlicense: mit\n---\n")
    done = RUN.invoke(staterank.app, ["prune", str(tiny), "--share", "0.5", "--rule", "low-rank", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "\nlicense: mit\n" in (out / "README.md").read_text()
    assert "4 of 8 heads removed" in done.stdout
    model = load_model(str(out))
    assert model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False).shape == (1, 5)


@pytest.mark.gpu
def test_a_trace_and_a_pruned_model_in_bfloat16_on_a_gpu(tiny: Path, tmp_path: Path) -> None:
    there = [str(tiny), "--device", "cuda", "--dtype", "bfloat16"]
    done = RUN.invoke(staterank.app, ["trace", *there, "--tokens", "300", "--out", str(tmp_path / "heads.csv")])
    assert done.exit_code == 0, done.output
    assert "8 heads in" in done.stdout
    out = tmp_path / "smaller"
    done = RUN.invoke(staterank.app, ["prune", *there, "--share", "0.5", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "in bfloat16" in (out / "README.md").read_text()
    model = load_model(str(out), device="cuda")
    assert model.dtype == torch.bfloat16
    prompt = torch.ones(1, 3, dtype=torch.long, device="cuda")
    assert model.generate(prompt, max_new_tokens=2, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["trace", "nowhere"], "nowhere"),
        (["trace", "MODEL", "--text", "none.txt"], "there is no file none.txt"),
        (["trace", "OWNER/NAME"], "pass --revision"),
        (["report", "NO_TOKENIZER", "--out", "new"], "no tokenizer"),
        (["trace", "MODEL", "--text", "prse"], "unknown domain 'prse': choose from"),
        (["trace", "MODEL", "--out", "."], "is a folder"),
        (["trace", "MODEL", "--out", "short.txt"], "is there already: choose another name"),
        (["trace", "MODEL", "--text", "short.txt"], "too few for 4 prompts of 512: lower --prompts or --tokens"),
        (["trace", "MODEL", "--device", "cuda:99"], "'cuda:99' is not there"),
        (["prune", "MODEL", "--out", "short.txt"], "is there already"),
        (["prune", "MODEL", "--share", "0.05", "--out", "new"], "0.05 of 8 heads rounds to not one"),
        (["prune", "MODEL", "--plain", "--out", "new"], "as many heads in every layer: add --per-layer"),
        (["prune", "MODEL", "--out", "short.txt/new"], "cannot be written"),
        (["trace", "MODEL", "--out", "short.txt/heads.csv"], "cannot be written"),
        (["report", "MODEL", "--out", "short.txt"], "is no report"),
        (["report", "MODEL", "--only", "99_none", "--out", "new"], "there is no chapter 99_none: choose from 00_"),
        (["report", "nowhere", "--out", "new"], "nowhere"),
        (["report", "OWNER/NAME", "--out", "new"], "revision"),
        (["report", "MODEL", "--tokens", "128", "--out", "new"], "--tokens must be at least 256, got 128"),
        (["report", "a, b", "--out", "new"], "has a comma"),
    ],
)
def test_bad_input_is_told_in_a_line(words: list[str], reason: str, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    folders = {"MODEL": tiny, "NO_TOKENIZER": tiny.parent / "no_tokenizer"}
    if not folders["NO_TOKENIZER"].exists():
        shutil.copytree(tiny, folders["NO_TOKENIZER"], ignore=shutil.ignore_patterns("tokenizer*"))
    done = RUN.invoke(staterank.app, [str(folders.get(word, word)) for word in words])
    assert done.exit_code == 1
    assert reason in done.stderr
    assert done.stderr.count("staterank: ") == 1
    assert "Traceback" not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


OF_TORCH = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 3.50 GiB is free. Including non-PyTorch "
    "memory, this process has 75.60 GiB memory in use. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 4.90 GiB is reserved by PyTorch "
    "but unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


@pytest.mark.parametrize(
    ("words", "where", "reason"),
    [
        (["trace"], (torch.nn.Module, "to"), "no room for the weights of .*: .*--dtype bfloat16, .*--device auto"),
        (["trace"], (tracing, "_trace_batch"), "take shorter prompts .*--dtype bfloat16"),
        (
            ["prune", "--out", "new"],
            (evaluation, "read_tokens"),
            "texts of .*: take a model of fewer bytes .--dtype bfloat16",
        ),
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(OF_TORCH), RuntimeError("CUDA error: out of memory")])
def test_a_gpu_that_is_full_says_what_to_lower(
    words: list[str],
    where: tuple[object, str],
    reason: str,
    error: RuntimeError,
    tiny: Path,
    tmp_path: Path,
    monkeypatch,
) -> None:
    def full(*args: object, **options: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(*where, full)
    done = RUN.invoke(staterank.app, [words[0], str(tiny), *words[1:], "--device", "cpu"])
    assert done.exit_code == 1
    assert re.search(reason, done.stderr), done.stderr
    assert "expandable" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_plain_pruned_model_is_of_its_own_class(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    done = RUN.invoke(
        staterank.app, ["prune", str(tiny), "--share", "0.5", "--per-layer", "--plain", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    settings = json.loads((out / "config.json").read_text())
    assert settings["architectures"] == ["Qwen3NextForCausalLM"]
    assert "import staterank_utils" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--rule", "best", "low-rank"),
        ("--share", "2", "between 0 and 1, got 2"),
        ("--share", "0", "between 0 and 1, got 0"),
        ("--share", "x", "valid number"),
    ],
)
def test_what_an_option_cannot_be_is_said_before_anything_is_imported(option: str, value: str, reason: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "staterank", "prune", "nowhere", option, value, "--out", "new"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert reason in done.stderr
    assert " torch" not in done.stderr


def test_what_cannot_be_done_is_said_before_weights_are_read(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    uneven = tmp_path / "uneven"
    assert RUN.invoke(staterank.app, ["prune", str(tiny), "--share", "0.125", "--out", str(uneven)]).exit_code == 0
    assert "Layers keep different numbers of heads" in (uneven / "README.md").read_text()
    mamba = tmp_path / "mamba"
    ARCHITECTURES["mamba2"].build().save_pretrained(mamba)
    monkeypatch.setattr(models, "load_model", lambda *args, **options: pytest.fail("weights were read"))
    for words, reason in (
        (["trace", str(uneven)], "different numbers of them: {0: 3, 2: 4}"),
        (["prune", str(uneven), "--out", "new"], "different numbers of them"),
        (["prune", str(mamba), "--share", "0.5", "--per-layer", "--plain", "--out", "new"], "leave --plain out"),
    ):
        done = RUN.invoke(staterank.app, words)
        assert (done.exit_code, reason in done.stderr) == (1, True), done.stderr


def test_a_text_is_found_by_its_name_and_however_its_path_is_typed(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").write_text("The state of a head is a matrix that forgets, but not at once. " * 60)
    sizes = ["--tokens", "16", "--prompts", "1"]
    said = [
        RUN.invoke(staterank.app, ["trace", str(tiny), "--text", text, *sizes]).stdout
        for text in ("notes", str(tmp_path / "notes"))
    ]
    assert said[0] == said[1]
    assert "| 2 |" in said[0]
    done = RUN.invoke(staterank.app, ["trace", str(tiny), "--text", str(tmp_path), *sizes])
    assert "is a folder: give a text file" in done.stderr
    Path("latin.txt").write_bytes("Zustände ".encode("latin-1") * 300)
    done = RUN.invoke(staterank.app, ["trace", str(tiny), "--text", "latin.txt", *sizes])
    assert "latin.txt is no text in UTF-8" in done.stderr


def test_a_checkpoint_keeps_its_dtype(tiny: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    save_with_tokenizer(load_model(str(tiny)).bfloat16(), narrow)
    done = RUN.invoke(
        staterank.app,
        ["prune", str(narrow), "--share", "0.5", "--per-layer", "--device", "cpu", "--out", str(tmp_path / "out")],
    )
    assert done.exit_code == 0, done.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert "in bfloat16" in (tmp_path / "out" / "README.md").read_text()


def test_a_disk_without_room_is_told_before_weights_are_read(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(models, "load_model", lambda *args, **options: pytest.fail("weights were read"))
    done = RUN.invoke(staterank.app, ["prune", str(tiny), "--out", str(tmp_path / "new")])
    assert done.exit_code == 1
    assert "new has room for 0.0 kB, and the smaller model needs at least" in done.stderr


def test_a_full_disk_is_told_in_a_line(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    done = RUN.invoke(staterank.app, ["prune", str(tiny), "--share", "0.5", "--out", str(tmp_path / "new")])
    assert done.exit_code == 1
    assert "could not write the weights" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_table_of_a_trace_may_go_into_a_folder_that_is_not_there(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "heads.csv"
    done = RUN.invoke(staterank.app, ["trace", str(tiny), "--tokens", "16", "--prompts", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.exists()


@pytest.mark.parametrize("command", [[], ["trace"], ["prune"], ["report"]])
def test_help_teaches(command: list[str]) -> None:
    done = RUN.invoke(staterank.app, [*command, "--help"])
    assert done.exit_code == 0
    assert not command or f"staterank {command[0]} ./my-model" in " ".join(done.stdout.split())


def test_help_answers_before_anything_heavy_is_imported() -> None:
    for words in (["--help"], ["prune", "--help"]):
        code = (
            f"import sys, staterank\ntry: staterank.app({words!r})\nexcept SystemExit: sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_rules_and_dtypes_are_those_of_the_package() -> None:
    assert [rule.value for rule in staterank.Rule] == list(RULES)
    assert [dtype.value for dtype in staterank.Dtype] == list(models.DTYPES)


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(tiny: Path) -> None:
    for name in ("libtorch_cpu", "_safetensors"):  # at the beginning and near the end of the imports
        process = subprocess.Popen(
            [sys.executable, "-m", "staterank", "trace", str(tiny)], stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and name not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "Traceback" not in said


def test_ctrl_c_before_the_command_is_there_leaves_no_traceback() -> None:
    code = """
import sys
class Stopped:
    def find_spec(self, name, *more):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stopped())
import staterank
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_ctrl_c_while_a_model_is_written_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def stopped(self: PreTrainedModel, folder: Path, **options: object) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", stopped)
    done = RUN.invoke(staterank.app, ["prune", str(tiny), "--share", "0.5", "--out", "smaller"])
    assert done.exit_code != 0
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []
