"""Benchmarks that the field knows: a model, also an ablated or pruned one, in lm-evaluation-harness."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.architectures import cache_name
from staterank_utils.decoding import check_padding
from staterank_utils.models import make_cache


def harness_model(model: PreTrainedModel, tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None) -> Any:
    """A model as lm-evaluation-harness takes it, with the cache that linear attention needs.

    The model itself is handed over, not its weights: heads that `ablate_heads` takes out stay out while its block is open.

    Args:
        model, tokenizer: from `load_model` and `load_tokenizer`, or pruned.
        batch_size: requests answered side by side.
        max_length: tokens of prompt and answer; longer prompts lose their beginning. By default what the configuration says.

    Returns:
        An instance of `lm_eval.models.huggingface.HFLM`, for `lm_eval.simple_evaluate(model=...)`.

    Raises:
        ModuleNotFoundError: lm-evaluation-harness is not installed.
        ValueError: a batch size under 1, or over 1 where a model cannot read prompts of different lengths side by side.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> harness_model(load_model("pure"), load_tokenizer("pure")).max_length
        4096
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lm-evaluation-harness is not installed: pip install 'lm_eval[math,ruler]'"
        ) from error
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size > 1:
        check_padding(model)
    # The Mamba family's own `generate` makes its cache; before transformers 5.24 it has another name there.
    name = cache_name(inspect.signature(model.forward).parameters)

    class WithCache(HFLM):  # type: ignore[misc, unused-ignore]
        """Gives `generate` a cache that counts tokens also where no layer has softmax attention."""

        def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
            with torch.no_grad():
                logits: Tensor = self.model(inps, use_cache=False).logits
            return logits

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            cache = {name: make_cache(self.model)} if name and name != "cache_params" else {}
            made: Tensor = super()._model_generate(context, max_length, stop, **cache, **options)
            return made

    return WithCache(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, device=str(model.device)
    )


def evaluate_in_harness(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    limit: int | None = None,
    task_folder: Path | str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of a model on tasks of lm-evaluation-harness.

    Args:
        model, tokenizer, batch_size, max_length: as in `harness_model`.
        tasks: names that the harness knows, such as "gsm8k_cot", "hendrycks_math500" or "niah_single_1"; their data come from a
            hub, over the network, unless a local task names files.
        limit: instances a task; all by default. A score of fewer is a test of the path, not a result.
        task_folder: of more tasks, as YAML files.
        metadata: for tasks that ask for it, such as the lengths of RULER's.

    Returns:
        task -> metric with its filter, such as "exact_match,none", and its standard error -> number.

    Raises:
        ModuleNotFoundError, ValueError: as in `harness_model`.
        KeyError: a task that the harness does not know.

    Example:
        >>> from staterank_utils import load_model, load_tokenizer
        >>> evaluate_in_harness(load_model("hybrid"), load_tokenizer("hybrid"), ["gsm9k"])
        Traceback (most recent call last):
            ...
        KeyError: "lm-evaluation-harness has no task 'gsm9k': `lm_eval ls tasks` lists what it has, task_folder=... adds your own"
    """
    wrapped = harness_model(model, tokenizer, batch_size=batch_size, max_length=max_length)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder) if task_folder else None, metadata=dict(metadata or {}))
    for task in tasks:
        if task not in manager.all_tasks:
            raise KeyError(
                f"lm-evaluation-harness has no task {task!r}: `lm_eval ls tasks` lists what it has, task_folder=... adds your own"
            )
    found = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return {
        task: {name: number for name, number in scores.items() if isinstance(number, float)}
        for task, scores in found["results"].items()
    }
