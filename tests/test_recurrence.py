"""States made token by token on a GPU, held to the float64 recurrence; the kernel itself also in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import OnGpu

from staterank_utils import (
    domain_prompts,
    effective_rank,
    load_model,
    load_tokenizer,
    recurrence,
    trace_states,
    tracing,
)
from staterank_utils.reference import gated_delta_rule

IN_INTERPRETER = """
import torch
from staterank_utils import recurrence
from staterank_utils.reference import gated_delta_rule

generator = torch.Generator().manual_seed(0)
for by_channel, n_keys in ((False, 4), (False, 2), (True, 4)):
    key, value = (torch.randn(2, 9, n, d, generator=generator) for n, d in ((n_keys, 5), (4, 20)))
    g = -torch.rand(2, 9, 4, *([5] if by_channel else []), generator=generator)
    beta, first = torch.rand(2, 9, 4, generator=generator), torch.randn(2, 4, 5, 20, generator=generator)
    k = key.double().repeat_interleave(4 // n_keys, 2)
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    _, expected = gated_delta_rule(k, k, value.double(), g.double(), beta.double())
    positions = [1, 2, 4, 8, 9]
    three = 4 * 2 * 4 * 5 * 20 * 3  # bytes of three positions
    parts = list(recurrence.states_after(key, value, g, beta, positions=positions, normalize=True, n_bytes=three))
    assert [part.shape[1] for part in parts] == [3, 2]
    torch.testing.assert_close(torch.cat(parts, 1).double(), expected[:, [t - 1 for t in positions]], rtol=0, atol=1e-5)
    [middle] = recurrence.states_after(key[:, :4], value[:, :4], g[:, :4], beta[:, :4], positions=[4], normalize=True)
    [first_one] = recurrence.states_after(*(x[:, :1] for x in (key, value, g, beta)), positions=[1], normalize=True)
    torch.testing.assert_close(first_one[:, 0].double(), expected[:, 0], rtol=0, atol=1e-5)
    rest = [x[:, 4:] for x in (key, value, g, beta)]
    [end] = recurrence.states_after(*rest, positions=[5], initial_state=middle[:, 0], normalize=True)
    torch.testing.assert_close(end[:, 0].double(), expected[:, -1], rtol=0, atol=1e-5)
print("agree")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_agrees_with_the_float64_recurrence() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", IN_INTERPRETER], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "agree", done.stderr


def test_only_delta_rules_on_a_gpu_without_gradients_or_packed_prompts_are_served() -> None:
    assert not recurrence.serves("torch_chunk_gated_delta_rule", {"key": torch.ones(1, 2, 1, 4)}, [1, 2])
    assert not recurrence.serves("segment_sum", {"key": torch.ones(1, 2, 1, 4)}, [1, 2])


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_few_positions_of_narrow_weights_are_left_to_the_kernel() -> None:
    def served(dtype: torch.dtype, positions: list[int]) -> bool:
        arguments = {name: torch.ones(1, 2, 1, 4, dtype=dtype).as_subclass(OnGpu) for name in ("key", "value")}
        with torch.no_grad():
            return recurrence.serves("torch_chunk_gated_delta_rule", arguments, positions)

    assert served(torch.bfloat16, [256, 511])
    assert not served(torch.bfloat16, [256, 512])
    assert served(torch.float32, [1024, 16384])


@pytest.mark.gpu
@pytest.mark.parametrize("by_channel", [False, True], ids=["a decay a head", "a decay a channel"])
def test_states_on_a_gpu_agree_with_the_float64_recurrence(by_channel: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 200, 2, 128, generator=generator), torch.randn(2, 200, 4, 128, generator=generator)
    g = -torch.rand(2, 200, 4, *([128] if by_channel else []), generator=generator)
    beta = torch.rand(2, 200, 4, generator=generator)
    k = key.double().repeat_interleave(2, 2)
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    _, expected = gated_delta_rule(k, k, value.double(), g.double(), beta.double())
    made = recurrence.states_after(*(x.cuda() for x in (key, value, g, beta)), positions=range(1, 201), normalize=True)
    torch.testing.assert_close(torch.cat(list(made), 1).cpu().double(), expected, rtol=0, atol=1e-5)
    [few] = recurrence.states_after(*(x.cuda() for x in (key, value, g, beta)), positions=[100, 200], normalize=True)
    torch.testing.assert_close(few.cpu().double(), expected[:, [99, 199]], rtol=0, atol=1e-5)
    g[0, 150, 0] = torch.nan
    [spoilt] = recurrence.states_after(*(x.cuda() for x in (key, value, g, beta)), positions=[100, 200], normalize=True)
    assert spoilt[:, 0].isfinite().all()
    assert spoilt[0, 1, 0].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hybrid", "pure"])
def test_a_trace_of_every_position_is_that_of_a_few_and_of_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = domain_prompts("prose", load_tokenizer(name), n_prompts=2, n_tokens=130, seed=0)
    here, there = (load_model(name, device=device, dtype=torch.float32) for device in ("cpu", "cuda"))
    every = trace_states(there, prompts, positions=range(1, 131))
    few = trace_states(there, prompts, positions=[1, 64, 130])
    torch.testing.assert_close(every.values[:, :, [0, 63, 129]], few.values, rtol=0, atol=1e-4)
    exact = trace_states(here, prompts, positions=[1, 64, 130])
    torch.testing.assert_close(few.values, exact.values, rtol=0, atol=2e-2)  # the GPU's products round to TF32
    torch.testing.assert_close(few.log_decay, exact.log_decay, rtol=1e-2, atol=1e-3)
    monkeypatch.setattr(tracing, "MOST_WAITING", 2**20)
    ranks = trace_states(there, prompts, positions=range(1, 131), reduce=effective_rank)
    assert torch.equal(ranks.values, effective_rank(every.values.cuda()).cpu())


@pytest.mark.gpu
def test_states_at_few_positions_are_those_that_the_model_itself_goes_on_from() -> None:
    """And in bfloat16 near those of float32 sums, of which they make nearly the same ranks."""
    model, tokenizer = load_model("hybrid", device="cuda"), load_tokenizer("hybrid")
    assert model.dtype == torch.bfloat16
    prompts = domain_prompts("prose", tokenizer, n_prompts=2, n_tokens=1024, seed=0)
    few = trace_states(model, prompts, positions=[512, 1024]).values
    for place, position in enumerate((512, 1024)):
        alone = trace_states(model, prompts, positions=[position]).values[:, :, 0]
        torch.testing.assert_close(few[:, :, place], alone, rtol=0, atol=1e-3 * alone.abs().max().item())
    many = trace_states(model, prompts, positions=range(128, 1025, 128)).values[:, :, [3, 7]]
    apart = (few - many).norm(dim=(-2, -1)) / many.norm(dim=(-2, -1))
    assert apart.max() < 0.02
    ranks = effective_rank(few) - effective_rank(many)
    assert (ranks != 0).float().mean() < 0.1
    assert ranks.abs().max() <= 3
