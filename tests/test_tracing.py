import gc
import itertools
import re
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import OnGpu, tiny_qwen3_next, unchecked
from transformers import (
    BatchEncoding,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from staterank_utils import dispatch, tracing
from staterank_utils.architectures import WRONG_IN_SEGMENTS, linear_layers
from staterank_utils.dispatch import backends, choose_kernels
from staterank_utils.models import load_model, make_cache
from staterank_utils.rebinding import calls_through
from staterank_utils.reference import gated_delta_rule
from staterank_utils.spectra import effective_rank, effective_rank_bounds
from staterank_utils.tracing import Reducer, trace_states

POSITIONS = [1, 2, 3, 5, 31, 63, 64, 65, 100, 129, 150]
# float32 sums in another order; the states and logits compared are of size 1.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(0, 64, (3, 150), generator=torch.Generator().manual_seed(0))


def recorded_inputs(model, prompts: torch.Tensor) -> dict[int, tuple[torch.Tensor, ...]]:
    """What every linear layer hands to its chunked kernel in one full forward: (query, key, value, log_decay, beta)."""
    calls: list[tuple[torch.Tensor, ...]] = []
    layers = linear_layers(model)

    def spy(kernel, query, key, value, g, beta, **kwargs):
        calls.append((query, key, value, g, beta))
        return kernel(query, key, value, g=g, beta=beta, **kwargs)

    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.enter_context(calls_through(layer.module, {"torch_chunk_gated_delta_rule": spy}))
        model(prompts, use_cache=False)
    return {layer.index: call for layer, call in zip(layers, calls, strict=True)}


def test_states_agree_with_the_float64_recurrence(tiny_model, prompts: torch.Tensor) -> None:
    trace = trace_states(tiny_model, prompts, positions=POSITIONS)
    for row, (query, key, value, log_decay, beta) in enumerate(recorded_inputs(tiny_model, prompts).values()):
        heads = value.shape[2] // key.shape[2]
        query, key = (x.double().repeat_interleave(heads, dim=2) for x in (query, key))
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
        _, states = gated_delta_rule(query, key, value.double(), log_decay.double(), beta.double())
        expected = states[:, [t - 1 for t in POSITIONS]]
        assert (trace.values[row].double() - expected).abs().max() < TOLERANCE
        torch.testing.assert_close(trace.log_decay[row], log_decay.double().mean(1), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(trace.write_strength[row], beta.double().mean(1), rtol=1e-5, atol=1e-7)


def test_logits_agree_with_one_full_forward(tiny_model, prompts: torch.Tensor) -> None:
    trace = trace_states(tiny_model, prompts, positions=POSITIONS, logits=True)
    with torch.no_grad():
        full = tiny_model(prompts, use_cache=False).logits
    assert (trace.logits - full[:, [t - 1 for t in POSITIONS]]).abs().max() < TOLERANCE


def test_positions_batches_and_segments_do_not_change_the_states(tiny_model, prompts: torch.Tensor) -> None:
    sparse = trace_states(tiny_model, prompts, positions=[64, 150], batch_size=3)
    dense = trace_states(tiny_model, prompts, positions=list(range(1, 151)), batch_size=2)
    assert (dense.values[:, :, [63, 149]] - sparse.values).abs().max() < TOLERANCE


@pytest.mark.parametrize("segment", [1, 37, 64, 149])
def test_long_prompts_run_in_segments(
    tiny_model, prompts: torch.Tensor, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trace_states(tiny_model, prompts, positions=POSITIONS, logits=True)
    monkeypatch.setattr(dispatch, "SEGMENT", segment)
    monkeypatch.setattr(dispatch, "TOKENS_ON_GPU", segment)
    cut = trace_states(tiny_model, prompts, positions=POSITIONS, logits=True)
    assert (whole.values - cut.values).abs().max() < TOLERANCE
    assert (whole.logits - cut.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("n_prompts", "borders"),
    [
        (1, [0, 9000]),
        (3, [0, 5440, 9000]),
        (32, [0, 2048, 4096, 6144, 8192, 9000]),
    ],
)
def test_segments_are_longer_for_few_prompts_where_fla_serves(
    tiny_model, n_prompts: int, borders: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = linear_layers(tiny_model)
    assert tracing._borders([100, 9000], layers, n_prompts=n_prompts) == [0, 2048, 4096, 6144, 8192, 9000]
    monkeypatch.setattr(dispatch, "backend_of", lambda layer: "fla" if layer.scans else "torch")
    assert tracing._borders([100, 9000], layers, n_prompts=n_prompts) == borders
    for layer in layers:
        layer.scans = ()
    found = tracing._borders([100, 9000], layers, n_prompts=n_prompts)
    assert found == [0, 100, 2048, 4096, 6144, 8192, 9000]


@pytest.mark.gpu
def test_a_kernel_on_a_gpu_says_whose_it_is() -> None:
    pytest.importorskip("fla")
    model = load_model("hybrid", device="cuda")
    layers = linear_layers(model)
    assert set(backends(model)) == {layer.index for layer in layers}
    assert set(backends(model).values()) == {"fla"}
    choose_kernels(model, plain=True)
    assert set(backends(model).values()) == {"torch"}


def test_snapshots_are_copies_not_the_live_buffer(tiny_model, prompts: torch.Tensor) -> None:
    trace = trace_states(tiny_model, prompts, positions=[10, 150])
    assert not torch.equal(trace.values[:, :, 0], trace.values[:, :, 1])


def test_reduce_sees_every_state_and_keeps_none(tiny_model, prompts: torch.Tensor) -> None:
    kept = trace_states(tiny_model, prompts, positions=POSITIONS)
    reduced = trace_states(tiny_model, prompts, positions=POSITIONS, reduce=effective_rank)
    assert torch.equal(reduced.values, effective_rank(kept.values))


def test_with_reduce_no_more_states_are_in_memory_than_may_wait_whatever_the_number_of_positions(
    tiny_model, prompts: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = linear_layers(tiny_model)
    size = layers[0].d_k, layers[0].d_v
    snapshot = len(prompts) * layers[0].n_heads * len(layers)
    seen: list[int] = []

    def matrices() -> int:
        """State matrices in the memory of all tensors that Python holds, each memory counted once."""
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim >= 3 and x.shape[-2:] == size]
        return sum({x.untyped_storage().data_ptr(): x.numel() // (size[0] * size[1]) for x in tensors}.values())

    def note(states: torch.Tensor) -> torch.Tensor:
        seen.append(matrices() - before)
        return states.sum((-2, -1))

    a_matrix = 4 * size[0] * size[1]
    monkeypatch.setattr(tracing, "HELD_TOGETHER", snapshot * a_matrix // len(layers))
    monkeypatch.setattr(tracing, "WAITING_ON_CPU", snapshot * a_matrix)
    gc.freeze()  # what is there before is not looked through each time
    before = matrices()
    trace_states(tiny_model, prompts, positions=list(range(5, 151, 5)), reduce=note, batch_size=3)
    gc.unfreeze()
    # The model's own, those that wait, and these once more, side by side.
    assert snapshot < max(seen) <= 3 * snapshot


def test_rank_is_at_most_the_number_of_tokens(tiny_model, prompts: torch.Tensor) -> None:
    trace = trace_states(tiny_model, prompts, positions=POSITIONS, reduce=effective_rank)
    bound = torch.tensor([min(t, trace.d) for t in POSITIONS])
    assert (trace.values <= bound[None, None, :, None]).all()
    assert trace.values[:, :, 0].eq(1).all()


def test_the_model_is_left_as_it_was(tiny_model, prompts: torch.Tensor) -> None:
    before = [dict(vars(module)) for module in tiny_model.modules()]

    def stop(states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        trace_states(tiny_model, prompts, positions=[10], reduce=stop)
    assert not any(module._forward_hooks for module in tiny_model.modules())
    assert [dict(vars(module)) for module in tiny_model.modules()] == before


def test_generate_with_our_cache_is_generate_without(tiny_model, prompts: torch.Tensor) -> None:
    tokens = prompts[:, :7]
    grown = tokens
    for _ in range(8):
        with torch.no_grad():
            grown = torch.cat([grown, tiny_model(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    cache = make_cache(tiny_model)
    made = tiny_model.generate(
        tokens, max_new_tokens=8, do_sample=False, use_cache=True, past_key_values=cache, eos_token_id=-1
    )
    assert torch.equal(made, grown)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize(
    ("ids", "positions", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), [1], "at least one token"),
        (torch.zeros(4, dtype=torch.long), [1], "shape"),
        (torch.tensor([[1, 64]]), [1], "token id 64 is outside the model's vocabulary 0..63"),
        (torch.tensor([[1, -2]]), [1], "token id -2"),
        (torch.ones(1, 5, dtype=torch.long), [6], "1..5"),
        (torch.ones(1, 5, dtype=torch.long), [3, 2], "must increase"),
        (torch.ones(1, 5, dtype=torch.long), [2, 2], "must increase"),
        (torch.ones(1, 5, dtype=torch.long), [0, 2], "1..5"),
        (torch.ones(1, 5, dtype=torch.long), [], "positions"),
    ],
    ids=["empty", "flat", "id too large", "id negative", "beyond", "out of order", "repeated", "zero", "none"],
)
def test_bad_prompts_and_positions_are_refused(ids: torch.Tensor, positions: list[int], words: str) -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention"])
    with pytest.raises(ValueError, match=re.escape(words)):
        unchecked(trace_states)(model, ids, positions=positions)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[1, 2, 3]], "got list: make one with torch.tensor"),
        (np.ones((1, 3), dtype=np.int64), "got ndarray"),
        (BatchEncoding({"input_ids": torch.ones(1, 3, dtype=torch.long)}), "got BatchEncoding: .*'input_ids'"),
        (torch.ones(1, 3), "got torch.float32: convert them with .long()"),
        (torch.ones(1, 3, dtype=torch.int16), "got torch.int16"),
        (torch.ones(1, 3, dtype=torch.bool), "got torch.bool"),
    ],
    ids=["list", "array", "tokenizer's output", "float", "short", "bool"],
)
def test_ids_that_are_not_a_tensor_of_integers_are_refused(ids, words: str) -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention"])
    with pytest.raises(TypeError, match=words):
        unchecked(trace_states)(model, ids, positions=[3])


def test_ids_of_32_bits_are_read(tiny_model, prompts: torch.Tensor) -> None:
    wide, narrow = (trace_states(tiny_model, ids, positions=[5]).values for ids in (prompts, prompts.int()))
    assert torch.equal(wide, narrow)


def test_a_measure_that_makes_no_tensor_is_refused(tiny_model, prompts: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"got tuple from .*effective_rank_bounds.*torch.stack"):
        trace_states(tiny_model, prompts, positions=[5], reduce=effective_rank_bounds)


def test_bad_batch_size_is_refused(tiny_model, prompts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        trace_states(tiny_model, prompts, positions=[1], batch_size=0)


def test_models_without_linear_attention_are_refused(prompts: torch.Tensor) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="llama has no linear-attention layer.*LlamaAttention.*qwen3_next"):
        trace_states(LlamaForCausalLM(config), prompts, positions=[1])


@pytest.mark.parametrize("model_type", WRONG_IN_SEGMENTS)
def test_architectures_that_are_wrong_in_segments_are_refused_by_name(model_type: str, prompts: torch.Tensor) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1))
    model.config.model_type = model_type
    with pytest.raises(ValueError, match=f"{model_type} cannot be traced: "):
        trace_states(model, prompts, positions=[1])


def test_states_on_a_gpu_are_reduced_in_their_order_beside_the_model() -> None:
    kept: tuple[list, list] = ([], [])
    threads: set[int] = set()

    def total(states: torch.Tensor) -> torch.Tensor:
        threads.add(threading.get_ident())
        return states.sum((-2, -1))

    states = torch.randn(2, 13, 1, 5, 3, 4, 4)  # (layer, call, batch, position, head, d_k, d_v)
    with Reducer(total) as reducer:
        reducer.n_bytes = 3 * states[0, 0].nbytes
        for call, layer in itertools.product(range(13), range(2)):
            reducer.add(layer, kept[layer], states[layer, call].as_subclass(OnGpu))
        reducer.finish()
    for layer in range(2):
        assert torch.equal(torch.stack(kept[layer]), states[layer].sum((-2, -1)))
    assert len(threads - {threading.get_ident()}) == 1


@pytest.mark.parametrize("n_bytes", [1, 10**9], ids=["in the thread", "at the end"])
def test_what_a_measure_raises_on_a_gpu_is_raised_by_the_trace(n_bytes: int) -> None:
    with Reducer(lambda states: states.nonsense) as reducer:
        reducer.n_bytes = n_bytes
        reducer.add(0, [], torch.ones(1, 1, 1, 4, 4).as_subclass(OnGpu))
        with pytest.raises(AttributeError, match="nonsense"):
            reducer.finish()


def test_nothing_runs_or_is_held_after_a_trace_that_broke_off() -> None:
    done: list[int] = []

    def slow(states: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        done.append(1)
        return states.sum((-2, -1))

    def broken(reducer: Reducer) -> None:
        with reducer:
            reducer.add(0, [], torch.ones(1, 1, 1, 4, 4).as_subclass(OnGpu))
            raise RuntimeError("broke off")

    reducer = Reducer(slow)
    reducer.n_bytes = 1
    with pytest.raises(RuntimeError, match="broke off"):
        broken(reducer)
    assert done == [1], "what had begun came to its end"
    assert not reducer._waiting
    assert reducer._running is None


def test_a_measure_that_looks_at_a_part_keeps_no_more_than_that(tiny_model) -> None:
    ids = torch.arange(20)[None]
    kept: list[torch.Tensor] = []
    with Reducer(lambda states: states[..., 0, 0]) as reducer:
        reducer.add(0, kept, torch.ones(1, 2, 3, 4, 4))
        reducer.finish()
    assert kept[0].untyped_storage().nbytes() == kept[0].nbytes
    trace = trace_states(tiny_model, ids, positions=[5, 20], reduce=lambda states: states[..., 0, 0])
    assert torch.equal(trace.values, trace_states(tiny_model, ids, positions=[5, 20]).values[..., 0, 0])
