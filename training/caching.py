"""Measure caches of pairs on the embedded models, and store it in results/caching.json.

    python -m training.caching

It takes eight minutes on an H200. Of tasks the loss on the right answers is taken, since these models master none.
"""

from staterank_utils import domain_prompts, load_model, load_tokenizer
from staterank_utils.models import EMBEDDED
from staterank_utils.results import embedded_folders, provenance
from staterank_utils.studies.caching import measure_caching, store_caching
from staterank_utils.studies.texts import draw_texts

SIZES = {"n_windows": 8, "n_copies": 4, "n_calibration": 2}
N_ANSWERS = 32
PROMPTS = {"n_prompts": 16, "n_tokens": 2048, "seed": 1000}  # of chapter 4, on which heads are scored


def main() -> None:
    found = {}
    for name in EMBEDDED:
        model, tokenizer = load_model(name), load_tokenizer(name)
        prompts = domain_prompts("code", tokenizer, **PROMPTS)
        found[name] = measure_caching(model, tokenizer, draw_texts(tokenizer, **SIZES), prompts, n_answers=N_ANSWERS)
    made = provenance(parameters={**SIZES, **PROMPTS, "n_answers": N_ANSWERS}, checkpoints=embedded_folders(EMBEDDED))
    store_caching(found, made=made)


if __name__ == "__main__":
    main()
