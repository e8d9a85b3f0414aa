"""Make one result of one notebook's results on different models, such as those of several GPUs.

python -m book.gather results/full/03_ablation_asymmetry.json hybrid.json pure.json
"""

import argparse
import json
from pathlib import Path

from staterank_utils.results import gather, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    arguments = parser.parse_args()
    parts = [json.loads(part.read_text(encoding="utf-8")) for part in arguments.parts]
    write_json(arguments.target, gather(parts))


if __name__ == "__main__":
    main()
