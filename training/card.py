"""Turn a measured model of the ladder into an embedded one: copy it, write its card and checksums.

    python -m training.card hybrid hybrid-text-0 RUNS/hybrid-text-0/model

reads the folder of weights and results/ladder/hybrid-text-0.json, and writes checkpoints/hybrid. Every number of the card is what was
measured on these weights; other weights are refused.
"""

import argparse
import hashlib
import shutil
from pathlib import Path
from typing import Any

from staterank_utils.markdown import markdown_table
from staterank_utils.models import CHECKPOINTS, initial_model, load_model, parameters_hash
from staterank_utils.results import weights_hash
from staterank_utils.studies.ladder import load_measured

MAX_SHARD, MAX_MODEL = 15_000_000, 40_000_000  # bytes
KINDS = {
    "hybrid": "the architecture class of Qwen3-Next, three gated-delta layers to one softmax layer",
    "pure": "gated-delta layers only, no softmax layer",
}
BOOKS = "github.com/mlschmitt/classic-books-markdown at commit 9448827"

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

## Data

{data}. Held-out text is from other books: {windows} windows of {tokens_each:,} tokens.

## What it can do

It continues English text and Python. It was {tasks}. Scores on the book's four tasks, by greedy generation ({n_scores} instances per
task; of copying, the share of tokens that are right):

{scores}

## Limits

One training seed, and {tokens:.0f} million tokens: it knows little of the world. English and Python only. What holds for its heads need not
hold for those of a large model. On a machine without a GPU that has flash-linear-attention installed, transformers alone cannot
run it ("0 active drivers"); `staterank_utils.load_model` can.

## Weights before training

`load_model("{name}", weights="initial")` makes them from seed {seed}, the same bits on every machine; SHA-256 over all parameters
in bfloat16, in order of their names: `{initial}`.

## Files

SHA-256 of every file: `SHA256SUMS`, checked at loading. Weights:

{files}
"""


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def copy_model(source: Path, folder: Path) -> None:
    """Copy the files that a model needs and list their checksums; refuse what is too large to embed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = {file.name: file.stat().st_size for file in sorted(source.glob("*.safetensors"))}
    if not sizes or max(sizes.values()) >= MAX_SHARD or sum(sizes.values()) > MAX_MODEL:
        raise SystemExit(
            f"{source} cannot be embedded: shards of {sizes} bytes, limits {MAX_SHARD} per shard and {MAX_MODEL} in all"
        )
    files = [folder / name for name in sorted((*sizes, *(file.name for file in source.glob("*.json"))))]
    for file in files:
        shutil.copyfile(source / file.name, file)
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files))


def facts(recipe: str, training: dict[str, Any], model: Any) -> str:
    """What the model is, as a table."""
    config = model.config
    linear = config.layer_types.count("linear_attention")
    rows = [
        ("class", type(model).__name__),
        ("layers", f"{linear} gated delta, {len(config.layer_types) - linear} softmax; hidden size {config.hidden_size}"),
        ("linear heads", f"{linear * config.linear_num_value_heads}: {config.linear_num_value_heads} value heads on {config.linear_num_key_heads} key heads per layer, states {config.linear_key_head_dim} x {config.linear_value_head_dim}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("vocabulary", f"{config.vocab_size:,}, byte-level BPE, one token per digit"),
        ("trained on", f"{training['tokens'] / 1e6:,.0f} million tokens in {training['steps']:,} steps of {training['tokens'] // training['steps']:,}"),
        ("device and wall-clock", f"{training['device']}; {training['seconds'] / 60:.1f} min"),
        ("recipe", f"`{recipe}` of `training/recipes.py`"),
        ("measured", f"`results/ladder/{recipe}.json`"),
        ("seed", training["seed"]),
        ("held-out books", f"{training['bits_per_byte_held_out_books']:.3f} bits per byte"),
        ("software", f"torch {training['torch']}, transformers {training['transformers']}, Python {training['python']}"),
    ]  # fmt: skip
    return markdown_table(("", ""), rows)


def data_in_words(training: dict[str, Any]) -> str:
    """Which rows it was trained on."""
    rows, corpus = training["recipe"]["rows"], training["corpus_tokens"]
    parts = [
        f"{rows['books']:.0%} of the rows are windows of public-domain books ({corpus['books'] / 1e6:.1f} million tokens, from {BOOKS})",
        f"{rows['code']:.0%} windows of the Python standard library without the held-out files ({corpus['code'] / 1e6:.1f} million tokens; `staterank_utils.tasks.is_held_out`)",
    ]
    if rows["tasks"]:
        parts.append(f"{rows['tasks']:.0%} generated tasks (`training/mixture.py`)")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(KINDS), help="under which it is embedded")
    parser.add_argument("recipe", help="under which it was measured")
    parser.add_argument("weights", type=Path, help="folder of the model")
    arguments = parser.parse_args()
    name, folder = arguments.name, CHECKPOINTS / f"{arguments.name}.partial"
    measured, content = load_measured(arguments.recipe)
    if content["provenance"]["checkpoints"]["model"] != weights_hash(arguments.weights):
        raise SystemExit(f"{arguments.weights} does not hold the weights that {arguments.recipe} was measured on")
    if ("full_attention" in measured.training["recipe"]["layer_types"]) != (name == "hybrid"):
        raise SystemExit(f"{arguments.recipe} is not {KINDS[name]}")
    copy_model(arguments.weights, folder)
    model, training = load_model(str(folder)), dict(measured.training)
    scores = [(task, f"{values.mean():.3f}") for task, values in measured.recall.scores.items()]
    text = CARD.format(
        name=name, kind=KINDS[name], facts=facts(arguments.recipe, training, model), data=data_in_words(training),
        tasks="trained on tasks as well" if training["recipe"]["rows"]["tasks"] else "not trained on tasks",
        scores=markdown_table(("task", "score"), scores), n_scores=len(next(iter(measured.recall.scores.values()))),
        windows=training["held_out_windows"], tokens_each=training["recipe"]["n_tokens"], tokens=training["tokens"] / 1e6,
        seed=training["seed"], initial=parameters_hash(initial_model(model.config)),
        files="\n".join(f"- `{file.name}`: `{sha256(file)}`" for file in sorted(folder.glob("*.safetensors"))),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")
    # Everything is made; only now does it take the place of what was there.
    embedded = CHECKPOINTS / name
    shutil.rmtree(embedded, ignore_errors=True)
    folder.rename(embedded)


if __name__ == "__main__":
    main()
