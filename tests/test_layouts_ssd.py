"""What every layout promises, for the layers of `layouts.ssd`; each check prints the largest difference that it saw."""

from collections.abc import Iterator
from pathlib import Path

import conformance
import pytest
import torch
import torch.nn.functional as F
from tiny_ssd import MODELS, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from staterank_utils.channels import order_channels
from staterank_utils.decoding import pad_left
from staterank_utils.layouts import Layout, head_names, linear_layers
from staterank_utils.models import choose_kernels, make_cache, output_logits, read_tokens
from staterank_utils.pruning import cache_bytes, prune_heads
from staterank_utils.surgery import ablate_heads, all_heads, forward_with_edits, mean_outputs
from staterank_utils.tracing import trace_states

N_TOKENS = 96
POSITIONS = (1, 2, 3, 63, 65, 96)
SEGMENTS = {"32+64": [32, 64], "5+91": [5, 91], "32+1+63": [32, 1, 63], "96 times 1": [1] * 96}
ROUNDING = 1e-4  # float32 sums in another order
MEASURED = {
    "segments, logits": conformance.SEGMENTS,
    "trace, states": conformance.STATES,
    "removed": conformance.REMOVED,
    "left padding": conformance.PADDING,
}
# Eight heads in two groups of four: whole group, as many of each, unevenly, all but one, a whole layer.
REMOVALS = {
    "a whole group": [0, 1, 2, 3],
    "as many of each group": [1, 6],
    "unevenly": [0, 2, 7],
    "all but one": [0, 1, 2, 3, 4, 6, 7],
    "a whole layer": list(range(8)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.set_num_threads(1)
    return tiny(request.param)


@pytest.fixture(scope="module", params=[1, 3], ids=["batch 1", "batch 3"])
def ids(request: pytest.FixtureRequest) -> Tensor:
    return torch.randint(3, 64, (request.param, N_TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def three() -> Tensor:
    return torch.randint(3, 64, (3, N_TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=REMOVALS)
def removal(request: pytest.FixtureRequest, model) -> dict[int, list[int]]:
    first, *_, last = [index for index, _, _ in linear_layers(model)]
    return {first: REMOVALS[request.param], last: [3]}


def pairs(removal: dict[int, list[int]]) -> list[tuple[int, int]]:
    return [(layer, head) for layer, heads in removal.items() for head in heads]


def say(what: str, found: Tensor, expected: Tensor) -> float:
    """The largest difference; of states, as a share of the largest entry, since some are large."""
    scale = expected.abs().max() if "states" in what else torch.ones(())
    difference = ((found - expected).abs().max() / scale).item()
    if measured := next((value for start, value in MEASURED.items() if what.startswith(start)), None):
        conformance.keep(measured, difference, MODELS)
    return difference


@torch.no_grad()
def in_segments(
    model: PreTrainedModel, ids: Tensor, sizes: list[int], mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits of all tokens, and the states of every linear layer behind them."""
    cache, parts, stop = make_cache(model), [], 0
    positions = torch.arange(ids.shape[1])[None] if mask is None else (mask.cumsum(1) - 1).clamp(0)
    for size in sizes:
        start, stop = stop, stop + size
        seen = None if mask is None else mask[:, :stop]
        hidden = read_tokens(model, ids[:, start:stop], positions=positions[:, start:stop], cache=cache, mask=seen)
        parts.append(output_logits(model, hidden))
    states = [
        layout.state(cache, index).clone() for index, layer, layout in linear_layers(model) if layout.n_heads(layer)
    ]
    return torch.cat(parts, 1), states


# ---------------------------------------------------------------- oracle


def recurrence(model: PreTrainedModel, layer: nn.Module, layout: Layout, projected: Tensor) -> Iterator[Tensor]:
    """States after each token in float64, from what a layer's first projection put out."""
    projected, n_heads = projected.double(), layout.n_heads(layer)
    if layout.layer_class == "MiniMaxLightningAttention":
        _, key, value = F.silu(projected).unflatten(-1, (n_heads, -1)).chunk(3, -1)
        last = model.config.num_hidden_layers - 1
        slope = 2 ** (-8 / n_heads * torch.arange(1, n_heads + 1).double()) * (
            1 - layer.layer_idx / (last + 1e-5) + 1e-5
        )
        decay, strength = (-slope).exp().expand(*projected.shape[:2], -1), torch.ones(*projected.shape[:2], n_heads)
    else:
        d_k, d_v, n_keys = layout.d_k(layer), layout.d_v(layer), layout.n_keys(layer)
        widths = [n_heads * d_v, n_heads * d_v, n_keys * d_k, n_keys * d_k, n_heads]
        for i, multiplier in enumerate(getattr(model.config, "ssm_multipliers", None) or []):
            projected.split(widths, -1)[i].mul_(multiplier)
        _, *convolved, raw = projected.split(widths, -1)
        taps = layer.conv1d.weight.double()
        padded = F.pad(torch.cat(convolved, -1).mT, (taps.shape[-1] - 1, 0))
        value, key, _ = F.silu(F.conv1d(padded, taps, layer.conv1d.bias.double(), groups=len(taps))).mT.split(
            widths[1:4], -1
        )
        value = value.unflatten(-1, (n_heads, d_v))
        key = key.unflatten(-1, (n_keys, d_k)).repeat_interleave(n_heads // n_keys, -2)
        smallest = model.config.time_step_min if layout.layer_class[:4] in ("Nemo", "Zamb") else 0.0
        strength = F.softplus(raw + layer.dt_bias.double()).clamp(min=smallest)
        decay = (-layer.A_log.double().exp() * strength).exp()
    state = torch.zeros(len(projected), n_heads, key.shape[-1], value.shape[-1], dtype=torch.float64)
    for t in range(projected.shape[1]):
        write = strength[:, t, :, None, None] * key[:, t, :, :, None] * value[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + write
        yield state


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("sizes", SEGMENTS.values(), ids=SEGMENTS)
def test_segments_are_the_whole(model, ids, sizes: list[int]) -> None:
    with torch.no_grad():
        whole = model(ids).logits
    logits, states = in_segments(model, ids, sizes)
    assert say("segments, logits", logits, whole) < ROUNDING
    _, expected = in_segments(model, ids, [N_TOKENS])
    for state, other in zip(states, expected, strict=True):
        assert say("segments, states", state, other) < ROUNDING


def test_traces_follow_the_recurrence(model, ids) -> None:
    trace = trace_states(model, ids, positions=POSITIONS, logits=True)
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.get_submodule(layout.gate_modules[0]).register_forward_hook(
            lambda module, inputs, output, index=index: seen.update({index: output})
        )
        for index, layer, layout in linear_layers(model)
    ]
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    for place, (index, layer, layout) in enumerate(linear_layers(model)):
        states = torch.stack(list(recurrence(model, layer, layout, seen[index])), 1)
        chosen = states[:, [position - 1 for position in POSITIONS]]
        assert trace.values[place].shape == chosen.shape
        assert say("trace, states", trace.values[place], chosen) < ROUNDING
        log_decay, strength = (gate.double().mean(1) for gate in layout.gates(layer, seen[index]))
        assert say("trace, decay", trace.log_decay[place], log_decay) < ROUNDING
        assert say("trace, write strength", trace.write_strength[place], strength) < ROUNDING
    assert say("trace, logits", trace.logits, logits[:, [position - 1 for position in POSITIONS]]) < ROUNDING


def test_bfloat16(model, ids, tmp_path: Path) -> None:
    low = in_dtype(model, torch.bfloat16, tmp_path)
    first = linear_layers(low)[0][0]
    with torch.no_grad():
        whole = low(ids).logits.float()
        removed = prune_heads(low, {first: [2]})(ids).logits.float()
        with ablate_heads(low, [(first, 2)]):
            ablated = low(ids).logits.float()
    logits, states = in_segments(low, ids, [32, 64])
    # MiniMax keeps states, and rounds decays, in the model's dtype.
    if keeps_low := low.config.model_type == "minimax":
        with pytest.raises(ValueError, match="keeps its states in torch.bfloat16"):
            trace_states(low, ids, positions=[5])
    else:
        assert trace_states(low, ids, positions=[5, 96]).values.dtype == torch.float32
    assert all(state.isfinite().all() for state in states)
    scale = whole.std()
    for what, found, expected in (("segments", logits.float(), whole), ("removed", removed, ablated)):
        share = (found - expected).pow(2).mean().sqrt() / scale
        print(f"\n[conformance] bfloat16, {what}, rms: {share:.1e}")
        assert share < (0.1 if keeps_low else 0.05)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    """As it is loaded: buffers such as frequencies stay in float32, which `model.to` would round."""
    model.save_pretrained(folder)
    loaded: PreTrainedModel = type(model).from_pretrained(folder, dtype=dtype).eval()
    choose_kernels(loaded)
    return loaded


# ---------------------------------------------------------------- ablating


@pytest.mark.parametrize("kind", ["zero", "mean", "frozen"])
def test_ablation_leaves_the_other_heads_alone(model, three, kind: str) -> None:
    first = linear_layers(model)[0][0]
    means = {"means": mean_outputs(model, three)} if kind == "mean" else {}
    for sizes in ([N_TOKENS], [32, 64], [90] + [1] * 6):
        before, states = in_segments(model, three, sizes)
        with ablate_heads(model, [(first, 2)], kind=kind, **means):
            without, changed = in_segments(model, three, sizes)
        after, _ = in_segments(model, three, sizes)
        assert torch.equal(before, after)
        assert (without - before).abs().max() > 10 * ROUNDING
        others = [0, 1, 3, 4, 5, 6, 7]
        assert torch.equal(changed[0][:, others], states[0][:, others])
        if kind == "frozen":
            assert not changed[0][:, 2].any()
        else:
            assert torch.equal(changed[0][:, 2], states[0][:, 2])


def test_edits_reach_the_states(model, three) -> None:
    first = linear_layers(model)[0][0]
    run = {"heads": [(first, 1)], "every": 32}
    kept = forward_with_edits(model, three, edit=lambda state: state, **run)
    cleared = forward_with_edits(model, three, edit=torch.zeros_like, **run)
    assert torch.equal(kept[:, :32], cleared[:, :32])
    assert (kept - cleared)[:, 32:].abs().max() > 10 * ROUNDING


# ---------------------------------------------------------------- removing


def test_removed_equals_ablated(model, ids, removal) -> None:
    pruned = prune_heads(model, removal)
    with torch.no_grad(), ablate_heads(model, pairs(removal)):
        expected = model(ids).logits
    with torch.no_grad():
        assert say("removed, whole", pruned(ids).logits, expected) < ROUNDING
        assert (model(ids).logits - expected).abs().max() > 10 * ROUNDING
    for sizes in ([32, 64], [5, 91], [90] + [1] * 6):
        assert say("removed, segments", in_segments(pruned, ids, sizes)[0], expected) < ROUNDING


def test_removed_equals_ablated_with_left_padding(model, three, removal) -> None:
    mask = torch.ones_like(three)
    mask[0, :9] = 0
    pruned = prune_heads(model, removal)
    for sizes in ([N_TOKENS], [32, 64], [90] + [1] * 6):
        with ablate_heads(model, pairs(removal)):
            expected, _ = in_segments(model, three, sizes, mask)
        found, _ = in_segments(pruned, three, sizes, mask)
        assert say("removed, left padding", found[mask == 1], expected[mask == 1]) < ROUNDING


def test_left_padding_changes_nothing(model, three) -> None:
    mask = torch.ones_like(three)
    mask[0, :9] = 0
    if getattr(model.config, "use_bias", False):
        with pytest.raises(ValueError, match="prompts of different lengths side by side.*batch_size=1"):
            pad_left(model, [[5, 6], [7]])
        return
    alone, _ = in_segments(model, three[:1, 9:], [N_TOKENS - 9])
    for sizes in ([N_TOKENS], [32, 64], [90] + [1] * 6):
        padded, _ = in_segments(model, three, sizes, mask)
        assert say("left padding", padded[:1, 9:], alone) < ROUNDING


def test_removing_twice_is_removing_at_once(model, three) -> None:
    first = linear_layers(model)[0][0]
    twice = prune_heads(prune_heads(model, {first: [0, 5]}), {first: [2]})
    once = prune_heads(model, {first: [0, 2, 5]})
    assert head_names(*linear_layers(twice)[0][1:]) == [1, 3, 4, 6, 7]
    with torch.no_grad():
        assert torch.equal(twice(three).logits, once(three).logits)


def test_the_state_shrinks(model, three, removal) -> None:
    def recurrent(model: PreTrainedModel) -> int:
        cache = make_cache(model)
        with torch.no_grad():
            read_tokens(model, three, cache=cache)
        return cache_bytes(cache)["recurrent"]

    share = len(pairs(removal)) / len(all_heads(model))
    assert recurrent(prune_heads(model, removal)) == round(recurrent(model) * (1 - share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("removal", ["unevenly", "a whole layer"], indirect=True)
def test_saved_and_loaded_bit_for_bit(model, three, removal, dtype: torch.dtype, tmp_path: Path) -> None:
    pruned = prune_heads(in_dtype(model, dtype, tmp_path / "whole"), removal)
    loaded = in_dtype(pruned, dtype, tmp_path / "pruned")
    for (name, a), (other, b) in zip(pruned.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(pruned(three).logits, loaded(three).logits)


def test_generate_agrees_with_the_ablated_model(model, three, removal) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "use_cache": True}
    pruned = prune_heads(model, removal)
    made = pruned.generate(three[:, :20], **options)
    with ablate_heads(model, pairs(removal)):
        expected = model.generate(three[:, :20], **options)
    assert torch.equal(made, expected)


def test_a_pruned_model_trains(model, three) -> None:
    first = linear_layers(model)[0][0]
    pruned = prune_heads(model, {first: [1]}).requires_grad_(True).train()
    pruned(three[:, :20], labels=three[:, :20]).loss.backward()
    _, layer, layout = linear_layers(pruned)[0]
    for blocks in layout.blocks(layer):
        weight = blocks.tensor(layer)
        if isinstance(weight, nn.Parameter):
            assert weight.grad is not None, blocks.weight
            assert weight.grad.any(), blocks.weight


def test_key_channels_are_refused(model, three) -> None:
    with pytest.raises(ValueError, match="key channels of .* cannot be cut"):
        order_channels(model, three)
