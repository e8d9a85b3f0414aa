"""Measure more random draws of heads on the embedded models, at every dose of the ladder, and store them in results/draws.json.

    python -m training.draws

The ladder has 16 draws per dose, and 40 at the two doses of C5a. These make 40 of all, on the same windows. It takes three minutes on an H200.
"""

import torch

from staterank_utils import load_model, load_tokenizer
from staterank_utils.claims import SECOND
from staterank_utils.models import EMBEDDED
from staterank_utils.results import embedded_folders, provenance, write_json
from staterank_utils.studies.ladder import load_measured
from staterank_utils.studies.removal import DRAWS_FILE, further_draws, losses_without
from staterank_utils.studies.repeated import stored_name
from staterank_utils.studies.texts import draw_texts
from training.measure import compute_in_float32

SIZES = {"n_windows": 16, "window": 1024}  # of the ladder
N_DRAWS = SECOND["C5a"].numbers["draws"]


def main() -> None:
    compute_in_float32()
    nats = {}
    for name in EMBEDDED:
        stored = stored_name(name)
        assert stored, f"results/ladder has no model of the weights of {name}"
        measured, _ = load_measured(stored)
        windows, model = draw_texts(load_tokenizer(name), **SIZES).windows, load_model(name, dtype=torch.float32)
        arms = further_draws(measured.removal, name=measured.name, n_draws=N_DRAWS)
        nats[name] = losses_without(model, arms, windows).round(5).tolist()
    made = provenance(parameters=SIZES | {"n_draws": N_DRAWS}, checkpoints=embedded_folders(EMBEDDED))
    write_json(DRAWS_FILE, {"provenance": made, "nats": nats})


if __name__ == "__main__":
    main()
