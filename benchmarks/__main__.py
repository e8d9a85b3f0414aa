"""All benchmarks, one after the other in one process, with what each is set beside and the limit of the machine.

python -m benchmarks [--store]
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks import ablate, large, prune, spectra, trace, watch

ALL: tuple[Callable[[list[str]], None], ...] = (trace.main, spectra.main, ablate.main, prune.main, watch.main)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="keep the tables for the book")
    options = ["--store"] if parser.parse_args().store else []
    for benchmark in (*ALL, large.main) if torch.cuda.is_available() else ALL:
        benchmark(options)
        print()


if __name__ == "__main__":
    main()
