"""One page that compares the models of a sweep: findings as tiles, and the table of claims, for every seed.

python -m book.compare index.html --run RUN --seeds 0 1 --models mine=FOLDER theirs=OWNER/NAME
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from book import home
from staterank_utils.markdown import overview_table
from staterank_utils.results import whole_or_not

STYLES = Path(__file__).with_name("_static") / "book.css"
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Models compared</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5; }}
.claims {{ overflow-x: auto; font-size: 0.85rem; }}
.claims td, .claims th {{ padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ccc; }}
{styles}
</style>
</head>
<body>
<h1>Models compared</h1>
<p>Verdicts by rules that were registered before any model was measured. A tile leads to the executed notebook.</p>
<p>{legend}</p>
{parts}
</body>
</html>
"""


def comparison(run: Path, seeds: Sequence[int], models: Mapping[str, str]) -> str:
    """The page as HTML that needs no other file but the notebooks it links to.

    Args:
        run: folder of the sweep, with results/SEED/NAME/NOTEBOOK.json and pages/SEED/NAME/NOTEBOOK.ipynb.
        seeds: of the sweep.
        models: short name -> the model, as results name it.
    """
    parts = []
    for seed in seeds:
        rows = {name: _rows(run / "results" / str(seed) / name) for name in models}

        def link(name: str, notebook: str, seed: int = seed) -> str:
            return f"pages/{seed}/{name}/{notebook}.ipynb"

        claims = MarkdownIt().enable("table").render(overview_table(run / "gathered" / str(seed), models))
        parts += [
            f"<h2>Seed {seed}</h2>" if len(seeds) > 1 else "",
            home.ladder_tiles(rows, link=link),
            f'<h3>Claims</h3>\n<div class="claims">{claims}</div>',
        ]
    return PAGE.format(
        styles=STYLES.read_text(encoding="utf-8"), legend=escape(home.legend()), parts="\n".join(filter(None, parts))
    )


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [
        row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--run", type=Path, default=Path())
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=MODEL")
    arguments = parser.parse_args()
    models = dict(pair.split("=", 1) for pair in arguments.models)
    with whole_or_not(arguments.target) as partial:
        partial.write_text(comparison(arguments.run, arguments.seeds, models), encoding="utf-8")


if __name__ == "__main__":
    main()
