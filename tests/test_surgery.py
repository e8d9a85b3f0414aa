import re

import pytest
import torch
from architectures import ssd
from conftest import tiny_qwen3_next

from staterank_utils.architectures import linear_layers
from staterank_utils.models import make_cache
from staterank_utils.surgery import (
    KINDS,
    ablate_heads,
    ablate_softmax_heads,
    all_heads,
    best_rank,
    forward_with_edits,
    mean_outputs,
    rotated,
    softmax_heads,
)
from staterank_utils.tracing import trace_states

HEADS = [(0, 1), (0, 2), (2, 3)]


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"])


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (3, 70), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids: torch.Tensor, **options) -> torch.Tensor:
    return model(ids, **options).logits


def zeroed_columns(model, heads) -> torch.Tensor:
    """The same ablation by hand: a copy of the weights with the heads' columns of the output projection at zero."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, head in heads:
        weights[f"model.layers.{layer}.linear_attn.out_proj.weight"][:, 8 * head : 8 * head + 8] = 0
    return weights


def test_zero_equals_output_columns_at_zero(model, ids) -> None:
    other = tiny_qwen3_next(["linear_attention", "full_attention", "linear_attention"])
    other.load_state_dict(zeroed_columns(model, HEADS))
    with ablate_heads(model, HEADS):
        ablated = logits(model, ids)
    assert torch.equal(ablated, logits(other, ids))
    assert (ablated - logits(model, ids)).abs().max() > 1e-3


def test_frozen_keeps_the_state_at_zero_and_equals_zero_output(model, ids) -> None:
    with ablate_heads(model, HEADS, kind="zero"):
        zero = logits(model, ids)
    with ablate_heads(model, HEADS, kind="frozen"):
        torch.testing.assert_close(logits(model, ids), zero, rtol=0, atol=1e-6)
        trace = trace_states(model, ids, positions=[1, 33, 70])
    layers = [layer.index for layer in linear_layers(model)]
    for layer, head in all_heads(model):
        state = trace.values[layers.index(layer), :, :, head]
        assert (state == 0).all() == ((layer, head) in HEADS)


def test_mean_of_the_same_prompt_at_one_token_changes_nothing(model) -> None:
    ids = torch.tensor([[7]])
    means = mean_outputs(model, ids)
    with ablate_heads(model, HEADS, kind="mean", means=means):
        ablated = logits(model, ids)
    torch.testing.assert_close(ablated, logits(model, ids), rtol=0, atol=1e-6)


def test_mean_is_over_all_tokens_of_all_prompts(model, ids) -> None:
    seen = []
    projection = model.model.layers[0].linear_attn.out_proj
    handle = projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double()))
    logits(model, ids)
    handle.remove()
    expected = seen[0].flatten(0, 1).mean(0).unflatten(0, (4, 8))
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(
            mean_outputs(model, ids, batch_size=batch_size)[0].double(), expected, rtol=0, atol=1e-7
        )


def options_of(kind: str, model, ids: torch.Tensor) -> dict:
    return {"kind": kind} | ({"means": mean_outputs(model, ids)} if kind == "mean" else {})


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_nest_and_restore_bit_for_bit(model, ids, kind: str) -> None:
    before, options = logits(model, ids), options_of(kind, model, ids)
    with ablate_heads(model, HEADS, **options):
        together = logits(model, ids)
    with ablate_heads(model, HEADS[:1], **options):
        alone = logits(model, ids)
        with ablate_heads(model, HEADS[1:], **options):
            torch.testing.assert_close(logits(model, ids), together, rtol=0, atol=1e-6)
        assert torch.equal(logits(model, ids), alone)
    assert torch.equal(logits(model, ids), before)


def test_a_head_in_two_blocks_is_ablated_by_both(model, ids) -> None:
    with ablate_heads(model, HEADS):
        zero = logits(model, ids)
        with ablate_heads(model, HEADS, kind="frozen"):
            torch.testing.assert_close(logits(model, ids), zero, rtol=0, atol=1e-6)
            assert not trace_states(model, ids, positions=[70]).values[0, :, :, [1, 2]].any()
        assert torch.equal(logits(model, ids), zero)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_restores_the_model(model, ids, kind: str) -> None:
    before = logits(model, ids)
    with pytest.raises(KeyboardInterrupt), ablate_heads(model, HEADS, **options_of(kind, model, ids)):
        raise KeyboardInterrupt
    assert torch.equal(logits(model, ids), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layers", [["linear_attention", "full_attention", "linear_attention"], ["linear_attention"] * 3]
)
def test_generate_with_left_padding_equals_token_by_token(ids, kind: str, layers: list[str]) -> None:
    model = tiny_qwen3_next(layers)
    prompts = [ids[0, :9], ids[1, :5]]
    padded = torch.stack([torch.nn.functional.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(9) >= 9 - len(prompt) for prompt in prompts]).long()
    before = logits(model, ids, use_cache=False)
    with ablate_heads(model, HEADS, **options_of(kind, model, ids)):
        cache = make_cache(model)
        made = model.generate(padded, attention_mask=mask, past_key_values=cache, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)  # fmt: skip
        for row, prompt in zip(made, prompts, strict=True):
            text = prompt
            for _ in range(6):
                text = torch.cat([text, logits(model, text[None], use_cache=False)[0, -1].argmax()[None]])
            assert row[-6:].tolist() == text[-6:].tolist()
    assert torch.equal(logits(model, ids, use_cache=False), before)


def test_softmax_heads_are_ablated_apart(model, ids) -> None:
    assert softmax_heads(model) == [(1, 0), (1, 1)]
    before = logits(model, ids)
    with ablate_softmax_heads(model, [(1, 1)]):
        one = logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    assert not torch.equal(one, before)
    assert softmax_heads(tiny_qwen3_next(["linear_attention"] * 2)) == []


def test_softmax_layers_that_share_weights_are_told_apart() -> None:
    shared = ssd.zamba2(
        num_hidden_layers=7,
        layers_block_type=["linear_attention", "hybrid"] * 3 + ["linear_attention"],
        num_mem_blocks=2,
    )
    assert softmax_heads(shared) == [(layer, head) for layer in (1, 3, 5) for head in (0, 1)]
    seen = []
    for layer in (1, 3, 5):
        projection = shared.model.layers[layer].shared_transformer.self_attn.o_proj
        projection.register_forward_hook(lambda _, __, output: seen.append(output.abs().max().item()))
    ids = torch.arange(3, 43)[None]
    with ablate_softmax_heads(shared, softmax_heads(shared)):
        logits(shared, ids)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(1, 0)], "layer 1 has no linear-attention heads: layers [0, 2] have"),
        ([(9, 0)], "layer 9 has no linear-attention heads"),
        ([(0, 4)], "layer 0 has no head 4: its linear-attention heads are [0, 1, 2, 3]"),
        ([(0, -1)], "layer 0 has no head -1"),
        ([(0, 1), (0, 1)], "head (0, 1) is named twice"),
    ],
)
def test_wrong_heads_are_refused(model, heads, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)), ablate_heads(model, heads):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "median"}, "unknown kind 'median'"),
        ({"kind": "mean"}, "'mean' needs them"),
        ({"kind": "zero", "means": {0: torch.zeros(4, 8)}}, "'mean' needs them"),
        ({"kind": "mean", "means": {2: torch.zeros(4, 8)}}, "means are missing for layers [0]"),
    ],
)
def test_wrong_kinds_and_means_are_refused(model, options, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)), ablate_heads(model, HEADS, **options):
        pass


def test_edits_that_change_nothing_equal_one_full_forward(tiny_model, ids) -> None:
    full = logits(tiny_model, ids, use_cache=False)
    for every in (1, 7, 64, 100):
        hidden = forward_with_edits(tiny_model, ids, heads=all_heads(tiny_model), edit=lambda s: s, every=every)
        torch.testing.assert_close(tiny_model.lm_head(hidden), full, rtol=0, atol=2e-5)


def test_rank_zero_at_every_token_is_a_model_without_memory(model, ids) -> None:
    """A state that is cleared after every token leaves a head with what the token itself writes."""
    cleared = forward_with_edits(model, ids, heads=[(0, 0)], edit=lambda s: best_rank(s, 0), every=1)
    kept = forward_with_edits(model, ids, heads=[(0, 0)], edit=lambda s: s, every=1)
    torch.testing.assert_close(cleared[:, :1], kept[:, :1], rtol=0, atol=0)
    assert (cleared[:, 1:] - kept[:, 1:]).abs().max() > 1e-4


def test_best_rank_and_rotation() -> None:
    state = torch.randn(2, 3, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = best_rank(state, 3)
    sigma = torch.linalg.svdvals(state)
    torch.testing.assert_close(torch.linalg.svdvals(low)[..., :3], sigma[..., :3])
    torch.testing.assert_close((state - low).norm(dim=(-2, -1)), sigma[..., 3:].norm(dim=-1))
    turned = rotated(state, seed=1)
    torch.testing.assert_close(torch.linalg.svdvals(turned), sigma)
    assert not torch.allclose(turned, state)
    assert torch.equal(turned, rotated(state, seed=1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: best_rank(torch.eye(3), -1), "rank must be at least 0, got -1"),
        (lambda m, ids: forward_with_edits(m, ids, heads=[], edit=lambda s: s, every=0), "every must be at least 1"),
        (lambda m, ids: forward_with_edits(m, ids, heads=[(0, 0)], edit=lambda s: s[..., :1]), "the edit made"),
    ],
)
def test_bad_edits_are_refused(model, ids, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model, ids)
