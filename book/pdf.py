"""The whole book as one PDF, printed by a browser from the pages that `make book` staged, and linked from the home page.

python -m book.pdf --stage _build/stage --site _build/html
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from staterank_utils.results import whole_or_not

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
]
DRAWN = "[...document.querySelectorAll('figure.interactive')].every(each => each.classList.contains('drawn'))"
SHOWN = '<p class="whole-book">'
HIDDEN = SHOWN.replace(">", " hidden>")
# What only a screen needs.
HIDE = "header, footer.bd-footer, .bd-sidebar, .bd-sidebar-primary, .bd-sidebar-secondary, .article-header-buttons, .prev-next-footer, .vega-bindings, details.hide {display: none !important}"
PAPER = "figure, table tr, pre, div.math {break-inside: avoid} section > section > h1 {break-before: page} .bd-main, .bd-content, .bd-article-container {max-width: none !important}"


def chromium() -> str:
    """Path of a browser.

    Raises:
        SystemExit: there is none, with what to do.
    """
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("no chromium on this machine: install it (on Debian, apt-get install chromium)")
    return path


def one_page(stage: Path) -> Path:
    """Build all pages as one; returns its file.

    Args:
        stage: folder that `book.assemble` wrote.

    Raises:
        SystemExit: it is not there, or jupyter-book failed.
    """
    if not (stage / "book" / "generated").is_dir():
        raise SystemExit(f"{stage} holds no staged book: run `make book` first")
    out = stage.parent / "single"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        str(Path(sys.executable).parent / "jupyter-book"),
        "build",
        str(stage),
        "--path-output",
        str(out),
        "--builder",
        "singlehtml",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"jupyter-book could not make one page: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    # Its links are those of a page at the root, but it lies where the first page does.
    site = out / "_build" / "singlehtml"
    return (site / "book" / "intro.html").replace(site / "all.html")


def print_page(page: Path, target: Path) -> None:
    """Print a page as a PDF with an outline, equations and figures drawn; whole or not at all.

    Args:
        page: an HTML file.
        target: where to.
    """
    with whole_or_not(target) as partial, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=FLAGS)
        sheet = browser.new_page()
        sheet.goto(page.as_uri())
        sheet.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => true) : true")
        sheet.wait_for_function(DRAWN)
        sheet.evaluate("document.querySelectorAll('details:not(.hide)').forEach(each => each.open = true)")  # tables
        sheet.add_style_tag(content=HIDE + PAPER)
        margin: Any = {"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"}
        sheet.pdf(
            path=str(partial), format="A4", print_background=True, margin=margin, outline=True, tagged=True, scale=0.8
        )
        browser.close()


def publish(made: Path, site: Path) -> None:
    """Put the PDF into the built site, and show the link to it, which the home page hides until then.

    Args:
        made: the PDF.
        site: folder of the built pages.

    Raises:
        SystemExit: the home page has no such link.
    """
    home = site / "book" / "intro.html"
    text = home.read_text(encoding="utf-8")
    if HIDDEN not in text and SHOWN not in text:
        raise SystemExit(f"{home} has no link to a PDF: run `make book` first")
    with whole_or_not(site / made.name) as partial:
        shutil.copy(made, partial)
    with whole_or_not(home) as partial:
        partial.write_text(text.replace(HIDDEN, SHOWN), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=Path, default=ROOT / "_build" / "stage")
    parser.add_argument("--site", type=Path, default=ROOT / "_build" / "html")
    arguments = parser.parse_args()
    chromium()
    made = ROOT / "_build" / "state-rank.pdf"
    print_page(one_page(arguments.stage.resolve()), made)
    publish(made, arguments.site)
    print(f"the book is in {made}, {made.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
