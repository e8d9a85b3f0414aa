"""Every notebook on models that it was not written on: changed by one parameter, run to its end."""

from functools import partial
from pathlib import Path

import pytest
import torch
from architectures import delta, fla_models

from staterank_notebook import execute

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODELS = {  # beside Mamba-2, on which test_wheel.py makes a report of all chapters
    "kimi_linear": delta.MODELS["kimi_linear"],
    "fla_gated_deltanet": partial(fla_models.tiny, "GatedDeltaNet"),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of another architecture under the tokenizer of the embedded ones."""
    torch.manual_seed(0)
    model, target = MODELS[request.param](), tmp_path_factory.mktemp(request.param)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_on_another_architecture(notebook: Path, folder: Path, tmp_path: Path) -> None:
    # So tiny heads often have the same rank; with these sizes the chapters find enough that differ.
    small = {
        "00": {"n_prompts": 1, "n_tokens": 256},
        "01": {"n_prompts": 2, "n_tokens": 256},
        "02": {"n_prompts": 2, "n_tokens": 256},
        "05": {"n_prompts": 1, "n_copies": 1},
    }.get(notebook.stem[:2], {"n_prompts": 2, "n_draws": 2})
    execute(
        notebook, tmp_path / "out.ipynb", {"model": str(folder), "results_folder": str(tmp_path), **small}, cwd=ROOT
    )
    assert (tmp_path / f"{notebook.stem}.json").exists()
