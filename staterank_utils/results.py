"""Write and read results with what is needed to trust them: where, when, from what, with which parameters."""

import contextlib
import difflib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from staterank_utils.markdown import markdown_table, verdict_table
from staterank_utils.models import CHECKPOINTS, EMBEDDED
from staterank_utils.strata import Estimate

STORED = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("torch", "transformers", "flash-linear-attention", "numpy", "scipy", "diptest")
PROFILES = ("quick", "full")
STARTED = time.monotonic()
COMMIT = "STATERANK_COMMIT"  # the environment variable that names the commit of code that was copied from elsewhere


def write_json(path: Path | str, data: Any) -> None:
    """Write JSON whole or not at all: beside the target first, then renamed over it.

    Whatever interrupts the writing (a full disk, Ctrl-C), the target keeps its old content and the partial file is removed.

    Args:
        path: of the target; folders above it are made.
        data: what JSON can hold.

    Raises:
        TypeError: the data hold something that JSON has no form for, such as an array.
        ValueError: the data hold a NaN or infinity, which JSON has no word for.
        OSError: the file system's own error, with the target's name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "a.json"), {"x": 1})
        ...     print(Path(folder, "a.json").read_text().split())
        ['{', '"x":', '1', '}']
    """
    path = Path(path)
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_not(path) as partial, partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, f"could not write results to {path}: {error.strerror}") from error


@contextlib.contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """A place beside a file or folder to write it: renamed over it at the end of the block, removed if anything interrupts that.

    Args:
        path: of the file or folder; the one above it is there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_or_not(Path(folder, "a")) as partial:
        ...         _ = partial.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a']
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if partial.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def provenance(*, parameters: Mapping[str, Any], checkpoints: Sequence[Path] = ()) -> dict[str, Any]:
    """What a result needs beside it: commit, versions, device, checkpoint hashes, parameters, time.

    Args:
        parameters: all that the run could have been given otherwise, seeds included.
        checkpoints: folders of weights that were measured; each is named with a hash over its safetensors files.

    Returns:
        A dictionary that JSON can hold. `seconds` is counted from the import of this module; `commit` is what the environment variable
        STATERANK_COMMIT says, else "unknown" outside a git checkout, and ends in "+changes" where tracked files were changed.

    Raises:
        FileNotFoundError: a folder without weights.

    Example:
        >>> provenance(parameters={"seed": 0})["parameters"]
        {'seed': 0}
    """
    return {
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - STARTED, 1),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "checkpoints": {folder.name: weights_hash(folder) for folder in checkpoints},
        "parameters": dict(parameters),
    }


def weights_hash(folder: Path) -> str:
    """SHA-256 over the safetensors files of a folder, in the order of their names.

    Args:
        folder: in Hugging Face format.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError: there are none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "model.safetensors").write_bytes(b"weights")
        ...     weights_hash(Path(folder)) == hashlib.sha256(b"weights").hexdigest()
        True
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors file")
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


def read_result(path: Path | str, *, parameters: Mapping[str, Any], checkpoints: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a stored result, and refuse it if it was made with other parameters or other weights.

    Args:
        path: written by `write_json` with a `provenance` entry.
        parameters: what the caller asks for; each must be stored with the same value.
        checkpoints: folders of weights as they are now; each must be stored with the same hash.

    Raises:
        FileNotFoundError: there is no such result.
        ValueError: a parameter or the weights differ; the message names them.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "a.json"), {"provenance": provenance(parameters={"seed": 0}), "rows": []})
        ...     read_result(Path(folder, "a.json"), parameters={"seed": 0})["rows"]
        ...     read_result(Path(folder, "a.json"), parameters={"seed": 1})
        Traceback (most recent call last):
            ...
        ValueError: a.json was made with seed=0, not 1: run the notebook again
    """
    path = Path(path)
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    made = data["provenance"]
    again = "run the notebook again"
    for name, value in parameters.items():
        if made["parameters"].get(name) != value:
            raise ValueError(
                f"{path.name} was made with {name}={made['parameters'].get(name)!r}, not {value!r}: {again}"
            )
    for folder in checkpoints:
        if made["checkpoints"].get(folder.name) != weights_hash(folder):
            raise ValueError(f"{path.name} was made with other weights of {folder.name}: {again}")
    return data


def gather(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of one notebook on different models as one result, as if one run had measured them all, one after the other.

    Args:
        parts: each with entries `provenance`, `rows` and, where the notebook keeps them, `tables`; of one commit, the same packages and
            the same parameters but for the model and its revision. They may come from different machines.

    Returns:
        The same entries: rows and the rows of each table, one part after the other, without repetitions; seconds added up.

    Raises:
        ValueError: no parts; or two of them differ in more than the model, measured the same one, or have tables with other heads.

    Example:
        >>> parts = [
        ...     {"provenance": provenance(parameters={"model": name, "seed": 0}), "rows": [{"model": name}], "tables": {}}
        ...     for name in ("a", "b")
        ... ]
        >>> both = gather(parts)
        >>> both["provenance"]["parameters"], both["rows"]
        ({'model': 'a, b', 'seed': 0}, [{'model': 'a'}, {'model': 'b'}])
    """
    if not parts:
        raise ValueError("expected at least one result to gather, got none")
    made = [part["provenance"] for part in parts]
    models = [name.strip() for each in made for name in each["parameters"]["model"].split(",")]
    if len(set(models)) < len(models):
        raise ValueError(f"each model can be gathered once, got results of {', '.join(models)}")
    for each in made:
        for what in ("commit", "packages"):
            if each[what] != made[0][what]:
                raise ValueError(
                    f"results to gather must have one {what}, got {made[0][what]} and {each[what]}: run them again"
                )
        theirs, ours = ({**one["parameters"], "model": "", "revision": ""} for one in (each, made[0]))
        if theirs != ours:
            raise ValueError(f"results to gather may differ in the model alone, got parameters {ours} and {theirs}")
    revisions = {each["parameters"].get("revision", ""): None for each in made}
    parameters = {**made[0]["parameters"], "model": ", ".join(models)}
    if "revision" in parameters:
        parameters["revision"] = ", ".join(filter(None, revisions))
    return {
        "provenance": {
            **made[0],
            "date": max(each["date"] for each in made),
            "seconds": round(sum(each["seconds"] for each in made), 1),
            "device": ", ".join(dict.fromkeys(each["device"] for each in made)),
            "checkpoints": {name: value for each in made for name, value in each["checkpoints"].items()},
            "parameters": parameters,
        },
        "rows": [row for part in parts for row in part["rows"]],
        "tables": _joined([part.get("tables", {}) for part in parts]),
    }


def _joined(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Markdown tables under the same title as one, each different row once."""
    joined = {}
    for title in dict.fromkeys(title for part in parts for title in part):
        tables = [part[title].split("\n") for part in parts if title in part]
        heads = {"\n".join(lines[:2]) for lines in tables}
        if len(heads) > 1:
            raise ValueError(f"tables {title!r} have different heads: {sorted(heads)}")
        rows = dict.fromkeys(line for lines in tables for line in lines[2:])
        joined[title] = "\n".join([*heads, *rows])
    return joined


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)


def _commit() -> str:
    """The commit that runs, marked where files differ from it; results do not count, they change nothing that is measured."""
    if named := os.environ.get(COMMIT):
        return named
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def embedded_folders(models: Sequence[str]) -> list[Path]:
    """Folders of those of the models that are local: embedded names and paths.

    A hub id has none; a result names it by its revision instead.

    Args:
        models: names as `load_model` takes them.

    Example:
        >>> [folder.name for folder in embedded_folders(["hybrid", "owner/name"])]
        ['hybrid']
    """
    candidates = [CHECKPOINTS / name if name in EMBEDDED else Path(name) for name in models]
    return [folder for folder in candidates if folder.is_dir()]


def stored_recovery(name: str) -> list[tuple[str, ...]]:
    """Rows of a table of what fine-tuning brought back to a pruned embedded model (training/recover.py).

    Args:
        name: of the model.

    Returns:
        (model, arm, heads removed, score over intact before and after, bits a byte before and after) for each stored arm; nothing
        where nothing is stored.

    Raises:
        ValueError: the stored numbers are of other weights.

    Example:
        >>> stored_recovery("no such model")
        []
    """
    path = STORED / "recovery" / f"{name}.json"
    if not path.exists():
        return []

    def numbers(row: Mapping[str, Any]) -> Iterator[str]:
        for when in ("before", "after"):
            yield str(Estimate(**row[when]["score / intact"]))
        for when in ("before", "after"):
            yield f"{row[when]['bits a byte']:.3f}"

    rows = read_result(path, parameters={"name": name}, checkpoints=[CHECKPOINTS / name])["rows"]
    return [(name, row["arm"], str(row["heads"]), *numbers(row)) for row in rows]


class Tables(dict[str, str]):
    """Tables of a notebook as Markdown, by title: shown where they are made, stored with the result, shown again beside it.

    Example:
        >>> tables = Tables()
        >>> print(tables.keep("Heads by layer", ("layer", "heads"), [("0", "8")]))
        | layer | heads |
        | --- | --- |
        | 0 | 8 |
        >>> list(tables)
        ['Heads by layer']
    """

    def keep(self, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
        """Make a table, keep it under its title, and return it."""
        self[title] = markdown_table(head, rows)
        return self[title]


def stored_beside(notebook: str, *, parameters: Mapping[str, Any], checkpoints: Sequence[Path] = ()) -> str:
    """The verdicts of the stored full-profile run as Markdown, or a sentence that says why they are not shown.

    Behind the verdicts stand what we read in that run, where NOTEBOOK.md lies beside the stored result, and the run's tables.

    Args:
        notebook: name of the page, such as "01_stratification".
        parameters: what the stored run must have been given.
        checkpoints: folders of the weights that it must have measured.

    Example:
        >>> stored_beside("09_nothing_yet", parameters={})
        '*There is no stored full-profile run of 09_nothing_yet for these models.*'
    """
    path = STORED / "full" / f"{notebook}.json"
    try:
        data = read_result(path, parameters=parameters, checkpoints=checkpoints)
    except FileNotFoundError:
        return f"*There is no stored full-profile run of {notebook} for these models.*"
    except ValueError as error:
        return f"*The stored full-profile run is not shown: {error}.*"
    made = data["provenance"]
    parts = [
        f"Beside it, the stored run of the full profile ({made['parameters']['n_prompts']} prompts each, {made['device']}, "
        f"{made['seconds']:.0f} s, {made['date'][:10]}, commit {made['commit'][:10]}):",
        verdict_table(data["rows"]),
    ]
    if path.with_suffix(".md").exists():
        parts.append(path.with_suffix(".md").read_text(encoding="utf-8").strip())
    if tables := data.get("tables"):
        inside = "\n\n".join(f"*{title}*\n\n{table}" for title, table in tables.items())
        parts.append(f"::::{{dropdown}} The tables of that run\n{inside}\n::::")
    return "\n\n".join(parts)


def stored_run(notebook: str, *, parameters: Mapping[str, Any], checkpoints: Sequence[Path] = ()) -> dict[str, Any]:
    """The rows and tables of the stored full-profile run, to draw and to quote; none where `stored_beside` says why it is not shown.

    Args:
        notebook, parameters, checkpoints: as in `stored_beside`.

    Returns:
        "rows", the verdicts, and "tables", by title; without a run no rows, and empty tables of any title.

    Example:
        >>> stored_run("09_nothing_yet", parameters={})["rows"]
        []
    """
    try:
        return read_result(STORED / "full" / f"{notebook}.json", parameters=parameters, checkpoints=checkpoints)
    except (FileNotFoundError, ValueError):
        return {"rows": [], "tables": defaultdict(str)}


def check_parameters(namespace: dict[str, Any], *, texts: Sequence[str] = (), numbers: Sequence[str] = ()) -> None:
    """Refuse a misspelt notebook parameter, which papermill only warns about, a value of another kind, and a profile that there is not.

    Call it in the cell after the parameters: whatever plain value stands in the namespace then came from there. That holds
    the first time; when cells are run again by hand, the names are no longer looked at.

    Args:
        namespace: `globals()` of the notebook; a mark that the names were looked at is left in it.
        texts: names of the parameters that are texts.
        numbers: names of those that are whole numbers.

    Raises:
        ValueError: a name that is not known, with the nearest one that is, or an unknown profile.
        TypeError: a value of another kind.

    Example:
        >>> check_parameters({"seed": 0}, numbers=["seed"])
        >>> check_parameters({"seed": "x"}, numbers=["seed"])
        Traceback (most recent call last):
            ...
        TypeError: parameter 'seed' takes a whole number, got 'x'
        >>> check_parameters({"sede": 0}, numbers=["seed"])
        Traceback (most recent call last):
            ...
        ValueError: this notebook has no parameter 'sede'; did you mean 'seed'? It has seed.
    """
    profile = namespace.get("profile", PROFILES[0])
    if profile not in PROFILES:
        raise ValueError(f"there is no profile {profile!r}: choose from {', '.join(PROFILES)}")
    if namespace.get("_parameters_checked"):
        return
    plain = (bool, int, float, str, list, dict, type(None))
    given = [
        name
        for name, value in namespace.items()
        if isinstance(value, plain) and not name.startswith("_") and name not in ("In", "Out")
    ]
    known = [*texts, *numbers]
    for name in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"this notebook has no parameter {name!r}{hint} It has {', '.join(known)}.")
    for kind, words, names in ((str, "a text", texts), (int, "a whole number", numbers)):
        for name in names:
            value = namespace.get(name, kind())
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"parameter {name!r} takes {words}, got {value!r}")
    namespace["_parameters_checked"] = True
