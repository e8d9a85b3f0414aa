"""xLSTM's matrix memory (mLSTM).

A state is S(t) = f_t S(t-1) + i_t k_t v_t^T, with f_t a sigmoid and i_t an exponential. transformers keeps C = S / exp(m) beside the
running maximum m that it was divided by, and a sum of keys n, divided alike, which norms the output of a head. A state is read here as
S and written as C; an edit leaves n as it is.

Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517, Eqs. 19 to 27.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from staterank_utils.architectures.core import Change, Gates, noted_change
from staterank_utils.architectures.layer import LinearLayer, ModelAdapter, kept_as
from staterank_utils.rebinding import replaced

MODULE = "transformers.models.xlstm.modeling_xlstm"


def _soft_cap(values: Tensor, cap: float) -> Tensor:
    capped: Tensor = importlib.import_module(MODULE).soft_cap(values.float(), cap_value=cap)
    return capped


def _mended(run: Callable[..., Any]) -> Callable[..., Any]:
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
            modules = [module for module in model.modules() if XLSTMLayer.describes_class(type(module))]
            self._layers = [XLSTMLayer(index, module) for index, module in enumerate(modules)]
            self.rnn_state: dict[int, tuple[Tensor, ...]] = {}

        @property
        def linear_cache(self) -> list[Tensor]:
            """All that it holds, under the name that MiniMax's has."""
            return [tensor for kept in self.rnn_state.values() for tensor in kept]

        def fit(self, n_prompts: int) -> None:
            """Make room, once."""
            for layer in [] if self.rnn_state else self._layers:
                lead = (n_prompts, layer.n_heads)
                shapes = ((*lead, layer.d_k, layer.d_v), (*lead, layer.d_k), (*lead, 1))
                device = layer.module.out_proj.weight.device
                self.rnn_state[layer.index] = tuple(torch.zeros(shape, device=device) for shape in shapes)

    return FloatXLSTMCache


class XLSTMModel(ModelAdapter):
    """Its cache needs room for the prompts beforehand, and its logits are capped."""

    own_cache = True

    def make_cache(self, max_tokens: int | None = None) -> Any:
        return _cache_class()(self.model)

    def fitted(self, cache: Any, input_ids: Tensor) -> Any:
        if cache is None and input_ids.shape[1] <= self.model.config.max_inference_chunksize:
            return None
        # A longer prompt is read in pieces, through a cache in bfloat16 if none is given.
        cache = self.make_cache() if cache is None else cache
        cache.fit(len(input_ids))
        return cache

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden.to(self.model.lm_head.weight.dtype))
        return _soft_cap(logits, self.model.config.output_logit_soft_cap)


class XLSTMLayer(LinearLayer):
    """The matrix memory of xLSTM."""

    describes = (f"{MODULE}.xLSTMLayer",)
    model_adapter = XLSTMModel
    n_heads = n_keys = kept_as("config.num_heads")
    d_k: Any = property(lambda self: int(self.module.qk_dim // self.n_heads))
    d_v: Any = property(lambda self: int(self.module.v_dim // self.n_heads))
    output_module = "out_proj"
    gate_modules = ("igate_preact", "fgate_preact")
    write_module = "v"
    kept_whole = "the cache that transformers makes in generate has the same number in every layer"
    padding_refusal = "transformers gives it no mask"
    mend = staticmethod(_mended)

    @property
    def refusal(self) -> str | None:
        expected = {"weight_mode": "single", "mode": "inference", "inference_state_dtype": "float32"}
        for name, value in expected.items():
            if (found := getattr(self.module.config, name)) != value:
                return f"its configuration has {name}={found!r}, and its states are described for {value!r}"
        return None

    def read_gates(self, write: Float[Tensor, "batch token head"], forget: Float[Tensor, "batch token head"]) -> Gates:
        cap = self.module.config.gate_soft_cap
        return F.logsigmoid(_soft_cap(forget, cap)), _soft_cap(write, cap).exp()

    def change_decay(self, change: Change) -> AbstractContextManager[None]:
        return _changed_decay(self.module, change)

    def without_writes(self, values: Float[Tensor, "batch token row"], places: list[int]) -> Tensor:
        # The gate has a lower bound, so a head writes nothing where its values are 0.
        columns = [place * self.d_v + i for place in places for i in range(self.d_v)]
        return values.index_fill(-1, torch.tensor(columns, device=values.device), 0.0)

    def state(self, cache: Any) -> Float[Tensor, "batch head d_k d_v"]:
        divided, _, maximum = cache.rnn_state[self.index]
        state: Tensor = divided * maximum.exp()[..., None]
        return state

    def set_state(self, cache: Any, places: list[int], states: Float[Tensor, "batch place d_k d_v"]) -> None:
        divided, _, maximum = cache.rnn_state[self.index]
        divided[:, places] = states * maximum[:, places].neg().exp()[..., None]


ADAPTERS = (XLSTMLayer,)
