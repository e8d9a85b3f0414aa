"""What a layout may leave out, and what happens then, on each tiny model with a delta rule."""

import dataclasses

import pytest
import torch
from architectures import ARCHITECTURES, delta
from transformers import PreTrainedModel

from staterank_utils.dispatch import choose_kernels
from staterank_utils.layouts import LAYOUTS, linear_layers
from staterank_utils.models import make_cache, read_tokens
from staterank_utils.pruning import cache_bytes, prune_heads
from staterank_utils.surgery import ablate_heads
from staterank_utils.tracing import trace_states

POSITIONS = [1, 2, 3, 63, 65, 96]
ROUNDING = 1e-4


def test_every_layout_has_a_tiny_model_of_two_layers() -> None:
    found = [[layout.layer_class for _, _, layout in linear_layers(each.build())] for each in ARCHITECTURES.values()]
    assert all(len(classes) >= 2 for classes in found)
    covered = {name for classes in found for name in classes}
    # transformers 5.17 does not know the last ones yet.
    assert set(LAYOUTS) - covered <= (
        {"BailingHybridDeltaAttention"} if "bailing_hybrid" not in ARCHITECTURES else set()
    )


@pytest.fixture(scope="module", params=delta.MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made = delta.tiny(request.param)
    choose_kernels(made)
    return made


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 56, (3, 96), generator=torch.Generator().manual_seed(0))


def test_a_layout_without_scans_is_traced_in_segments(model, ids, monkeypatch) -> None:
    expected = trace_states(model, ids, positions=POSITIONS, logits=True)
    for _, _, layout in linear_layers(model):
        monkeypatch.setitem(LAYOUTS, layout.layer_class, dataclasses.replace(layout, scans=()))
    trace = trace_states(model, ids, positions=POSITIONS, logits=True)
    assert (trace.values - expected.values).abs().max() < ROUNDING
    assert (trace.logits - expected.logits).abs().max() < ROUNDING
    torch.testing.assert_close(trace.log_decay, expected.log_decay, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace.write_strength, expected.write_strength, rtol=1e-5, atol=1e-6)


def test_what_a_layout_leaves_out_is_refused(model, monkeypatch) -> None:
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


@torch.no_grad()
def test_under_a_delta_rule_a_head_that_writes_nothing_puts_out_nothing(model, ids) -> None:
    index, _, _ = linear_layers(model)[0]
    with ablate_heads(model, [(index, 1)]):
        zero = model(ids, use_cache=False).logits
    with ablate_heads(model, [(index, 1)], kind="frozen"):
        frozen = model(ids, use_cache=False).logits
    assert (frozen - zero).abs().max() < ROUNDING


def test_a_class_of_the_same_name_from_elsewhere_is_refused() -> None:
    made = delta.tiny("kimi_linear")
    theirs = type("KimiLinearDeltaAttention", (torch.nn.Identity,), {"__module__": "theirs", "layer_idx": 0})()
    for layer in made.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn = theirs
        elif type(layer.self_attn).__name__ == "KimiLinearDeltaAttention":
            layer.self_attn = theirs
    with pytest.raises(
        ValueError, match=r"theirs\.KimiLinearDeltaAttention is another class .*without trust_remote_code"
    ):
        linear_layers(made)


@pytest.mark.parametrize("name", ["fla RetNet", "fla RWKV7", "xlstm"])
def test_why_heads_cannot_be_removed_is_said(name: str) -> None:
    if name not in ARCHITECTURES:
        pytest.skip("fla is not installed")
    with pytest.raises(
        ValueError,
        match="cannot be removed exactly, since .* (index|in every layer)",
    ):
        prune_heads(ARCHITECTURES[name].build(), {0: [1]})


def test_every_layout_says_how_heads_are_removed_or_why_not() -> None:
    assert all(bool(layout.weights) != bool(layout.kept_whole) for layout in LAYOUTS.values())


@pytest.mark.parametrize("setting", [{"mode": "train"}, {"inference_state_dtype": "bfloat16"}])
def test_settings_of_xlstm_that_its_states_are_not_described_for_are_refused(setting: dict[str, str]) -> None:
    made = ARCHITECTURES["xlstm"].build()
    vars(made.config).update(setting)
    with pytest.raises(ValueError, match=f"its configuration has {next(iter(setting))}="):
        linear_layers(made)


def test_a_long_prompt_of_xlstm_is_not_rounded_on_the_way(ids) -> None:
    made = ARCHITECTURES["xlstm"].build()
    choose_kernels(made)
    with torch.no_grad():
        expected = read_tokens(made, ids)
        made.config.max_inference_chunksize = 32
        assert (read_tokens(made, ids) - expected).abs().max() < ROUNDING


def test_what_an_xlstm_cache_holds_is_counted(ids) -> None:
    made = ARCHITECTURES["xlstm"].build()
    cache = make_cache(made)
    assert cache_bytes(cache)["recurrent"] == 0
    read_tokens(made, ids[:1], cache=cache)
    assert cache_bytes(cache)["recurrent"] == 2 * 4 * 4 * (16 * 32 + 16 + 1)
