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

from book import address
from book.pairs import image
from staterank_notebook import execute

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
TAGS = {"parameters", "remove-cell", "hide-input", "of-the-book"}


def cells(source: Path, kind: str) -> list:
    return [cell for cell in jupytext.read(source).cells if cell.cell_type == kind]


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def source(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_a_notebook_is_the_image_of_its_source_without_outputs(source: Path) -> None:
    assert source.with_suffix(".ipynb").read_text() == image(source)
    assert '"outputs": []' in image(source)


def test_every_page_opens_with_a_question_its_answer_and_its_verdicts(source: Path) -> None:
    texts = cells(source, "markdown")
    first, last = (
        texts[0].source,
        [cell.source for cell in texts if "of-the-book" not in cell.metadata.get("tags", [])][-1],
    )
    assert first.splitlines()[0].startswith("# ")
    assert first.splitlines()[0].endswith("?")
    assert "{glue:text}`answer`" in first
    assert "{glue:}`badges`" in first
    assert len(first.split()) < 40
    assert "markdown.verdict_table" in source.read_text()
    assert last.startswith("## What this does not say")


def test_the_first_figure_comes_before_the_first_explanation(source: Path) -> None:
    kinds = ["figure" if "mystnb" in cell.metadata else cell.cell_type for cell in jupytext.read(source).cells]
    assert kinds[:1] + [kind for kind in kinds[1:] if kind != "code"][:2] == ["code", "markdown", "figure"]


def n_lines(cell) -> int:
    return len([line for line in cell.source.splitlines() if line.strip()])


def is_open(cell) -> bool:
    """Whether a page shows the code of a cell without a click."""
    return not {"hide-input", "remove-cell"} & set(cell.metadata.get("tags", []))


def test_cells_are_few_short_and_tagged_by_the_rules(source: Path) -> None:
    code = cells(source, "code")
    shown = [cell for cell in code if is_open(cell)]
    assert len(code) <= 20
    assert 1 <= len(shown) <= 10
    assert max(map(n_lines, shown)) <= 12
    assert max(map(n_lines, code)) <= 30
    assert all(set(cell.metadata.get("tags", [])) <= TAGS for cell in code)
    assert not any(isinstance(node, ast.FunctionDef) for cell in code for node in ast.walk(ast.parse(cell.source)))
    assert sum("setup(" in cell.source for cell in code) == 1


def test_there_is_more_prose_than_code_on_the_page(source: Path) -> None:
    words = sum(len(cell.source.split()) for cell in cells(source, "markdown"))
    code = cells(source, "code")
    assert words >= 8 * sum(n_lines(cell) for cell in code if is_open(cell))
    assert words >= 4 * sum(n_lines(cell) for cell in code if "remove-cell" not in cell.metadata.get("tags", []))


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
    figures = [cell for cell in cells(source, "code") if "mystnb" in cell.metadata]
    drawn = [
        cell for cell in cells(source, "code") if "plotting.plot_" in cell.source or "interactive.embed" in cell.source
    ]
    assert len(figures) >= 2
    assert [cell.source for cell in figures] == [cell.source for cell in drawn]
    for cell in figures:
        shown = cell.metadata["mystnb"]
        assert 10 <= len(shown["figure"]["caption"].split()) <= 35
        assert shown["figure"]["name"].startswith("fig-")
        assert "alt_text=ALT" in cell.source or len(shown["image"]["alt"]) > 20


def test_one_address_of_the_repository_stands_everywhere() -> None:
    for file in address.FILES:
        assert set(address.ADDRESS.findall((ROOT / file).read_text())) == {address.address()}, file


def test_a_new_address_is_written_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_config.yml", *address.FILES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(address, "ROOT", tmp_path)
    assert set(address.write("https://github.com/me/my-book")) == {"_config.yml", *address.FILES}
    assert address.address() == "https://github.com/me/my-book"
    assert "&& cd my-book" in (tmp_path / "README.md").read_text()
    assert "staterank/staterank-book" not in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="expected an address"):
        address.write("me/my-book")


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
        execute(notebook, tmp_path / "out.ipynb", {"n_prompt": 1}, cwd=ROOT)
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
    execute(notebook, tmp_path / "out.ipynb", parameters, cwd=ROOT)
    assert (tmp_path / "results" / "01_stratification.json").exists()


def test_jupytext_changes_nothing_when_it_synchronizes_the_pairs(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    before = {file.name: file.read_bytes() for file in (tmp_path / "notebooks").iterdir() if file.is_file()}
    sources = [str(file) for file in sorted((tmp_path / "notebooks").glob("*.py"))]
    subprocess.run([sys.executable, "-m", "jupytext", "--sync", *sources], check=True, capture_output=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "notebooks").iterdir() if file.is_file()} == before
