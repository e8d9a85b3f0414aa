"""The training code on a CPU: same function as the model's own forward, same batches after a kill."""

import json
import lzma
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import BambaForCausalLM, KimiLinearForCausalLM
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from staterank_utils import Spectrum, domain_prompts, load_model, prune_heads, singular_values, trace_states
from staterank_utils.dispatch import Kernel, choose_kernels, limit_autotuning
from staterank_utils.models import CHECKPOINTS, EMBEDDED, GATES, initial_model
from staterank_utils.sse import SSEForCausalLM
from staterank_utils.studies.repeated import stored_on
from training import train as training
from training.corpus import encode, read_books, write_corpus
from training.fast_forward import (
    FastForward,
    Gradients,
    chunk_gradients,
    decayed_sum,
    gated_delta,
    mend_backward,
    recurrence_of,
)
from training.mixture import Mixture
from training.recipes import LINEAR, RECIPES, SCHEMES, SOFTMAX, WAVES, find_recipe
from training.train import Run, rate, train, untrained

TOKENIZER = str(CHECKPOINTS / "hybrid")
TASKS_63 = RECIPES["hybrid-tasks63-0"]
TINY = replace(
    TASKS_63, name="tiny", layer_types=(LINEAR, SOFTMAX, LINEAR), steps=4, batch_rows=1, n_tokens=32, hidden=64, intermediate=64,
    key_heads=2, value_heads=4, head_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    ids = np.random.default_rng(0).integers(2, len(tokenizer), 20_000).astype(np.uint16)
    write_corpus(folder, dict.fromkeys(("books", "code", "held_out_books"), ids), tokenizer)
    return folder


@pytest.fixture(scope="module")
def tiny_recurrence(tokenizer) -> Callable:
    return plain_recurrence(initial_model(TINY.configuration(tokenizer)))


def plain_recurrence(model) -> Callable:
    """The chunked rule of the model's class, in plain torch."""
    if isinstance(model, BambaForCausalLM):
        return decayed_sum
    of_kda = isinstance(model, KimiLinearForCausalLM)
    kernel = Kernel(chunk_kimi_delta_attention if of_kda else torch_chunk_gated_delta_rule, plain=True)
    return lambda q, k, v, log_decay, beta: kernel(q, k, v, g=log_decay, beta=beta)[0]


@pytest.mark.parametrize(
    "name", ["hybrid-text-0", "pure-tasks63-1", "hybrid-sse-0", "hybrid-kda-0", "hybrid-nodelta-0"]
)
def test_fast_forward_is_the_model_s_own_forward(name: str, tokenizer) -> None:
    model = initial_model(RECIPES[name].configuration(tokenizer))
    choose_kernels(model, plain=True)
    ids = torch.randint(0, 512, (2, 131), generator=torch.Generator().manual_seed(0))
    fast = FastForward(model, plain_recurrence(model), dtype=torch.float32, compiled=False)
    with torch.no_grad():
        own = model(ids, use_cache=False).logits
        assert (fast.logits(ids) - own).abs().max() < 1e-4
        weights = torch.rand(2, 130)
        expected = torch.nn.functional.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss, losses = fast.loss(ids, weights)
        if name == "hybrid-sse-0":  # its own loss in training has the auxiliary one in it
            model.train()(ids[:, :-1])
            loss = loss - model.config.balance * model.balance()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, (expected * weights.flatten()).sum() / weights.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hybrid-sse-0", "hybrid-kda-0", "hybrid-nodelta-0"])
def test_fast_forward_of_another_rule_has_the_gradients_of_its_own_forward(name: str, tokenizer) -> None:
    """With partitions, whose tokens are brought together and taken apart again, with a decay per channel, and without the delta rule."""
    recipe = replace(RECIPES[name], layer_types=(LINEAR, SOFTMAX), hidden=32, intermediate=32, head_size=8)
    model = initial_model(recipe.configuration(tokenizer)).train()
    choose_kernels(model, plain=True)
    ids = torch.randint(0, 512, (2, 66), generator=torch.Generator().manual_seed(0))
    logits = model(ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if name == "hybrid-sse-0":
        loss = loss + model.config.balance * model.balance()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    fast = FastForward(model, plain_recurrence(model), dtype=torch.float32, compiled=False)
    fast.loss(ids, torch.ones(2, 65))[0].backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        torch.testing.assert_close(
            p.grad, expected[key], rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_fast_forward_takes_one_active_partition(tokenizer) -> None:
    recipe = replace(RECIPES["hybrid-sse-0"], layer_types=(LINEAR, SOFTMAX))
    configuration = recipe.configuration(tokenizer)
    configuration.n_active = 2
    model = SSEForCausalLM(configuration)
    with pytest.raises(ValueError, match="one active partition per token, got n_active=2"):
        FastForward(model, plain_recurrence(model))


def test_fast_forward_takes_mamba_layers_that_are_normalised_by_group(tokenizer) -> None:
    model = initial_model(replace(RECIPES["hybrid-nodelta-0"], layer_types=(LINEAR, SOFTMAX)).configuration(tokenizer))
    del model.model.layers[0].mamba.norm.group_size
    with pytest.raises(ValueError, match=r"train with 5\.23 or later"):
        FastForward(model, plain_recurrence(model))


def test_kernels_keep_one_configuration_also_where_they_were_defined_before(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner

    def kernel() -> None: ...

    configs = [triton.Config({"BK": 32}, num_warps=warps, num_stages=stages) for warps in (2, 4) for stages in (2, 3)]
    tuned = triton.autotune(configs=configs, key=[])(triton.jit(kernel))
    taken = []
    monkeypatch.setattr(Autotuner, "run", Autotuner.run)  # as it was again afterwards
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuned.fn, "run", lambda **settings: taken.append(settings))
    limit_autotuning()
    tuned.run()
    assert [(made["BK"], made["num_warps"], made["num_stages"]) for made in taken] == [(32, 4, 3)]


def test_a_batch_follows_from_its_step_alone(corpus: Path, tokenizer) -> None:
    one, other = (Mixture(corpus, tokenizer, replace(TASKS_63, batch_rows=6, n_tokens=256, seed=3)) for _ in range(2))
    one[0]
    for a, b in zip(one[5], other[5], strict=True):
        assert torch.equal(a, b)
    ids, weights = one[5]
    assert ids.shape == (6, 257)
    assert weights.shape == (6, 256)
    assert set(weights.unique().tolist()) <= {1.0, TASKS_63.answer_weight}
    assert not torch.equal(ids, one[6][0])


def test_weights_mark_the_answers(corpus: Path, tokenizer) -> None:
    mixture = Mixture(corpus, tokenizer, replace(TASKS_63, batch_rows=40, n_tokens=512))
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


def test_the_ladder_s_recipes_are_those_of_its_waves() -> None:
    of_waves = [name for names in WAVES.values() for name in names]
    assert sorted([*of_waves, "hybrid-wide-0", "pure-wide-0"]) == sorted(RECIPES)
    for name, recipe in RECIPES.items():
        assert name == recipe.name
        assert sum(recipe.rows.values()) == pytest.approx(1)
        assert sum(recipe.tasks.values()) == pytest.approx(1)
        assert recipe.gates in SCHEMES
        assert SCHEMES[recipe.gates] in GATES
        n_heads = 72 if recipe.value_heads == 8 else 144
        assert recipe.n_linear_heads == (n_heads if name.startswith("hybrid") else 192)
    with pytest.raises(ValueError, match="there is no recipe 'hybrid': choose from hybrid-text-0, "):
        find_recipe("hybrid")


def test_another_rule_has_as_many_parameters(tokenizer) -> None:
    names = ("hybrid-text-0", "hybrid-sse-0", "hybrid-fewheads-0", "hybrid-kda-0", "hybrid-nodelta-0")
    counts = [sum(p.numel() for p in untrained(RECIPES[name], tokenizer).parameters()) for name in names]
    assert counts == pytest.approx([counts[0]] * len(names), rel=0.02)


def test_a_recipe_without_a_model_class_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="no model class for rule 'RWKV'"):
        replace(TINY, rule="RWKV").configuration(tokenizer)
    with pytest.raises(ValueError, match="unknown gates 'wide': choose from broad, narrow, default, open"):
        replace(TINY, gates="wide").configuration(tokenizer)
    with pytest.raises(ValueError, match="no recurrence for the update rule 'RWKV'"):
        recurrence_of("RWKV")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "LOG_EVERY": 1,
        "SAVE_EVERY": 0.0,
        "RECORD_AT": (0, 1),
        "STATES_EVERY": 2,
        "RECORD_PROMPTS": 1,
        "RECORD_DOMAINS": ("prose",),
        "KEEP_AT": (2,),
        "HELD_OUT_WINDOWS": 2,
    }.items():
        monkeypatch.setattr(training, name, value)


def run_of(corpus: Path, out: Path, **more: object) -> Run:
    return Run(TINY, corpus, TOKENIZER, out, workers=0, **more)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: value for file in folder.glob("*.safetensors") for key, value in safetensors.torch.load_file(file).items()
    }


@pytest.mark.usefixtures("quick")
def test_a_run_that_was_killed_resumes_to_the_same_weights(
    corpus: Path, tmp_path: Path, tiny_recurrence, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run_of(corpus, tmp_path / "whole"), tiny_recurrence, device="cpu", compiled=False)
    steps: list[int] = []
    original = Mixture.__getitem__

    def killed_at_third(self: Mixture, step: int):
        steps.append(step)
        if steps.count(step) == 1 and step == 2:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(Mixture, "__getitem__", killed_at_third)
    killed = run_of(corpus, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        train(killed, tiny_recurrence, device="cpu", compiled=False)
    assert not (killed.out / "training.json").exists()
    train(killed, tiny_recurrence, device="cpu", compiled=False)
    assert steps == [0, 1, 2, 2, 3]
    whole, resumed = (weights_of(tmp_path / name / "model") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not torch.equal(
        whole["model.embed_tokens.weight"], weights_of(killed.out / "step-2")["model.embed_tokens.weight"]
    )
    made = json.loads((killed.out / "training.json").read_text())
    assert [entry["step"] for entry in made["log"]] == [1, 2, 3, 4]
    watched = [[name for name in entry if name.endswith("effective_rank")] for entry in made["log"]]
    each = [f"staterank/layer_{layer}/effective_rank" for layer in (0, 2)]
    assert watched == [[], each, [], each]
    assert made["recipe"] == TINY.settings()
    assert list(made["record"]["steps"]) == ["0", "1", "end"]
    assert np.array(made["record"]["steps"]["end"]["prose"]["effective_rank"]).shape == (2, 4)
    other = replace(killed, recipe=replace(TINY, seed=1))
    with pytest.raises(ValueError, match="is of another recipe"):
        train(other, tiny_recurrence, device="cpu", compiled=False)


@pytest.mark.usefixtures("quick")
def test_a_clock_can_end_a_run(corpus: Path, tmp_path: Path, tiny_recurrence) -> None:
    train(run_of(corpus, tmp_path, minutes=0.001), tiny_recurrence, device="cpu", compiled=False)
    assert json.loads((tmp_path / "training.json").read_text())["steps"] >= 1


@pytest.mark.usefixtures("quick")
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    corpus: Path, tmp_path: Path, tiny_recurrence, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FastForward.loss
    calls: list[int] = []

    def broken(self: FastForward, ids: torch.Tensor, weights: torch.Tensor):
        loss, losses = original(self, ids, weights)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 3 else loss), losses

    monkeypatch.setattr(FastForward, "loss", broken)
    monkeypatch.setattr(training, "LOG_EVERY", 4)
    with pytest.raises(SystemExit, match="the loss of tiny is not finite from step 2 on"):
        train(run_of(corpus, tmp_path), tiny_recurrence, device="cpu", compiled=False)
    assert torch.load(tmp_path / "progress.pt")["step"] == 2


@pytest.mark.usefixtures("quick")
def test_a_full_disk_leaves_the_last_progress_whole(
    corpus: Path, tmp_path: Path, tiny_recurrence, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = torch.save, []

    def full(state: object, path: Path) -> None:
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(state, path)

    monkeypatch.setattr(torch, "save", full)
    run = run_of(corpus, tmp_path)
    with pytest.raises(OSError, match="could not write .*progress.pt .*No space left.*resumes from the last progress"):
        train(run, tiny_recurrence, device="cpu", compiled=False)
    assert [file.name for file in tmp_path.iterdir()] == ["progress.pt"]
    assert torch.load(tmp_path / "progress.pt")["step"] == 1
    train(run, tiny_recurrence, device="cpu", compiled=False)
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == TINY.steps


@pytest.mark.usefixtures("quick")
def test_a_full_disk_leaves_no_half_of_a_model(
    corpus: Path, tmp_path: Path, tiny_recurrence, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, full = safetensors.torch.save_file, [True]

    def save_file(tensors: dict, path: str, **options: object) -> None:
        if full:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_file)
    run = run_of(corpus, tmp_path)
    with pytest.raises(OSError, match="could not write .*step-2 .*No space left.*give the same command"):
        train(run, tiny_recurrence, device="cpu", compiled=False)
    assert [file.name for file in tmp_path.iterdir()] == ["progress.pt"]
    full.clear()
    train(run, tiny_recurrence, device="cpu", compiled=False)
    assert weights_of(tmp_path / "step-2")


def test_a_corpus_of_another_tokenizer_is_refused(corpus: Path, tmp_path: Path, tiny_recurrence) -> None:
    made = json.loads((corpus / "corpus.json").read_text())
    (tmp_path / "corpus.json").write_text(json.dumps(made | {"tokenizer": "0" * 64}))
    with pytest.raises(ValueError, match="was made with another tokenizer .SHA-256 000000000000, expected"):
        train(run_of(tmp_path, tmp_path / "out"), tiny_recurrence, device="cpu", compiled=False)
    with pytest.raises(FileNotFoundError, match="is not a prepared corpus"):
        train(run_of(tmp_path / "nowhere", tmp_path / "out"), tiny_recurrence, device="cpu", compiled=False)


def test_an_unknown_recipe_is_named_with_those_that_exist(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["train", "pure", "--corpus", "c", "--tokenizer", "t", "--out", "o"])
    with pytest.raises(SystemExit):
        training.main()
    assert "there is no recipe 'pure': choose from hybrid-text-0" in capsys.readouterr().err


@pytest.mark.parametrize("layers", [(LINEAR, LINEAR, LINEAR, SOFTMAX), (LINEAR,) * 3], ids=["hybrid", "pure"])
def test_fast_forward_is_the_forward_of_a_pruned_model(layers: tuple[str, ...], tokenizer) -> None:
    model = initial_model(replace(TINY, layer_types=layers).configuration(tokenizer))
    pruned = prune_heads(model, {0: list(range(4)), 1: [3], 2: [0, 2]})
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


def test_gates_begin_where_the_recipe_says(tokenizer) -> None:
    def half_lives(gates: str) -> torch.Tensor:
        layer = initial_model(replace(TINY, gates=gates).configuration(tokenizer)).model.layers[0].linear_attn
        return math.log(2) / (layer.A_log.exp() * torch.nn.functional.softplus(layer.dt_bias)).detach()

    assert half_lives("narrow").numpy() == pytest.approx(2.4, rel=0.02)  # rounded to bfloat16
    assert half_lives("default").min() < 0.5
    assert half_lives("broad").max() > 10
    assert torch.isinf(half_lives("open")).all()
    strange = replace(TINY).configuration(tokenizer)
    strange.initialization = {"scheme": "zeros", "seed": 0}
    with pytest.raises(
        ValueError, match="unknown initialization 'zeros': expected one of 'normal weights, Mamba-2 gates'"
    ):
        initial_model(strange)


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_initial_weights_have_the_ranks_that_were_measured_on_them(name: str, tokenizer) -> None:
    found = stored_on(name)
    assert found is not None
    stored, n_prompts = found[0].groups["initial"], 2
    # Generated prompts are the same on every version of Python, those from its documentation are not.
    prompts = domain_prompts("arithmetic", tokenizer, n_prompts=n_prompts, n_tokens=stored.n_tokens, seed=0)
    trace = trace_states(
        load_model(name, weights="initial"), prompts, positions=[stored.n_tokens], reduce=singular_values
    )
    ranks = Spectrum(trace.values[:, :, 0]).effective_rank().transpose(0, 1).flatten(1)
    assert (ranks.numpy() != stored.rank["arithmetic"][:n_prompts]).mean() < 0.01, "but for ties with the threshold"


def test_gradients_within_chunks_are_those_of_autograd() -> None:
    """Outputs and next state of every chunk as a function of q, k and the decays, with values and states as they are."""
    torch.manual_seed(0)
    size, n_chunks, n_keys, n_heads, d, scale = 8, 3, 2, 4, 5, 0.3
    q, k = (torch.randn(2, n_chunks * size, n_keys, d) for _ in range(2))
    v, dv, do = (torch.randn(2, n_chunks * size, n_heads, d) for _ in range(3))
    h, dh = (torch.randn(2, n_chunks, n_heads, d, d) for _ in range(2))
    steps = -torch.rand(2, n_chunks, size, n_heads)
    total = steps.cumsum(2)  # natural logarithm

    inputs = [x.clone().requires_grad_() for x in (q, k, total)]
    q_, k_ = (x.repeat_interleave(2, 2).unflatten(1, (n_chunks, size)).transpose(2, 3) for x in inputs[:2])
    v_, do_, dv_ = (x.unflatten(1, (n_chunks, size)).transpose(2, 3) for x in (v, do, dv))
    g_ = inputs[2].transpose(2, 3)
    below = torch.ones(size, size).tril()
    scores = (q_ @ k_.mT) * (g_[..., :, None] - g_[..., None, :]).mul(below).exp() * below
    out = scale * (g_.exp()[..., None] * (q_ @ h) + scores @ v_)
    last = g_[..., -1:, None]
    after = last.exp() * h + ((last - g_[..., None]).exp() * k_).mT @ v_
    ((out * do_).sum() + (after * dh).sum()).backward()

    in_base_2 = (total / np.log(2)).flatten(1, 2)
    dq, dk, dw, dg = chunk_gradients(q, k, v, in_base_2, h, dv, do, dh, scale, size)
    for found, given in zip((dq, dk, dg), inputs, strict=True):
        torch.testing.assert_close(found, given.grad.reshape(found.shape), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dw, -(dv_ @ h.mT).transpose(2, 3).flatten(1, 2), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- on a GPU


def in_float64(q, k, v, log_decay, beta):
    """The recurrence, token by token, with a gradient."""
    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], 2).double() for x in (q, k))
    v, log_decay, beta = v.double(), log_decay.double(), beta.double()
    state, outputs = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]), []
    for t in range(v.shape[1]):
        state = state * log_decay[:, t].exp()[..., None, None]
        written = beta[:, t][..., None] * (v[:, t] - (state * k[:, t][..., None]).sum(-2))
        state = state + k[:, t][..., None] * written[..., None, :]
        outputs.append((state * q[:, t][..., None]).sum(-2) * k.shape[3] ** -0.5)
    return torch.stack(outputs, 1)


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla's backward pass mended as in a training, for one test."""
    chunk = pytest.importorskip("fla.ops.gated_delta_rule.chunk")
    monkeypatch.setattr(chunk, "chunk_bwd_dqkwg", chunk.chunk_bwd_dqkwg)
    limit_autotuning()
    mend_backward()


@pytest.mark.gpu
@pytest.mark.usefixtures("mended")
def test_the_gradients_of_the_recurrence_are_those_in_float64() -> None:
    torch.manual_seed(0)
    shape = (2, 256)
    q, k = (
        torch.nn.functional.normalize(torch.randn(*shape, 2, 64, device="cuda"), dim=-1).bfloat16() for _ in range(2)
    )
    v = torch.randn(*shape, 4, 64, device="cuda").bfloat16()
    log_decay = -torch.tensor([0.003, 0.1, 1.0, 9.0], device="cuda") * torch.rand(*shape, 4, device="cuda")
    given = (q, k, v, log_decay, torch.rand(*shape, 4, device="cuda").bfloat16())
    weight = torch.randn(*shape, 4, 64, device="cuda")
    found = []
    for rule in (gated_delta, in_float64):
        inputs = [x.detach().clone().requires_grad_() for x in given]
        out = rule(*inputs)
        out.backward(weight.to(out.dtype))
        found.append([out.detach(), *(x.grad for x in inputs)])
    for ours, exact in zip(*found, strict=True):
        assert (ours.double() - exact.double()).norm() / exact.double().norm() < 0.01  # bfloat16


@pytest.mark.gpu
@pytest.mark.usefixtures("mended")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch 2.11 asks for it in dynamo
def test_a_recorded_step_gives_the_gradients_of_one_that_is_not(tokenizer) -> None:
    model = initial_model(replace(TINY, head_size=64).configuration(tokenizer)).to("cuda")
    fast = FastForward(model, gated_delta, compiled=False)
    recorded = Gradients(fast)
    batches = [(torch.randint(2, 8000, (2, 65), device="cuda"), torch.ones(2, 64, device="cuda")) for _ in range(3)]
    found = []
    for ids, weights in batches:
        loss, _ = recorded(ids, weights)
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    for (ids, weights), (loss, gradients) in zip(batches, found, strict=True):
        model.zero_grad()
        expected, _ = fast.loss(ids, weights)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-3)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(
                gradient, parameter.grad, rtol=0.05, atol=1e-3 * parameter.grad.abs().max().item()
            )
