"""Write and read results with what is needed to trust them: where, when, from what, with which parameters."""

import contextlib
import csv
import difflib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from staterank_utils.models import CHECKPOINTS, EMBEDDED

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


def plain(value: Any, *, digits: int = 6) -> Any:
    """Numbers as JSON can hold them: so many digits, null for what is undefined.

    Args:
        value: of mappings, sequences, arrays and numbers; keys become texts.
        digits: that count.

    Example:
        >>> plain({0.5: [float("nan"), 1 / 3, 2]}, digits=3)
        {'0.5': [None, 0.333, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(each, digits=digits) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), digits=digits)
    if isinstance(value, list | tuple):
        return [plain(each, digits=digits) for each in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.{digits}g}")
    return value


def check_writable(path: Path) -> Path:
    """Refuse a place that cannot be written, before anything is measured.

    Args:
        path: of a file or folder, which need not be there.

    Returns:
        The folder that exists and will hold what is written: PATH itself if it is one, or else the nearest above it.

    Raises:
        PermissionError: it cannot be written.

    Example:
        >>> check_writable(Path(__file__) / "new")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        PermissionError: ... cannot be written: ...results.py is no folder that you may write into
    """
    above = path if path.is_dir() else next(folder for folder in path.absolute().parents if folder.exists())
    try:  # for some folders, such as those of /proc, the system says yes and means no
        tempfile.TemporaryFile(dir=above).close()
    except OSError:
        raise PermissionError(f"{path} cannot be written: {above} is no folder that you may write into") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} cannot be written: it is read-only")
    return above


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


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all; a column that a row lacks is empty there.

    Args:
        path: of the file; the folder above it is there.
        rows: column -> value; the columns stand in the order in which they first appear.

    Raises:
        ValueError: there are no rows.
        OSError: the file system's own error.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_table(Path(folder) / "a.csv", [{"x": 1}, {"x": 2, "y": 3}])
        ...     (Path(folder) / "a.csv").read_text().splitlines()
        ['x,y', '1,', '2,3']
    """
    if not rows:
        raise ValueError(f"there is nothing to write into {path.name}: expected at least one row")
    with whole_or_not(path) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def requirement() -> str:
    """By what pip installs this package: its name, and the address of its repository if it was installed.

    Example:
        >>> requirement().startswith("staterank-utils")
        True
    """
    try:
        addresses = metadata.metadata("staterank-utils").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return "staterank-utils"
    [repository] = [address.removeprefix("Repository, ") for address in addresses if address.startswith("Repository, ")]
    return f"staterank-utils @ git+{repository}"


def provenance(*, parameters: Mapping[str, Any], checkpoints: Sequence[Path] = ()) -> dict[str, Any]:
    """What a result needs beside it: commit, versions, device, hashes and sizes of checkpoints, parameters, time.

    Args:
        parameters: all that the run could have been given otherwise, seeds included.
        checkpoints: folders of weights that were measured; each is named with a hash over its safetensors files, and how many numbers
            they hold.

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
        "n_weights": {folder.name: count_weights(folder) for folder in checkpoints},
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
        with file.open("rb") as stream:
            while block := stream.read(2**24):
                total.update(block)
    return total.hexdigest()


def count_weights(folder: Path) -> int:
    """How many numbers the safetensors files of a folder hold, from what they say at their start.

    Args:
        folder: in Hugging Face format.

    Example:
        >>> f"{count_weights(CHECKPOINTS / 'hybrid'):,}"
        '17,194,464'
    """
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def gather(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of one notebook on different models as one result, as if one run had measured them all, one after the other.

    Args:
        parts: each with entries `provenance` and `rows`; of one commit, the same packages and the same parameters but for the model
            and its revision. They may come from different machines.

    Returns:
        The same entries: rows, one part after the other; seconds added up.

    Raises:
        ValueError: no parts; or two of them differ in more than the model, or measured the same one.

    Example:
        >>> parts = [
        ...     {"provenance": provenance(parameters={"model": name, "seed": 0}), "rows": [{"model": name}]}
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
            **{
                key: {name: value for each in made for name, value in each[key].items()}
                for key in ("checkpoints", "n_weights")
            },
            "parameters": parameters,
        },
        "rows": [row for part in parts for row in part["rows"]],
    }


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
