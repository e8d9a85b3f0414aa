"""Train an embedded model from scratch on one CUDA GPU.

    python -m training.train hybrid --corpus PREPARED --tokenizer checkpoints/hybrid --minutes 20 --out RUN

Stops by the clock. RUN/progress.pt holds everything needed to go on: the same command resumes a run that was killed, with
the batches and the learning rate that it would have had. Where only a finished run is left, `--embedded` goes on from the
embedded model of that name: its clock, steps and record, but optimizers that start anew; with `--layers 3 7` only those layers are
trained, and all other weights stay as they are, bit for bit. RUN/model is the finished model in Hugging Face format, bfloat16;
RUN/training.json the record of heads and losses.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, Qwen3NextConfig

from staterank_utils.models import choose_kernels, initial_model, load_model
from staterank_utils.results import STORED, write_json
from staterank_utils.spectra import Spectrum, singular_values
from staterank_utils.tasks import domain_prompts
from staterank_utils.tracing import trace_states
from training.fast_forward import FastForward, Recurrence, fla_recurrence, fla_recurrence_bounded, limit_autotuning
from training.mixture import SHARES, Mixture

LAYERS = {"hybrid": ["linear_attention"] * 3 + ["full_attention"], "pure": ["linear_attention"] * 4}
PEAK = {"muon": 6e-3, "adamw": 3e-3}
WARM_UP = 100  # steps
DECAY = 0.6  # last share of the time, over which the learning rate falls to 0
RECORD_AT = (0, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
RECORD_DOMAINS = ("prose", "code", "arithmetic")
RECORD_PROMPTS = 4  # a domain
LOG_EVERY = 50  # steps
SAVE_EVERY = 120  # seconds
HELD_OUT_WINDOWS = 128


def configuration(name: str, *, vocabulary: int, eos: int, pad: int, seed: int) -> Qwen3NextConfig:
    """The small Qwen3-Next: 8 layers, 4 key and 8 value heads of 64 x 64 a linear layer, dense MLPs, tied embeddings."""
    return Qwen3NextConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=8, layer_types=LAYERS[name] * 2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, linear_num_key_heads=4, linear_num_value_heads=8,
        linear_key_head_dim=64, linear_value_head_dim=64, num_experts=0, mlp_only_layers=list(range(8)), tie_word_embeddings=True,
        max_position_embeddings=4096, eos_token_id=eos, pad_token_id=pad, use_cache=name == "hybrid",
        initialization={"scheme": "normal weights, Mamba-2 gates", "seed": seed}, architectures=["Qwen3NextForCausalLM"],
    )  # fmt: skip


def record_heads(model: PreTrainedModel, prompts: dict[str, Tensor]) -> dict[str, dict[str, list[list[float]]]]:
    """Per domain and measure, a table [linear layer][head] of means over prompts, at the last token."""
    tables = {}
    for domain, ids in prompts.items():
        trace = trace_states(model, ids.to(model.device), positions=[ids.shape[1]], reduce=singular_values)
        spectrum = Spectrum(trace.values[:, :, 0])
        measures = {
            "effective_rank": spectrum.effective_rank().double(), "nuclear_norm": spectrum.nuclear_norm(),
            "log_decay": trace.log_decay, "write_strength": trace.write_strength,
        }  # fmt: skip
        tables[domain] = {
            name: [[float(f"{x:.6g}") for x in row] for row in value.mean(1).tolist()]
            for name, value in measures.items()
        }
    return tables


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for embeddings, convolutions, gates and norms; of what asks for a gradient."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "layers" in name and "in_proj_ba" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters.values() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=PEAK["muon"], weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.1}, {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}],
            lr=PEAK["adamw"], betas=(0.9, 0.95),
        ),
    ]  # fmt: skip


def keep_all_but(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Let only the parameters of these layers ask for a gradient."""
    beyond = [layer for layer in layers if not 0 <= layer < len(model.model.layers)]
    if beyond:
        raise SystemExit(f"there is no layer {beyond[0]}: the model has layers 0 to {len(model.model.layers) - 1}")
    model.requires_grad_(False)
    for layer in layers:
        model.model.layers[layer].requires_grad_()


def rate(step: int, spent: float) -> float:
    """Share of the peak learning rate: up over WARM_UP steps, flat, down to 0 over the last DECAY of the time."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (1 - spent) / DECAY))


def save(path: Path, state: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)


def train(settings: "Settings", recurrence: Recurrence, *, device: str = "cuda", compiled: bool = True) -> None:
    """Train until the clock says stop, from RUN/progress.pt where there is one; write RUN/model and RUN/training.json."""
    settings.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    config = configuration(
        settings.name,
        vocabulary=len(tokenizer),
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        seed=settings.seed,
    )
    model = initial_model(config).to(device)
    choose_kernels(model, plain=True)
    fast = FastForward(
        model, recurrence, dtype=torch.bfloat16 if device == "cuda" else torch.float32, compiled=compiled
    )
    prompts = {
        domain: domain_prompts(domain, tokenizer, n_prompts=RECORD_PROMPTS, n_tokens=settings.n_tokens, seed=0)
        for domain in RECORD_DOMAINS
    }
    if settings.layers:
        keep_all_but(model, settings.layers)
    opts = optimizers(model)
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    mixture = Mixture(settings.corpus, tokenizer, rows=settings.rows, n_tokens=settings.n_tokens, seed=settings.seed)
    now = stage(settings, mixture, device)

    progress = settings.out / "progress.pt"
    step, earlier, log, record, stages = 0, 0.0, [], {}, [{"from_step": 0, **now}]
    if settings.embedded:
        finished = json.loads((STORED / "training" / f"{settings.name}.json").read_text(encoding="utf-8"))
        model.load_state_dict(load_model(settings.name, device="cpu", dtype=torch.float32).state_dict())
        step, earlier, log = finished["steps"], finished["seconds"], finished["log"]
        record = {key: value for key, value in finished["record"]["steps"].items() if key != "end"}
        stages = [*finished["stages"], {"from_step": step, **now}]
    if progress.exists():
        state = torch.load(progress, weights_only=True, map_location=device)
        step, earlier, log, record, stages = (state[key] for key in ("step", "elapsed", "log", "record", "stages"))
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)

    batches = iter(
        DataLoader(
            mixture, batch_size=None, sampler=range(step, 10**7), num_workers=settings.workers,
            prefetch_factor=8 if settings.workers else None, pin_memory=device == "cuda",
        )
    )  # fmt: skip
    budget = 60 * settings.minutes
    started, saved_at, elapsed = time.monotonic(), earlier, earlier
    with tqdm(total=round(budget), initial=round(earlier), unit="s", desc=settings.name, mininterval=5) as bar:
        while elapsed < budget:
            if step in RECORD_AT and str(step) not in record:
                record[str(step)] = record_heads(model, prompts)
            share = rate(step, elapsed / budget)
            for opt, peak in zip(opts, peaks, strict=True):
                for group, value in zip(opt.param_groups, peak, strict=True):
                    group["lr"] = share * value
            ids, weights = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            loss, losses = fast.loss(ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            step += 1
            elapsed = earlier + time.monotonic() - started
            if step % LOG_EVERY == 0:
                if not torch.isfinite(loss):
                    raise SystemExit(f"loss is {loss.item()} at step {step}: lower the learning rate")
                asked = (weights > 1).flatten()
                entry = {"step": step, "seconds": round(elapsed, 1), "text": round(losses[~asked].mean().item(), 4)}
                if asked.any():
                    entry["answers"] = round(losses[asked].mean().item(), 4)
                log.append(entry)
                bar.set_postfix(entry)
                bar.update(round(elapsed) - bar.n)
            if elapsed - saved_at > SAVE_EVERY:
                save(progress, {"step": step, "elapsed": elapsed, "log": log, "record": record, "stages": stages, "model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts]})  # fmt: skip
                saved_at = elapsed

    # What is embedded is bfloat16, so that is what the last record and the score are of.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    model.to(torch.bfloat16).save_pretrained(settings.out / "model", max_shard_size="14MB")
    tokenizer.save_pretrained(settings.out / "model")
    model.float()
    record["end"] = record_heads(model, prompts)
    write_json(
        settings.out / "training.json",
        {
            "model": settings.name, "seed": settings.seed, "steps": step, "tokens": step * settings.rows * settings.n_tokens, "seconds": round(elapsed, 1),
            "torch": torch.__version__, "python": platform.python_version(),
            "transformers": transformers.__version__,
            "settings": {"rows": settings.rows, "n_tokens": settings.n_tokens, "peak_rates": PEAK, "warm_up_steps": WARM_UP, "decay_share": DECAY},
            "stages": stages,
            "recurrence": getattr(recurrence, "__name__", "?"),
            **held_out_score(fast, settings, tokenizer, device),
            "record": {"prompts_a_domain": RECORD_PROMPTS, "n_tokens": settings.n_tokens, "steps": record}, "log": log,
        },
    )  # fmt: skip


def stage(settings: "Settings", mixture: Mixture, device: str) -> dict[str, Any]:
    """What may change when a finished run is gone on with."""
    return {
        "minutes": settings.minutes,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "layers": list(settings.layers) or "all",
        "books_tokens": len(mixture.sources.books),
        "code_tokens": len(mixture.sources.code),
        "mixture": SHARES,
    }


@torch.no_grad()
def held_out_score(fast: FastForward, settings: "Settings", tokenizer: Any, device: str) -> dict[str, float]:
    """Bits a byte on windows spread over the held-out books; the first token of a window is given, not predicted."""
    ids = np.load(settings.corpus / "held_out_books.npy")
    starts = np.linspace(0, len(ids) - settings.n_tokens - 1, HELD_OUT_WINDOWS).astype(int)
    windows = torch.from_numpy(np.stack([ids[s : s + settings.n_tokens + 1] for s in starts]).astype(np.int64))
    n_bytes = sum(len(text.encode()) for text in tokenizer.batch_decode(windows[:, 1:]))
    nats = sum(
        fast.loss(part, torch.ones_like(part[:, 1:], dtype=torch.float32))[1].double().sum().item()
        for part in windows.to(device).split(settings.rows)
    )
    return {
        "bits_per_byte_held_out_books": round(nats / math.log(2) / n_bytes, 4),
        "held_out_windows": HELD_OUT_WINDOWS,
    }


@dataclass(frozen=True)
class Settings:
    """What one training run is: rows and n_tokens are the size of a step, minutes those of all stages together, layers those
    that are trained (none named: everything)."""

    name: str
    corpus: Path
    tokenizer: str
    out: Path
    minutes: float = 20
    seed: int = 0
    workers: int = 7
    rows: int = 32
    n_tokens: int = 2048
    embedded: bool = False
    layers: tuple[int, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(LAYERS))
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by training.corpus")
    parser.add_argument("--tokenizer", required=True, help="folder written by training.tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Settings.minutes)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--workers", type=int, default=Settings.workers, help="processes that make batches")
    parser.add_argument("--embedded", action="store_true", help="go on from the embedded model of this name")
    parser.add_argument("--bounded", action="store_true", help="hold log-decay above -5 in training: faster kernels")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[], help="numbers of the layers to train; all by default"
    )
    arguments = vars(parser.parse_args())
    arguments["layers"] = tuple(arguments["layers"])
    recurrence = fla_recurrence_bounded if arguments.pop("bounded") else fla_recurrence
    settings = Settings(**arguments)
    if not torch.cuda.is_available():
        raise SystemExit("training needs a CUDA GPU, and this machine has none")
    limit_autotuning()
    # Batches are made in forked processes, where the tokenizer's own threads would wait for each other for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    train(settings, recurrence)


if __name__ == "__main__":
    main()
