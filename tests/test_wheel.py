"""What is published, from the wheel in an empty environment, as somebody who has nothing else would use it."""

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from architectures import delta, fla_models, ssd
from conftest import save_tiny, save_with_tokenizer

ROOT = Path(__file__).resolve().parents[1]
HOWTO = ROOT / "book" / "howto.md"
FAMILIES: dict[str, Callable] = {
    "qwen3_5": delta.MODELS["qwen3_5"],
    "kimi_linear": delta.MODELS["kimi_linear"],
    "mamba2": ssd.MODELS["mamba2"],
    "minimax": ssd.MODELS["minimax"],
    "fla_gla": partial(fla_models.tiny, "GLA"),
}
TUNE = """
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.arange(40).reshape(2, 20)
logits = model.train()(input_ids=ids).logits  # (fla's own loss is for a GPU)
loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
loss.backward()
optimizer.step()
model.eval()
beams = model.generate(ids[:1, :5], attention_mask=torch.ones(1, 5, dtype=torch.long), max_new_tokens=3, do_sample=False, num_beams=2, use_cache=True)
print(json.dumps([loss.item(), beams.shape[1]]))
"""
NOTES = "The state of a head is a matrix that forgets. " * 80
IN_TURN = """
import json, sys
from staterank import app
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
"""
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("wheel")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made of the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def bin(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs of an empty environment are that has the wheel, and what it asks for."""
    folder = tmp_path_factory.mktemp("environment") / "empty"
    venv.create(folder, with_pip=True)
    [wheel] = built.glob("*.whl")
    # The newest transformers that the wheel allows, which is what a user gets; of all else what was tested together.
    pins = (ROOT / "requirements.txt").read_text().splitlines(keepends=True)
    (folder.parent / "pins.txt").write_text("".join(pin for pin in pins if not pin.startswith("transformers==")))
    install(folder / "bin", f"{wheel}[report,trainer]")
    return folder / "bin"


@pytest.fixture(scope="module")
def bin_with_fla(bin: Path) -> Path:
    """The same with flash-linear-attention, whose kernels transformers then calls, also where no GPU is: tests that do without come before."""
    if sys.platform == "linux":
        install(bin, "flash-linear-attention", "triton")
    return bin


def install(bin: Path, *packages: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-compile", "--constraint", str(bin.parents[1] / "pins.txt")]
    subprocess.run([bin / "python", "-m", "pip", "install", *quiet, *packages], check=True)


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess:
    apart = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=apart, check=False)


def test_an_index_would_take_what_is_built(built: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_the_wheel_says_what_it_lacks(bin: Path, tmp_path: Path) -> None:
    program = (
        "import staterank_utils, staterank_utils.callback, torch; print(staterank_utils.__file__);"
        "print(staterank_utils.effective_rank(torch.eye(3)).item());"
        "staterank_utils.load_model('hybrid')"
    )
    done = run([str(bin / "python"), "-W", "ignore", "-c", program], tmp_path)
    where, rank = done.stdout.split()
    assert Path(where).is_relative_to(bin.parent)
    assert Path(where).with_name("py.typed").is_file(), "without it, type checkers do not read the annotations"
    assert rank == "3"
    assert "FileNotFoundError: the embedded model 'hybrid' is part of the repository" in done.stderr


def save(family: str, folder: Path) -> Path:
    if family == "qwen3_next":
        return save_tiny(folder, ["linear_attention", "full_attention", "linear_attention"])
    torch.manual_seed(0)
    made = FAMILIES[family]()
    made.resize_token_embeddings(8192)
    return save_with_tokenizer(made, folder)


def commands(folder: Path, smaller: str) -> list[list[str]]:
    trace = ["trace", str(folder), "--text", "notes.txt", "--tokens", "48", "--prompts", "2", "--out", f"{smaller}.csv"]
    return [trace, ["prune", str(folder), "--share", "0.25", "--out", smaller]]


def code_of_the_card(smaller: Path) -> str:
    [code] = re.findall(r"```python\n(.*?)```", (smaller / "README.md").read_text(), re.DOTALL)
    return str(code)


def check_outcome(line: str) -> None:
    loss, length = json.loads(line)
    assert loss > 0
    assert length == 8


def test_a_model_is_traced_pruned_loaded_tuned_and_generates(bin: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(NOTES)
    for words in commands(save("qwen3_next", tmp_path / "qwen3_next"), "smaller"):
        done = run([str(bin / "staterank"), *words], tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "smaller.csv").read_text().splitlines()) > 4
    code = code_of_the_card(tmp_path / "smaller")
    done = run([str(bin / "python"), "-c", f"import json, torch\n{code}{TUNE}"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    check_outcome(done.stdout.splitlines()[-1])


def test_the_callback_of_the_pages_watches_a_training(bin: Path, tmp_path: Path) -> None:
    folder = save("qwen3_next", tmp_path / "qwen3_next")
    [block] = [
        of for of in re.findall(r"```python\n(.*?)```", HOWTO.read_text(), re.DOTALL) if "StateRankCallback" in of
    ]
    done = run([str(bin / "python"), "-W", "ignore", "-c", f"FOLDER = {str(folder)!r}\n{block}"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "training").rglob("events.out.tfevents.*"))


def test_so_is_a_model_of_any_other_family(bin_with_fla: Path, tmp_path: Path) -> None:
    """In one process, which imports everything once."""
    (tmp_path / "notes.txt").write_text(NOTES)
    words = [of for family in FAMILIES for of in commands(save(family, tmp_path / family), f"smaller-{family}")]
    done = run([str(bin_with_fla / "python"), "-W", "ignore", "-c", IN_TURN, json.dumps(words)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for family in FAMILIES:
        assert len((tmp_path / f"smaller-{family}.csv").read_text().splitlines()) > 4
    codes = [code_of_the_card(tmp_path / f"smaller-{family}") for family in FAMILIES]
    together = "".join(f"{code}{TUNE}" for code in codes)
    done = run([str(bin_with_fla / "python"), "-c", f"import json, torch\n{together}"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(FAMILIES)
    for line in lines:
        check_outcome(line)


@pytest.fixture(params=["qwen3_next", *FAMILIES])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(request.param, tmp_path / request.param)


def test_a_report_is_made_without_the_repository(model: Path, bin: Path, tmp_path: Path) -> None:
    """Of one family all chapters, of the others one."""
    few = [] if model.name == "mamba2" else ["--only", "01_stratification"]
    sizes = ["--prompts", "2", "--tokens", "256"]
    done = run([str(bin / "staterank"), "report", str(model), "--out", "report", *sizes, *few], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"State ranks of {model.name}" in (tmp_path / "report" / "index.html").read_text()
    pages = {page.stem for page in (tmp_path / "report" / "notebooks").glob("*.html")}
    assert pages == ({"01_stratification"} if few else {file.stem for file in (ROOT / "notebooks").glob("*.py")})
    for name in pages:
        page = (tmp_path / "report" / "notebooks" / f"{name}.html").read_text()
        text = re.sub(r"<[^>]+>", "", page)
        for words in ("papermill notebooks", "the embedded hybrid", "hybrid, pure"):
            assert words not in text, (name, words)
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", page), name  # it opens without a network
    if not few:
        explorer = (tmp_path / "report" / "notebooks" / "03_ablation_asymmetry.html").read_text()
        assert 'class="interactive' in explorer
        assert (tmp_path / "report" / "_static" / "vega.js").stat().st_size > 100_000


def test_the_sdist_installs_in_an_empty_environment(built: Path, bin: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=True)
    python = str(tmp_path / "empty" / "bin" / "python")
    [sdist] = built.glob("*.tar.gz")
    # What the package asks for was installed from the wheel; here it is the build that is tried.
    words = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", str(sdist)]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    listed = run([python, "-m", "pip", "show", "--files", "staterank-utils"], tmp_path).stdout
    assert "staterank_utils/_book/notebooks/01_stratification.ipynb" in listed
    assert "bin/staterank" in listed
