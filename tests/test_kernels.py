import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from conftest import tiny_qwen3_next
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

from staterank_utils import domain_prompts, kernels, load_model, load_tokenizer
from staterank_utils.architectures import linear_layers
from staterank_utils.dispatch import PLAIN_KERNELS, choose_kernels
from staterank_utils.models import make_cache
from staterank_utils.reference import gated_delta_rule
from staterank_utils.results import EMBEDDED

CASES = [  # batch, tokens, key heads, value heads, d_k, d_v
    (1, 1, 4, 8, 64, 64),
    (1, 31, 2, 2, 8, 16),
    (3, 64, 2, 4, 16, 8),
    (3, 77, 1, 3, 8, 8),
    (1, 1031, 4, 8, 64, 64),
]


def inputs(case: tuple[int, ...], *, decay: float = 0.1) -> tuple[Tensor, ...]:
    batch, tokens, n_keys, n_heads, d_k, d_v = case
    generator = torch.Generator().manual_seed(sum(case))
    q, k = torch.randn(2, batch, tokens, n_keys, d_k, generator=generator)
    v = torch.randn(batch, tokens, n_heads, d_v, generator=generator)
    g = -decay * torch.rand(batch, tokens, n_heads, generator=generator)
    return q, k, v, g, torch.rand(batch, tokens, n_heads, generator=generator)


def oracle(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x.double().repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    q, k = (x / (x.square().sum(-1, keepdim=True) + kernels.EPS).sqrt() for x in (q, k))
    return gated_delta_rule(q, k, v.double(), g.double(), beta.double())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decay", [0.0, 1e-4, 0.1, 20.0, 1e4, float("inf")])
@torch.no_grad()
def test_the_rule_agrees_with_the_float64_recurrence_in_one_go_and_continued(case, decay: float) -> None:
    given = inputs(case, decay=decay)
    expected, states = oracle(*given)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    out, state = kernels.torch_chunk_gated_delta_rule(*given, **options)
    assert (out - expected).abs().max() < 1e-5
    assert (state - states[:, -1]).abs().max() < 2e-5
    cuts = [1, case[1] // 2, case[1] - case[1] // 2 - 2, 1]
    if min(cuts) < 1:
        return
    parts, state = [], None
    for part in zip(*(x.split(cuts, 1) for x in given), strict=True):
        before = None if state is None else state.clone()
        one = part[0].shape[1] == 1
        rule = kernels.torch_recurrent_gated_delta_rule if one else kernels.torch_chunk_gated_delta_rule
        out, after = rule(*part, initial_state=state, **options)
        assert before is None or torch.equal(state, before)
        parts.append(out)
        state = after
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5
    assert (state - states[:, -1]).abs().max() < 2e-5


@torch.no_grad()
def test_a_step_in_place_is_the_step() -> None:
    given = inputs((3, 1, 2, 4, 8, 16))
    state = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    out, after = kernels.torch_recurrent_gated_delta_rule(*given, initial_state=state, output_final_state=True)
    again, same = kernels.torch_recurrent_gated_delta_rule(
        *given, initial_state=state, output_final_state=True, in_place=True
    )
    assert torch.equal(out, again)
    assert torch.equal(after, same)
    assert same.data_ptr() == state.data_ptr()


@pytest.mark.parametrize("n_tokens", [1, 2, 50])
@torch.no_grad()
def test_the_convolution_is_the_one_of_transformers(n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((3, 24, n_tokens), (24, 4), (24,)))
    fn, update = (getattr(modeling, name).__wrapped__ for name in ("causal_conv1d_fn", "causal_conv1d_update"))
    for options in ({}, {"bias": bias}, {"activation": "silu"}):
        expected = fn(x, weight, **options)
        torch.testing.assert_close(kernels.causal_conv1d_fn(x, weight, **options), expected)
        kept = torch.randn(3, 24, 4, generator=generator)
        ours, theirs = kept.clone(), kept.clone()
        got = kernels.causal_conv1d_update(x[..., :1], ours, weight, **options)
        torch.testing.assert_close(got, update(x[..., :1], theirs, weight, **options))
        assert torch.equal(ours, theirs)


@contextmanager
def plain(model: PreTrainedModel) -> Iterator[None]:
    choose_kernels(model, plain=True)
    try:
        yield
    finally:
        choose_kernels(model)


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, lengths: list[int]) -> Tensor:
    cache = make_cache(model)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(lengths, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_the_logits_are_those_of_the_plain_path(hybrid, n_rows: int) -> None:
    ids = torch.randint(5, 8000, (n_rows, 200), generator=torch.Generator().manual_seed(n_rows))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    lengths = [2, 1, 1, 120, 1, 75]
    with torch.no_grad(), plain(hybrid):
        expected = [hybrid(ids).logits, hybrid(ids, attention_mask=mask).logits[:, 20:], read(hybrid, ids, lengths)]
    with torch.no_grad():
        got = [hybrid(ids).logits, hybrid(ids, attention_mask=mask).logits[:, 20:], read(hybrid, ids, lengths)]
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", EMBEDDED)
@torch.no_grad()
def test_logits_of_the_embedded_models_are_those_of_float64(name: str) -> None:
    # transformers' plain path in float32 is itself off by 1.1e-4 from these of `pure`.
    def in_float64(kernel, *given: Tensor, g: Tensor, beta: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        out, states = oracle(*given, g, beta)
        return out, states[:, -1]

    model = load_model(name, device="cpu")
    ids = domain_prompts("prose", load_tokenizer(name), n_prompts=32, n_tokens=64, seed=0)
    wide = copy.deepcopy(model).double()
    with ExitStack() as stack:
        for layer in linear_layers(wide):
            stack.enter_context(layer.scans_through(in_float64))
        exact = wide(ids).logits
    assert exact.dtype == torch.float64
    assert (model(ids).logits - exact).abs().max() < 1e-4


def test_one_environment_variable_leaves_everything_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(5, 75)[None]
    fast = load_model("hybrid", device="cpu")
    monkeypatch.setenv(PLAIN_KERNELS, "1")
    alone = load_model("hybrid", device="cpu")
    monkeypatch.setattr(kernels, "_sequence", None)  # without which none of ours runs
    with torch.no_grad():
        expected = alone(ids).logits
    monkeypatch.undo()
    choose_kernels(fast)
    with torch.no_grad():
        assert 0 < (fast(ids).logits - expected).abs().max() < 1e-4
    monkeypatch.setenv(PLAIN_KERNELS, "yes")
    with pytest.raises(ValueError, match="STATERANK_PLAIN_KERNELS must be 1 .* got 'yes'"):
        choose_kernels(fast)


def test_tiny_models_agree_with_the_plain_path(tiny_model) -> None:
    ids = torch.randint(0, 64, (2, 70), generator=torch.Generator().manual_seed(0))
    got = read(tiny_model, ids, [40, 1, 29])
    with plain(tiny_model):
        assert (got - read(tiny_model, ids, [40, 1, 29])).abs().max() < 1e-5


def test_gradients_are_those_of_transformers() -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention"])
    ids = torch.arange(40)[None]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    ours = gradients()
    with plain(model):
        assert all(torch.equal(a, b) for a, b in zip(ours, gradients(), strict=True))


def test_plain_gives_norms_the_forward_of_their_class_again() -> None:
    model = tiny_qwen3_next(["linear_attention", "full_attention"])
    norm = model.model.norm
    assert "forward" in vars(norm)
    with plain(model):
        assert "forward" not in vars(norm)
    assert "forward" in vars(norm)


def test_weights_are_ordered_for_a_while_and_ordinary_afterwards(hybrid) -> None:
    before = {name: parameter.clone() for name, parameter in hybrid.named_parameters()}
    with torch.inference_mode(), kernels.ordered_weights(hybrid):
        matrices = [parameter for parameter in hybrid.parameters() if parameter.ndim == 2]
        assert all(matrix.t().is_contiguous() for matrix in matrices)
        assert hybrid.lm_head.weight is hybrid.model.embed_tokens.weight
    for name, parameter in hybrid.named_parameters():
        assert parameter.is_contiguous()
        assert not parameter.is_inference()
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("n_tokens", [1, 31, 32, 33, 600])
@pytest.mark.parametrize("n_before", [0, 20])
@torch.no_grad()
def test_states_on_the_way_are_those_of_the_recurrence(n_tokens: int, n_before: int) -> None:
    given, state, seen = inputs((1, n_before + n_tokens, 2, 4, 8, 16)), None, []
    if n_before:
        before = (x[:, :n_before] for x in given)
        _, state = kernels.torch_chunk_gated_delta_rule(*before, output_final_state=True, use_qk_l2norm_in_kernel=True)
    out, last = kernels.gated_delta_rule_states(
        *(x[:, n_before:] for x in given),
        positions=range(1, n_tokens + 1),
        keep=seen.append,
        initial_state=state,
        use_qk_l2norm_in_kernel=True,
    )
    expected, states = oracle(*given)
    assert len(seen) == n_tokens
    assert (out - expected[:, n_before:]).abs().max() < 1e-5
    assert (torch.stack(seen, 1) - states[:, n_before:]).abs().max() < 2e-5
    assert (seen[-1] - last).abs().max() < 1e-6
