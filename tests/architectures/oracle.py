"""What a layer's states must be: recurrences in float64, token by token, over what the layer's own projections put out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from staterank_utils.architectures import LinearLayer, linear_layers

ALL = frozenset(("a group", "one of each group", "unevenly", "all but one", "a whole layer"))  # of removals


@dataclass(frozen=True)
class Expected:
    """Of one layer: states (batch, token, head, d_k, d_v), log-decay and write strength (batch, token, head), all float64."""

    states: Tensor
    log_decay: Tensor
    write_strength: Tensor


@dataclass(frozen=True)
class Architecture:
    """A tiny model that is put under every check of `test_conformance.py`.

    Attributes:
        build: makes the model, of the real class, with the same random weights every time and gates that decay and write at every strength;
            at least two linear-attention layers, grouped heads where the family has them.
        expected: (model, ids) -> what every linear-attention layer must keep, from one full pass.
        refused: names of the removals in `test_conformance.REMOVALS` that cannot be exact, so that `prune_heads` refuses them.
        pads: whether prompts can be padded on the left.
        wide_states: whether states are float32 in a model of bfloat16.
    """

    build: Callable[[], PreTrainedModel]
    expected: Callable[[PreTrainedModel, Tensor], list[Expected]]
    refused: frozenset[str] = frozenset()
    pads: bool = True
    wide_states: bool = True


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1, as the kernels divide them."""
    return x.double() * (x.double().square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def recurrence(
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    write: Tensor | None = None,
    remove: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """States (batch, token, head, d_k, d_v) in float64 of S <- exp(log_decay) S + b k (v - S^T k)^T, or + k v^T without b.

    Args:
        key, value: (batch, token, head, d_k) and (batch, token, head, d_v).
        log_decay: (batch, token, head, d_k), or with a last axis of 1.
        write: b, (batch, token, head).
        remove: (alpha, beta), (batch, token, head, d_k) each, of RWKV-7: S <- exp(log_decay) S + beta (alpha^T S) + k v^T.
    """
    key, value, log_decay = key.double(), value.double(), log_decay.double()
    state = key.new_zeros(*key.shape[:1], *key.shape[2:], value.shape[-1])
    states = []
    for t in range(key.shape[1]):
        k, v, old = key[:, t, :, :, None], value[:, t, :, None, :], state
        state = log_decay[:, t].exp()[..., None] * state
        if remove is not None:
            alpha, beta = (x.double()[:, t, :, :, None] for x in remove)
            state = state + beta * (alpha * old).sum(-2, keepdim=True)
        if write is not None:
            v = write.double()[:, t, :, None, None] * (v - (k * state).sum(-2, keepdim=True))
        state = state + k * v
        states.append(state)
    return torch.stack(states, 1)


@torch.no_grad()
def from_projections(
    model: PreTrainedModel, ids: Tensor, of_layer: Callable[[LinearLayer, Tensor], Expected]
) -> list[Expected]:
    """From the outputs of every layer's first projection in one full pass: `of_layer` is given the layer and its output."""
    found: list[Expected] = []
    hooks = [
        layer.module.get_submodule(layer.gate_modules[0]).register_forward_hook(
            lambda _, __, out, layer=layer: found.append(of_layer(layer, out.double()))
        )
        for layer in linear_layers(model)
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def mixed_by(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """(batch, token, channel) through a causal convolution and SiLU, in float64."""
    padded = F.pad(x.double().mT, (conv.weight.shape[-1] - 1, 0))
    bias = None if conv.bias is None else conv.bias.double()
    return F.silu(F.conv1d(padded, conv.weight.double(), bias, groups=len(conv.weight)).mT)
