"""lm-evaluation-harness, offline: a local task, an embedded model whole, ablated and pruned."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import continued
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from staterank_utils import load_model, load_tokenizer, prune_heads
from staterank_utils.dispatch import choose_kernels
from staterank_utils.harness import evaluate_in_harness, harness_model
from staterank_utils.surgery import ablate_heads, all_heads, heads_by_layer

MEAN = {"aggregation": "mean", "higher_is_better": True}


def early_heads(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [(layer, head) for layer, head in all_heads(model) if layer < 2]


def tasks(made: Path, model: PreTrainedModel, tokenizer: Any) -> Path:
    """Two tasks on passages, of which the model is a master: say its own words, and tell them from those of it ablated."""
    answers = continued(model, tokenizer)
    with ablate_heads(model, early_heads(model)):
        others = continued(model, tokenizer)
    rows = [
        {"question": passage, "answer": answer, "choices": [answer, others[passage]]}
        for passage, answer in answers.items()
    ]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(made / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    said = common | {
        "task": "said", "output_type": "generate_until", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["NEVER"], "max_gen_toks": 4},
        "metric_list": [{**MEAN, "metric": "exact_match"}],
    }  # fmt: skip
    chosen = common | {
        "task": "chosen", "output_type": "multiple_choice", "doc_to_target": 0, "doc_to_choice": "{{choices}}",
        "metric_list": [{**MEAN, "metric": "acc"}],
    }  # fmt: skip
    for task in (said, chosen):
        (made / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, hybrid, tokenizer) -> Path:
    return tasks(tmp_path_factory.mktemp("tasks"), hybrid, tokenizer)


def scores(model, tokenizer, folder: Path) -> tuple[float, float]:
    found = evaluate_in_harness(model, tokenizer, ["said", "chosen"], task_folder=folder, batch_size=3)
    return found["said"]["exact_match,none"], found["chosen"]["acc,none"]


def test_the_harness_sees_what_was_done_to_the_model(hybrid, tokenizer, folder: Path, tmp_path: Path) -> None:
    assert scores(hybrid, tokenizer, folder) == (1.0, 1.0)
    with ablate_heads(hybrid, early_heads(hybrid)):
        ablated = scores(hybrid, tokenizer, folder)
    assert ablated[0] == 0.0
    assert ablated[1] < 1.0
    pruned = prune_heads(hybrid, heads_by_layer(early_heads(hybrid), all_heads(hybrid), what="heads"))
    pruned.save_pretrained(tmp_path)
    assert scores(load_model(str(tmp_path)), tokenizer, folder) == ablated


def test_a_model_without_softmax_layers_generates_in_the_harness(tmp_path: Path) -> None:
    model, tokenizer = load_model("pure"), load_tokenizer("pure")
    assert scores(model, tokenizer, tasks(tmp_path, model, tokenizer)) == (1.0, 1.0)


def test_what_is_missing_or_wrong_is_said(hybrid, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="no task 'nothing'"):
        evaluate_in_harness(hybrid, tokenizer, ["nothing"])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        harness_model(hybrid, tokenizer, batch_size=0)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ModuleNotFoundError, match="harness"):
        harness_model(hybrid, tokenizer)


def test_a_mamba_generates_in_the_harness(tokenizer, folder: Path) -> None:
    """Its `generate` knows no cache of that name, and where a projection has a bias it cannot be padded."""
    config = Mamba2Config(
        vocab_size=8192, hidden_size=32, num_heads=8, head_dim=8, state_size=16, num_hidden_layers=2, chunk_size=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config).eval()
    choose_kernels(model)
    assert scores(model, tokenizer, folder)[0] == 0.0
    config.use_bias = True
    with pytest.raises(ValueError, match="side by side.*batch_size=1"):
        harness_model(Mamba2ForCausalLM(config), tokenizer)
