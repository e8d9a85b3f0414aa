"""Train and measure the recipes of a wave, one process per GPU of this host, or a few.

    python -m training.ladder --wave 1 --corpus PREPARED --tokenizer checkpoints/hybrid --runs RUNS --out results/ladder

Each recipe is a job of its own: it waits for a free GPU, trains into RUNS/NAME, measures, and writes OUT/NAME.json and OUT/NAME.npz.xz. A job
that fails leaves the others alone and is named at the end. The same command resumes: what is done is not done again. `--recipes NAME ...`
takes recipes of any wave, and `--job NAME` runs one job, which is what a workflow engine calls. With `--per-gpu 2` two jobs share a GPU: a
training uses 23 GB, and each fills the other's gaps.
"""

import argparse
import fcntl
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from staterank_utils.studies.ladder import LADDER
from training.recipes import RECIPES, WAVES, find_recipe

POLL = 2.0  # seconds between two looks for a free GPU


@contextmanager
def free_gpu(folder: Path, n_gpus: int, per_gpu: int = 1) -> Iterator[int]:
    """Wait for a place on a GPU that no other job of this folder has, and hold it until the end of the block.

    Args:
        folder: of the runs, in which the locks are files.
        n_gpus: of this host.
        per_gpu: places on each; every GPU gets its first job before one gets its second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for place, index in itertools.product(range(per_gpu), range(n_gpus)):
            with (folder / f".gpu-{socket.gethostname()}-{index}-{place}.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield index
                return
        time.sleep(POLL)


def commands(name: str, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """What a job runs, one after the other, unless its result is there."""
    run = arguments.runs / name
    train = [
        "training.train", name, "--corpus", str(arguments.corpus), "--tokenizer", arguments.tokenizer, "--out", str(run),
        "--workers", str(arguments.workers),
    ]  # fmt: skip
    steps = {"training": (run / "training.json", train)}
    steps["measuring"] = (arguments.out / f"{name}.json", ["training.measure", str(run), "--out", str(arguments.out)])
    return {step: [sys.executable, "-m", *command] for step, (result, command) in steps.items() if not result.exists()}


def run_job(name: str, arguments: argparse.Namespace, n_gpus: int) -> None:
    """Train and measure one recipe on a free GPU.

    Raises:
        SystemExit: training or measuring failed; it names the recipe and its log.
    """
    find_recipe(name)
    log = arguments.runs / f"{name}.log"
    with free_gpu(arguments.runs, n_gpus, arguments.per_gpu) as index:
        # Of those that this process may use, by their own names.
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}
        for step, command in commands(name, arguments).items():
            with log.open("a") as stream:
                done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"{step} of {name} failed with exit status {done.returncode}: see {log}")


def run_wave(names: Sequence[str], arguments: argparse.Namespace, n_gpus: int) -> list[str]:
    """Start every job, wait for all, and return the names of those that failed."""
    options = ["--corpus", arguments.corpus, "--tokenizer", arguments.tokenizer, "--runs", arguments.runs, "--out", arguments.out, "--workers", arguments.workers, "--gpus", n_gpus, "--per-gpu", arguments.per_gpu]  # fmt: skip
    jobs = {
        name: subprocess.Popen([sys.executable, "-m", "training.ladder", "--job", name, *map(str, options)])
        for name in names
    }
    try:
        return [name for name, job in tqdm(jobs.items(), desc="jobs") if job.wait()]
    finally:
        for job in jobs.values():
            job.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--wave", type=int, choices=sorted(WAVES))
    what.add_argument("--recipes", nargs="+", choices=sorted(RECIPES), metavar="NAME", help="of any wave")
    what.add_argument("--job", choices=sorted(RECIPES), metavar="NAME", help="one recipe, in this process")
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by training.corpus")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs, with room for 1 GB each")
    parser.add_argument("--out", type=Path, default=LADDER, help="folder of the results")
    parser.add_argument("--gpus", type=int, help="GPUs to use; all of this host by default")
    parser.add_argument("--per-gpu", type=int, default=1, help="jobs that share a GPU")
    parser.add_argument("--workers", type=int, default=7, help="processes that make batches, per training")
    arguments = parser.parse_args()
    there = torch.cuda.device_count()
    if not there:
        raise SystemExit("the ladder needs a CUDA GPU, and this host has none")
    n_gpus = there if arguments.gpus is None else arguments.gpus
    if not 1 <= n_gpus <= there:
        raise SystemExit(f"asked for {n_gpus} GPUs, and torch sees {there} on this host: lower --gpus")
    if arguments.per_gpu < 1:
        raise SystemExit(f"--per-gpu is {arguments.per_gpu}: expected at least 1 job per GPU")
    if arguments.job:
        run_job(arguments.job, arguments, n_gpus)
    elif failed := run_wave(arguments.recipes or WAVES[arguments.wave], arguments, n_gpus):
        raise SystemExit(
            f"failed: {', '.join(failed)}; their logs are in {arguments.runs}. The same command tries them again"
        )


if __name__ == "__main__":
    main()
