"""The training code on a CPU: same function as the model's own forward, same batches after a kill."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from staterank_utils import Spectrum, domain_prompts, load_model, prune_heads, singular_values, trace_states
from staterank_utils.ablation import MEAN, Ablation
from staterank_utils.evaluation import recall_task
from staterank_utils.layouts import linear_layers, modeling_module
from staterank_utils.models import CHECKPOINTS, EMBEDDED, choose_kernels, initial_model
from staterank_utils.strata import exactly
from training import recover as recovery
from training import train as training
from training.corpus import encode, read_books
from training.fast_forward import FastForward, limit_autotuning
from training.mixture import ANSWER_WEIGHT, Mixture
from training.recover import Recovery
from training.train import LAYERS, Settings, configuration, rate, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    ids = np.random.default_rng(0).integers(2, len(tokenizer), 20_000).astype(np.uint16)
    for name in ("books", "code", "held_out_books"):
        np.save(folder / f"{name}.npy", ids)
    return folder


def plain_recurrence(model) -> Callable:
    """The chunked gated delta rule of transformers, in plain torch."""
    choose_kernels(model, plain=True)
    kernel = modeling_module(linear_layers(model)[0][1]).torch_chunk_gated_delta_rule
    return lambda q, k, v, log_decay, beta: kernel(q, k, v, g=log_decay, beta=beta)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_fast_forward_is_the_model_s_own_forward(name: str) -> None:
    model = initial_model(configuration(name, vocabulary=512, eos=0, pad=1, seed=0))
    ids = torch.randint(0, 512, (2, 131), generator=torch.Generator().manual_seed(0))
    fast = FastForward(model, plain_recurrence(model), dtype=torch.float32, compiled=False)
    with torch.no_grad():
        own = model(ids, use_cache=False).logits
        assert (fast.logits(ids) - own).abs().max() < 1e-4
        weights = torch.rand(2, 130)
        expected = torch.nn.functional.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss, losses = fast.loss(ids, weights)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, (expected * weights.flatten()).sum() / weights.sum(), rtol=1e-4, atol=1e-4)


def test_kernels_keep_one_configuration_also_where_they_were_defined_before(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner

    def kernel() -> None: ...

    configs = [triton.Config({"BK": 32}, num_warps=warps, num_stages=stages) for warps in (2, 4) for stages in (2, 3)]
    tuned = triton.autotune(configs=configs, key=[])(triton.jit(kernel))
    taken = []
    monkeypatch.setattr(Autotuner, "run", Autotuner.run)  # as it was again afterwards
    monkeypatch.setattr(tuned.fn, "run", lambda **settings: taken.append(settings))
    limit_autotuning()
    tuned.run()
    assert [(made["BK"], made["num_warps"], made["num_stages"]) for made in taken] == [(32, 4, 3)]


def test_a_batch_follows_from_its_step_alone(corpus: Path, tokenizer) -> None:
    one, other = (Mixture(corpus, tokenizer, rows=6, n_tokens=256, seed=3) for _ in range(2))
    one[0]
    for a, b in zip(one[5], other[5], strict=True):
        assert torch.equal(a, b)
    ids, weights = one[5]
    assert ids.shape == (6, 257)
    assert weights.shape == (6, 256)
    assert set(weights.unique().tolist()) <= {1.0, ANSWER_WEIGHT}
    assert not torch.equal(ids, one[6][0])


def test_weights_mark_the_answers(corpus: Path, tokenizer) -> None:
    mixture = Mixture(corpus, tokenizer, rows=40, n_tokens=512, seed=0)
    ids, weights = mixture[0]
    marked = [tokenizer.decode(row[1:][w > 1]) for row, w in zip(ids, weights, strict=True)]
    assert any("The answer is" in text for text in marked)
    assert not any("Question:" in text for text in marked)


def test_books_are_read_plain_or_compressed_and_held_out_by_name(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\n\0\ntwo")
    with lzma.open(tmp_path / "b_valid.txt.xz", "wt") as stream:
        stream.write("three")
    assert list(read_books(tmp_path, held_out=False)) == ["one", "two"]
    assert list(read_books(tmp_path, held_out=True)) == ["three"]
    ids = encode(iter(["one", "two"]), tokenizer, label="test")
    assert tokenizer.decode(ids) == "one<|endoftext|>two<|endoftext|>"
    (tmp_path / "b_valid.txt.xz").unlink()
    with pytest.raises(FileNotFoundError, match="no held-out text"):
        list(read_books(tmp_path, held_out=True))


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    assert rate(0, 0.0) < rate(50, 0.0) < rate(200, 0.1) == 1
    assert rate(10_000, 1.0) == 0
    assert rate(10_000, 0.9) < rate(10_000, 0.7) < 1


def test_a_run_that_was_killed_goes_on_where_it_was(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "LOG_EVERY": 1,
        "SAVE_EVERY": 0.0,
        "RECORD_AT": (0, 1),
        "RECORD_PROMPTS": 1,
        "RECORD_DOMAINS": ("prose",),
        "HELD_OUT_WINDOWS": 2,
    }.items():
        monkeypatch.setattr(training, name, value)
    settings = Settings(
        "pure", corpus, str(CHECKPOINTS / "hybrid"), tmp_path, minutes=5, workers=0, rows=1, n_tokens=32
    )
    recurrence = plain_recurrence(initial_model(configuration("pure", vocabulary=64, eos=0, pad=1, seed=0)))
    steps: list[int] = []
    original = Mixture.__getitem__

    def killed_at_third(self: Mixture, step: int):
        steps.append(step)
        if steps.count(step) == 1 and step == 2:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Mixture, "__getitem__", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        train(settings, recurrence, device="cpu", compiled=False)
    assert not (tmp_path / "training.json").exists()
    elapsed = torch.load(tmp_path / "progress.pt")["elapsed"]
    train(Settings(**{**vars(settings), "minutes": elapsed / 60 + 0.01}), recurrence, device="cpu", compiled=False)
    assert steps[:4] == [0, 1, 2, 2]
    run = json.loads((tmp_path / "training.json").read_text())
    assert [entry["step"] for entry in run["log"]] == list(range(1, run["steps"] + 1))
    assert list(run["record"]["steps"]) == ["0", "1", "end"]
    assert np.array(run["record"]["steps"]["end"]["prose"]["effective_rank"]).shape == (8, 8)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()


def test_a_finished_run_goes_on_from_the_embedded_model(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LOG_EVERY": 1, "RECORD_AT": (0,), "RECORD_PROMPTS": 1, "HELD_OUT_WINDOWS": 2}.items():
        monkeypatch.setattr(training, name, value)
    finished = json.loads((CHECKPOINTS.parent / "results" / "training" / "pure.json").read_text())
    minutes = finished["seconds"] / 60 + 0.01
    settings = Settings("pure", corpus, str(CHECKPOINTS / "hybrid"), tmp_path, minutes=minutes, workers=0, rows=1, n_tokens=32, embedded=True, layers=(1, 3))  # fmt: skip
    recurrence = plain_recurrence(initial_model(configuration("pure", vocabulary=64, eos=0, pad=1, seed=0)))
    steps: list[int] = []
    original = Mixture.__getitem__
    monkeypatch.setattr(Mixture, "__getitem__", lambda self, step: steps.append(step) or original(self, step))
    train(settings, recurrence, device="cpu", compiled=False)
    run = json.loads((tmp_path / "training.json").read_text())
    assert steps[0] == finished["steps"] == run["stages"][-1]["from_step"]
    assert run["steps"] == finished["steps"] + len(steps)
    assert run["stages"][:-1] == finished["stages"]
    assert run["log"][: len(finished["log"])] == finished["log"]
    assert list(run["record"]["steps"]) == list(finished["record"]["steps"])
    trained, embedded = (safetensors.torch.load_file(next(folder.glob("*-00001-*"))) for folder in (tmp_path / "model", CHECKPOINTS / "pure"))  # fmt: skip
    moved = {key: (trained[key].float() - embedded[key].float()).abs().max() for key in embedded}
    assert 0 < max(moved.values()) < 0.1
    assert {key.split(".")[2] for key, distance in moved.items() if distance > 0} == {"1", "3"}


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    model = initial_model(configuration("pure", vocabulary=64, eos=0, pad=1, seed=0))
    with pytest.raises(SystemExit, match="no layer 8"):
        training.keep_all_but(model, [3, 8])


@pytest.mark.parametrize("name", EMBEDDED)
def test_fast_forward_is_the_forward_of_a_pruned_model(name: str) -> None:
    model = initial_model(configuration(name, vocabulary=512, eos=0, pad=1, seed=0))
    pruned = prune_heads(model, {0: list(range(8)), 1: [3], 2: [0, 1, 4, 7]})
    ids = torch.randint(0, 512, (2, 70), generator=torch.Generator().manual_seed(0))
    fast = FastForward(pruned, plain_recurrence(pruned), dtype=torch.float32, compiled=False)
    with torch.no_grad():
        assert (fast.logits(ids) - pruned(ids, use_cache=False).logits).abs().max() < 1e-4


def test_books_of_a_clone_are_held_out_by_author_and_title(tmp_path: Path) -> None:
    for name in ("Jane Austen/Pride and Prejudice.md", "Jane Austen/Emma.md", "valid.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(read_books(tmp_path, held_out=True)) == ["Jane Austen/Pride and Prejudice.md", "valid.txt"]
    assert list(read_books(tmp_path, held_out=False)) == ["Jane Austen/Emma.md"]


def test_recovery_trains_every_arm_and_goes_on_after_a_kill(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "HELD_OUT_WINDOWS", 1)
    monkeypatch.setattr(
        Ablation, "sweep", lambda self, *, seed: {head: {MEAN: exactly(float(i))} for i, head in enumerate(self.heads)}
    )
    settings = Recovery("hybrid", steps=2, n_prompts=2, n_graded=1, rows=1, n_tokens=64)
    trained: list[str] = []
    fine_tune = recovery.fine_tune

    def killed_at_second(model, *rest) -> None:
        if len(trained) == 1:
            trained.append("killed")
            raise KeyboardInterrupt
        before = [parameter.clone() for parameter in model.parameters()]
        fine_tune(model, *rest)
        assert any((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
        trained.append(type(model).__name__)

    monkeypatch.setattr(recovery, "fine_tune", killed_at_second)
    file, tasks = tmp_path / "hybrid.json", {"recall": recall_task(4)}
    recurrence = plain_recurrence(load_model("hybrid", device="cpu"))

    def run() -> list:
        recovery.recover(settings, corpus, file, recurrence, tasks=tasks, device="cpu", workers=0)
        return json.loads(file.read_text())["rows"]

    with pytest.raises(KeyboardInterrupt):
        run()
    [first] = json.loads(file.read_text())["rows"]
    rows = run()
    assert rows[0] == first
    assert [row["arm"] for row in rows] == ["whole", "joint", "random", "joint, reversed", "least damage alone"]
    assert [row["heads"] for row in rows] == [0, 19, 19, 19, 19]
    assert first["before"]["score / intact"]["point"] == 1
    assert all(row["before"]["bits a byte"] != row["after"]["bits a byte"] for row in rows)
    assert len(trained) == 6


def test_the_stored_records_of_the_embedded_models_are_whole() -> None:
    for file in sorted((CHECKPOINTS.parent / "results" / "training").glob("*.json")):
        data = json.loads(file.read_text())
        if "record" not in data:
            continue
        steps = data["record"]["steps"]
        assert next(iter(steps)) == "0"
        assert list(steps)[-1] == "end"
        for domains in steps.values():
            assert set(domains) == {"prose", "code", "arithmetic"}
            assert all(
                set(m) == {"effective_rank", "nuclear_norm", "log_decay", "write_strength"} for m in domains.values()
            )


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_record_at_step_0_is_what_the_initial_weights_give_here(name: str, tokenizer) -> None:
    record = json.loads((CHECKPOINTS.parent / "results" / "training" / f"{name}.json").read_text())["record"]
    n_prompts, n_tokens = record["prompts_a_domain"], record["n_tokens"]
    # Generated prompts are the same on every version of Python, those from its documentation are not.
    prompts = domain_prompts("arithmetic", tokenizer, n_prompts=n_prompts, n_tokens=n_tokens, seed=0)
    trace = trace_states(load_model(name, weights="initial"), prompts, positions=[n_tokens], reduce=singular_values)
    stored = torch.tensor(record["steps"]["0"]["arithmetic"]["nuclear_norm"], dtype=torch.float64)
    torch.testing.assert_close(Spectrum(trace.values[:, :, 0]).nuclear_norm().mean(1), stored, rtol=1e-4, atol=0)
