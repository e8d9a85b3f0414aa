"""What the checks of every architecture measured: the largest difference of each property, for the tables in the book.

A check calls `keep` with what it measured. `pytest --store-conformance tests/test_conformance.py` writes results/conformance_cpu.json, or
conformance_gpu.json where there is a GPU; with several processes (-n), each hands what it measured to the first.
"""

from typing import Any

SEGMENTS, TOKENS, STATES = "segments - one pass", "token by token - one pass", "states - float64"
OTHERS, REMOVED = "ablated: other heads", "removed - ablated"
SAVED, PADDING = "loaded - saved", "left padding - none"
PROPERTIES = {
    "float32": (SEGMENTS, TOKENS, STATES, OTHERS, REMOVED, SAVED, PADDING),
    "bfloat16": (SEGMENTS, TOKENS, STATES, OTHERS, REMOVED, SAVED, PADDING),
}
Measured = dict[str, dict[str, dict[str, float]]]
MEASURED: Measured = {}


def keep(name: str, measured: str, difference: float, *, dtype: str = "float32") -> float:
    """Remember the largest difference of a property of an architecture; return it for an assertion.

    Args:
        name: of the architecture.
        measured: one of `PROPERTIES` of the dtype.
        difference: in float32 of logits, absolute, and of states, over the largest entry; in bfloat16 root mean square over the standard deviation.
        dtype: of the model.
    """
    assert measured in PROPERTIES[dtype]
    known = MEASURED.setdefault(name, {}).setdefault(dtype, {})
    known[measured] = max(difference, known.get(measured, 0.0))
    return difference


def join(found: Measured) -> None:
    """Take in what another process measured."""
    for name, by_dtype in found.items():
        for dtype, values in by_dtype.items():
            for measured, difference in values.items():
                keep(name, measured, difference, dtype=dtype)


def table() -> list[dict[str, Any]]:
    """One row per model, in the order of their names, properties in theirs."""
    return [
        {"model": name}
        | {
            dtype: {
                measured: float(f"{MEASURED[name][dtype][measured]:.1e}")
                for measured in properties
                if measured in MEASURED[name].get(dtype, {})
            }
            for dtype, properties in PROPERTIES.items()
        }
        for name in sorted(MEASURED)
    ]
