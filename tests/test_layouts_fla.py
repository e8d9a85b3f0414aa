"""What every layout must hold to, for the models of flash-linear-attention."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("fla")

import conformance
from tiny_fla import TINY, tiny_fla
from transformers import AutoConfig, AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

from staterank_utils.fla_cpu import _dispatch
from staterank_utils.layouts import linear_layers, modeling_module
from staterank_utils.models import _config, choose_kernels, load_model, make_cache
from staterank_utils.pruning import cache_bytes, prune_heads, removed_heads
from staterank_utils.surgery import ablate_heads, mean_outputs
from staterank_utils.tracing import trace_states

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's matrix products are in TF32.
TOLERANCE = 1e-4 if DEVICE == "cpu" else 5e-2
POSITIONS = [1, 2, 3, 63, 65, 96]
NO_REMOVAL = ("RetNet", "RWKV7")
torch.set_num_threads(1)
# Where there is a GPU, all of this is about fla's kernels.
pytestmark = [pytest.mark.filterwarnings("ignore:According to Bo"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


@pytest.fixture(scope="module", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str):
    tiny = tiny_fla(name).to(DEVICE)
    choose_kernels(tiny)
    return tiny


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 64, (3, 96), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def keep(measured: str, difference: float) -> float:
    return conformance.keep(measured, difference, TINY, library="fla ")


def apart(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


@torch.no_grad()
def in_pieces(model, ids: Tensor, cuts: list[int], mask: Tensor | None = None) -> Tensor:
    cache, parts = make_cache(model), []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :stop]
        parts.append(model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(parts, 1)


CUTS = {"32+64": [32], "5+91": [5], "token by token": [*range(1, 96)]}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("n_batch", [1, 3])
def test_segments_are_one_pass(model, ids, cuts, n_batch) -> None:
    full = model(ids[:n_batch]).logits
    assert keep(conformance.SEGMENTS, apart(in_pieces(model, ids[:n_batch], cuts), full)) < TOLERANCE


def test_generation_goes_on_from_the_cache(model, ids) -> None:
    if DEVICE != "cpu":
        pytest.skip("the largest logit is not the same in TF32")
    expected = ids[:, :20]
    for _ in range(5):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    made = model.generate(ids[:, :20], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made, expected)


def test_left_padding_changes_nothing(model, ids) -> None:
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, :20] = 0, 0
    padded = model(ids, attention_mask=mask).logits
    alone = [model(ids[row : row + 1, skip:]).logits[0] for row, skip in ((0, 9), (1, 20))]
    assert keep(conformance.PADDING, max(apart(padded[0, 9:], alone[0]), apart(padded[1, 20:], alone[1]))) < TOLERANCE
    pieces = in_pieces(model, ids, [32, 90, *range(91, 96)], mask)
    assert apart(pieces[mask == 1], padded[mask == 1]) < TOLERANCE


def test_bfloat16(model, ids, request) -> None:
    half = tiny_fla(request.node.callspec.params["name"]).to(DEVICE, torch.bfloat16)
    full = half(ids).logits
    assert full.dtype == torch.bfloat16
    pieces = in_pieces(half, ids, [32])
    std = full.float().std().item()
    assert ((pieces.float() - full.float()).square().mean().sqrt() / std).item() < 0.05
    trace = trace_states(half, ids, positions=POSITIONS)
    exact = trace_states(model, ids, positions=POSITIONS)
    relative = (trace.values[0] - exact.values[0]).norm() / exact.values[0].norm()
    assert relative < 0.05  # of the first layer, which reads the same embeddings up to rounding
    cache = half(ids, use_cache=True).past_key_values
    assert all(layout.state(cache, index).dtype == torch.float32 for index, _, layout in linear_layers(half))


# ---------------------------------------------------------------- states


def recurrence(key: Tensor, value: Tensor, decay: Tensor, write: Tensor | None, remove: Tensor | None = None) -> Tensor:
    """States (batch, token, head, d_k, d_v) in float64 of S <- exp(decay) S + b k (v - S^T k)^T, or + k v^T without b.

    With `remove` = (alpha, beta) it is RWKV-7's: S <- exp(decay) S + beta (alpha^T S) + k v^T.
    """
    key, value, decay = key.double(), value.double(), decay.double()
    state = key.new_zeros(*key.shape[:1], *key.shape[2:], value.shape[-1])
    states = []
    for t in range(key.shape[1]):
        k, v = key[:, t, :, :, None], value[:, t, :, None, :]
        old = state
        state = decay[:, t].exp()[..., None] * state
        if remove is not None:
            alpha, beta = (x.double()[:, t, :, :, None] for x in remove)
            state = state + beta * (alpha * old).sum(-2, keepdim=True)
        if write is not None:
            v = write.double()[:, t, :, None, None] * (v - (k * state).sum(-2, keepdim=True))
        state = state + k * v
        states.append(state)
    return torch.stack(states, 1)


def oracle(model_type: str, layer, seen: dict[str, Tensor]) -> Tensor:
    """States from what a layer gave to its kernel."""
    unit = lambda x: x.double() * (x.double().square().sum(-1, keepdim=True) + 1e-6).rsqrt()  # noqa: E731
    spread = lambda x: x.repeat_interleave(seen["v"].shape[2] // x.shape[2], 2)  # noqa: E731
    twice = 2 if getattr(layer, "allow_neg_eigval", False) else 1
    k, v = seen["k"], seen["v"]
    if model_type == "gated_deltanet":
        decay = -layer.A_log.double().exp() * F.softplus(seen["g"].double() + layer.dt_bias.double())
        return recurrence(spread(unit(k)), v, decay[..., None], twice * seen["beta"].double().sigmoid())
    if model_type == "delta_net":
        k = unit(k) if layer.qk_norm == "l2" else k
        return recurrence(k, v, torch.zeros_like(k[..., :1]), seen["beta"])
    if model_type == "kda":
        g = seen["g"].double() + layer.dt_bias.double().view(layer.num_v_heads, -1)
        rate = layer.A_log.double().exp()[:, None]
        decay = -rate * F.softplus(g) if layer.lower_bound is None else layer.lower_bound * (rate * g).sigmoid()
        return recurrence(spread(unit(k)), v, decay, twice * seen["beta"].double().sigmoid())
    if model_type == "gla":
        return recurrence(k, v, seen["g"], None)
    if model_type == "retnet":
        heads = torch.arange(k.shape[2], dtype=torch.float64, device=k.device)
        decay = (1 - 2 ** (-5 - heads)).log()[:, None]
        return recurrence(k, v, decay.expand(*k.shape[:3], 1), None)
    if model_type == "linear_attn":
        return recurrence(k, v, torch.zeros_like(k[..., :1]), None)
    assert model_type == "rwkv7"
    return recurrence(k, v, seen["w"], None, (seen["a"], seen["b"]))


def mamba2_oracle(layer, projected: Tensor) -> Tensor:
    """States from what in_proj puts out."""
    size, n_group, double = layer.intermediate_size, layer.n_groups * layer.ssm_state_size, projected.double()
    _, mixed, dt = double.split([size, layer.conv_dim, layer.num_heads], -1)
    conv = layer.conv1d
    mixed = F.pad(mixed.transpose(1, 2), (conv.kernel_size[0] - 1, 0))
    mixed = F.conv1d(mixed, conv.weight.double(), conv.bias.double(), groups=conv.groups).transpose(1, 2)
    x, b, _ = F.silu(mixed).split([size, n_group, n_group], -1)
    dt = F.softplus(dt + layer.dt_bias.double())
    # Consecutive heads share a group, as in the paper's repository.
    key = b.unflatten(-1, (layer.n_groups, -1)).repeat_interleave(layer.num_heads // layer.n_groups, 2)
    value = x.unflatten(-1, (layer.num_heads, -1)) * dt[..., None]
    return recurrence(key, value, (-layer.A_log.double().exp() * dt)[..., None], None)


KERNELS = {
    "gated_deltanet": "chunk_gated_delta_rule",
    "delta_net": "chunk_delta_rule",
    "kda": "chunk_kda",
    "gla": "chunk_gla",
    "retnet": "chunk_retention",
    "linear_attn": "chunk_linear_attn",
    "rwkv7": "chunk_rwkv7",
}


def expected_states(model, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """(batch, token, head, d_k, d_v) of every layer, from the inputs that one full pass gives to the kernels."""
    model_type, found = model.config.model_type, []
    layers = [layer for _, layer, _ in linear_layers(model)]
    if model_type == "mamba2":
        hooks = [
            layer.in_proj.register_forward_hook(lambda _, __, out, layer=layer: found.append(mamba2_oracle(layer, out)))
            for layer in layers
        ]
        model(ids)
        for hook in hooks:
            hook.remove()
        return found
    module = modeling_module(layers[0])
    kernel = getattr(module, KERNELS[model_type])

    def look(**seen):
        found.append(oracle(model_type, layers[len(found)], seen))
        return kernel(**seen)

    monkeypatch.setattr(module, KERNELS[model_type], look)
    model(ids)
    monkeypatch.undo()
    return found


def test_traced_states_are_those_of_the_float64_recurrence(model, ids, monkeypatch) -> None:
    expected = expected_states(model, ids, monkeypatch)
    trace = trace_states(model, ids, positions=POSITIONS, logits=True)
    at = [position - 1 for position in POSITIONS]
    differences = [
        (apart(values, states[:, at].cpu()) / states.abs().max().item())
        for values, states in zip(trace.values, expected, strict=True)
    ]
    assert keep(conformance.STATES, max(differences)) < TOLERANCE
    assert apart(trace.logits, model(ids).logits[:, at].cpu()) < TOLERANCE
    assert trace.log_decay.max() <= 0
    assert trace.write_strength.min() >= 0


def test_gates_of_the_trace(model, ids, monkeypatch) -> None:
    """Mean log-decay and write strength, where the kernel is given both."""
    if model.config.model_type not in ("gated_deltanet", "kda"):
        pytest.skip("decay is fixed, or not what the kernel is given")
    layer, module = linear_layers(model)[0][1], modeling_module(linear_layers(model)[0][1])
    name, seen = KERNELS[model.config.model_type], []
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, lambda **options: (seen.append(options), kernel(**options))[1])
    model(ids)
    beta = seen[0]["beta"].sigmoid().mean(1) * (2 if layer.allow_neg_eigval else 1)
    monkeypatch.undo()
    trace = trace_states(model, ids, positions=[96])
    assert apart(trace.write_strength[0], beta.cpu()) < TOLERANCE


def test_mamba2_prompt_is_as_in_fla(ids) -> None:
    """Of one group, where fla's own torch code is right."""
    model = tiny_fla("Mamba2").to(DEVICE)
    choose_kernels(model)
    ours = model(ids).logits
    layer_class = type(linear_layers(model)[0][1])
    patched = layer_class.torch_forward
    layer_class.torch_forward = patched.__wrapped__
    try:
        assert apart(model(ids).logits, ours) < TOLERANCE
    finally:
        layer_class.torch_forward = patched


# ---------------------------------------------------------------- ablation and removal


@pytest.mark.parametrize("kind", ["zero", "mean", "frozen"])
def test_ablation_leaves_the_other_heads_alone(model, ids, kind) -> None:
    before, states = model(ids).logits, trace_states(model, ids, positions=POSITIONS).values
    n_heads = states.shape[3]
    chosen = [head for head in range(n_heads) if head // 2 % 2 == 0]  # whole groups of two
    others = [head for head in range(n_heads) if head not in chosen]
    means = mean_outputs(model, ids) if kind == "mean" else None
    with ablate_heads(model, [(0, head) for head in chosen], kind=kind, means=means):
        ablated, inside = model(ids).logits, trace_states(model, ids, positions=POSITIONS).values
    assert torch.equal(inside[0][:, :, others], states[0][:, :, others])
    assert not torch.equal(ablated, before)
    if kind == "frozen":
        assert not inside[0][:, :, chosen].any()
    else:
        assert torch.equal(inside[0], states[0])
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(trace_states(model, ids, positions=POSITIONS).values, states)


def removals(name: str, n_heads: int) -> dict[str, dict[int, list[int]]]:
    whole = list(range(n_heads))
    if name.startswith("Mamba2, two"):
        return {"a group": {0: whole[:4], 1: whole[4:]}, "half of each": {0: [0, 1, 6, 7], 1: whole}}
    return {
        "whole groups": {0: whole[:2], 1: whole[2:4]},
        "split groups": {0: [3], 1: [0]},
        "a whole layer": {1: whole},
    }


def test_removed_equals_ablated(name, model, ids) -> None:
    n_heads = linear_layers(model)[0][2].n_heads(linear_layers(model)[0][1])
    if name in NO_REMOVAL:
        with pytest.raises(ValueError, match="cannot be removed exactly"):
            prune_heads(model, {0: [0]})
        return
    mask, worst = torch.ones_like(ids), 0.0
    mask[0, :9] = 0
    for removal in removals(name, n_heads).values():
        pruned = prune_heads(model, removal)
        with ablate_heads(model, [(layer, head) for layer, heads in removal.items() for head in heads]):
            expected, padded = model(ids).logits, model(ids, attention_mask=mask).logits
        assert apart(model(ids).logits, expected) > 10 * TOLERANCE
        found = [pruned(ids).logits, *(in_pieces(pruned, ids, cuts) for cuts in ([32], [5], [*range(80, 96)]))]
        worst = max(worst, *(apart(logits, expected) for logits in found))
        for logits in (pruned(ids, attention_mask=mask).logits, in_pieces(pruned, ids, [32, 95], mask)):
            worst = max(worst, apart(logits[mask == 1], padded[mask == 1]))
        sizes = [cache_bytes(m(ids, use_cache=True).past_key_values)["recurrent"] for m in (pruned, model)]
        gone = sum(map(len, removal.values()))
        assert sizes[0] == sizes[1] * (2 * n_heads - gone) // (2 * n_heads)
    assert keep(conformance.REMOVED, worst) < TOLERANCE


def test_uneven_groups_under_one_norm_are_refused(ids) -> None:
    model = tiny_fla("Mamba2, two groups")
    with pytest.raises(ValueError, match="whole groups, or as many heads of each"):
        prune_heads(model, {0: [0]})


def test_saved_and_loaded_bit_for_bit(name, model, ids, tmp_path: Path) -> None:
    n_heads = linear_layers(model)[0][2].n_heads(linear_layers(model)[0][1])
    for i, removal in enumerate([{}, *(removals(name, n_heads).values() if name not in NO_REMOVAL else ())]):
        saved = prune_heads(model, removal) if removal else model
        saved.save_pretrained(tmp_path / str(i))
        loaded = load_model(str(tmp_path / str(i)), device=DEVICE, dtype=torch.float32)
        assert removed_heads(loaded.config) == removal
        assert torch.equal(loaded(ids).logits, saved(ids).logits)
        for (key, a), (_, b) in zip(saved.state_dict().items(), loaded.state_dict().items(), strict=True):
            assert torch.equal(a, b), key


def test_a_fresh_process_loads_a_pruned_model(ids, tmp_path: Path) -> None:
    model = tiny_fla("KDA").to(DEVICE)
    pruned = prune_heads(model, {0: [0, 1], 1: [3]})
    pruned.save_pretrained(tmp_path)
    torch.save((ids, pruned(ids).logits), tmp_path / "expected")
    script = (
        "import sys, torch, logging\n"
        "from staterank_utils import load_model\n"
        "torch.set_num_threads(1)\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "model = load_model(sys.argv[1], dtype=torch.float32)\n"
        "ids, logits = torch.load(sys.argv[1] + '/expected')\n"
        "assert torch.equal(model(ids).logits, logits)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fla" in done.stderr


def test_a_type_that_both_libraries_have_is_loaded_from_the_one_that_wrote_it(tmp_path: Path) -> None:
    config = Mamba2Config(
        vocab_size=64, hidden_size=32, num_heads=8, head_dim=8, state_size=16, num_hidden_layers=2, n_groups=2, chunk_size=32
    )  # fmt: skip
    Mamba2ForCausalLM(config).save_pretrained(tmp_path / "transformers")
    tiny_fla("Mamba2").save_pretrained(tmp_path / "fla")
    assert type(AutoConfig.from_pretrained(tmp_path / "transformers")).__module__.startswith("fla.")
    loaded = _config(str(tmp_path / "transformers"), {})
    assert type(loaded) is Mamba2Config
    assert type(AutoModelForCausalLM.from_config(loaded)) is Mamba2ForCausalLM
    assert type(load_model(str(tmp_path / "fla"), device="cpu")).__module__.startswith("fla.")


def test_what_a_kernel_refuses_for_its_dtype_goes_to_the_naive_operator() -> None:
    def chunk_delta_rule(q: Tensor) -> str:
        return "kernel"

    call = _dispatch(chunk_delta_rule, lambda q: "naive", plain=False)
    # Neither on a CPU nor on a GPU, so that only the dtype decides.
    assert call(torch.empty(1, device="meta")) == "naive"
    assert call(torch.empty(1, device="meta", dtype=torch.bfloat16)) == "kernel"


# ---------------------------------------------------------------- refusals


def test_the_log_says_how_slow_it_is(ids, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_fla("GLA").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="staterank_utils"):
        load_model(str(tmp_path), device="cpu")
    assert "fla's naive operators (slow, exact)" in caplog.text


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("GLA", {"attn_mode": "fused_chunk"}, "attn_mode='chunk'"),
        ("RetNet", {"attn_mode": "parallel"}, "keeps no state"),
        ("DeltaNet", {"use_beta": False}, "no write strength"),
        ("LinearAttention", {"norm_feature_map": True}, "sum of keys"),
        ("Mamba2", {"dt_limit": (0.01, 1.0)}, "lower bound"),
    ],
)
def test_settings_that_would_be_wrong_are_refused(name, settings, reason) -> None:
    config = tiny_fla(name).config
    for key, value in settings.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    with pytest.raises(ValueError, match=reason):
        choose_kernels(AutoModelForCausalLM.from_config(config))


def test_hybrids_with_softmax_layers_are_refused() -> None:
    model = tiny_fla("GLA")
    model.config.attn = {"layers": [1], "num_heads": 2}
    with pytest.raises(ValueError, match="gla with softmax layers .* cannot be traced"):
        linear_layers(model)


def test_writes_of_a_shared_value_head_stop_together(ids) -> None:
    model = tiny_fla("GLA")
    choose_kernels(model)
    with pytest.raises(ValueError, match="share one key and value head"), ablate_heads(model, [(0, 0)], kind="frozen"):
        model(ids.cpu())


def test_dispatch_is_put_in_once_and_kernels_are_kept(model) -> None:
    module = modeling_module(linear_layers(model)[0][1])
    if model.config.model_type == "mamba2":
        return
    dispatcher = getattr(module, KERNELS[model.config.model_type])
    choose_kernels(model)
    again = getattr(module, KERNELS[model.config.model_type])
    assert again.staterank_bound is dispatcher.staterank_bound
    assert not hasattr(again.staterank_bound, "staterank_bound")
