"""Does training bring back what pruning took? Fine-tune pruned embedded models for some hundred steps.

    python -m training.recover hybrid --corpus PREPARED [--steps 300]

removes 38.9 % of the heads in several ways, trains each pruned model on the mixture that the embedded one was trained on, with
batches that it has not seen, and writes scores before and after to results/recovery/hybrid.json. The whole model is trained
as well: what it gains is not recovery. Every arm is stored when it is done; the same command goes on with the others.
"""

import argparse
import copy
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils.ablation import MEAN, Ablation
from staterank_utils.dispatch import choose_kernels
from staterank_utils.evaluation import TASKS, Task
from staterank_utils.models import CHECKPOINTS, EMBEDDED, load_model, load_tokenizer
from staterank_utils.results import STORED, provenance, read_result, write_json
from staterank_utils.selection import PAPER_SHARE, random_heads, saturation_scores, select_heads
from staterank_utils.surgery import Head
from training.corpus import check_corpus
from training.fast_forward import FastForward, Recurrence, gated_delta, limit_autotuning, mend_backward
from training.mixture import Mixture
from training.recipes import find_recipe
from training.train import held_out_score, optimizers

RECIPE = "hybrid-tasks63-0"  # whose mixture the embedded models were trained on
RATE = 0.1  # first learning rate, over the peak of the training; falls linearly to 0
SEED = 1000  # of batches; the training used 0


@dataclass(frozen=True)
class Recovery:
    """What one run is given; `n_prompts` a task and `n_graded` for the damage of single heads."""

    name: str
    steps: int = 300
    n_prompts: int = 300
    n_graded: int = 16
    rows: int = 32
    n_tokens: int = 2048


def arms(study: Ablation) -> dict[str, list[Head]]:
    """The heads that each way removes, as many for all but the first."""
    joint = saturation_scores(study.measures["effective rank"], study.measures["nuclear norm"], d=study.d)
    alone = {head: -added[MEAN].point for head, added in study.sweep(seed=1001).items()}
    orders = {
        "joint": joint,
        "joint, reversed": {head: -score for head, score in joint.items()},
        "least damage alone": alone,
    }
    chosen = {
        name: [(layer, head) for layer, heads in select_heads(order, model=study.model).items() for head in heads]
        for name, order in orders.items()
    }
    drawn = random_heads(study.heads, study.count(PAPER_SHARE), seed=0)
    return {"whole": [], "joint": chosen.pop("joint"), "random": drawn, **chosen}


def fine_tune(model: PreTrainedModel, fast: FastForward, mixture: Mixture, steps: int, workers: int) -> None:
    """Train in place, on the batches 0 to steps - 1, which `workers` processes make (0: this one)."""
    batches = iter(DataLoader(mixture, batch_size=None, sampler=range(steps), num_workers=workers))
    opts = optimizers(model)
    peaks = [[RATE * group["lr"] for group in opt.param_groups] for opt in opts]
    for step in tqdm(range(steps), desc="fine-tuning", leave=False):
        for opt, peak in zip(opts, peaks, strict=True):
            for group, value in zip(opt.param_groups, peak, strict=True):
                group["lr"] = value * (1 - step / steps)
        ids, weights = (tensor.to(model.device) for tensor in next(batches))
        loss, _ = fast.loss(ids, weights)
        if not torch.isfinite(loss):
            raise SystemExit(f"loss is {loss.item()} at step {step}: lower RATE")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)


def recover(
    settings: Recovery,
    corpus: Path,
    file: Path,
    recurrence: Recurrence,
    *,
    tasks: Mapping[str, Task] = TASKS,
    device: str = "cuda",
    workers: int = 7,
) -> None:
    """Measure every arm before and after, and write `file` after each."""
    parameters, checkpoints = asdict(settings), [CHECKPOINTS / settings.name]
    rows = read_result(file, parameters=parameters, checkpoints=checkpoints)["rows"] if file.exists() else []
    model, tokenizer = load_model(settings.name, device=device, dtype=torch.float32), load_tokenizer(settings.name)
    study = Ablation(model, tokenizer, tasks, n_prompts=settings.n_prompts, n_graded=settings.n_graded, batch_size=128)
    check_corpus(corpus, tokenizer)
    recipe = replace(find_recipe(RECIPE), seed=SEED, batch_rows=settings.rows, n_tokens=settings.n_tokens)
    mixture = Mixture(corpus, tokenizer, recipe)
    for name, heads in arms(study).items():
        if any(row["arm"] == name for row in rows):
            continue
        pruned = (study.pruned(heads) if heads else copy.deepcopy(model)).requires_grad_()
        # Not compiled: layers that lost different numbers of heads would each be compiled anew.
        fast = FastForward(pruned, recurrence, dtype=torch.bfloat16 if device == "cuda" else torch.float32, compiled=False)  # fmt: skip

        def measure(model: PreTrainedModel = pruned, fast: FastForward = fast) -> dict[str, Any]:
            choose_kernels(model)
            bits = held_out_score(fast, corpus, tokenizer, recipe, device)["bits_per_byte_held_out_books"]
            return {"score / intact": vars(study.over_intact(study.scores_of(model))), "bits a byte": bits}

        row = {"arm": name, "heads": len(heads), "before": measure()}
        fine_tune(pruned, fast, mixture, settings.steps, workers)
        rows.append({**row, "after": measure()})
        write_json(file, {"provenance": provenance(parameters=parameters, checkpoints=checkpoints), "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EMBEDDED)
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by training.corpus")
    parser.add_argument("--steps", type=int, default=Recovery.steps)
    parser.add_argument("--out", type=Path, default=STORED / "recovery", help="folder")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("recovery needs a CUDA GPU, and this machine has none")
    limit_autotuning()
    mend_backward()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings = Recovery(arguments.name, arguments.steps)
    recover(settings, arguments.corpus, arguments.out / f"{settings.name}.json", gated_delta)


if __name__ == "__main__":
    main()
