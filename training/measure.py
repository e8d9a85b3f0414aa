"""Measure a finished run with everything that the ladder asks for.

    python -m training.measure RUN --out results/ladder

reads RUN/model, RUN/step-500, RUN/step-2000 and RUN/training.json, and writes NAME.json and NAME.npz.xz.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from staterank_utils.dispatch import limit_autotuning
from staterank_utils.results import provenance
from staterank_utils.studies.ladder import LADDER, Scale, measure_model, store_measured


def measure(run: Path, out: Path, *, scale: Scale, device: str | None = None) -> None:
    """Measure a run and store it."""
    training = json.loads((run / "training.json").read_text(encoding="utf-8"))
    measured = measure_model(run, name=training["model"], training=training, scale=scale, device=device)
    store_measured(measured, out, made=provenance(parameters=asdict(scale), checkpoints=[run / "model"]))


def compute_in_float32() -> None:
    """Where there is a GPU, let kernels take three products of TF32 for each of float32, and keep one configuration each.

    The heads' order and the losses are then float32's. It holds for the whole process, so only a program that measures calls it.
    """
    if torch.cuda.is_available():
        os.environ["TRITON_F32_DEFAULT"] = "tf32x3"
    limit_autotuning()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=LADDER, help="folder")
    arguments = parser.parse_args()
    compute_in_float32()
    measure(arguments.run, arguments.out, scale=Scale())


if __name__ == "__main__":
    main()
