"""Times of several ways to do one thing, taken in turn in one process, and where they are stored."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils.dispatch import choose_kernels, limit_autotuning
from staterank_utils.results import STORED, provenance, write_json


def options(
    description: str | None, arguments: Sequence[str] | None, *, repeats: int, on_model: bool = True
) -> argparse.Namespace:
    """What a benchmark is told: a model where it is about one, how often, and whether to store the table.

    On a GPU every Triton kernel keeps one configuration, since each new shape would be tuned anew, for minutes.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if on_model:
        parser.add_argument("--model", default="hybrid")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--store", action="store_true", help="keep the table for the book")
    limit_autotuning()
    return parser.parse_args(arguments)


def by_transformers_alone(model: PreTrainedModel, way: Callable[[], object]) -> Callable[[], object]:
    """A way with transformers' plain kernels in the place of ours; the order of the weights in memory stays ours."""

    def alone() -> object:
        choose_kernels(model, plain=True)
        try:
            return way()
        finally:
            choose_kernels(model)

    return alone


def rounds(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every way in every round; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in tqdm(range(repeats + 1), desc=next(iter(ways))):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def over_first(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Of every way, the median over rounds of its time over that of the first way in the same round."""
    first = next(iter(seconds.values()))
    return {
        name: statistics.median(a / b for a, b in zip(values, first, strict=True)) for name, values in seconds.items()
    }


def store(name: str, *, parameters: Mapping[str, Any], goal: str, table: str) -> None:
    """Write a table to results/benchmarks/NAME_cpu.json or NAME_gpu.json, by the machine; the book shows both."""
    device = "gpu" if torch.cuda.is_available() else "cpu"
    made = {"provenance": provenance(parameters=parameters), "goal": goal, "table": table}
    write_json(STORED / "benchmarks" / f"{name}_{device}.json", made)
