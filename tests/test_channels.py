import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_qwen3_next, unchecked
from transformers import AutoModelForCausalLM

from staterank_utils.architectures import cache_bytes, linear_layers
from staterank_utils.channels import keep_channels, order_channels
from staterank_utils.dispatch import choose_kernels
from staterank_utils.models import make_cache
from staterank_utils.pruning import prune_heads
from staterank_utils.surgery import ablate_heads
from staterank_utils.tracing import trace_states


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 64, (3, 70), generator=torch.Generator().manual_seed(1))


def reading_only(model, channels) -> ExitStack:
    """While entered, the recurrence of the whole model is given only the channels of queries and keys that are kept."""
    stack = ExitStack()
    for layer in linear_layers(model):

        def cut(kernel, query, key, value, *rest, index=layer.index, names=layer.keys, **options):
            per = key.shape[2] // len(names)
            of_head = torch.tensor([channels[index][name] for name in names for _ in range(per)])
            places = of_head.expand(*key.shape[:2], *of_head.shape)
            return kernel(query.gather(-1, places), key.gather(-1, places), value, *rest, **options)

        stack.enter_context(layer.scans_through(cut))
    return stack


@pytest.mark.parametrize(("n_channels", "share"), [(1, 0.9), (5, 0.375), (8, 0.0)])
def test_it_computes_what_the_whole_model_does_with_cut_queries_and_keys(
    tiny_model, ids, n_channels: int, share: float
) -> None:
    order = order_channels(tiny_model, ids)
    kept = {
        index: {name: sorted(all_of_it[:n_channels]) for name, all_of_it in heads.items()}
        for index, heads in order.items()
    }
    reduced = keep_channels(tiny_model, order, share=share)
    with torch.no_grad(), reading_only(tiny_model, kept):
        expected = tiny_model(ids, use_cache=False).logits
    with torch.no_grad():
        assert (reduced(ids).logits - expected).abs().max() < 1e-5
        cache, parts = make_cache(reduced), []
        for start, stop in ((0, 33), (33, 68), (68, 69), (69, 70)):
            positions = torch.arange(start, stop)[None]
            parts.append(reduced(ids[:, start:stop], position_ids=positions, past_key_values=cache).logits)
        assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5
        changed = (tiny_model(ids, use_cache=False).logits - expected).abs().max()
    assert changed == 0 if n_channels == 8 else changed > 1e-4


def test_channels_are_in_the_order_of_a_pivoted_decomposition() -> None:
    """Greedy: always the column with most length left once those chosen are projected out."""
    model = tiny_qwen3_next(["linear_attention", "linear_attention"])
    ids = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(3))
    keys: list[torch.Tensor] = []
    layer = linear_layers(model)[1]

    def look(kernel, query, key, *rest, **options):
        keys.append(key[:, :, :: key.shape[2] // 2].flatten(0, 1).double())
        return kernel(query, key, *rest, **options)

    with torch.no_grad(), layer.scans_through(look):
        model(ids, use_cache=False)
    for head in (0, 1):
        matrix = torch.cat(keys)[:, head].numpy()
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        chosen: list[int] = []
        for _ in range(4):
            basis = np.linalg.qr(matrix[:, chosen])[0] if chosen else np.zeros((len(matrix), 0))
            left = np.linalg.norm(matrix - basis @ (basis.T @ matrix), axis=0)
            left[chosen] = -1
            chosen.append(int(left.argmax()))
        assert order_channels(model, ids)[layer.index][head][:4] == chosen


def test_the_state_shrinks_by_the_share_of_channels(tiny_model, ids) -> None:
    def recurrent(model) -> int:
        with torch.no_grad():
            return cache_bytes(model(ids, past_key_values=make_cache(model)).past_key_values)["recurrent"]

    assert (
        recurrent(keep_channels(tiny_model, order_channels(tiny_model, ids), share=0.25))
        == recurrent(tiny_model) * 6 // 8
    )


@pytest.mark.parametrize("heads", [{0: [0]}, {0: [0, 1]}, {0: [0, 1, 2, 3]}], ids=str)
def test_it_composes_with_pruning_in_either_order(tiny_model, ids, heads) -> None:
    order = order_channels(tiny_model, ids)
    reduced = keep_channels(tiny_model, order, share=0.4)
    first, second = prune_heads(reduced, heads), keep_channels(prune_heads(tiny_model, heads), order, share=0.4)
    with torch.no_grad(), ablate_heads(reduced, [(0, head) for head in heads[0]]):
        expected = reduced(ids).logits
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
        assert (first(ids).logits - expected).abs().max() < 1e-4
    of_pruned = order_channels(prune_heads(tiny_model, heads), ids)
    assert set(of_pruned[0]) == {1: {0, 1}, 2: {1}, 4: set()}[len(heads[0])]


def test_a_reduced_model_is_traced_saved_and_loaded_without_us(tiny_model, ids, tmp_path: Path) -> None:
    reduced = keep_channels(tiny_model, order_channels(tiny_model, ids), share=0.4)
    assert trace_states(reduced, ids, positions=[70]).values.shape[-2] == 5
    reduced.save_pretrained(tmp_path / "reduced")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "reduced")
    choose_kernels(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, reduced(ids).logits)
    program = f"from transformers import AutoModelForCausalLM as A; print(A.from_pretrained({str(tmp_path / 'reduced')!r}).num_parameters())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == reduced.num_parameters() < tiny_model.num_parameters()


def test_too_few_tokens_are_refused(ids) -> None:
    with pytest.raises(ValueError, match="7 tokens cannot order 8 channels"):
        order_channels(tiny_qwen3_next(["linear_attention"]), ids[:1, :7])


@pytest.mark.parametrize("share", [-0.1, 0.95, 1.0, float("nan")])
def test_a_share_that_cannot_be_removed_is_refused(share: float, ids) -> None:
    model = tiny_qwen3_next(["linear_attention"])
    with pytest.raises(ValueError, match=r"lies in \[0, 1\) and leaves at least one of 8"):
        keep_channels(model, order_channels(model, ids), share=share)


WHOLE = list(range(8))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({0: {0: WHOLE, 1: WHOLE}}, "layer 1, key head 0: expected an order of all channels"),
        ({0: {0: WHOLE}, 1: {0: WHOLE, 1: WHOLE}}, "layer 0, key head 1: expected an order"),
        ({0: {0: WHOLE, 1: WHOLE}, 1: {0: WHOLE, 1: WHOLE[1:]}}, r"layer 1, key head 1: .* got \[1, 2"),
        ({0: {0: [0, *WHOLE[:-1]], 1: WHOLE}, 1: {0: WHOLE, 1: WHOLE}}, r"layer 0, key head 0: .* got \[0, 0"),
    ],
)
def test_orders_that_do_not_fit_are_refused(order, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unchecked(keep_channels)(tiny_qwen3_next(["linear_attention", "linear_attention"]), order, share=0.5)
