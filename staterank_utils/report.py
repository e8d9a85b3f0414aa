"""A report on one model: the chapters of the book run on it, as a folder of pages that opens from disk."""

import hashlib
import json
import logging
import math
import multiprocessing
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from packaging.requirements import Requirement
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_notebook import tell
from staterank_utils import __version__, claims, markdown
from staterank_utils.architectures import linear_layers
from staterank_utils.budget import duration_in_words, in_words, machine_memory, moment_bytes, weight_bytes
from staterank_utils.models import (
    CHECKPOINTS,
    DTYPES,
    EMBEDDED,
    check_device,
    load_tokenizer,
    model_outline,
    runs_on_cpu,
    verify_weights,
)
from staterank_utils.results import PROFILES, check_writable, weights_hash, whole_or_not, write_json
from staterank_utils.studies.groups import EARLY, check_sizes
from staterank_utils.tasks import domain_prompts
from staterank_utils.tracing import check_dtype, check_even

log = logging.getLogger(__name__)
PACKAGE = Path(__file__).resolve().parent
# Notebooks and looks of the book: in the package where it was installed from a wheel, beside it in the repository.
BOOK = PACKAGE / "_book" if (PACKAGE / "_book").exists() else PACKAGE.parent
DISTRIBUTION = "staterank-utils"
JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"
LEAST = 20.0  # seconds that a chapter takes on any model, most of them imports
PATIENCE = 10.0  # seconds that a chapter's process has to end
ROOM = 500_000_000  # bytes that must be free: of pages, the library of charts, and executed notebooks
DEFAULT = "at its default"  # of a size, a dtype or a device that was not given
LOCK = ".lock"  # in the folder of a report that is being written
TOLD = 400  # letters of an error that a page shows


def finish_page(notebook: Path, numbers: Path) -> None:
    """Make a page of an executed notebook: without the cell that papermill added, and with links to the numbers behind figures.

    That cell repeats the parameters above it.

    Args:
        notebook: executed, below the folder that the site is built from.
        numbers: folder with FIGURE.csv.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = Path(folder, "page.ipynb")
        ...     _ = page.write_text('{"cells": [{"metadata": {"tags": ["injected-parameters"]}}]}')
        ...     finish_page(page, Path(folder))
        ...     json.loads(page.read_text())["cells"][0]["metadata"]["tags"]
        ['injected-parameters', 'remove-cell']
    """
    content = json.loads(notebook.read_text(encoding="utf-8"))
    content.get("metadata", {}).pop("papermill", None)  # which tells where it lay
    for cell in content["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "injected-parameters" in tags:
            tags.append("remove-cell")
        figure = cell["metadata"].get("mystnb", {}).get("figure", {})
        if figure and (numbers / f"{figure['name']}.csv").exists():
            figure["caption"] += f" {{download}}`Numbers <../results/{figure['name']}.csv>`"
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_report(
    model: str,
    out: Path | str,
    *,
    revision: str | None = None,
    profile: str = "quick",
    device: str | None = None,
    dtype: str | None = None,
    only: Sequence[str] = (),
    parameters: Mapping[str, int] | None = None,
    in_words: Callable[[str], str] = str,
) -> dict[str, str]:
    """Run the book's chapters on a model, and build pages of them.

    A model that cannot be measured is refused before its weights are read. A chapter that fails leaves the others alone; the first page
    says why. The same call again resumes with the chapters that are left. A folder holds one report: a call with another model, other
    weights or other sizes needs another folder.

    Args:
        model: an embedded name, a folder in Hugging Face format, or a hub id.
        out: folder of the report; OUT/index.html is its first page.
        revision: commit or tag, for a hub id.
        profile: "quick" (minutes on two cores for a small model) or "full".
        device: as in `load_model`.
        dtype: of the weights, "float32" or "bfloat16"; by default as in `load_model`.
        only: names of chapters, such as "01_stratification"; all by default.
        parameters: sizes that every chapter which has them takes, such as {"n_prompts": 2}.
        in_words: puts the reasons of chapters that failed in the words of who asked, such as a command's options.

    Returns:
        Chapter -> why it failed; empty where none did.

    Raises:
        ValueError: an unknown profile, dtype, chapter or parameter, or a model that cannot be measured.
        FileExistsError: the folder holds something else, and the message says what; or another call is writing a report there.
        ModuleNotFoundError: without the packages that run and build notebooks.
        OSError: a hub id that could not be fetched, or too little room on the disk.

    Example:
        >>> write_report("hybrid", "report", profile="whole")
        Traceback (most recent call last):
            ...
        ValueError: there is no profile 'whole': choose from quick, full
    """
    out, sizes = Path(out).resolve(), dict(parameters or {})
    if "," in model:
        raise ValueError(
            f"a report is on one model, and {model!r} has a comma, at which chapters split: rename the folder"
        )
    if dtype not in (None, *DTYPES):
        raise ValueError(f"there is no dtype {dtype!r} of a report: choose from {', '.join(DTYPES)}")
    sources = _chapters(profile, only)
    _check_packages()
    known = {source: _sizes_of(source, sizes) for source in sources}
    if unknown := set(sizes) - {name for of in known.values() for name in of}:
        raise ValueError(f"no chapter that was asked for has a size {', '.join(sorted(unknown))}")
    check_sizes(n_prompts=sizes.get("n_prompts", 2), n_tokens=sizes.get("n_tokens", 2 * EARLY))
    outline = _checked(model, revision, device, dtype, sizes)
    plan = " ".join((_memory(model, outline, device, dtype), _time(outline, known, profile, device)))
    folder = CHECKPOINTS / model if model in EMBEDDED else Path(model)
    if folder.is_dir():
        verify_weights(folder)
    given: dict[str, Any] = {
        "model": str(folder.resolve()) if folder.is_dir() and model not in EMBEDDED else model,
        "revision": revision or "", "device": device or "", "dtype": dtype or "", "profile": profile,
    }  # fmt: skip
    files = _files_hash(folder) if folder.is_dir() else "of the revision"
    chosen = {name: value for name, value in {**given, **sizes}.items() if value}
    made_of = {**chosen, "version": __version__, "files": files}
    _check_folder(out, made_of)
    with _alone_in(out):
        _check_folder(out, made_of)
        _begin(out / "work", made_of)
        print(plan, file=sys.stderr)
        missing = _run_chapters(
            sources, out / "work", {source: {**given, **known[source]} for source in sources}, in_words
        )
        measured_with = ", ".join(f"{name} {value}" for name, value in chosen.items() if name != "model")
        _build(out, out / "work", given["model"], measured_with, _done(out / "work"), missing)
    return missing


def _run_chapters(
    sources: Iterable[Path], work: Path, parameters: Mapping[Path, Mapping[str, Any]], in_words: Callable[[str], str]
) -> dict[str, str]:
    """Run the chapters that are not done; chapter -> why it failed."""
    missing: dict[str, str] = {}
    [model] = {of["model"] for of in parameters.values()}
    with _called(model, work) as name, tqdm(sources, desc="chapters") as bar:
        for source in bar:
            bar.set_postfix_str(source.stem)
            target = work / "notebooks" / source.name
            named = {**parameters[source], "model": name, "results_folder": str(work / "results")}
            if not target.exists() and (reason := _run(source, target, named, cwd=work)):
                said = in_words(reason)
                log.warning("%s failed: %s", source.stem, said)
                missing[source.stem] = said if len(said) <= TOLD else said[:TOLD] + " ..."
    if not _done(work):
        raise ValueError("no chapter could be run: " + "; ".join(f"{name}: {why}" for name, why in missing.items()))
    return missing


@contextmanager
def _called(model: str, work: Path) -> Iterator[str]:
    """What chapters call a model: a folder by its own name, through a link beside them, so that figures name no place of this machine."""
    link = work / Path(model).name
    if link.is_symlink():  # left by a stop
        link.unlink()
    if not Path(model).is_absolute() or link.name in EMBEDDED or link.exists():
        yield model
        return
    link.symlink_to(model, target_is_directory=True)
    try:
        yield link.name
    finally:
        link.unlink()


def _chapters(profile: str, only: Sequence[str]) -> list[Path]:
    if profile not in PROFILES:
        raise ValueError(f"there is no profile {profile!r}: choose from {', '.join(PROFILES)}")
    sources = _all_chapters()
    if unknown := set(only) - {source.stem for source in sources}:
        raise ValueError(
            f"there is no chapter {', '.join(sorted(unknown))}: choose from {', '.join(s.stem for s in sources)}"
        )
    return [source for source in sources if not only or source.stem in only]


def _all_chapters() -> list[Path]:
    return sorted((BOOK / "notebooks").glob("*.ipynb"))


def _title(notebook: Path) -> str:
    """The first heading of a chapter."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), notebook.stem)


def _done(work: Path) -> list[str]:
    """The chapters of which there is a page."""
    return sorted(file.stem for file in (work / "notebooks").glob("*.ipynb"))


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the folder of a report, which is made where it is not there, so that no other command writes to it meanwhile."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"another command is writing a report to {out}: wait until it has ended, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
        (out / LOCK).unlink(missing_ok=True)


def _check_folder(out: Path, made_of: Mapping[str, Any]) -> None:
    """Refuse a folder that holds anything but a report on the same things, or one of which no chapter is done; or that has no room."""
    marker = out / "work" / "report.json"
    if marker.exists() and _done(marker.parent):
        before = json.loads(marker.read_text(encoding="utf-8"))
        if others := [name for name in {**made_of, **before} if before.get(name) != made_of.get(name)]:
            if "model" in others and "files" in others:
                others.remove("files")
            differs = ", ".join(
                "files of the model that have changed since" if name == "files" else f"{name} {before.get(name, DEFAULT)!s}, not {made_of.get(name, DEFAULT)!s}"
                for name in others
            )  # fmt: skip
            raise FileExistsError(f"{out} holds a report with {differs}: choose another folder, or remove this one")
        return
    if not marker.exists() and out.exists() and (not out.is_dir() or any(each.name != LOCK for each in out.iterdir())):
        raise FileExistsError(f"{out} is there already and is no report: choose a folder that is new or empty")
    above = check_writable(out)
    if (free := shutil.disk_usage(above).free) < ROOM:
        raise OSError(f"{out} has room for {in_words(free)}, and a report needs {in_words(ROOM)}: choose another disk")


def _begin(work: Path, made_of: Mapping[str, Any]) -> None:
    """Make the folder in which chapters are run, anew where none is done."""
    if not _done(work):
        shutil.rmtree(work, ignore_errors=True)  # what a start without a finished chapter left
        write_json(work / "report.json", made_of)
    (work / "notebooks").mkdir(exist_ok=True)


def _check_packages() -> None:
    if absent := _absent(metadata.requires(DISTRIBUTION) or ()):
        raise ModuleNotFoundError(
            f"a report needs {', '.join(needed.name for needed in absent)}: pip install {' '.join(shlex.quote(f'{needed.name}{needed.specifier}') for needed in absent)}, "
            f"or install {DISTRIBUTION} with [report] behind its name",
            name=absent[0].name,
        )


def _absent(requirements: Iterable[str]) -> list[Requirement]:
    """Of the packages that the extra "report" asks for, those that are not installed, or in another version."""
    asked = (
        needed
        for needed in map(Requirement, requirements)
        if needed.marker and needed.marker.evaluate({"extra": "report"})
    )
    return [
        needed for needed in asked
        if not any(needed.specifier.contains(found.version, prereleases=True) for found in metadata.distributions(name=needed.name))
    ]  # fmt: skip


def _files_hash(folder: Path) -> str:
    """Over weights, configuration and tokenizer of a model."""
    told = hashlib.sha256(weights_hash(folder).encode())
    for file in sorted(folder.glob("*.json")):
        told.update(file.name.encode() + file.read_bytes())
    return told.hexdigest()


def _checked(
    model: str, revision: str | None, device: str | None, dtype: str | None, sizes: Mapping[str, int]
) -> PreTrainedModel:
    """The model without weights, if it can be measured on prompts of these sizes."""
    if device:
        check_device(device)
    outline = model_outline(model, revision=revision)
    check_even(linear_layers(outline))
    check_dtype(linear_layers(outline), DTYPES[dtype] if dtype else None)
    tokenizer = load_tokenizer(model, revision=revision)
    if "n_tokens" in sizes:
        for domain in ("prose", "code"):  # whose texts end; the others are made
            domain_prompts(domain, tokenizer, n_prompts=sizes.get("n_prompts", 2), n_tokens=sizes["n_tokens"], seed=0)
    return outline


def _memory(model: str, outline: PreTrainedModel, device: str | None, dtype: str | None) -> str:
    """What will be measured, and the room that it takes, from the configuration alone."""
    layers, has = linear_layers(outline), _memory_of(device)
    n_parameters = outline.num_parameters()
    if dtype or runs_on_cpu(device):  # where weights are float32 by default
        weights = f"{in_words(n_parameters * DTYPES[dtype or 'float32'].itemsize)} in {dtype or 'float32'}"
    else:
        weights = f"{in_words(weight_bytes(outline))} as they are stored"
    return (
        f"{model}: {len(layers)} linear-attention layers, {sum(layer.n_heads for layer in layers)} heads with states of {layers[0].d_k} x "
        f"{layers[0].d_v}. Weights take {weights}, "
        f"and some chapters hold a control of the same size beside them; the states of a prompt take {in_words(moment_bytes(outline))}{has and '; '}{has}. "
        f"The report takes up to {in_words(ROOM)} of disk."
    )


def _memory_of(device: str | None) -> str:
    """The memory that weights on a device share, in words; empty where the system does not say."""
    if runs_on_cpu(device):
        memory = machine_memory()
        return f"this machine has {in_words(memory)} of memory" if memory else ""
    if device == "auto":
        total = sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        return f"the GPUs of this machine have {in_words(total)} of memory together"
    return f"this GPU has {in_words(torch.cuda.get_device_properties(device or 'cuda').total_memory)} of memory"


def _time(outline: PreTrainedModel, known: Mapping[Path, Mapping[str, int]], profile: str, device: str | None) -> str:
    """How long the chapters will take on a CPU: what they took on the book's models, by the number of weights and by the sizes."""
    stored = {source: BOOK / "results" / "quick" / f"{source.stem}.json" for source in known}
    if profile != "quick" or not runs_on_cpu(device) or not all(file.exists() for file in stored.values()):
        return "How long it takes is known for the book's chapters in the quick profile on a CPU alone."
    seconds, n_weights = 0.0, outline.num_parameters()
    for source, sizes in known.items():
        made = json.loads(stored[source].read_text(encoding="utf-8"))["provenance"]
        # A smaller model than the book's takes as long: most of its time goes by between kernels.
        of_book = made["n_weights"].values()
        factor = max(n_weights, min(of_book)) / sum(of_book)
        factor *= math.prod(value / made["parameters"][name] for name, value in sizes.items() if name.startswith("n_"))
        seconds += max(LEAST, made["seconds"] * factor)
    return f"On two cores the chapters take very roughly {duration_in_words(seconds)}, by what they took on the book's models and the number of weights."


def _sizes_of(source: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Of the sizes, those that a chapter has."""
    import papermill

    has = papermill.inspect_notebook(str(source)) if sizes else {}
    return {name: value for name, value in sizes.items() if name in has}


def _run(source: Path, target: Path, parameters: Mapping[str, Any], *, cwd: Path) -> str | None:
    """Run a chapter, without its cells on the book's own models, in a process of its own, and finish its page; why it failed, or None."""
    with tempfile.TemporaryDirectory() as folder:
        of_model, executed = Path(folder, source.name), Path(folder, "executed.ipynb")
        content = json.loads(source.read_text(encoding="utf-8"))
        content["cells"] = [cell for cell in content["cells"] if "of-the-book" not in _tags(cell)]
        of_model.write_text(json.dumps(content), encoding="utf-8")
        if reason := _apart(of_model, executed, parameters, cwd):
            return reason
        finish_page(executed, cwd / "results")
        with whole_or_not(target) as partial:
            shutil.copy(executed, partial)
    return None


def _apart(source: Path, target: Path, parameters: Mapping[str, Any], cwd: Path) -> str | None:
    """Execute a notebook in a process of its own, which ends with this one; why it failed, or None."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(there, source, target, parameters, cwd), daemon=True)
    resource_tracker.ensure_running()  # which the start does otherwise, and then lets the signal in again
    with _deaf():
        process.start()
    there.close()
    try:
        told: str | None = here.recv()
        process.join(PATIENCE)  # it takes down what it made
    except EOFError:
        process.join()
        told = f"the process that ran it ended with status {process.exitcode}"
    finally:
        process.terminate()
        process.join()
    return told


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that start in this block never hear Ctrl-C; the one that starts them hears it at the end of the block, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _build(
    out: Path, work: Path, model: str, measured_with: str, chapters: Sequence[str], missing: Mapping[str, str]
) -> None:
    """Write the pages around the chapters, and build the site into OUT."""
    from staterank_utils import interactive  # with the libraries of figures, which the command's help need not wait for

    stage, name_of_model = work / "site", Path(model).name if Path(model).is_dir() else model

    def named(text: str) -> str:
        """A text that names the model, and no place of this machine."""
        places = {model: name_of_model, str(work): ".", str(BOOK): ".", sys.prefix: "python"}
        for place, name in places.items():
            text = text.replace(json.dumps(place)[1:-1], name)
        return text

    def alone(text: str) -> str:
        """A text on models without the name of the one that it is on."""
        return text.replace(f" ({name_of_model})", "")

    shutil.rmtree(stage, ignore_errors=True)
    (stage / "results").mkdir(parents=True)
    for file in (work / "results").iterdir():
        if file.suffix == ".csv" or file.stem in chapters:
            (stage / "results" / file.name).write_text(named(file.read_text(encoding="utf-8")), encoding="utf-8")
    (stage / "notebooks").mkdir()
    (stage / "book").mkdir()
    shutil.copytree(BOOK / "book" / "_static", stage / "book" / "_static")
    shutil.copy(BOOK / "book" / "references.bib", stage / "book")
    for name in chapters:
        text = (work / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        (stage / "notebooks" / f"{name}.ipynb").write_text(alone(_alone(named(text), chapters)), encoding="utf-8")
    (stage / "book" / "_static" / "vega.js").write_text(interactive.bundle(), encoding="utf-8")
    others = {source.stem: "not asked for" for source in _all_chapters() if source.stem not in chapters}
    titles = {source.stem: _title(source) for source in _all_chapters()}
    not_run = "\n".join(f"- *{titles[name]}* ({name}): {named(why)}" for name, why in {**others, **missing}.items())
    pages = {
        "index": "\n\n".join(
            [
                f"# State ranks of {name_of_model}",
                f"The chapters of the book \"State Rank Dynamics, tested\", run on `{name_of_model}` with staterank-utils {__version__}. Verdicts are by rules that were "
                "fixed before the book's models were trained ({doc}`book/claims`). Embedded models, and those of the ladder, are models of the book. "
                f"Measured with: {measured_with}.",
                alone(_answers(stage / "results", chapters)),
                alone(markdown.overview_table(stage / "results", {name_of_model: name_of_model})),
                "## What was not run" if not_run else "",
                not_run,
            ]
        ),
        "book/claims": "\n\n".join(
            [
                "# The registered rules", claims.PREAMBLE, markdown.registered_table(), claims.CONTROLS,
                "## Second registration", claims.SECOND_TERMS, markdown.rules_table(claims.SECOND), claims.SECOND_READINGS,
            ]
        ),
        "book/references": "# References\n\n```{bibliography}\n:all:\n```",
    }  # fmt: skip
    for name, text in pages.items():
        (stage / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    write_json(stage / "_toc.yml", _contents(chapters))  # JSON is YAML
    write_json(stage / "_config.yml", _configuration(name_of_model))
    print("The pages are being built, which takes a minute or two.", file=sys.stderr)
    made = subprocess.run(
        [sys.executable, "-c", JUPYTER_BOOK, "build", str(stage), "--path-output", str(work), "--all", "-q"],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise ChildProcessError(f"the pages could not be built:\n{made.stdout[-2000:]}\n{made.stderr[-2000:]}")
    shutil.copytree(work / "_build" / "html", out, dirs_exist_ok=True)
    shutil.rmtree(work / "_build")


def _answers(results: Path, chapters: Sequence[str]) -> str:
    """What each chapter found, as a list."""
    found = {name: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["answer"] for name in chapters}
    return "\n".join(f"- {{doc}}`notebooks/{name}` {answer}" for name, answer in found.items())


def _alone(notebook: str, chapters: Sequence[str]) -> str:
    """A chapter with its parameters as given, and without references to pages that the report lacks."""
    content = json.loads(notebook)
    cells = [cell for cell in content["cells"] if "parameters" not in _tags(cell)]
    for cell in cells:
        if "injected-parameters" in _tags(cell):
            cell["metadata"]["tags"] = ["hide-input"]
        shown = cell["metadata"].get("mystnb", {})
        for part, name in ((shown.get("image"), "alt"), (shown.get("figure"), "caption")):
            if part:
                sentences = re.split(r"(?<=\.) ", part[name])
                part[name] = " ".join(each for each in sentences if not re.search("embedded|stored", each))
    content["cells"] = cells

    def plain(found: re.Match[str]) -> str:
        text, target = found["text"], found["target"] or found["text"]
        there = target == "../book/claims" or target in chapters
        return found[0] if there else f"{text} of the book" if found["target"] else f"the chapter {target} of the book"

    texts = json.dumps(content, indent=1, ensure_ascii=False)
    return re.sub(r"\{doc\}`(?P<text>[^`<]*?)(?: <(?P<target>[^`>]*)>)?`", plain, texts)


def _tags(cell: Mapping[str, Any]) -> set[str]:
    return set(cell["metadata"].get("tags", ()))


def _contents(chapters: Sequence[str]) -> dict[str, Any]:
    files = [{"file": f"notebooks/{name}"} for name in chapters]
    return {
        "format": "jb-book",
        "root": "index",
        "chapters": [*files, *({"file": f"book/{name}"} for name in ("claims", "references"))],
    }


def _configuration(model: str) -> dict[str, Any]:
    """That of the book, without what leads to its repository."""
    import yaml

    made: dict[str, Any] = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))
    for name in ("repository", "launch_buttons"):
        made.pop(name)
    made["title"] = f"State ranks of {model}"
    made["html"] = {"favicon": "book/_static/favicon.svg"}
    kept = ("sphinx-mathjax-offline", "sphinx_proof")
    made["sphinx"]["extra_extensions"] = [name for name in made["sphinx"]["extra_extensions"] if name in kept]
    made["sphinx"]["config"] = {
        name: value
        for name, value in made["sphinx"]["config"].items()
        if not name.startswith(("autodoc", "napoleon", "nitpick"))
    }
    made["sphinx"]["config"]["smartquotes"] = False  # which makes a dash of the two before an option
    return made
