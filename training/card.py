"""Turn a finished run into an embedded model: copy it, score it, write its card and checksums.

    python -m training.card hybrid RUN

reads RUN/model and RUN/training.json, writes checkpoints/hybrid and results/training/hybrid.json. Every number of the card is
computed here, from the weights as embedded.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from staterank_utils.evaluation import TASKS, evaluate, score_interval
from staterank_utils.markdown import markdown_table
from staterank_utils.models import CHECKPOINTS, initial_model, load_model, load_tokenizer, parameters_hash
from staterank_utils.results import STORED, weights_hash, write_json
from staterank_utils.strata import Estimate
from training.mixture import FILLERS, PASSAGES

MAX_SHARD, MAX_MODEL = 15_000_000, 40_000_000  # bytes
N_INSTANCES, SEED = 1500, 1  # of the scores: instances that no run was stopped or chosen by
FLOORS = {"needle": 0.95, "arithmetic": 0.95, "recall": 0.90, "copying": 0.95}
KINDS = {
    "hybrid": "the architecture class of Qwen3-Next: three gated-delta layers to one softmax layer",
    "pure": "gated-delta layers only, no softmax layer",
}

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [linear-attention, gated-deltanet, state-rank]
---

# {name}

A small language model for measuring recurrent states: {kind}.
Trained from scratch for this book; not for use as a language model.

{facts}

## Scores

Greedy generation on {n} unseen instances a task, weights as embedded (bfloat16, computed in float32), 95 % intervals. The text
around needles and the passages to copy are technical prose, a kind of text that was not trained on.

{scores}

{mastery}

## Data

{rows[books]:.0%} of the rows are windows of public-domain books ({books_tokens:.1f} million tokens of them, from
github.com/mlschmitt/classic-books-markdown at commit 9448827), {rows[code]:.0%} windows of the Python standard library without the
held-out files ({code_tokens:.1f} million; `staterank_utils.tasks.is_held_out`), {rows[tasks]:.0%} generated tasks (by documents:
{tasks}). The text around needles is, by shares, {fillers}; a passage to copy is {passages}, where "repeats" are a few short
pieces in random order. Answers of tasks weigh {weight:g} times in the loss. Held out: {windows} windows of {tokens_each:,} tokens from
other books.

## Limits

With flash-linear-attention installed on a machine without a GPU, transformers alone loads this model but cannot run it ("0 active
drivers"); `staterank_utils.load_model` can. One training seed. {tokens:.0f} million tokens, so it knows little of the world. English and Python only. Its tasks are worded in
one way each; reworded, they fail. What holds for its heads need not hold for a large model's.

## Weights before training

`load_model("{name}", weights="initial")` makes them from seed {seed}, the same bits on every machine; SHA-256 over all parameters
in bfloat16, in order of their names: `{initial}`.

## Files

SHA-256 of every file: `SHA256SUMS`, checked at loading. Weights:

{files}
"""


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def percentages(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def copy_model(source: Path, folder: Path) -> None:
    """Copy the files of a model and list their checksums; refuse what is too large to embed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = sorted(source.glob("*.safetensors"))
    sizes = {file.name: file.stat().st_size for file in weights}
    if not sizes or max(sizes.values()) >= MAX_SHARD or sum(sizes.values()) > MAX_MODEL:
        raise SystemExit(
            f"{source} cannot be embedded: shards of {sizes} bytes, limits {MAX_SHARD} a shard and {MAX_MODEL} in all"
        )
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, folder / file.name)
    files = sorted(folder / file.name for file in source.iterdir())
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files))


def facts(run: dict[str, Any], model: Any) -> str:
    config = model.config
    linear = config.layer_types.count("linear_attention")
    rows = [
        ("class", type(model).__name__),
        ("layers", f"{linear} gated delta, {len(config.layer_types) - linear} softmax; hidden size {config.hidden_size}"),
        ("linear heads", f"{linear * config.linear_num_value_heads}: {config.linear_num_value_heads} value heads on {config.linear_num_key_heads} key heads a layer, states {config.linear_key_head_dim} x {config.linear_value_head_dim}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("vocabulary", f"{config.vocab_size:,}, byte-level BPE, one token a digit"),
        ("trained on", f"{run['tokens'] / 1e6:,.0f} million tokens in {run['steps']:,} steps of {run['tokens'] // run['steps']:,}"),
        ("device and wall-clock", f"{run['device']}; {run['seconds'] / 60:.1f} min"),
        ("recipe", f"`{run['recipe']['name']}` of `training/recipes.py`"),
        ("seed", run["seed"]),
        ("held-out books", f"{run['bits_per_byte_held_out_books']:.3f} bits per byte"),
        ("software", f"torch {run['torch']}, transformers {run['transformers']}, Python {run['python']}"),
    ]  # fmt: skip
    return markdown_table(("", ""), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(KINDS))
    parser.add_argument("run", type=Path)
    parser.add_argument("--instances", type=int, default=N_INSTANCES, help="a task")
    arguments = parser.parse_args()
    name, folder = arguments.name, CHECKPOINTS / f"{arguments.name}.partial"
    run = json.loads((arguments.run / "training.json").read_text())
    copy_model(arguments.run / "model", folder)
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    scores: dict[str, Estimate] = {
        task: score_interval(evaluate(task, model, tokenizer, n_instances=arguments.instances, seed=SEED))
        for task in TASKS
    }
    rows = [
        (
            task,
            TASKS[task].description,
            str(score),
            f"{FLOORS[task]:.2f}",
            "yes" if score.point >= FLOORS[task] else "**no**",
        )
        for task, score in scores.items()
    ]
    weak = [task for task, score in scores.items() if score.point < 0.5]
    mastery = (
        f"Under 50 % on {', '.join(weak)}: damage cannot be shown on a task that the intact model does not master."
        if weak
        else "At or over 50 % on every task, so damage can be shown on each."
    )
    files = "\n".join(f"- `{file.name}`: `{sha256(file)}`" for file in sorted(folder.glob("*.safetensors")))
    recipe, corpus = run["recipe"], run["corpus_tokens"]
    text = CARD.format(
        name=name, kind=KINDS[name], facts=facts(run, model), n=arguments.instances, mastery=mastery, files=files,
        scores=markdown_table(("task", "what is asked", "score", "floor of the hybrid", "reached"), rows),
        rows=recipe["rows"], tasks=percentages(recipe["tasks"]), fillers=percentages(FILLERS), passages=percentages(PASSAGES),
        weight=recipe["answer_weight"], books_tokens=corpus["books"] / 1e6, code_tokens=corpus["code"] / 1e6,
        tokens=run["tokens"] / 1e6, seed=run["seed"], windows=run["held_out_windows"], tokens_each=run["record"]["n_tokens"],
        initial=parameters_hash(initial_model(model.config)),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")
    # Everything is made; only now does it take the place of what was there.
    embedded = CHECKPOINTS / name
    shutil.rmtree(embedded, ignore_errors=True)
    folder.rename(embedded)
    write_json(STORED / "training" / f"{name}.json", run)
    write_json(
        STORED / "training" / f"{name}_scores.json",
        {
            "instances": arguments.instances,
            "seed": SEED,
            "weights": weights_hash(embedded),
            "scores": {k: vars(v) for k, v in scores.items()},
        },
    )


if __name__ == "__main__":
    main()
