"""The shape of the notebooks: short cells, prose around them, parameters that are literals, pairs that match."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import papermill
import pytest
import yaml

from book.assemble import execute
from book.pairs import image

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
TAGS = {"parameters", "remove-cell", "hide-input"}


def cells(source: Path, kind: str) -> list:
    return [cell for cell in jupytext.read(source).cells if cell.cell_type == kind]


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_a_notebook_is_the_image_of_its_source_without_outputs(source: Path) -> None:
    assert source.with_suffix(".ipynb").read_text() == image(source)
    assert '"outputs": []' in image(source)


def test_every_page_opens_with_a_question_and_ends_with_verdicts(source: Path) -> None:
    first = cells(source, "markdown")[0].source
    assert first.splitlines()[0].startswith("# ")
    assert first.splitlines()[0].endswith("?")
    assert first.count("\n- ") == 3
    assert "markdown.verdict_table" in source.read_text()
    assert cells(source, "markdown")[-1].source.count("\n- ") == 3


def test_cells_are_short_and_tagged_by_the_rules(source: Path) -> None:
    code = cells(source, "code")
    lengths = sorted(len([line for line in cell.source.splitlines() if line.strip()]) for cell in code)
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[int(0.9 * len(lengths))] <= 25
    assert lengths[-1] <= 40
    assert all(set(cell.metadata.get("tags", [])) <= TAGS for cell in code)


def test_there_is_more_prose_than_code_on_the_page(source: Path) -> None:
    words = sum(len(cell.source.split()) for cell in cells(source, "markdown"))
    hidden = {"hide-input", "remove-cell"}
    shown = [cell for cell in cells(source, "code") if not hidden & set(cell.metadata.get("tags", []))]
    lines = sum(len([line for line in cell.source.splitlines() if line.strip()]) for cell in shown)
    assert words / lines >= 6


def test_parameters_are_literals_with_known_names(source: Path) -> None:
    [cell] = [cell for cell in cells(source, "code") if "parameters" in cell.metadata.get("tags", [])]
    names = []
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
        names += [target.id for target in node.targets]
    assert set(names) == set(papermill.inspect_notebook(str(source.with_suffix(".ipynb"))))
    assert {"model", "profile", "seed"} <= set(names)


def test_figures_have_a_caption_a_name_and_a_text_for_those_who_cannot_see(source: Path) -> None:
    figures = [cell for cell in cells(source, "code") if "plotting.plot_" in cell.source]
    assert len(figures) >= 3
    for cell in figures:
        shown = cell.metadata["mystnb"]
        assert len(shown["figure"]["caption"]) > 80
        assert shown["figure"]["name"].startswith("fig-")
        assert len(shown["image"]["alt"]) > 20


def test_the_table_of_contents_names_every_notebook_and_page() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = {toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])}
    present = {f"notebooks/{source.stem}" for source in SOURCES} | {
        f"book/{page.stem}" for page in (ROOT / "book").glob("*.md")
    }
    assert listed == present


def test_a_misspelt_parameter_stops_the_run(tmp_path: Path) -> None:
    notebook = ROOT / "notebooks" / "01_stratification.ipynb"
    with pytest.raises(ValueError, match="has no parameter n_prompt"):
        execute(notebook, tmp_path / "out.ipynb", {"n_prompt": 1})
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        str(tmp_path / "out.ipynb"),
        "--cwd",
        str(ROOT),
        "-p",
        "n_prompt",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "did you mean 'n_prompts'" in done.stderr


def test_a_notebook_runs_on_another_model_from_a_folder(tmp_path: Path, tokenizer) -> None:
    from conftest import tiny_qwen3_next

    model = tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    notebook = ROOT / "notebooks" / "01_stratification.ipynb"
    parameters = {
        "model": str(tmp_path / "model"),
        "n_prompts": 2,
        "n_tokens": 160,
        "results_folder": str(tmp_path / "results"),
    }
    execute(notebook, tmp_path / "out.ipynb", parameters)
    assert (tmp_path / "results" / "01_stratification.json").exists()


def test_jupytext_changes_nothing_when_it_synchronizes_the_pairs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    before = {file.name: file.read_bytes() for file in (tmp_path / "notebooks").iterdir() if file.is_file()}
    sources = [str(file) for file in sorted((tmp_path / "notebooks").glob("*.py"))]
    subprocess.run([sys.executable, "-m", "jupytext", "--sync", *sources], check=True, capture_output=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "notebooks").iterdir() if file.is_file()} == before
