"""What a linear-attention head is in each architecture, one entry per layer class.

An architecture is added here and nowhere else: say which modules are linear-attention layers, how many heads they have,
how large a head's state is, and how decay and write strength follow from the layer's projections. `core` says what an entry
holds, the modules beside it hold the entries of one family each, and `lookup` finds them in a model.
"""

from staterank_utils.layouts.core import Blocks, Layout, noted_change, recurrent_state
from staterank_utils.layouts.layer import LinearLayer
from staterank_utils.layouts.lookup import (
    LAYOUTS,
    WRONG_IN_SEGMENTS,
    check_heads,
    find_layers,
    layer_index,
    linear_layers,
    state_size,
)

__all__ = [
    "LAYOUTS",
    "WRONG_IN_SEGMENTS",
    "Blocks",
    "Layout",
    "LinearLayer",
    "check_heads",
    "find_layers",
    "layer_index",
    "linear_layers",
    "noted_change",
    "recurrent_state",
    "state_size",
]
