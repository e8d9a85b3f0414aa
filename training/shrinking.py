"""Measure smaller states of the embedded models, and store it in results/shrinking.json.

    python -m training.shrinking

It takes four minutes on an H200, most of them to compile kernels for layers of every size.
"""

import torch

from staterank_utils import domain_prompts, load_model, load_tokenizer
from staterank_utils.models import EMBEDDED
from staterank_utils.results import embedded_folders, provenance
from staterank_utils.studies.shrinking import measure_shrinking, store_shrinking
from staterank_utils.studies.texts import draw_texts
from training.measure import compute_in_float32

PROMPTS = {"n_prompts": 16, "n_tokens": 2048, "seed": 1000}  # of chapter 4, on which heads are scored


def main() -> None:
    compute_in_float32()
    found = {}
    for name in EMBEDDED:
        model, tokenizer = load_model(name, dtype=torch.float32), load_tokenizer(name)
        found[name] = measure_shrinking(model, draw_texts(tokenizer), domain_prompts("code", tokenizer, **PROMPTS))
    store_shrinking(found, made=provenance(parameters=PROMPTS, checkpoints=embedded_folders(EMBEDDED)))


if __name__ == "__main__":
    main()
