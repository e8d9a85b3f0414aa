"""What a linear-attention head is in each architecture, one class per family of layers.

An architecture is added here and nowhere else: say which modules are linear-attention layers, how many heads they have,
how large a head's state is, and how decay and write strength follow from the layer's projections. `layer` says what an adapter
is asked, the modules beside it hold the adapters of one family each, and `lookup` finds the layers of a model.
"""

from staterank_utils.architectures.caches import LinearOnlyCache, cache_bytes, cache_name, recurrent_state
from staterank_utils.architectures.core import Blocks, noted_change
from staterank_utils.architectures.layer import LinearLayer, ModelAdapter, kept_as
from staterank_utils.architectures.lookup import (
    ADAPTERS,
    SOFTMAX_PROJECTION,
    WRONG_IN_SEGMENTS,
    check_heads,
    find_layers,
    layer_index,
    linear_layers,
    model_adapter,
    register,
    softmax_layers,
    state_size,
)

__all__ = [
    "ADAPTERS",
    "SOFTMAX_PROJECTION",
    "WRONG_IN_SEGMENTS",
    "Blocks",
    "LinearLayer",
    "LinearOnlyCache",
    "ModelAdapter",
    "cache_bytes",
    "cache_name",
    "check_heads",
    "find_layers",
    "kept_as",
    "layer_index",
    "linear_layers",
    "model_adapter",
    "noted_change",
    "recurrent_state",
    "register",
    "softmax_layers",
    "state_size",
]
