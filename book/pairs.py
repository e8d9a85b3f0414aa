"""Keep every notebooks/*.ipynb the exact image of its .py: the .py is the source, the .ipynb is generated, without outputs.

python -m book.pairs           write the .ipynb files
python -m book.pairs --check   fail where one is missing, stale, or has outputs
"""

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def image(source: Path) -> str:
    """The .ipynb text of a .py notebook, with cell ids that depend on the place alone."""
    notebook = jupytext.read(source, config=jupytext.config.load_jupytext_config(str(source)))
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02d}"
    notebook.metadata.setdefault("language_info", {"name": "python"})
    notebook.metadata["jupytext"].pop("text_representation", None)  # as `jupytext --sync` has it
    return str(nbformat.writes(notebook, version=4)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    sources = sorted(NOTEBOOKS.glob("*.py"))
    stray = {file.stem for file in NOTEBOOKS.glob("*.ipynb")} - {source.stem for source in sources}
    stale = [source.name for source in sources if not _is_current(source)]
    if not check:
        for source in sources:
            source.with_suffix(".ipynb").write_text(image(source), encoding="utf-8")
    elif stale or stray:
        sys.exit(
            f"not the image of their source: {', '.join(stale) or 'none'}; without a source: {', '.join(sorted(stray)) or 'none'}. Run `make notebooks`."
        )


def _is_current(source: Path) -> bool:
    target = source.with_suffix(".ipynb")
    return target.exists() and target.read_text(encoding="utf-8") == image(source)


if __name__ == "__main__":
    main()
