"""Train a recipe of the ladder from scratch on one CUDA GPU.

    python -m training.train hybrid-text-0 --corpus PREPARED --tokenizer checkpoints/hybrid --out RUN

trains by steps, or with `--minutes` by the clock. RUN/progress.pt holds everything needed to resume: the same command continues a run
that was killed, with the batches and the learning rate that it would have had, to the same weights. RUN/model is the finished model in
Hugging Face format, bfloat16, RUN/step-500 and RUN/step-2000 are what it was on the way, and RUN/training.json is the record of heads
and losses; every 500 steps its log has what `layer_metrics` says of the states.
"""

import argparse
import copy
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from staterank_utils.callback import layer_metrics
from staterank_utils.dispatch import choose_kernels, limit_autotuning
from staterank_utils.models import initial_model
from staterank_utils.results import whole_or_not, write_json
from staterank_utils.selection import head_metrics
from staterank_utils.tasks import domain_prompts
from training.corpus import check_corpus
from training.fast_forward import FastForward, Gradients, Recurrence, mend_backward, recurrence_of
from training.mixture import Mixture
from training.recipes import Recipe, find_recipe

PEAK = {"muon": 6e-3, "adamw": 3e-3}
GATES = ("in_proj_ba.", ".b_proj.", "forget_gate.")  # in names of their projections
WARM_UP = 100  # steps
DECAY = 0.6  # last share of the training, over which the learning rate falls to 0
RECORD_AT = (0, 20, 50, 100, 200, 500, 1_000, 2_000)
RECORD_DOMAINS = ("prose", "code", "arithmetic")
RECORD_PROMPTS = 4  # of each domain
KEEP_AT = (500, 2_000)  # weights that are kept beside the last ones
LOG_EVERY = 50  # steps
STATES_EVERY = 500  # steps, a multiple of LOG_EVERY, as often as transformers' Trainer logs
SAVE_EVERY = 120  # seconds
HELD_OUT_WINDOWS = 128
NEVER = 10**7  # steps


@dataclass(frozen=True)
class Run:
    """Where a recipe is trained: on which corpus, into which folder.

    Attributes:
        minutes: stop by the clock, of all sessions together; None: by the recipe's steps.
        workers: processes that make batches, 0 for none but this one.
    """

    recipe: Recipe
    corpus: Path
    tokenizer: str
    out: Path
    minutes: float | None = None
    workers: int = 7


def record_heads(model: PreTrainedModel, prompts: dict[str, Tensor]) -> dict[str, dict[str, list[list[float]]]]:
    """Per domain and measure, a table [linear layer][head] of means over prompts, at the last token."""
    tables = {}
    for domain, ids in prompts.items():
        tables[domain] = {
            name: [[float(f"{x:.6g}") for x in row] for row in table.tolist()]
            for name, table in head_metrics(model, ids.to(model.device)).items()
        }
    return tables


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for embeddings, convolutions, gates and norms."""
    parameters = dict(model.named_parameters())
    matrices = [
        p
        for name, p in parameters.items()
        if p.ndim == 2 and "layers" in name and not any(part in name for part in GATES)
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters.values() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=PEAK["muon"], weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [p for p in others if p.squeeze().ndim >= 2], "weight_decay": 0.1}, {"params": [p for p in others if p.squeeze().ndim < 2], "weight_decay": 0.0}],
            lr=PEAK["adamw"], betas=(0.9, 0.95),
        ),
    ]  # fmt: skip


def rate(step: int, spent: float) -> float:
    """Share of the peak learning rate: up over WARM_UP steps, flat, down to 0 over the last DECAY of the training."""
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (1 - spent) / DECAY))


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """As `whole_or_not`, with what to do where there is no room.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    try:
        with whole_or_not(path) as partial:
            yield partial
    except (OSError, RuntimeError) as error:  # torch and safetensors say a full disk either way
        raise OSError(
            f"could not write {path} ({error}): free some space and give the same command, which resumes from the last "
            "progress that was written"
        ) from error


def save(path: Path, state: dict[str, object]) -> None:
    """Write a state whole or not at all."""
    with written(path) as partial:
        torch.save(state, partial)


def untrained(recipe: Recipe, tokenizer: Any) -> PreTrainedModel:
    """The model of a recipe before training, with one matrix for the embedding and the head, also where its class has two."""
    model = initial_model(recipe.configuration(tokenizer))
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def keep_model(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write a copy of the model in bfloat16, whole or not at all."""
    kept = copy.deepcopy(model).to(torch.bfloat16)
    if not kept.config.tie_word_embeddings:  # its class writes both
        kept.lm_head.weight = torch.nn.Parameter(kept.lm_head.weight.clone())
    with written(folder) as partial:
        kept.save_pretrained(partial, max_shard_size="14MB")
        tokenizer.save_pretrained(partial)


def train(run: Run, recurrence: Recurrence, *, device: str = "cuda", compiled: bool = True) -> None:
    """Train to the end, from RUN/progress.pt where there is one; write RUN/model and RUN/training.json.

    Args:
        run: what and where.
        recurrence: of the recipe's update rule, on this device.
        device: of the training.
        compiled: fuse with `torch.compile`.

    Raises:
        SystemExit: the loss is not finite; it names the first step at which it was not.
        OSError: progress could not be written.
        ValueError: a corpus of another tokenizer.
    """
    recipe = run.recipe
    tokenizer = AutoTokenizer.from_pretrained(run.tokenizer)
    tokens = check_corpus(run.corpus, tokenizer)
    run.out.mkdir(parents=True, exist_ok=True)
    model = untrained(recipe, tokenizer).to(device)
    choose_kernels(model, plain=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    gradients = Gradients(FastForward(model, recurrence, dtype=dtype, compiled=compiled))
    prompts = {
        domain: domain_prompts(domain, tokenizer, n_prompts=RECORD_PROMPTS, n_tokens=recipe.n_tokens, seed=0)
        for domain in RECORD_DOMAINS
    }
    opts = optimizers(model)
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    progress = run.out / "progress.pt"
    step, earlier, log, record = 0, 0.0, [], {}
    if progress.exists():
        state = torch.load(progress, weights_only=True, map_location=device)
        if state["recipe"] != recipe.settings():
            raise ValueError(f"{progress} is of another recipe: train {recipe.name} into another folder")
        step, earlier, log, record = (state[key] for key in ("step", "elapsed", "log", "record"))
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)

    batches = iter(
        DataLoader(
            Mixture(run.corpus, tokenizer, recipe), batch_size=None, sampler=range(step, NEVER), num_workers=run.workers,
            prefetch_factor=8 if run.workers else None, pin_memory=device == "cuda",
        )
    )  # fmt: skip
    started, saved_at, elapsed = time.monotonic(), earlier, earlier
    first_bad = torch.tensor(NEVER, device=device)

    def spent() -> float:
        """Share of the training that is over."""
        return step / recipe.steps if run.minutes is None else elapsed / (60 * run.minutes)

    def check_loss() -> None:
        if first_bad.item() < NEVER:
            raise SystemExit(
                f"the loss of {recipe.name} is not finite from step {first_bad.item()} on: lower PEAK in training/train.py; "
                "the progress that was written lies before it"
            )

    with tqdm(
        total=recipe.steps if run.minutes is None else None, initial=step, desc=recipe.name, mininterval=5
    ) as bar:
        while spent() < 1:
            if step in RECORD_AT and str(step) not in record:
                record[str(step)] = record_heads(model, prompts)
            if step in KEEP_AT:
                keep_model(model, tokenizer, run.out / f"step-{step}")
            share = rate(step, spent())
            for opt, peak in zip(opts, peaks, strict=True):
                for group, value in zip(opt.param_groups, peak, strict=True):
                    group["lr"] = share * value
            ids, weights = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            loss, losses = gradients(ids, weights)
            # Looked at every LOG_EVERY steps, so that the GPU need not be waited for.
            first_bad = torch.where(torch.isfinite(loss), first_bad, first_bad.clamp_max(step))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
            step += 1
            elapsed = earlier + time.monotonic() - started
            if step % LOG_EVERY == 0:
                check_loss()
                asked = (weights > 1).flatten()
                entry = {"step": step, "seconds": round(elapsed, 1), "text": round(losses[~asked].mean().item(), 4)}
                if asked.any():
                    entry["answers"] = round(losses[asked].mean().item(), 4)
                bar.set_postfix(entry)
                if step % STATES_EVERY == 0:
                    states = layer_metrics(model, prompts[RECORD_DOMAINS[0]].to(device))
                    entry |= {name: float(f"{value:.6g}") for name, value in states.items()}
                log.append(entry)
                bar.update(step - bar.n)
            if elapsed - saved_at > SAVE_EVERY:
                check_loss()
                save(progress, {"recipe": recipe.settings(), "step": step, "elapsed": elapsed, "log": log, "record": record, "model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts]})  # fmt: skip
                saved_at = elapsed
    check_loss()

    # What is kept is bfloat16, so that is what the last record and the score are of.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    keep_model(model, tokenizer, run.out / "model")
    record["end"] = record_heads(model, prompts)
    write_json(
        run.out / "training.json",
        {
            "model": recipe.name, "seed": recipe.seed, "steps": step, "tokens": step * recipe.batch_rows * recipe.n_tokens, "seconds": round(elapsed, 1),
            "torch": torch.__version__, "python": platform.python_version(), "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "recipe": recipe.settings(), "corpus_tokens": tokens,
            "settings": {"peak_rates": PEAK, "warm_up_steps": WARM_UP, "decay_share": DECAY},
            "recurrence": getattr(recurrence, "__name__", "?"),
            # (compiled without gradients it would be compiled anew)
            **held_out_score(FastForward(model, recurrence, dtype=dtype, compiled=False), run.corpus, tokenizer, recipe, device),
            "record": {"prompts_a_domain": RECORD_PROMPTS, "n_tokens": recipe.n_tokens, "steps": record}, "log": log,
        },
    )  # fmt: skip


@torch.no_grad()
def held_out_score(fast: FastForward, corpus: Path, tokenizer: Any, recipe: Recipe, device: str) -> dict[str, float]:
    """Bits per byte on windows spread over the held-out books; the first token of a window is given, not predicted."""
    ids = np.load(corpus / "held_out_books.npy")
    starts = np.linspace(0, len(ids) - recipe.n_tokens - 1, HELD_OUT_WINDOWS).astype(int)
    windows = torch.from_numpy(np.stack([ids[s : s + recipe.n_tokens + 1] for s in starts]).astype(np.int64))
    n_bytes = sum(len(text.encode()) for text in tokenizer.batch_decode(windows[:, 1:]))
    nats = sum(
        fast.loss(part, torch.ones_like(part[:, 1:], dtype=torch.float32))[1].double().sum().item()
        for part in windows.to(device).split(recipe.batch_rows)
    )
    return {
        "bits_per_byte_held_out_books": round(nats / math.log(2) / n_bytes, 4),
        "held_out_windows": HELD_OUT_WINDOWS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of the recipe, see training/recipes.py")
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by training.corpus")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="stop by the clock and not by the recipe's steps")
    parser.add_argument("--workers", type=int, default=Run.workers, help="processes that make batches")
    arguments = parser.parse_args()
    try:
        recipe = find_recipe(arguments.recipe)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        raise SystemExit("training needs a CUDA GPU, and this machine has none")
    limit_autotuning()
    mend_backward()
    # Batches are made in forked processes, where the tokenizer's own threads would wait for each other for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    run = Run(recipe, arguments.corpus, arguments.tokenizer, arguments.out, arguments.minutes, arguments.workers)
    train(run, recurrence_of(recipe.rule))


if __name__ == "__main__":
    main()
