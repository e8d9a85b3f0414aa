"""States while a model is trained, in transformers' real Trainer."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import tiny_qwen3_next, unchecked
from transformers import Trainer, TrainerCallback, TrainingArguments

from staterank_utils.callback import StateRankCallback, layer_metrics
from staterank_utils.dispatch import choose_kernels
from staterank_utils.spectra import effective_rank
from staterank_utils.tracing import trace_states

LAYERS = ["linear_attention", "full_attention", "linear_attention"]
NAMES = {
    f"staterank/layer_{i}/{name}"
    for i in (0, 2)
    for name in ("effective_rank", "nuclear_norm", "half_life", "share_outside")
}
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(0))


def trained(
    folder: Path,
    *,
    steps: int,
    report_to: str = "none",
    callback: Any = None,
    every: int = 10,
    model: Any = None,
    **options: bool,
) -> Trainer:
    """A tiny model with dropout after some steps; batches and dropout are the same every time."""
    model = (model or tiny_qwen3_next(LAYERS)).train()
    model.config.attention_dropout = 0.1
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (2 * steps, 32), generator=generator)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, logging_steps=every, per_device_train_batch_size=2, report_to=report_to, save_strategy="no",
        disable_tqdm=True, seed=0, **(options or {"use_cpu": True}),
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    if callback:
        trainer.add_callback(callback(trainer))
    trainer.train()
    return trainer


def test_a_trainer_logs_the_states_and_tensorboard_has_them(tmp_path: Path, ids: torch.Tensor, monkeypatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trained(
        tmp_path, steps=50, report_to="tensorboard", callback=lambda trainer: StateRankCallback(trainer, ids)
    )
    logged = [entry for entry in trainer.state.log_history if "staterank/seconds" in entry]
    assert [entry["step"] for entry in logged] == [10, 20, 30, 40, 50]
    assert set(logged[0]) >= NAMES
    assert sum("loss" in entry for entry in trainer.state.log_history) == 5
    files = accumulator.EventAccumulator(str(tmp_path / "board"))
    files.Reload()
    for name in NAMES:
        points = files.Scalars(f"train/{name}")
        assert [point.step for point in points] == [10, 20, 30, 40, 50]
        assert [point.value for point in points] == pytest.approx([entry[name] for entry in logged])
    # The last are those of the weights as they are at the end.
    trainer.model.eval()
    assert {name: logged[-1][name] for name in NAMES} == pytest.approx(layer_metrics(trainer.model, ids))


def test_a_training_goes_on_bit_for_bit_as_without_it(tmp_path: Path, ids: torch.Tensor) -> None:
    without = trained(tmp_path / "a", steps=12, every=4).model.state_dict()
    beside = trained(tmp_path / "b", steps=12, every=4, callback=lambda trainer: StateRankCallback(trainer, ids))
    assert all(torch.equal(value, without[name]) for name, value in beside.model.state_dict().items())
    assert beside.model.training


@pytest.mark.gpu
def test_a_training_in_bfloat16_on_a_gpu_goes_on_bit_for_bit_as_without_it(tmp_path: Path, ids, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # of its short convolutions
    made = []
    for name, callback in (("a", None), ("b", lambda trainer: StateRankCallback(trainer, ids))):
        model = tiny_qwen3_next(LAYERS, d_k=16, d_v=16)
        choose_kernels(model, plain=True)  # the gradients of fla's are refused on a Hopper GPU with Triton before 3.7.1
        made.append(trained(tmp_path / name, steps=12, every=4, callback=callback, model=model, bf16=True))
    without, beside = (trainer.model.state_dict() for trainer in made)
    assert all(value.is_cuda and torch.equal(value, without[name]) for name, value in beside.items())
    logged = [entry for entry in made[1].state.log_history if "staterank/seconds" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    made[1].model.eval()
    assert {name: logged[-1][name] for name in NAMES} == pytest.approx(layer_metrics(made[1].model, ids))


def test_states_that_are_not_finite_do_not_stop_a_training(tmp_path: Path, ids: torch.Tensor, caplog) -> None:
    def broken(trainer: Trainer) -> StateRankCallback:
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight.fill_(math.nan)
        return StateRankCallback(trainer, ids)

    trainer = trained(tmp_path, steps=8, every=4, callback=broken)
    assert trainer.state.global_step == 8
    assert not [entry for entry in trainer.state.log_history if "staterank/seconds" in entry]
    assert "states were not measured at step 4: " in caplog.text


def test_whatever_a_measurement_raises_does_not_stop_a_training(
    tmp_path: Path, ids: torch.Tensor, caplog, monkeypatch
) -> None:
    def fails(*_: Any) -> dict[str, float]:
        raise AttributeError("a layer that is not there")

    monkeypatch.setattr("staterank_utils.callback.layer_metrics", fails)
    trainer = trained(tmp_path, steps=8, every=4, callback=lambda trainer: StateRankCallback(trainer, ids))
    assert trainer.state.global_step == 8
    assert "states were not measured at step 4: AttributeError: a layer that is not there" in caplog.text


def test_it_may_be_added_while_a_training_runs(tmp_path: Path, ids: torch.Tensor) -> None:
    class Later(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                trainers[0].add_callback(StateRankCallback(trainers[0], ids))

    trainers: list[Trainer] = []

    def added(trainer: Trainer) -> Later:
        trainers.append(trainer)
        return Later()

    logged = trained(tmp_path, steps=8, every=4, callback=added).state.log_history
    assert [entry["step"] for entry in logged if "staterank/seconds" in entry] == [4, 8]


def test_it_measures_no_more_often_than_asked(tmp_path: Path, ids: torch.Tensor) -> None:
    trainer = trained(tmp_path, steps=10, every=2, callback=lambda trainer: StateRankCallback(trainer, ids, every=4))
    for _ in range(2):
        logged = [entry["step"] for entry in trainer.state.log_history if "staterank/seconds" in entry]
        assert logged == [2, 6, 10]
        trainer.train()  # counts anew
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, StateRankCallback))
    callback.on_train_begin(None, SimpleNamespace(global_step=7), None)
    assert callback.last == 7


def test_a_loop_of_ones_own_gets_what_a_trace_says(ids: torch.Tensor) -> None:
    model = tiny_qwen3_next(LAYERS).train()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    metrics = layer_metrics(model, ids)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    trace = trace_states(model, ids, positions=[48], reduce=effective_rank)
    assert metrics["staterank/layer_2/effective_rank"] == pytest.approx(trace.values[1].double().mean().item())
    decay = trace.log_decay[0]
    assert metrics["staterank/layer_0/half_life"] == pytest.approx(math.log(2) / np.median(decay.mean(0).abs()))


def test_layers_without_decay_have_no_half_life(ids: torch.Tensor) -> None:
    if "fla DeltaNet" not in ARCHITECTURES:
        pytest.skip("fla is not installed")
    metrics = layer_metrics(ARCHITECTURES["fla DeltaNet"].build(), ids)
    assert not [name for name in metrics if name.endswith("half_life")]


def test_what_cannot_be_watched_is_refused(tmp_path: Path, ids: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"got Qwen3NextForCausalLM: write trainer\.add_callback"):
        unchecked(StateRankCallback.__init__)(SimpleNamespace(), tiny_qwen3_next(LAYERS), ids)
    trainer = Trainer(tiny_qwen3_next(LAYERS), TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        StateRankCallback(trainer, ids + 64)
    with pytest.raises(TypeError, match="got list: make one with"):
        unchecked(StateRankCallback.__init__)(SimpleNamespace(), trainer, ids.tolist())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        StateRankCallback(trainer, ids, every=0)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="split over its processes"):
        StateRankCallback(trainer, ids)
    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = False, True
    trainer.args.hf_deepspeed_config = SimpleNamespace(is_zero3=lambda: True)
    with pytest.raises(ValueError, match="split over its processes"):
        StateRankCallback(trainer, ids)
