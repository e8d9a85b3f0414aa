"""What the checks of every architecture measured: the largest difference of each property, for the table in the book.

A check calls `keep` with what it measured. `pytest --store-conformance tests/test_layouts_*.py` writes results/conformance.json.
"""

import os
from collections.abc import Iterable
from typing import Any

SEGMENTS, STATES = "segments - one pass", "states - float64"
REMOVED, PADDING = "removed - ablated", "left padding - none"
PROPERTIES = (SEGMENTS, STATES, REMOVED, PADDING)
MEASURED: dict[str, dict[str, float]] = {}


def keep(measured: str, difference: float, names: Iterable[str], *, library: str = "") -> float:
    """Remember the largest difference of a property for the model that the running test is about; return it for an assertion.

    Args:
        measured: one of `PROPERTIES`.
        difference: in logits, absolute; of states, over the largest entry.
        names: of the tiny models, one of which the test's own name holds.
        library: that the models are of, where it is not transformers.
    """
    assert measured in PROPERTIES
    inside = os.environ["PYTEST_CURRENT_TEST"].partition("[")[2]
    name = max((name for name in names if name in inside), key=len)
    known = MEASURED.setdefault(f"{library}{name}", {})
    known[measured] = max(difference, known.get(measured, 0.0))
    return difference


def table() -> list[dict[str, Any]]:
    """One row a model, in the order of their names, properties in theirs."""
    return [
        {"model": model}
        | {name: float(f"{MEASURED[model][name]:.1e}") for name in PROPERTIES if name in MEASURED[model]}
        for model in sorted(MEASURED)
    ]
