import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_qwen3_next, unchecked
from transformers import AutoModelForCausalLM

from staterank_utils.architectures import LinearOnlyCache, cache_bytes, linear_layers
from staterank_utils.models import load_model, make_cache
from staterank_utils.pruning import duplicated_bytes, prune_heads, removed_heads
from staterank_utils.selection import saturation_scores, select_heads
from staterank_utils.surgery import ablate_heads, all_heads
from staterank_utils.tracing import trace_states

TOLERANCE = 1e-4
# Four value heads on two key heads: whole groups, half of each, a split group, all of a layer, all but one.
REMOVALS = {
    "whole group": {0: [0, 1]},
    "half of each group": {0: [0, 2], -1: [1, 3]},
    "a split group": {0: [3], -1: [0]},
    "a whole layer": {0: [0, 1, 2, 3]},
    "all but one": {0: [0, 1, 2], -1: [0, 1, 2, 3]},
}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 64, (3, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=REMOVALS, ids=list(REMOVALS))
def removal(request: pytest.FixtureRequest, tiny_model) -> dict[int, list[int]]:
    last = linear_layers(tiny_model)[-1].index
    return {last if layer < 0 else layer: heads for layer, heads in REMOVALS[request.param].items()}


def pairs(removal: dict[int, list[int]]) -> list[tuple[int, int]]:
    return [(layer, head) for layer, heads in removal.items() for head in heads]


@torch.no_grad()
def in_pieces(model, ids: torch.Tensor, cuts: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of all tokens, read through the cache in segments that end at the cuts."""
    cache, parts = make_cache(model), []
    mask = torch.ones_like(ids) if mask is None else mask
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        options = {"attention_mask": mask[:, :stop]} if mask.min() == 0 else {}
        parts.append(
            model(
                ids[:, start:stop], position_ids=places[:, start:stop], past_key_values=cache, use_cache=True, **options
            ).logits
        )
    return torch.cat(parts, 1)


def test_removed_equals_ablated(tiny_model, ids, removal) -> None:
    pruned = prune_heads(tiny_model, removal)
    with torch.no_grad(), ablate_heads(tiny_model, pairs(removal)):
        expected = tiny_model(ids).logits
    with torch.no_grad():
        assert (pruned(ids).logits - expected).abs().max() < TOLERANCE
        assert (tiny_model(ids).logits - expected).abs().max() > 10 * TOLERANCE
    for cuts in ([33], [5, 64], [66, 67, 68, 69]):
        assert (in_pieces(pruned, ids, cuts) - expected).abs().max() < TOLERANCE


def test_removed_equals_ablated_with_left_padding(tiny_model, ids, removal) -> None:
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    pruned = prune_heads(tiny_model, removal)
    with torch.no_grad(), ablate_heads(tiny_model, pairs(removal)):
        expected = tiny_model(ids, attention_mask=mask).logits
    with torch.no_grad():
        assert (pruned(ids, attention_mask=mask).logits - expected)[mask == 1].abs().max() < TOLERANCE
    with ablate_heads(tiny_model, pairs(removal)):
        expected = in_pieces(tiny_model, ids, [40, *range(64, 70)], mask)
    found = in_pieces(pruned, ids, [40, *range(64, 70)], mask)
    assert (found - expected)[mask == 1].abs().max() < TOLERANCE
    alone = in_pieces(pruned, ids[:1, 9:], [31, *range(55, 61)])
    assert (found[:1, 9:] - alone).abs().max() < TOLERANCE


def test_saved_models_are_loaded_bit_for_bit_in_a_fresh_process(tiny_model, ids, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "whole")
    expected = {}
    for dtype in (torch.float32, torch.bfloat16):
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype)
        last = linear_layers(whole)[-1].index
        for i, removal in enumerate(REMOVALS.values()):
            pruned = prune_heads(whole, {last if layer < 0 else layer: heads for layer, heads in removal.items()})
            name = f"pruned {i} {dtype}"
            pruned.save_pretrained(tmp_path / name)
            with torch.no_grad():
                expected[name] = pruned(ids).logits
    torch.save((ids, expected), tmp_path / "expected")
    script = (
        "import sys, torch, staterank_utils\n"
        "from pathlib import Path\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder = Path(sys.argv[1])\n"
        "ids, expected = torch.load(folder / 'expected')\n"
        "for name, logits in expected.items():\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype='auto', local_files_only=True).eval()\n"
        "    with torch.no_grad():\n"
        "        assert torch.equal(model(ids).logits, logits), name\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_weights_are_the_same_after_save_and_load(tiny_model, removal, tmp_path: Path) -> None:
    pruned = prune_heads(tiny_model, removal)
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(pruned)
    assert isinstance(loaded, type(tiny_model))
    assert removed_heads(loaded.config) == dict(sorted(removal.items()))
    for (name, a), (other, b) in zip(pruned.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_removing_twice_is_removing_at_once(tiny_model, ids) -> None:
    last = linear_layers(tiny_model)[-1].index
    twice = prune_heads(prune_heads(tiny_model, {0: [3], last: [0]}), {0: [2], last: [1, 3]})
    once = prune_heads(tiny_model, {0: [2, 3], last: [0, 1, 3]})
    assert twice.config.to_dict() == once.config.to_dict()
    for (name, a), b in zip(twice.state_dict().items(), once.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [layer.heads for layer in linear_layers(twice)][:: len(linear_layers(twice)) - 1] == [[0, 1], [2]]


def test_heads_of_a_pruned_model_keep_their_names(tiny_model, ids) -> None:
    pruned = prune_heads(tiny_model, {0: [0, 2]})
    assert (0, 0) not in all_heads(pruned)
    with torch.no_grad():
        with ablate_heads(pruned, [(0, 3)]):
            one = pruned(ids).logits
        with ablate_heads(tiny_model, [(0, 0), (0, 2), (0, 3)]):
            other = tiny_model(ids).logits
    assert (one - other).abs().max() < TOLERANCE
    with (
        pytest.raises(ValueError, match=re.escape("layer 0 has no head 2: its linear-attention heads are [1, 3]")),
        ablate_heads(pruned, [(0, 2)]),
    ):
        pass


def test_the_model_that_was_pruned_is_left_alone(tiny_model, ids) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    prune_heads(tiny_model, {0: [0, 3]})
    assert removed_heads(tiny_model.config) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


def test_the_state_shrinks_by_the_share_removed(tiny_model, ids, removal) -> None:
    def recurrent(model) -> int:
        cache = make_cache(model)
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        return cache_bytes(cache)["recurrent"]

    share = len(pairs(removal)) / len(all_heads(tiny_model))
    assert recurrent(prune_heads(tiny_model, removal)) == round(recurrent(tiny_model) * (1 - share))


def test_what_is_duplicated_is_counted(tiny_model) -> None:
    assert duplicated_bytes(tiny_model) == 0
    assert duplicated_bytes(prune_heads(tiny_model, {0: [0, 1]})) == 0
    assert duplicated_bytes(prune_heads(tiny_model, {0: [0, 2]})) == 0
    # Key head 0 serves one head and key head 1 two: the second is there twice, 8 query and 8 key rows of the projection
    # (32 columns) and of the convolution (4 taps), in float32.
    assert duplicated_bytes(prune_heads(tiny_model, {0: [0]})) == 4 * 16 * (32 + 4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_agrees_with_the_ablated_model(tiny_model, ids, removal, beams: int) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": -1, "use_cache": True}
    pruned = prune_heads(tiny_model, removal)
    made = pruned.generate(ids[:, :20], past_key_values=make_cache(pruned), **options)
    with ablate_heads(tiny_model, pairs(removal)):
        expected = tiny_model.generate(ids[:, :20], past_key_values=make_cache(tiny_model), **options)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate_as_users_call_it_goes_on_as_without_a_cache(tiny_model, ids, removal, dtype: torch.dtype) -> None:
    pruned = prune_heads(tiny_model, removal).to(dtype)
    expected = ids[:1, :20]
    for _ in range(6):
        with torch.no_grad():
            expected = torch.cat((expected, pruned(expected, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    made = pruned.generate(ids[:1, :20], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    with torch.no_grad():
        logits = pruned(made[:, :-1], use_cache=False).logits[:, 19:].float()
    chosen = logits.gather(-1, made[:, 20:, None])[..., 0]
    # In bfloat16 two nearly equal logits may change places.
    assert (logits.amax(-1) - chosen).max() <= (0.05 if dtype == torch.bfloat16 else TOLERANCE)
    if dtype == torch.float32:
        assert torch.equal(made, expected)
    beams = pruned.generate(ids[:, :20], max_new_tokens=6, do_sample=False, num_beams=3, eos_token_id=-1)
    assert beams.shape == (3, 26)


def test_it_runs_in_bfloat16(tiny_model, ids, removal) -> None:
    pruned = prune_heads(tiny_model, removal).to(torch.bfloat16)
    with torch.no_grad():
        low = pruned(ids).logits
        high = pruned.float()(ids).logits
    assert low.dtype == torch.bfloat16
    assert (low.float() - high).abs().max() < 0.05


def test_a_trace_of_uneven_layers_is_refused(tiny_model, ids) -> None:
    pruned = prune_heads(tiny_model, {0: [1]})
    with pytest.raises(ValueError, match="one axis of heads for all layers"):
        trace_states(pruned, ids, positions=[5])
    even = prune_heads(tiny_model, {layer.index: [1] for layer in linear_layers(tiny_model)})
    assert trace_states(even, ids, positions=[5]).values.shape[3] == 3


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ({7: [0]}, "layer 7 has no linear-attention heads: layers [0, 2] have"),
        ({1: [0]}, "layer 1 has no linear-attention heads"),
        ({0: [4]}, "layer 0 has no head 4: its linear-attention heads are [0, 1, 2, 3]"),
        ({0: [-1]}, "layer 0 has no head -1"),
        ({0: [1, 1]}, "named twice"),
        ({0: [0, 1, 2, 3], 2: [0, 1, 2, 3]}, "all heads of all layers"),
    ],
)
def test_wrong_heads_are_refused(heads, words: str) -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"])
    with pytest.raises(ValueError, match=re.escape(words)):
        prune_heads(model, heads)


def test_heads_may_be_integers_of_any_library(tiny_model, tmp_path: Path) -> None:
    plain = prune_heads(tiny_model, {0: [1, 2]})
    for heads in (np.array([1, 2]), torch.tensor([1, 2]), (np.int64(1), torch.tensor(2))):
        pruned = unchecked(prune_heads)(tiny_model, {np.int64(0): heads})
        assert pruned.config.to_dict() == plain.config.to_dict()
        pruned.save_pretrained(tmp_path)
        assert removed_heads(AutoModelForCausalLM.from_pretrained(tmp_path).config) == {0: [1, 2]}
    with pytest.raises(ValueError, match="named twice"):
        prune_heads(tiny_model, {0: torch.tensor([1, 1])})


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ({0: [1.0]}, "a head of layer 0 is named by a whole number, got 1.0"),
        ({"0": [1]}, "a layer is named by a whole number, got '0'"),
        ([(0, 1)], "expected a mapping from layers to heads, such as {0: [3]}, got [(0, 1)]"),
    ],
)
def test_heads_that_are_no_numbers_are_refused(heads, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        unchecked(prune_heads)(tiny_qwen3_next(["linear_attention", "full_attention"]), heads)


def test_a_head_cannot_be_removed_twice() -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"])
    with pytest.raises(ValueError, match=re.escape("head (0, 1) was removed before: layer 0 has heads [0, 2, 3]")):
        prune_heads(prune_heads(model, {0: [1]}), {0: [1]})


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"format": 1, "heads": {"0": [1]}}, "has format 1, this version of staterank_utils reads 2"),
        ([[0, 1]], "has format None"),
        ({"format": 2, "heads": {"0": [9]}}, "removes heads [9] of layer 0, which has 0..3"),
        ({"format": 2}, "has format None"),
        ({"format": 2, "heads": {"1": [0]}}, "removes heads of layers [1], which have no linear attention: [0] have"),
    ],
    ids=["another format", "none", "unknown head", "no heads", "unknown layer"],
)
def test_a_record_that_cannot_be_read_is_refused(record, words: str, tmp_path: Path) -> None:
    pruned = prune_heads(tiny_qwen3_next(["linear_attention", "full_attention"]), {0: [1]})
    pruned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"removed_heads": record}))
    with pytest.raises(ValueError, match=re.escape(words)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_one_that_an_earlier_version_pruned_is_refused(tmp_path: Path) -> None:
    pruned = prune_heads(tiny_qwen3_next(["linear_attention", "full_attention"]), {0: [1]})
    pruned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": config["pruned_from"]}))
    with pytest.raises(ValueError, match="was pruned by an earlier version of staterank_utils"):
        load_model(str(tmp_path))


def test_without_the_import_transformers_says_which_type_it_does_not_know(tmp_path: Path) -> None:
    prune_heads(tiny_qwen3_next(["linear_attention", "full_attention"]), {0: [1]}).save_pretrained(tmp_path)
    script = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode
    assert "model type `staterank_pruned`" in done.stderr


def test_a_model_without_an_adapter_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="llama has no linear-attention layer"):
        prune_heads(LlamaForCausalLM(config), {0: [0]})


def test_a_pure_model_without_heads_in_layer_0_counts_its_tokens(ids) -> None:
    pruned = prune_heads(tiny_qwen3_next(["linear_attention"] * 2), {0: [0, 1, 2, 3]})
    cache = make_cache(pruned)
    assert isinstance(cache, LinearOnlyCache)
    for n_tokens in (5, 1, 1, 3):
        with torch.no_grad():
            pruned(ids[:, :n_tokens], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 10


RANKS = {(0, 0): 64.0, (0, 1): 16.0, (1, 0): 0.0}
NORMS = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 4.0}


def test_scores_follow_the_equation() -> None:
    assert saturation_scores(RANKS, NORMS, d=64, alpha=0.25) == pytest.approx(
        {(0, 0): 0.25 * 1 + 0.75 / 4, (0, 1): 0.25 / 4 + 0.75 / 2, (1, 0): 0.75}
    )
    by_layer = saturation_scores(RANKS, NORMS, d=64, alpha=0.0, maximum="layer")
    assert by_layer == {(0, 0): 0.5, (0, 1): 1.0, (1, 0): 1.0}
    assert saturation_scores(RANKS, NORMS, d=64, alpha=1.0) == {(0, 0): 1.0, (0, 1): 0.25, (1, 0): 0.0}


@pytest.mark.parametrize(
    ("ranks", "norms", "options", "words"),
    [
        (RANKS, {(0, 0): 1.0}, {}, "got 3 and 1 heads"),
        ({}, {}, {}, "got 0 and 0 heads"),
        (RANKS, NORMS, {"alpha": 1.5}, "alpha must be in 0..1, got 1.5"),
        (RANKS, NORMS, {"d": 32}, "head (0, 0) has rank 64.0"),
        (RANKS, NORMS | {(1, 0): float("nan")}, {}, "head (1, 0)"),
        (RANKS, dict.fromkeys(RANKS, 0.0), {}, "all norms are 0"),
        (RANKS, NORMS, {"maximum": "head"}, "got 'head'"),
    ],
)
def test_scores_that_mean_nothing_are_refused(ranks, norms, options, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        unchecked(saturation_scores)(ranks, norms, **{"d": 64} | options)


def test_the_highest_scores_are_selected() -> None:
    scores = {(layer, head): float(10 * layer + head) for layer in (0, 2) for head in range(6)}
    assert select_heads(scores, share=0.25) == {2: [3, 4, 5]}
    assert select_heads(scores, share=0.5, per_layer=True) == {0: [3, 4, 5], 2: [3, 4, 5]}
    assert select_heads(scores, share=0.0) == {}


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="the share of heads to remove"):
        select_heads({(0, 0): 1.0}, share=share)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite score"):
        select_heads({(0, 0): float("inf")})
