"""What a way of doing something spends its time with: the explanation of a goal that was missed."""

import re
from collections.abc import Callable, Mapping

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from staterank_utils.markdown import markdown_table

Kernels = dict[str, tuple[float, int]]  # name of a GPU's kernel or copy -> seconds at it and times, the longest first


def gpu_work(way: Callable[[], object]) -> Kernels:
    """What a GPU does in one run of a way, kernels of one name taken together."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        way()
        torch.cuda.synchronize()
    found: Kernels = {}
    for event in seen.key_averages():
        if event.device_type == DeviceType.CUDA:
            plain = event.key.removeprefix("void ").replace("(anonymous namespace)::", "")
            name = re.split(r"[<(]", plain)[0].rpartition("::")[2].strip()
            seconds, times = found.get(name, (0.0, 0))
            found[name] = seconds + event.self_device_time_total / 1e6, times + event.count
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def where_gpu_time_goes(found: Mapping[str, Kernels], *, n_kernels: int = 6) -> str:
    """A table with a row for each way: its longest kernels with their shares of the time that the GPU is at work."""
    rows = []
    for name, kernels in found.items():
        total = sum(seconds for seconds, _ in kernels.values())
        shares = [f"`{key[:40]}` {seconds / total:.0%}" for key, (seconds, _) in list(kernels.items())[:n_kernels]]
        rows.append((name, ", ".join(shares)))
    return "Where the time goes:\n\n" + markdown_table(("", "kernels, share of the GPU's time at work"), rows)


def where_time_goes(ways: Mapping[str, Callable[[], object]], *, n_operators: int = 6) -> str:
    """A table with a row for each way: its largest operators of torch with their shares of the time that torch itself takes, and how many calls there are."""
    rows = []
    for name, way in ways.items():
        way()
        everywhere = _ExperimentalConfig(profile_all_threads=True)  # also in the threads of ours
        with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as seen:
            way()
        events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        shares = [f"`{e.key.removeprefix('aten::')}` {e.self_cpu_time_total / total:.0%}" for e in events[:n_operators]]
        rows.append((name, ", ".join(shares), f"{sum(event.count for event in events):,}"))
    return "Where the time goes:\n\n" + markdown_table(("", "operators of torch, share of their time", "calls"), rows)
