"""What a linear-attention head is in each architecture, one entry a layer class.

An architecture is added here and nowhere else: say which modules are linear-attention layers, how many heads they have,
how large a head's state is, and how decay and write strength follow from the layer's projections. `core` says what an entry
holds, the modules beside it hold the entries of one family each, and `lookup` finds them in a model.
"""

from staterank_utils.layouts.core import Blocks, Layout, recurrent_state, scans_through
from staterank_utils.layouts.lookup import (
    LAYOUTS,
    WRONG_IN_SEGMENTS,
    check_heads,
    find_layers,
    head_names,
    key_names,
    layer_index,
    linear_layers,
    state_size,
)

__all__ = [
    "LAYOUTS",
    "WRONG_IN_SEGMENTS",
    "Blocks",
    "Layout",
    "check_heads",
    "find_layers",
    "head_names",
    "key_names",
    "layer_index",
    "linear_layers",
    "recurrent_state",
    "scans_through",
    "state_size",
]
