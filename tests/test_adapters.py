"""What an adapter may leave out, and what happens then, on each tiny model with a delta rule."""

import contextlib
import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, delta
from conftest import unchecked
from transformers import PreTrainedModel

from staterank_utils import tracing
from staterank_utils.architectures import ADAPTERS, Blocks, LinearLayer, cache_bytes, linear_layers, register
from staterank_utils.decoding import check_padding
from staterank_utils.dispatch import Kernel, choose_kernels
from staterank_utils.memory import cap_half_life, half_lives
from staterank_utils.models import make_cache, read_tokens
from staterank_utils.pruning import prune_heads
from staterank_utils.surgery import ablate_heads, all_heads
from staterank_utils.tracing import trace_states

ROOT = Path(__file__).resolve().parents[1]
POSITIONS = [1, 2, 3, 63, 65, 96]
ROUNDING = 1e-4


def test_every_adapter_has_a_tiny_model_of_two_layers() -> None:
    found = [[layer.name for layer in linear_layers(each.build())] for each in ARCHITECTURES.values()]
    assert all(len(classes) >= 2 for classes in found)
    covered = {name for classes in found for name in classes}
    # transformers 5.17 does not know the last ones yet.
    assert {name.rpartition(".")[2] for name in ADAPTERS} - covered <= (
        {"BailingHybridDeltaAttention"} if "bailing_hybrid" not in ARCHITECTURES else set()
    )


@pytest.fixture(scope="module", params=delta.MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made = delta.tiny(request.param)
    choose_kernels(made)
    return made


removable = pytest.mark.parametrize(
    "model", [name for name, each in delta.ARCHITECTURES.items() if not each.refused], indirect=True
)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 56, (3, 96), generator=torch.Generator().manual_seed(0))


def without(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, **left_out: Any) -> None:
    """Let the adapter of a model leave things out."""
    adapter = type(linear_layers(model)[0])
    less = type(adapter.__name__, (adapter,), left_out)
    for name in adapter.describes:
        monkeypatch.setitem(ADAPTERS, name, less)


def test_an_adapter_without_scans_is_traced_in_segments(model, ids, monkeypatch) -> None:
    expected = trace_states(model, ids, positions=POSITIONS, logits=True)
    without(model, monkeypatch, scans=())
    trace = trace_states(model, ids, positions=POSITIONS, logits=True)
    assert (trace.values - expected.values).abs().max() < ROUNDING
    assert (trace.logits - expected.logits).abs().max() < ROUNDING
    torch.testing.assert_close(trace.log_decay, expected.log_decay, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace.write_strength, expected.write_strength, rtol=1e-5, atol=1e-6)


@removable
def test_what_an_adapter_leaves_out_is_refused(model, monkeypatch) -> None:
    index = linear_layers(model)[0].index
    without(model, monkeypatch, write_module=None, without_writes=None, idle=None)
    with pytest.raises(ValueError, match="cannot be stopped exactly"), ablate_heads(model, [(index, 0)], kind="frozen"):
        pass
    with pytest.raises(ValueError, match="must keep a head"):
        prune_heads(model, {index: [0, 1, 2, 3]})
    without(model, monkeypatch, weights=())
    with pytest.raises(ValueError, match="cannot be removed exactly"):
        prune_heads(model, {index: [0]})


@torch.no_grad()
def test_under_a_delta_rule_a_head_that_writes_nothing_puts_out_nothing(model, ids) -> None:
    index = linear_layers(model)[0].index
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
        ValueError,
        match=r"theirs\.KimiLinearDeltaAttention \(known: transformers\..*\) is another class .*without trust_remote_code",
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


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "describes no class"),
        ({"describes": ("theirs.Layer",)}, "does not say n_heads, .*, read_gates, output_module: every adapter must"),
        (
            {
                "describes": ("theirs.Layer",),
                "n_heads": 1,
                "n_keys": 1,
                "d_k": 1,
                "d_v": 1,
                "read_gates": None,
                "output_module": "out",
                "gate_modules": (),
            },
            "must say either where its heads are",
        ),
    ],
)
def test_an_adapter_that_says_too_little_is_not_registered(given: dict[str, Any], reason: str) -> None:
    before = dict(ADAPTERS)
    with pytest.raises(ValueError, match=reason):
        register(type("Bare", (LinearLayer,), given))
    assert before == ADAPTERS


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


@pytest.fixture(scope="module")
def on_the_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the page "Add an architecture" defines, run as it stands there."""
    page = (ROOT / "book" / "architectures.md").read_text(encoding="utf-8").split("## Add an architecture")[1]
    defined: dict[str, Any] = {"__name__": "toy"}
    torch.manual_seed(0)
    sys.modules["toy"] = ModuleType("toy")
    try:
        with contextlib.chdir(tmp_path_factory.mktemp("page")):
            for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
                exec(compile(block, "architectures.md", "exec"), defined)
        yield defined
    finally:
        ADAPTERS.pop("toy.ToyAttention", None)
        del sys.modules["toy"]


def test_the_architecture_that_the_page_adds_is_traced(on_the_page: dict[str, Any]) -> None:
    """Against its recurrence in float64."""
    model, ids = on_the_page["model"], on_the_page["ids"]
    assert on_the_page["trace"].values[:, :, :2].max() == 2
    trace = trace_states(model, ids, positions=[1, 5, 12])
    wide, x = copy.deepcopy(model).double().model, copy.deepcopy(model).double().model.embeddings(ids)
    for row, layer in enumerate(wide.layers):
        k, v = (p(x).unflatten(-1, (4, 4)) for p in (layer.k_proj, layer.v_proj))
        log_decay = layer.a_proj(x).sigmoid().log()
        for column, t in enumerate((1, 5, 12)):
            weights = [log_decay[:, i + 1 : t].sum(1).exp()[..., None, None] for i in range(t)]
            state = sum(w * k[:, i, :, :, None] * v[:, i, :, None, :] for i, w in enumerate(weights))
            assert (trace.values[row, :, column] - state).abs().max() < 1e-6
        torch.testing.assert_close(trace.log_decay[row].double(), log_decay.mean(1), rtol=1e-5, atol=1e-6)
        x = x + layer(x, {})


@torch.no_grad()
def test_its_heads_are_removed_ablated_and_frozen(on_the_page: dict[str, Any]) -> None:
    model, ids, smaller = on_the_page["model"], on_the_page["ids"], on_the_page["smaller"]
    assert all_heads(smaller) == [(0, 0), (0, 3), *((1, head) for head in range(4))]
    assert (smaller(ids).logits - on_the_page["ablated"]).abs().max() < 1e-6
    with ablate_heads(model, [(0, 1), (0, 2)], kind="frozen"):
        assert (model(ids).logits - on_the_page["ablated"]).abs().max() < 1e-6
    idle = prune_heads(model, {0: [0, 1, 2, 3]})
    with ablate_heads(model, [(0, head) for head in range(4)]):
        assert (model(ids).logits - idle(ids).logits).abs().max() < 1e-6
    assert torch.equal(on_the_page["loaded"](ids).logits, smaller(ids).logits)


def test_its_decay_is_capped(on_the_page: dict[str, Any]) -> None:
    model, ids = on_the_page["model"], on_the_page["ids"]
    with cap_half_life(model, 0.5):
        capped = trace_states(model, ids, positions=[12])
    assert half_lives(capped).max() <= 0.5 + 1e-6
    assert not torch.equal(on_the_page["forgetful"], model(ids).logits)


def test_a_changed_decay_of_minimax_is_made_where_the_layer_is() -> None:
    """Its own code makes numbers on the default device, which need not be the layer's."""
    layer = linear_layers(ARCHITECTURES["minimax"].build())[0]
    before = layer.module.query_decay.clone()
    with torch.device("meta"), layer.change_decay(lambda log_decay: 2 * log_decay):
        assert layer.module.query_decay.device.type == "cpu"
        assert torch.allclose(layer.module.query_decay, before**2)
    assert torch.equal(layer.module.query_decay, before)


@removable
def test_weights_that_are_described_wrongly_are_named(model, monkeypatch) -> None:
    layer = linear_layers(model)[0]
    [last] = [blocks for blocks in layer.weights if blocks.axis == 1]
    others = [blocks for blocks in layer.weights if blocks is not last]
    without(model, monkeypatch, weights=(*others, Blocks(last.weight, (("value", 1),), axis=1)))
    with pytest.raises(ValueError, match=f"{last.weight} has .* rows along axis 1, and it has .*: mend its `weights`"):
        prune_heads(model, {layer.index: [0]})
    without(model, monkeypatch, weights=layer.weights, resize=lambda self, *sizes: None)
    with pytest.raises(ValueError, match="still counts 4 heads .*: mend its `resize`"):
        prune_heads(model, {layer.index: [0, 1]})


def test_a_part_of_a_weight_belongs_to_a_key_or_a_value() -> None:
    blocks = Blocks("out.weight", ())
    object.__setattr__(blocks, "parts", (("head", "d_v"),))
    with pytest.raises(ValueError, match="'key' or a 'value' head, got 'head'"):
        blocks.__post_init__()


def test_writes_that_are_multiplied_away_are_refused(model, ids, monkeypatch) -> None:
    without(model, monkeypatch, without_writes=lambda self, output, places: output * 0)
    index = linear_layers(model)[0].index
    with (
        ablate_heads(model, [(index, 0)], kind="frozen"),
        pytest.raises(ValueError, match="must replace numbers"),
    ):
        model(ids, use_cache=False)


def test_a_misspelt_kernel_is_said_to_be_misspelt(model, ids, monkeypatch) -> None:
    without(model, monkeypatch, scans=("chunk_rulle",))
    with pytest.raises(ValueError, match="does not call chunk_rulle itself: mend `scans` of"):
        trace_states(model, ids, positions=[96])


def test_a_kernel_of_somebody_else_is_not_taken_for_the_one_of_that_name() -> None:
    def torch_chunk_gated_delta_rule(query: torch.Tensor) -> torch.Tensor:
        return query

    theirs, ours = (Kernel(torch_chunk_gated_delta_rule, plain=False, known=known) for known in (False, True))
    assert (theirs.fast, theirs.states) == (None, None)
    assert ours.fast is not None


def test_a_kernel_that_is_called_otherwise_is_refused(model, ids, monkeypatch) -> None:
    layer = linear_layers(model)[0]
    tap = tracing._StateTap(layer, reducer=None, gates=None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="with 6 arguments by place and .* by name: a kernel in `scans` is called with query"
    ):
        unchecked(tracing._StateTap.scan)(tap, torch.add, *range(6), scale=1)


def test_prompts_are_not_padded_for_a_model_without_a_mask(on_the_page: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ToyForCausalLM cannot read prompts of different lengths side by side"):
        check_padding(on_the_page["model"])


def test_bytes_of_an_unknown_cache_are_not_counted(on_the_page: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="expected a cache of transformers or fla, got dict"):
        cache_bytes(make_cache(on_the_page["model"]))
