"""What a trace takes, computed before it is run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from staterank_utils.architectures import linear_layers


@dataclass(frozen=True)
class Budget:
    """What a trace will read, and keep if nothing is reduced.

    Attributes:
        weights: bytes of the model's weights.
        n_prompts, n_tokens: how many prompts, and tokens of each, up to the last position.
        moment: bytes of all states of one prompt at one position, float32.
        total: bytes of all states at all positions of all prompts.

    Example:
        >>> print(Budget(weights=18_350_080, n_prompts=4, n_tokens=2048, moment=75_497_472, total=301_989_888))
        weights 18.4 MB; tokens 4 x 2,048 = 8,192; states 75.5 MB a moment, 302.0 MB if kept
    """

    weights: int
    n_prompts: int
    n_tokens: int
    moment: int
    total: int

    def __str__(self) -> str:
        return (
            f"weights {in_words(self.weights)}; tokens {self.n_prompts} x {self.n_tokens:,} = {self.n_prompts * self.n_tokens:,}; "
            f"states {in_words(self.moment)} a moment, {in_words(self.total)} if kept"
        )


def in_words(n_bytes: int) -> str:
    """A number of bytes in the unit that suits it.

    Example:
        >>> in_words(3_072), in_words(786_432), in_words(160_000_000_000)
        ('3.1 kB', '0.8 MB', '160.0 GB')
    """
    name, unit = ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6) if n_bytes >= 1e5 else ("kB", 1e3)
    return f"{n_bytes / unit:,.1f} {name}"


def duration_in_words(seconds: float | int) -> str:
    """A time in the unit that suits it, at least a minute.

    Example:
        >>> duration_in_words(20), duration_in_words(600), duration_in_words(90_000), duration_in_words(1e6)
        ('1 minute', '10 minutes', '25 hours', '12 days')
    """
    units = (("day", 86_400), ("hour", 3_600))
    unit, length = next((of for of in units if seconds >= 2 * of[1]), ("minute", 60))
    count = max(1, round(seconds / length))
    return f"{count} {unit}{'s' if count > 1 else ''}"


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's weights, on whatever devices they are.

    Example:
        >>> from staterank_utils import load_model
        >>> in_words(weight_bytes(load_model("hybrid")))
        '68.8 MB'
    """
    return sum(parameter.nbytes for parameter in model.parameters())


def moment_bytes(model: PreTrainedModel) -> int:
    """Bytes of all states of a model at one position of one prompt, in float32.

    Example:
        >>> from staterank_utils import load_model
        >>> moment_bytes(load_model("hybrid"))
        2359296
    """
    return sum(4 * layer.n_heads * layer.d_k * layer.d_v for layer in linear_layers(model))


FULL = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # in errors of other classes


@contextmanager
def out_of_memory(what: str, *, advice: str) -> Iterator[None]:
    """A block that re-raises out-of-memory errors with what the memory was for and what to do; of what torch says, two sentences.

    Args:
        what: begins the message, before what torch says.
        advice: ends it.

    Raises:
        torch.OutOfMemoryError: where the block raised one, or what torch raises in its place for a CPU, or where CUDA or cuBLAS asked for memory.

    Example:
        >>> with out_of_memory("no room for 3 prompts", advice="lower batch_size"):
        ...     raise torch.OutOfMemoryError("full")
        Traceback (most recent call last):
            ...
        torch.OutOfMemoryError: no room for 3 prompts (full): lower batch_size
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in FULL):
            raise
        told = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        raise torch.OutOfMemoryError(f"{what} ({told}): {advice}") from error


def budget(model: PreTrainedModel, input_ids: Int[Tensor, "batch token"], *, positions: Sequence[int]) -> Budget:
    """What `trace_states` would read, and keep if nothing is reduced; nothing is run.

    Args:
        model, input_ids, positions: as there.

    Example:
        >>> from staterank_utils import load_model
        >>> budget(load_model("hybrid"), torch.ones(2, 64, dtype=torch.long), positions=[1, 64]).moment
        2359296
    """
    moment = moment_bytes(model)
    n_prompts = len(input_ids)
    return Budget(weight_bytes(model), n_prompts, max(positions), moment, n_prompts * len(positions) * moment)


def machine_memory() -> int | None:
    """Bytes of memory that this machine has, or None where the system does not say.

    Example:
        >>> (machine_memory() or 2**30) >= 2**28
        True
    """
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
