"""Layout of xLSTM's matrix memory (mLSTM).

A state is S(t) = f_t S(t-1) + i_t k_t v_t^T, with f_t a sigmoid and i_t an exponential. transformers keeps C = S / exp(m) beside the
running maximum m that it was divided by, and a sum of keys n, divided alike, which norms what a head puts out. A state is read here as
S and written as C; an edit leaves n as it is.

Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517, Eqs. 19 to 27.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from staterank_utils.layouts.core import Change, Gates, Layout, noted_change
from staterank_utils.rebinding import replaced


def _gates(
    layer: nn.Module, write: Float[Tensor, "batch token head"], forget: Float[Tensor, "batch token head"]
) -> Gates:
    write, forget = (_modeling().soft_cap(x.float(), cap_value=layer.config.gate_soft_cap) for x in (write, forget))
    return F.logsigmoid(forget), write.exp()


def _modeling() -> ModuleType:
    return importlib.import_module(LAYOUT.module)


def _without_writes(layer: nn.Module, values: Float[Tensor, "batch token row"], heads: list[int]) -> Tensor:
    # The gate has a lower bound, so a head writes nothing where its values are 0.
    d_v = _d_v(layer)
    columns = [head * d_v + i for head in heads for i in range(d_v)]
    return values.index_fill(-1, torch.tensor(columns, device=values.device), 0.0)


def _d_k(layer: nn.Module) -> int:
    return int(layer.qk_dim // layer.config.num_heads)


def _d_v(layer: nn.Module) -> int:
    return int(layer.v_dim // layer.config.num_heads)


def _forward(run: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a layer, its recurrence in float32: transformers' own fails where the weights are bfloat16, unless it has such a state."""

    @functools.wraps(run)
    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        backend: Any = self.mlstm_backend
        recurrence = backend.forward

        def wide(**given: Any) -> Any:
            given = {name: value.float() if isinstance(value, Tensor) else value for name, value in given.items()}
            out, state = recurrence(**given)
            return out.to(x.dtype), state

        with replaced(backend, {"forward": wide}):
            return run(self, x, *args, **kwargs)

    return forward


@contextmanager
def _changed_decay(layer: nn.Module, change: Change) -> Iterator[None]:
    backend: Any = layer.mlstm_backend
    recurrence = backend.forward

    def changed(*, fgate: Float[Tensor, "batch head token"], **given: Any) -> Any:
        log_decay = change(F.logsigmoid(fgate.float()).transpose(1, 2)).transpose(1, 2)
        # The input at which the sigmoid gives that decay.
        return recurrence(fgate=log_decay - (-torch.expm1(log_decay)).log(), **given)

    with replaced(backend, {"forward": changed}), noted_change(layer, change):
        yield


@functools.cache
def _cache_class() -> type[Any]:
    from transformers.models.xlstm.modeling_xlstm import xLSTMCache

    class FloatXLSTMCache(xLSTMCache):
        """The model's cache in float32, whatever the weights are in, and made when the number of prompts is known."""

        layers = ()  # of which other caches have some

        def __init__(self, model: Any):
            self.seqlen_offset = 0
            self.dtype, self.config = torch.float32, model.config
            self._layers = [module for module in model.modules() if type(module).__name__ == LAYOUT.layer_class]
            self.rnn_state: dict[int, tuple[Tensor, ...]] = {}

        @property
        def linear_cache(self) -> list[Tensor]:
            """All that it holds, under the name that MiniMax's has."""
            return [tensor for kept in self.rnn_state.values() for tensor in kept]

        def fit(self, n_prompts: int) -> None:
            """Make room, once."""
            for index, layer in enumerate([] if self.rnn_state else self._layers):
                lead = (n_prompts, layer.config.num_heads)
                shapes = ((*lead, _d_k(layer), _d_v(layer)), (*lead, _d_k(layer)), (*lead, 1))
                device = layer.out_proj.weight.device
                self.rnn_state[index] = tuple(torch.zeros(shape, device=device) for shape in shapes)

    return FloatXLSTMCache


def _make_room(model: Any, input_ids: Tensor, positions: Tensor, cache: Any) -> dict[str, Any]:
    if cache is None and input_ids.shape[1] <= model.config.max_inference_chunksize:
        return {}
    # A longer prompt is read in pieces, through a cache in bfloat16 if none is given.
    cache = _cache_class()(model) if cache is None else cache
    cache.fit(len(input_ids))
    return {"cache_params": cache}


def _state(cache: Any, index: int) -> Float[Tensor, "batch head d_k d_v"]:
    divided, _, maximum = cache.rnn_state[index]
    state: Tensor = divided * maximum.exp()[..., None]
    return state


def _set_state(cache: Any, index: int, heads: list[int], states: Float[Tensor, "batch head d_k d_v"]) -> None:
    divided, _, maximum = cache.rnn_state[index]
    divided[:, heads] = states * maximum[:, heads].neg().exp()[..., None]


def _refusal(layer: nn.Module) -> str | None:
    expected = {"weight_mode": "single", "mode": "inference", "inference_state_dtype": "float32"}
    for name, value in expected.items():
        if (found := getattr(layer.config, name)) != value:
            return f"its configuration has {name}={found!r}, and its states are described for {value!r}"
    return None


def _logits(model: Any, hidden: Tensor) -> Tensor:
    logits = model.lm_head(hidden.to(model.lm_head.weight.dtype)).float()
    capped: Tensor = _modeling().soft_cap(logits, model.config.output_logit_soft_cap)
    return capped


LAYOUT = Layout(
    layer_class="xLSTMLayer",
    module="transformers.models.xlstm.modeling_xlstm",
    n_heads=lambda layer: layer.config.num_heads,
    n_keys=lambda layer: layer.config.num_heads,
    d_k=_d_k,
    d_v=_d_v,
    output=lambda layer: "out_proj",
    gate_modules=("igate_preact", "fgate_preact"),
    gates=_gates,
    changed_decay=_changed_decay,
    write_module="v",
    without_writes=_without_writes,
    state=_state,
    set_state=_set_state,
    forward=_forward,
    kept_whole="the cache that transformers makes in generate has the same number in every layer",
    cache=lambda model: _cache_class()(model),
    arguments=_make_room,
    logits=_logits,
    refusal=_refusal,
    padding_refusal=lambda layer: "transformers gives it no mask",
)
LAYOUTS = (LAYOUT,)
