"""What holds for every architecture with a delta rule, each on a tiny random model of the real class.

What they measure is kept for the table in the book.
"""

import dataclasses
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import conformance
import pytest
import torch
from tiny_delta import MODELS, tiny
from transformers import PreTrainedModel

from staterank_utils.channels import keep_channels, order_channels
from staterank_utils.layouts import LAYOUTS, head_names, linear_layers
from staterank_utils.models import choose_kernels, make_cache, output_logits, read_tokens
from staterank_utils.pruning import cache_bytes, prune_heads, removed_heads
from staterank_utils.reference import gated_delta_rule
from staterank_utils.surgery import ablate_heads, all_heads, best_rank, forward_with_edits, mean_outputs
from staterank_utils.tracing import scans_through, trace_states

POSITIONS = [1, 2, 3, 63, 65, 96]
# Segments of 32 and 64 tokens; of odd lengths; token by token.
CUTS = {"32+64": [32], "5+91": [5], "one by one": list(range(1, 96))}
TOLERANCE = 5e-5  # float32 sums in another order; logits have a standard deviation of about 0.8
PRUNING_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 0.25
MEASURED = {
    "segments ": conformance.SEGMENTS,
    "states of": conformance.STATES,
    "removed =": conformance.REMOVED,
    "padded =": conformance.PADDING,
}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    made = tiny(name)
    choose_kernels(made)
    return made


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 56, (3, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def removal(model: PreTrainedModel) -> dict[int, list[int]]:
    first, last = (index for index, _, _ in linear_layers(model))
    return {first: [1], last: [0, 2]}


def pairs(removal: dict[int, list[int]]) -> list[tuple[int, int]]:
    return [(layer, head) for layer, heads in removal.items() for head in heads]


def check(name: str, what: str, difference: torch.Tensor, tolerance: float) -> None:
    largest = difference.double().abs().max().item()
    if measured := next((value for start, value in MEASURED.items() if what.startswith(start)), None):
        conformance.keep(measured, largest, MODELS)
    assert largest <= tolerance, f"{name}, {what}: {largest}"


@torch.no_grad()
def full(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    return output_logits(model, read_tokens(model, ids, positions=positions, mask=mask))


@torch.no_grad()
def in_pieces(
    model: PreTrainedModel, ids: torch.Tensor, cuts: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of all tokens, read through the cache in segments that end at the cuts."""
    cache, parts = make_cache(model), []
    positions = (torch.ones_like(ids) if mask is None else mask).cumsum(1).sub(1).clamp_min(0)
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :stop]
        hidden = read_tokens(model, ids[:, start:stop], positions=positions[:, start:stop], cache=cache, mask=seen)
        parts.append(output_logits(model, hidden))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("n_prompts", [1, 3])
@pytest.mark.parametrize("cuts", CUTS)
def test_segments_equal_one_pass(name: str, model, ids, cuts: str, n_prompts: int) -> None:
    expected = full(model, ids[:n_prompts])
    difference = in_pieces(model, ids[:n_prompts], CUTS[cuts]) - expected
    check(name, f"segments {cuts}, batch {n_prompts}", difference, TOLERANCE)
    torch.testing.assert_close(model(ids[:n_prompts], use_cache=False).logits, expected, rtol=0, atol=1e-6)


def test_states_equal_the_float64_recurrence(name: str, model, ids) -> None:
    calls: dict[int, tuple[torch.Tensor, ...]] = {}

    def look(index: int, kernel, query, key, value, *, g, beta, **options):
        calls[index] = tuple(x.double() for x in (query, key, value, g, beta))
        return kernel(query, key, value, g=g, beta=beta, **options)

    with ExitStack() as stack:
        for index, layer, layout in linear_layers(model):
            stack.enter_context(scans_through(layer, layout, partial(look, index)))
        expected_logits = full(model, ids)
    trace = trace_states(model, ids, positions=POSITIONS, logits=True, batch_size=3)
    alone = trace_states(model, ids[:1], positions=POSITIONS)
    for row, (query, key, value, log_decay, beta) in enumerate(calls.values()):
        group = value.shape[2] // key.shape[2]
        query, key = (x.repeat_interleave(group, dim=2) for x in (query, key))
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
        _, states = gated_delta_rule(query, key, value, log_decay, beta)
        expected = states[:, [t - 1 for t in POSITIONS]]
        check(name, f"states of linear layer {row}", (trace.values[row] - expected) / expected.abs().max(), TOLERANCE)
        check(name, f"states of linear layer {row}, batch 1", alone.values[row] - expected[:1], TOLERANCE)
        gates = log_decay.mean(-1) if log_decay.ndim == 4 else log_decay
        torch.testing.assert_close(trace.log_decay[row], gates.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(trace.write_strength[row], beta.mean(1), rtol=1e-5, atol=1e-6)
    assert trace.values.abs().max() > 0.1
    check(name, "logits of the trace", trace.logits - expected_logits[:, [t - 1 for t in POSITIONS]], TOLERANCE)


def test_the_cache_holds_the_traced_state_to_read_and_to_write(name: str, model, ids) -> None:
    cache = make_cache(model)
    with torch.no_grad():
        read_tokens(model, ids, cache=cache)
    trace = trace_states(model, ids, positions=[96], batch_size=3)
    for row, (index, _, layout) in enumerate(linear_layers(model)):
        check(name, "state in the cache", layout.state(cache, index) - trace.values[row, :, 0], TOLERANCE)
    heads = all_heads(model)[:1]
    same = forward_with_edits(model, ids, heads=heads, edit=lambda state: state)
    edited = forward_with_edits(model, ids, heads=heads, edit=lambda state: best_rank(state, 0))
    assert torch.equal(same[:, :64], edited[:, :64])
    assert (same - edited)[:, 64:].abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["zero", "mean", "frozen"])
def test_an_ablated_head_leaves_the_others_alone(name: str, model, ids, kind: str) -> None:
    means = mean_outputs(model, ids) if kind == "mean" else None
    before, logits = trace_states(model, ids, positions=POSITIONS), full(model, ids)
    for row, (index, layer, layout) in enumerate(linear_layers(model)):
        with ablate_heads(model, [(index, 1)], kind=kind, means=means):
            trace = trace_states(model, ids, positions=POSITIONS)
            assert (full(model, ids) - logits).abs().max() > 1e-3
        others = [head for head in head_names(layer, layout) if head != 1]
        assert torch.equal(trace.values[: row + 1, :, :, others], before.values[: row + 1, :, :, others])
        if kind == "frozen":
            assert (trace.values[row, :, :, 1] == 0).all()
            with ablate_heads(model, [(index, 1)]):
                zero = full(model, ids)
            with ablate_heads(model, [(index, 1)], kind="frozen"):
                check(name, "frozen = zero", full(model, ids) - zero, TOLERANCE)
        else:
            assert torch.equal(trace.values[row], before.values[row])
    assert torch.equal(full(model, ids), logits)


@pytest.mark.parametrize("whole_layer", [False, True], ids=["some heads", "a whole layer"])
def test_removed_equals_ablated(name: str, model, ids, removal, whole_layer: bool) -> None:
    first = linear_layers(model)[0][0]
    chosen = {first: [0, 1, 2, 3]} if whole_layer else removal
    pruned = prune_heads(model, chosen)
    with ablate_heads(model, pairs(chosen)):
        expected = full(model, ids)
    assert (full(model, ids) - expected).abs().max() > 1e-2
    check(name, "removed = ablated, one pass", full(pruned, ids) - expected, PRUNING_TOLERANCE)
    for what, cuts in CUTS.items():
        check(name, f"removed = ablated, {what}", in_pieces(pruned, ids, cuts) - expected, PRUNING_TOLERANCE)
    caches = [make_cache(m) for m in (model, pruned)]
    for m, cache in zip((model, pruned), caches, strict=True):
        read_tokens(m, ids, cache=cache)
    whole, small = (cache_bytes(cache)["recurrent"] for cache in caches)
    assert small == whole * (len(all_heads(model)) - len(pairs(chosen))) / len(all_heads(model))


def test_left_padding(name: str, model, ids, removal) -> None:
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    alone = full(model, ids[:1, 9:])
    check(name, "padded = alone", full(model, ids, mask)[:1, 9:] - alone, TOLERANCE)
    check(name, "padded = alone, 32+64", in_pieces(model, ids, [32], mask)[:1, 9:] - alone, TOLERANCE)
    pruned = prune_heads(model, removal)
    with ablate_heads(model, pairs(removal)):
        expected = full(model, ids, mask)
    for what, found in {
        "one pass": full(pruned, ids, mask),
        "32+64": in_pieces(pruned, ids, [32], mask),
        "then one by one": in_pieces(pruned, ids, list(range(32, 96)), mask),
    }.items():
        check(name, f"removed = ablated, padded, {what}", (found - expected)[mask == 1], PRUNING_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_models_are_loaded_bit_for_bit(name: str, model, ids, removal, dtype, tmp_path: Path) -> None:
    # Loaded, so that what the class keeps in float32 in a model of bfloat16 is kept so.
    tiny(name).save_pretrained(tmp_path / "whole")
    whole = type(model).from_pretrained(tmp_path / "whole", dtype=dtype).eval()
    choose_kernels(whole)
    for i, chosen in enumerate((removal, {linear_layers(model)[0][0]: [0, 1, 2, 3]})):
        pruned = prune_heads(whole, chosen)
        pruned.save_pretrained(tmp_path / str(i))
        loaded = type(model).from_pretrained(tmp_path / str(i), dtype="auto").eval()
        choose_kernels(loaded)
        assert removed_heads(loaded.config.get_text_config()) == chosen
        for (key, a), (other, b) in zip(pruned.state_dict().items(), loaded.state_dict().items(), strict=True):
            assert key == other
            assert torch.equal(a, b), key
        assert torch.equal(full(loaded, ids), full(pruned, ids))


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_bfloat16(name: str, model, ids, removal, n_prompts: int) -> None:
    ids = ids[:n_prompts]
    low = tiny(name).to(torch.bfloat16)
    choose_kernels(low)
    cache = make_cache(low)
    with torch.no_grad():
        read_tokens(low, ids, cache=cache)
    index, _, layout = linear_layers(low)[0]
    assert layout.state(cache, index).dtype == torch.float32
    expected = full(low, ids)
    assert expected.dtype == torch.bfloat16
    for what, cuts in CUTS.items():
        check(name, f"bfloat16, {what}, batch {n_prompts}", in_pieces(low, ids, cuts) - expected, BFLOAT16_TOLERANCE)
    pruned = prune_heads(low, removal)
    with ablate_heads(low, pairs(removal)):
        expected = full(low, ids)
    check(name, f"bfloat16, removed = ablated, batch {n_prompts}", full(pruned, ids) - expected, BFLOAT16_TOLERANCE)
    trace = trace_states(low, ids, positions=POSITIONS)
    high = trace_states(low.float(), ids, positions=POSITIONS)
    check(name, f"bfloat16, states, batch {n_prompts}", trace.values - high.values, BFLOAT16_TOLERANCE)


def test_a_layout_without_scans_is_traced_in_segments(name: str, model, ids, monkeypatch) -> None:
    expected = trace_states(model, ids, positions=POSITIONS, logits=True)
    for _, _, layout in linear_layers(model):
        monkeypatch.setitem(LAYOUTS, layout.layer_class, dataclasses.replace(layout, scans=()))
    trace = trace_states(model, ids, positions=POSITIONS, logits=True)
    check(name, "states, segments instead of scans", trace.values - expected.values, TOLERANCE)
    check(name, "logits, segments instead of scans", trace.logits - expected.logits, TOLERANCE)
    torch.testing.assert_close(trace.log_decay, expected.log_decay, rtol=1e-5, atol=1e-6)


def test_what_a_layout_leaves_out_is_refused(name: str, model, ids, monkeypatch) -> None:
    index, _, layout = linear_layers(model)[0]
    bare = dataclasses.replace(layout, write_module=None, without_writes=None, idle=None)
    monkeypatch.setitem(LAYOUTS, layout.layer_class, bare)
    with pytest.raises(ValueError, match="cannot be stopped exactly"), ablate_heads(model, [(index, 0)], kind="frozen"):
        pass
    with pytest.raises(ValueError, match="must keep a head"):
        prune_heads(model, {index: [0, 1, 2, 3]})
    monkeypatch.setitem(LAYOUTS, layout.layer_class, dataclasses.replace(bare, weights=()))
    with pytest.raises(ValueError, match="cannot be removed exactly"):
        prune_heads(model, {index: [0]})


def test_key_channels_are_cut_where_the_configuration_allows(name: str, model, ids, tmp_path: Path) -> None:
    _, _, layout = linear_layers(model)[0]
    if layout.d_k_setting is None:
        with pytest.raises(ValueError, match="key channels of .* cannot be cut"):
            order_channels(model, ids)
        return
    reduced = keep_channels(model, order_channels(model, ids), share=0.25)
    assert trace_states(reduced, ids, positions=[96]).values.shape[-2:] == (6, 16)
    reduced.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    choose_kernels(loaded)
    assert torch.equal(full(loaded, ids), full(reduced, ids))
