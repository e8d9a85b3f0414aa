"""Large models without their weights: layers at their real widths, random weights, from a prompt to strata to pruning.

    python -m benchmarks.large [--store]

For each model as many layers as fit beside their pruned copy, in bfloat16 with float32 states, on one GPU. Measured are seconds and
memory of a trace with ranks and norms (medians over rounds of a forward and a trace), and of pruning 38.9 % of the heads; what the whole model needs is computed from its
configuration, which is its class's own default. `--store` keeps the tables for the book.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.limits import read
from benchmarks.timing import store
from staterank_utils import prune_heads, select_heads, trace_states
from staterank_utils.architectures import linear_layers
from staterank_utils.budget import moment_bytes, weight_bytes
from staterank_utils.dispatch import choose_kernels, limit_autotuning
from staterank_utils.markdown import markdown_table
from staterank_utils.selection import measure_saturation
from staterank_utils.spectra import rank_and_norm
from staterank_utils.strata import two_groups

MODELS = {"Qwen3-Next-80B-A3B": "qwen3_next", "Kimi-Linear-48B-A3B": "kimi_linear"}
MACHINES = {"laptop, 16 GB": 16e9, "one GPU, 80 GB": 80e9, "eight GPUs, 640 GB": 640e9}
N_TOKENS = 16384
POSITIONS = tuple(N_TOKENS * i // 12 for i in range(1, 13))
ROUNDS = 5  # of a forward and a trace
PERIOD = 4  # layers after which kinds of layers repeat
ROOM = 0.4  # of the memory for the weights; as much again for the pruned copy
GOAL = "the whole path runs at real widths, with float32 states of bfloat16 weights; 12 positions with ranks and norms in at most 1.15 forwards"


def on(device: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with its class's random weights, made where it stays."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def cut_to(config: PreTrainedConfig, n_layers: int) -> PreTrainedConfig:
    """The first layers of a configuration."""
    settings = config.to_dict()
    for name in ("layer_types", "mlp_layer_types"):
        if settings.get(name):
            settings[name] = settings[name][:n_layers]
    return AutoConfig.for_model(**settings | {"num_hidden_layers": n_layers})


def layers_that_fit(config: PreTrainedConfig, memory: float) -> int:
    """A multiple of PERIOD, at least one and at most all."""
    one, two = (weight_bytes(on("meta", cut_to(config, n * PERIOD))) for n in (1, 2))
    n_periods = 1 + int(max(0.0, ROOM * memory - one) // (two - one))
    return min(n_periods * PERIOD, config.num_hidden_layers)


def timed(device: str, work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What work gives, its seconds, and the GB of device memory it took beyond what was held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
        return result, time.perf_counter() - started, (torch.cuda.max_memory_allocated() - held) / 1e9
    return result, time.perf_counter() - started, float("nan")


def whole_path(config: PreTrainedConfig, device: str, *, n_tokens: int, positions: tuple[int, ...]) -> dict[str, str]:
    """From a prompt of random tokens to ranks, strata and a smaller model; what it took."""
    model = on(device, config)
    choose_kernels(model)
    layers = linear_layers(model)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (1, n_tokens), generator=generator)

    def forward() -> None:
        read(model, prompt.to(device))

    def trace(n: int = n_tokens) -> Any:
        return trace_states(model, prompt[:, :n], positions=[p for p in positions if p <= n], reduce=rank_and_norm)

    timed(device, trace)  # compiles kernels
    timed(device, forward)
    in_turn = [(timed(device, forward)[1], timed(device, trace)) for _ in range(ROUNDS)]
    traced, _, memory = in_turn[-1][1]
    plain, seconds = (statistics.median(of) for of in zip(*((one, two) for one, (_, two, _) in in_turn), strict=True))
    ratio = statistics.median(two / one for one, (_, two, _) in in_turn)
    _, _, memory_of_half = timed(device, lambda: trace(n_tokens // 2))
    ranks = traced.values[:, 0, -1, :, 0]  # (layer, head)
    found = two_groups(ranks.flatten()[None].numpy() / traced.d)
    scores = measure_saturation(model, prompt[:, : positions[0]])
    small, pruning, _ = timed(device, lambda: prune_heads(model, select_heads(scores, model=model)))
    whole, left = (read(each, prompt[:, : positions[0]].to(device))["recurrent"] for each in (model, small))
    per_thousand = 1000 / n_tokens
    return {
        "layers": f"{len(layers)} linear of {config.num_hidden_layers}",
        "states": f"{len(layers)} x {layers[0].n_heads} of {traced.d_k} x {traced.d_v}",
        "weights, GB": f"{weight_bytes(model) / 1e9:.1f}",
        "forward, s per 1,000 tokens": f"{plain * per_thousand:.3f}",
        "trace, s per 1,000 tokens": f"{seconds * per_thousand:.3f}",
        "trace over forward": f"{ratio:.2f}",
        f"memory of a trace of {n_tokens:,} tokens, GB": f"{memory:.2f}",
        "memory of 1,000 tokens more, GB": f"{2 * (memory - memory_of_half) * per_thousand:.3f}",
        "mean r/d": f"{ranks.mean().item() / traced.d:.2f}",
        "share outside (0.2, 0.8)": f"{found['share outside'].point:.2f}",
        "pruning, s": f"{pruning:.1f}",
        "state freed": f"{1 - left / whole:.1%}",
    }


def needs(config: PreTrainedConfig) -> dict[str, str]:
    """What the whole model takes, computed."""
    model = on("meta", config)
    weights = weight_bytes(model)
    return {
        "weights in bfloat16, GB": f"{weights / 1e9:.0f}",
        "states of one prompt, MB": f"{moment_bytes(model) / 1e6:.1f}",
        **{name: "yes" if 1.1 * weights < memory else "no" for name, memory in MACHINES.items()},
    }


def table_of(rows: dict[str, dict[str, str]]) -> str:
    head = ("", *next(iter(rows.values())))
    return markdown_table(head, [(name, *row.values()) for name, row in rows.items()])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("layers of this width need a CUDA GPU, and this machine has none")
    limit_autotuning()
    measured, computed = {}, {}
    for name, model_type in MODELS.items():
        config = AutoConfig.for_model(model_type)
        computed[name] = needs(config)
        n_layers = layers_that_fit(config, torch.cuda.get_device_properties(0).total_memory)
        measured[name] = whole_path(cut_to(config, n_layers), "cuda", n_tokens=N_TOKENS, positions=POSITIONS)
        torch.cuda.empty_cache()
        print(name, measured[name], flush=True)
    table = f"{table_of(measured)}\n\nThe whole model, computed:\n\n{table_of(computed)}"
    print(f"{table}\n\ngoal: {GOAL}")
    if arguments.store:
        store(
            "large", parameters=vars(arguments) | {"n_tokens": N_TOKENS, "positions": POSITIONS}, goal=GOAL, table=table
        )


if __name__ == "__main__":
    main()
