"""Sparse state expansion, held to its equations in float64, token by token, and to the classes of transformers."""

import math
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from architectures.delta import tiny
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from staterank_utils import load_model, trace_states
from staterank_utils.architectures import cache_bytes, linear_layers
from staterank_utils.memory import cap_half_life
from staterank_utils.models import make_cache, read_tokens
from staterank_utils.sse import SSEConfig, SSEForCausalLM, SSEGatedDeltaNet
from staterank_utils.surgery import ablate_heads


@pytest.fixture(scope="module")
def model() -> SSEForCausalLM:
    made = tiny("staterank_sse")
    assert isinstance(made, SSEForCausalLM)
    return made


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 56, (2, 24), generator=torch.Generator().manual_seed(4))


def by_equations(layer: SSEGatedDeltaNet, x: Tensor) -> Tensor:
    """The layer on one prompt (token, d_model), in float64, state by state and token by token."""
    weight = {name: value.double() for name, value in layer.named_parameters()}
    mixed, z = (x @ weight["in_proj_qkvz.weight"].T).split([layer.conv_dim, layer.value_dim], -1)
    width = layer.conv_kernel_size
    padded = torch.cat([mixed.new_zeros(width - 1, layer.conv_dim), mixed])
    kernel = weight["conv1d.weight"][:, 0]
    mixed = F.silu(torch.stack([(padded[t : t + width].T * kernel).sum(1) for t in range(len(x))]))
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
    more_q, more_k = (x @ weight["lora_down.weight"].T @ weight["lora_up.weight"].T).chunk(2, -1)
    shares = (x @ weight["router.weight"].T).softmax(-1)
    b, a = (x @ weight["in_proj_ba.weight"].T).chunk(2, -1)
    decay = (-weight["A_log"].exp() * F.softplus(a + weight["dt_bias"])).exp()
    per_key, out = layer.values // layer.keys, torch.zeros(len(x), layer.values, layer.head_v_dim, dtype=torch.float64)
    for partition in range(1 + layer.n_partitions):
        for head in range(layer.values):
            state = torch.zeros(layer.head_k_dim, layer.head_v_dim, dtype=torch.float64)
            place, of_key = partition * layer.values + head, head // per_key
            rows = slice(of_key * layer.head_k_dim, (of_key + 1) * layer.head_k_dim)
            columns = slice(head * layer.head_v_dim, (head + 1) * layer.head_v_dim)
            for t in range(len(x)):
                q, k, e = query[t, rows], key[t, rows], torch.tensor(1.0, dtype=torch.float64)
                if partition:
                    if partition - 1 not in shares[t].topk(layer.n_active).indices:
                        continue
                    q, k, e = q + more_q[t, rows], k + more_k[t, rows], shares[t, partition - 1]
                q, k = (e * u / (u.square().sum() + 1e-6).sqrt() for u in (q, k))
                state = decay[t, place] * state
                wrong = value[t, columns] - state.T @ k
                state = state + b[t, place].sigmoid() * torch.outer(k, wrong)
                out[t, head] += state.T @ q / layer.head_k_dim**0.5
    normed = out / (out.square().mean(-1, keepdim=True) + layer.norm.variance_epsilon).sqrt() * weight["norm.weight"]
    gated = normed * F.silu(z.unflatten(-1, (layer.values, -1)))
    return gated.flatten(1) @ weight["out_proj.weight"].T


def test_a_layer_computes_its_equations(model: SSEForCausalLM) -> None:
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(5))
    layer = linear_layers(model)[0].module
    with torch.inference_mode():
        out = layer(x)
    for row in range(2):
        assert (out[row] - by_equations(layer, x[row].double())).abs().max() < 1e-5


def test_a_partition_that_takes_no_part_keeps_its_state(model: SSEForCausalLM, ids: Tensor) -> None:
    layer = linear_layers(model)[0]
    inputs: list[Tensor] = []
    hook = layer.module.router.register_forward_hook(lambda _, __, out: inputs.append(out))
    trace = trace_states(model, ids, positions=[*range(1, 25)])
    hook.remove()
    takes_part = (layer.module.route(torch.cat(inputs, 0)[: len(ids)])[1] > 0)[0].repeat_interleave(
        layer.module.values, -1
    )
    states = trace.values[0, 0, :, layer.module.values :]  # of the partitions: (position, state, d_k, d_v)
    moved = (states[1:] - states[:-1]).flatten(2).abs().amax(-1) > 0
    assert (moved == takes_part[1:]).all()
    assert 0 < moved.double().mean() < 1


def test_bytes_and_ranks_are_per_state(model: SSEForCausalLM, ids: Tensor) -> None:
    cache = make_cache(model)
    with torch.inference_mode():
        read_tokens(model, ids, cache=cache)
    n_states = 2 * (1 + 3) * 4  # layers, partitions and the shared one, value heads
    assert cache_bytes(cache)["recurrent"] == len(ids) * n_states * 8 * 16 * 4
    assert trace_states(model, ids, positions=[24]).values.shape[:4] == (2, 2, 1, 16)


def test_a_partition_is_ablated_whole(model: SSEForCausalLM, ids: Tensor) -> None:
    layer = linear_layers(model)[0]
    of_partition = [(layer.index, place) for place in range(layer.module.values, 2 * layer.module.values)]

    def without(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        out = inputs[0].unflatten(-1, (4, -1)).clone()
        out[..., 1, :] = 0
        return (out.flatten(-2),)

    with torch.inference_mode():
        with ablate_heads(model, of_partition):
            ablated = model(ids).logits
        hook = layer.module.states.register_forward_pre_hook(without)
        expected = model(ids).logits
        hook.remove()
    assert torch.equal(ablated, expected)


def test_it_is_loaded_by_the_auto_classes(model: SSEForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = model(ids).logits
        for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(str(tmp_path), device="cpu")):
            assert isinstance(loaded, SSEForCausalLM)
            assert (loaded(ids).logits - expected).abs().max() < 1e-5
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "SSEModel"
    assert model.generate(ids[:, :5], max_new_tokens=4, do_sample=False).shape == (2, 9)


def test_the_loss_in_training_keeps_the_router_in_balance(ids: Tensor) -> None:
    model = tiny("staterank_sse").requires_grad_(True)
    plain = model(ids, labels=ids).loss
    with pytest.raises(ValueError, match="no router has chosen in training yet"):
        model.balance()
    model.train()
    loss = model(ids, labels=ids).loss
    assert (loss - plain).item() == pytest.approx(model.config.balance * model.balance().item(), rel=1e-4)
    assert model(ids, labels=ids, return_dict=False)[0].item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for layer in linear_layers(model):
        assert layer.module.router.weight.grad.abs().max() > 0
        assert layer.module.lora_up.weight.grad.abs().max() > 0


def test_shares_that_are_alike_cost_one_per_layer() -> None:
    layer = SSEGatedDeltaNet(tiny("staterank_sse").config, 0).train()
    layer.route(torch.zeros(1, 7, 3))
    assert layer.balance is not None
    assert layer.balance.item() == pytest.approx(1.0)


def test_a_cap_on_half_lives_leaves_idle_partitions_alone(ids: Tensor) -> None:
    model = tiny("staterank_sse")
    found = {}

    def look(label: str, index: int, kernel, *args, g, **options):
        found[label, index] = g
        return kernel(*args, g=g, **options)

    for label, block in (("plain", nullcontext()), ("capped", cap_half_life(model, 0.25))):
        with block, ExitStack() as stack:
            for layer in linear_layers(model):
                stack.enter_context(layer.scans_through(partial(look, label, layer.index)))
            model(ids, use_cache=False)
    first = linear_layers(model)[0].index  # whose inputs the cap leaves as they are
    plain, capped = found["plain", first], found["capped", first]
    idle = plain == 0
    assert 0 < idle.float().mean() < 1
    torch.testing.assert_close(capped[~idle], plain[~idle].clamp_max(-math.log(2) / 0.25))
    assert (capped[idle] == 0).all()


@pytest.mark.parametrize("n_active", [0, 5])
def test_a_number_of_active_partitions_that_cannot_be_is_refused(n_active: int) -> None:
    with pytest.raises(ValueError, match=f"n_active must lie in 1..n_partitions, got {n_active} of 4"):
        SSEGatedDeltaNet(SSEConfig(n_active=n_active), 0)
