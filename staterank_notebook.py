"""Run a notebook. A process that runs one imports this module alone: the package, which its kernel imports, takes seconds."""

import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm


def execute(
    source: Path, target: Path, parameters: Mapping[str, Any], *, cwd: Path, progress: bool = False
) -> dict[str, Any]:
    """Run a notebook; say how long it took and how much memory.

    Its peak memory is the largest of all kernels that this process has run, so give each notebook a process of its own.

    Args:
        source: notebook without outputs.
        target: where the executed one goes; after an error it holds what was run.
        parameters: of the notebook.
        cwd: folder that it runs in.
        progress: with a bar of its cells.

    Returns:
        "notebook", "seconds", "peak_gib" and the parameters.

    Raises:
        ValueError: a parameter that the notebook does not have.
        papermill.PapermillExecutionError: a cell failed.

    Example:
        >>> from staterank_utils.report import BOOK
        >>> execute(BOOK / "notebooks" / "01_stratification.ipynb", Path("out.ipynb"), {"n_promts": 1}, cwd=Path())
        Traceback (most recent call last):
            ...
        ValueError: 01_stratification.ipynb has no parameter n_promts
    """
    import papermill

    unknown = set(parameters) - set(papermill.inspect_notebook(str(source)))
    if unknown:
        raise ValueError(f"{source.name} has no parameter {', '.join(sorted(unknown))}")
    started = time.monotonic()
    papermill.execute_notebook(
        str(source), str(target), parameters=dict(parameters), cwd=str(cwd), log_output=False,
        progress_bar={"desc": source.stem, "position": 1, "leave": False} if progress else False,
        # A page says what went wrong; and no folder beside it, such as a model called xlstm, is taken for a package.
        extra_arguments=["--IPKernelApp.log_level=CRITICAL", "--IPKernelApp.ignore_cwd=True"],
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return {"notebook": source.stem, "seconds": time.monotonic() - started, "peak_gib": peak, **parameters}


def _end_with_parent() -> None:
    """A process whose parent was killed would go on, and write into a folder that may be another's by then."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


def tell(there: Connection, source: Path, target: Path, parameters: Mapping[str, Any], cwd: Path) -> None:
    """Execute a notebook with a bar of its cells, and send why it failed, or None.

    Args:
        there: end of a pipe.
        source, target, parameters, cwd: as in `execute`.

    Example:
        >>> from multiprocessing import Pipe
        >>> here, there = Pipe(duplex=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tell(there, Path(folder, "a.ipynb"), Path(folder, "b.ipynb"), {}, Path(folder))
        >>> here.recv()[:17]
        'FileNotFoundError'
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tempfile.tempdir = str(source.parent)  # for the kernel's connection file, which a stop would leave behind
    # By itself a bar takes a lock between processes, of which a stop would leave a part behind.
    tqdm.set_lock(threading.RLock())
    try:
        execute(source, target, parameters, cwd=cwd, progress=True)
        there.send(None)
    except Exception as error:
        there.send(f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}")
