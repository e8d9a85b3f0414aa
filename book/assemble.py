"""Put the book together: run every notebook with papermill, write the pages that are made from results, ready for the site.

    python -m book.assemble --stage _build/stage --profile quick

The staging folder then holds all that jupyter-book needs, and the working tree is as it was.
"""

import argparse
import base64
import json
import multiprocessing
import os
import platform
import shutil
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from book import home
from book.ladder import first_pair, ladder_figures, ladder_tables, needed, over_models, stored_models
from book.neighbours import expansion_figure, expansion_tables, neighbours_table
from staterank_notebook import execute
from staterank_utils import claims, interactive, markdown
from staterank_utils.models import EMBEDDED
from staterank_utils.report import finish_page
from staterank_utils.results import STORED

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("trace", "spectra", "ablate", "prune", "watch", "large")
REFERENCE = 0.7  # seconds that the machine of the time limits takes for `reference_seconds`
PACKAGES = (
    "torch", "transformers", "flash-linear-attention", "triton", "numpy", "scipy", "diptest", "matplotlib", "seaborn", "papermill", "jupyter-book",
)  # fmt: skip


def notebook_pages(stage: Path, profile: str, only: Sequence[str]) -> list[dict[str, Any]]:
    """The notebooks, or those named: two at a time with half of the processors each, or one after the other on a GPU."""
    (stage / "notebooks").mkdir(parents=True)
    # Relative to the folder that notebooks run in, since the page shows the parameters.
    folder = os.path.relpath(stage / "results", ROOT)
    sources = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if unknown := set(only) - {source.stem for source in sources}:
        raise SystemExit(
            f"there is no notebook {', '.join(sorted(unknown))}: choose from {', '.join(s.stem for s in sources)}"
        )
    sources = [source for source in sources if not only or source.stem in only]
    parameters = {"profile": profile, "results_folder": folder}
    at_once = 1 if torch.cuda.is_available() else 2
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))  # of each notebook
    # A process of its own for each, which tells its peak memory.
    processes = ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with processes, tqdm(total=len(sources), desc="notebooks") as bar:
        made = [
            processes.submit(execute, source, stage / "notebooks" / source.name, parameters, cwd=ROOT)
            for source in sources
        ]
        try:
            for run in as_completed(made):
                run.result()
                bar.update()
        except BaseException:
            processes.shutdown(cancel_futures=True)
            raise
        runs = [run.result() for run in made]
    for source in sources:
        finish_page(stage / "notebooks" / source.name, stage / "results")
    return runs


def model_card(name: str) -> str:
    """The card of an embedded model without its front matter, one heading level down."""
    text = (ROOT / "checkpoints" / name / "README.md").read_text(encoding="utf-8")
    body = text.split("---\n", 2)[2] if text.startswith("---\n") else text
    return "\n".join("#" + line if line.startswith("#") else line for line in body.strip().splitlines())


def reference_seconds() -> float:
    """How fast this machine is: seconds for the singular values of 1,152 float32 matrices of 128 x 128, the best of three."""
    matrices = torch.randn(1152, 128, 128, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(3):
        started = time.monotonic()
        torch.linalg.svdvals(matrices)
        times.append(time.monotonic() - started)
    return min(times)


def status_tables(runs: list[dict[str, Any]], seconds: float) -> str:
    """Versions and timings of this build as Markdown; `seconds` is what all runs took together."""
    versions = [
        ("Python", platform.python_version()),
        ("machine", f"{platform.machine()}, {os.cpu_count()} processors"),
    ]
    for package in PACKAGES:
        try:
            versions.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            versions.append((package, "not installed"))
    here = reference_seconds()
    scale = REFERENCE / here
    timings = [
        (
            run["notebook"],
            run["profile"],
            f"{run['seconds']:.0f}",
            f"{run['seconds'] * scale:.0f}",
            f"{run['peak_gib']:.1f}",
        )
        for run in runs
    ]
    timings.append(("all, two at a time on a CPU", "", f"{seconds:.0f}", f"{seconds * scale:.0f}", ""))
    head = ("notebook", "profile", "seconds", "at reference speed", "peak memory, GiB")
    return (
        f"Machines differ, so times are also given as on a machine that takes {REFERENCE} s for `torch.linalg.svdvals` of 1,152 float32 matrices "
        f"of 128 x 128. This one took {here:.2f} s.\n\n"
        + markdown.markdown_table(head, timings)
        + "\n\n## Versions\n\n"
        + markdown.markdown_table(("", "version"), versions)
    )


def figure(notebook: Path, name: str) -> bytes:
    """The PNG of a named figure of an executed notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    [image] = (
        output["data"]["image/png"]
        for cell in cells
        if cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") == name
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    )
    return base64.b64decode(image)


def stored_benchmark(name: str) -> str:
    """The stored tables of a benchmark, one per machine, and where each was measured."""
    tables = []
    for file in sorted((ROOT / "results" / "benchmarks").glob(f"{name}_?pu.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        made = data["provenance"]
        where = f"Measured on {made['device']}, {made['date'][:10]}, commit {made['commit'][:10]}, torch {made['packages']['torch']}."
        tables.append(f"{data['table']}\n\nGoal: {data['goal']}. {where}")
    if not tables:
        raise SystemExit(f"no stored benchmark {name!r}: run `python -m benchmarks.{name} --store`")
    return "\n\n".join(tables)


def conformance_tables() -> str:
    """What the checks of every architecture measured, on each machine and in each dtype."""
    parts = []
    stored = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(STORED.glob("conformance_?pu.json"))]
    known = {row["model"] for data in stored for row in data["rows"]}
    for data in stored:
        made, rows = data["provenance"], data["rows"]
        versions = ", ".join(
            f"{name} {made['packages'][name]}" for name in ("torch", "transformers", "flash-linear-attention")
        )
        if absent := sorted(known - {row["model"] for row in rows}):
            parts.append(f"Not run on {made['device']} yet: {', '.join(absent)}.")
        for dtype in ("float32", "bfloat16"):
            properties = list(rows[0][dtype])
            table = [(row["model"], *(_difference(row[dtype].get(name)) for name in properties)) for row in rows]
            parts.append(f"**{made['device']}, {dtype}** ({made['date'][:10]}, {versions})")
            parts.append(markdown.markdown_table(("architecture", *properties), table))
    return "\n\n".join(parts)


def _difference(measured: float | None) -> str:
    if measured is None:
        return "–"
    return f"{measured:.0e}" if measured else "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=Path, default=ROOT / "_build" / "stage")
    parser.add_argument("--figure", type=Path, help="where to put the figure of the README")
    parser.add_argument("--profile", choices=("quick", "full"), default="quick")
    parser.add_argument("--only", nargs="*", default=[], help="names of the notebooks to run; all by default")
    arguments = parser.parse_args()
    stage: Path = arguments.stage.resolve()
    if ROOT / "_build" not in stage.parents:
        raise SystemExit(f"the staging folder is emptied first, so it must lie in {ROOT / '_build'}; got {stage}")
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(ROOT / "book", stage / "book", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, stage / name)
    started = time.monotonic()
    runs = notebook_pages(stage, arguments.profile, arguments.only)
    seconds = time.monotonic() - started
    with zipfile.ZipFile(stage / "results" / "notebooks.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for source in sorted((ROOT / "notebooks").glob("*.ipynb")):
            archive.write(source, source.name)
    (stage / "book" / "_static" / "vega.js").write_text(interactive.bundle(), encoding="utf-8")
    models = stored_models()
    stored = {name: content["rows"] for name, (_, content) in models.items()}
    of_first_pair = {name: content["rows"] for name, content in first_pair().items()}
    when = home.ladder_answer(stored | of_first_pair, needed())
    again = json.loads((STORED / "ladder" / "repeats" / "hybrid-text-0.json").read_text(encoding="utf-8"))
    generated = {
        "tiles": home.home_tiles(
            stage / "results", EMBEDDED, home.ladder_verdicts(stored | of_first_pair, over_models())
        ),
        "tiles_ladder": home.ladder_tiles(stored | of_first_pair),
        "ladder_answer": when,
        "tiles_legend": home.legend(),
        "retrained": home.retrained("hybrid", models["hybrid-text-0"][1], again),
        "answers": f"{home.answers(stage / 'results')}\n- {{doc}}`ladder` {markdown.in_two(when)[0]}",
        "overview": markdown.overview_table(stage / "results", EMBEDDED),
        "registered": markdown.registered_table(),
        "preamble": claims.PREAMBLE,
        "controls": claims.CONTROLS,
        "second": markdown.rules_table(claims.SECOND),
        "second_terms": claims.SECOND_TERMS,
        "second_readings": claims.SECOND_READINGS,
        "second_later": claims.SECOND_LATER,
        "third": markdown.rules_table(claims.THIRD),
        "third_terms": claims.THIRD_TERMS,
        "status": status_tables(runs, seconds),
        "conformance": conformance_tables(),
        **ladder_tables(),
        **expansion_tables(),
        "neighbours": neighbours_table(),
        **{f"benchmark_{name}": stored_benchmark(name) for name in BENCHMARKS},
        **{f"card_{name}": model_card(name) for name in EMBEDDED},
    }
    (stage / "book" / "generated").mkdir()
    ladder_figures(stage / "book" / "generated", stage / "results")
    expansion_figure(stage / "book" / "generated", stage / "results")
    for name, text in generated.items():
        (stage / "book" / "generated" / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    if arguments.figure:
        arguments.figure.write_bytes(figure(stage / "notebooks" / "01_stratification.ipynb", "fig-ranks-over-time"))
    (stage / "results" / "runs.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
