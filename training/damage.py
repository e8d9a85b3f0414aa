"""Measure what the loss of each head alone costs the embedded models, and C4b without the first layer, and store both in results/damage.json.

    python -m training.damage

Every head is removed by itself; what is kept are means over the ladder's windows of held-out books and code. Then heads of all layers but the first go by
rank and in random orders within layers. It takes three minutes on an H200.
"""

import torch

from staterank_utils import load_model, load_tokenizer
from staterank_utils.models import EMBEDDED
from staterank_utils.results import embedded_folders, provenance, write_json
from staterank_utils.studies.removal import DAMAGE_FILE, areas_beyond_first, damage_alone
from staterank_utils.studies.repeated import stored_on
from staterank_utils.studies.texts import draw_texts
from training.measure import compute_in_float32

SIZES = {"n_windows": 16, "window": 1024}  # of the ladder


def main() -> None:
    compute_in_float32()
    added, areas = {}, {}
    for name in EMBEDDED:
        windows, model = draw_texts(load_tokenizer(name), **SIZES).windows, load_model(name, dtype=torch.float32)
        stored = stored_on(name)
        assert stored, f"results/ladder has no model of the weights of {name}"
        measured, _ = stored
        added[name] = damage_alone(model, windows).mean(1).round(7).tolist()
        areas[name] = areas_beyond_first(model, windows, measured.removal, name=measured.name).round(7).tolist()
    made = provenance(parameters=SIZES, checkpoints=embedded_folders(EMBEDDED))
    write_json(DAMAGE_FILE, {"provenance": made, "added": added, "areas_beyond_first": areas})


if __name__ == "__main__":
    main()
