"""What the states do while a model is trained: numbers per layer, for transformers' Trainer or a loop of one's own."""

import logging
import math
import time
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from staterank_utils.architectures import linear_layers, state_size
from staterank_utils.models import check_ids, unwrapped
from staterank_utils.selection import by_layer, head_metrics
from staterank_utils.tracing import check_even

log = logging.getLogger(__name__)
PREFIX = "staterank"


def layer_metrics(model: PreTrainedModel, input_ids: Int[Tensor, "prompt token"]) -> dict[str, float]:
    """What a log of a training holds of a model's states after the last token of some prompts.

    Weights, gradients, modes and the random numbers of torch are left as they are, so a training goes on bit for bit as without it. Call it
    between two optimizer steps.

    Args:
        model: any that `linear_layers` accepts, also in train mode, compiled, or wrapped by PEFT.
        input_ids: prompts of equal length, the same at every call, on any device.

    Returns:
        "staterank/layer_INDEX/NAME" -> number, means over prompts: "effective_rank" (arXiv:2602.02195, Eq. 6, eps = 1e-4) and
        "nuclear_norm", "half_life" and "share_outside", as `selection.by_layer` has them; a half-life without end is left out.

    Raises:
        TypeError, ValueError: as in `trace_states`.

    Example:
        >>> import torch
        >>> from staterank_utils import load_model
        >>> metrics = layer_metrics(load_model("hybrid"), torch.arange(64).reshape(1, 64))
        >>> sorted(metrics)[:4]
        ['staterank/layer_0/effective_rank', 'staterank/layer_0/half_life', 'staterank/layer_0/nuclear_norm', 'staterank/layer_0/share_outside']
    """
    bare = unwrapped(model)
    of_layers = by_layer(head_metrics(model, input_ids), state_size(bare))
    return {
        f"{PREFIX}/layer_{layer.index}/{name}": value
        for layer, numbers in zip(linear_layers(bare), of_layers, strict=True)
        for name, value in numbers.items()
        if math.isfinite(value)
    }


class StateRankCallback(TrainerCallback):
    """Adds `layer_metrics` to what a Trainer logs, whenever it logs a loss, for whatever it reports to.

    Beside them stands "staterank/seconds", what they took: one pass over the prompts. Where they cannot be measured, as with states that
    are not finite or a GPU that is full, a warning says why, and the training goes on.

    Args:
        trainer: that the callback is added to.
        input_ids: prompts of equal length, the same for the whole training: a few hundred tokens of a few texts do.
        every: optimizer steps that lie at least between two measurements, for a Trainer that logs more often.

    Raises:
        TypeError: not a Trainer, or ids as `trace_states` refuses them.
        ValueError: a model that `linear_layers` refuses; weights that are split over processes (FSDP, DeepSpeed's third stage), of which
            no process has a whole layer; `every` under 1.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import TrainingArguments
        >>> from staterank_utils import load_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(load_model("hybrid").requires_grad_(True), TrainingArguments(folder, report_to="none"))
        ...     trainer.add_callback(StateRankCallback(trainer, torch.arange(64).reshape(1, 64)))
        >>> type(trainer.callback_handler.callbacks[-1]).__name__
        'StateRankCallback'
    """

    def __init__(self, trainer: Trainer, input_ids: Int[Tensor, "prompt token"], *, every: int = 1):
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"expected the Trainer that is to log, got {type(trainer).__name__}: write trainer.add_callback(StateRankCallback(trainer, input_ids))"
            )
        if trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and trainer.args.hf_deepspeed_config.is_zero3()):
            raise ValueError(
                "the weights of this Trainer are split over its processes, so no process can read a prompt through whole layers: trace its checkpoints"
            )
        if every < 1:
            raise ValueError(f"every is a number of optimizer steps, at least 1, got {every}")
        check_ids(unwrapped(trainer.model), input_ids)
        check_even(linear_layers(unwrapped(trainer.model)))
        self.trainer, self.input_ids, self.every = trainer, input_ids, every
        self.last = -every  # step of the last measurement

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count steps anew; where a training is resumed, as if it had measured at the step that it resumes at."""
        self.last = state.global_step if state.global_step else -self.every

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Measure where the training's own loss was logged."""
        if "loss" not in (logs or {}) or not state.is_world_process_zero or state.global_step < self.last + self.every:
            return
        self.last = state.global_step
        started = time.perf_counter()
        try:
            metrics = layer_metrics(kwargs["model"], self.input_ids)
        except Exception as error:  # whatever it is, a training is worth more than its log
            log.warning("states were not measured at step %d: %s: %s", state.global_step, type(error).__name__, error)
            return
        self.trainer.log({**metrics, f"{PREFIX}/seconds": time.perf_counter() - started})
