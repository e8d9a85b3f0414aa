"""What a way of doing something spends its time with: the explanation of a goal that was missed."""

from collections.abc import Callable, Mapping

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from staterank_utils.claims import markdown_table


def gpu_work(way: Callable[[], object]) -> tuple[float, int]:
    """Seconds that a GPU is at work in one run of a way, and the number of its kernels and copies."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        way()
        torch.cuda.synchronize()
    events = [event for event in seen.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in events) / 1e6, sum(event.count for event in events)


def where_time_goes(ways: Mapping[str, Callable[[], object]], *, n_operators: int = 6) -> str:
    """A table with a row for each way: its largest operators of torch with their shares of the time that torch itself takes, and how many calls there are."""
    rows = []
    for name, way in ways.items():
        way()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            way()
        events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        shares = [f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / total:.0%}" for e in events[:n_operators]]
        rows.append((name, ", ".join(shares), f"{sum(event.count for event in events):,}"))
    return "Where the time goes:\n\n" + markdown_table(("", "operators of torch, share of their time", "calls"), rows)
