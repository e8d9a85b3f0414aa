"""Traces that outgrow memory: states go to disk as they are made, prompt by prompt, and are measured from there."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from staterank_utils.architectures import linear_layers
from staterank_utils.budget import budget, in_words
from staterank_utils.results import whole_or_not, write_json
from staterank_utils.surgery import ablations
from staterank_utils.tracing import (
    Reducer,
    StateTrace,
    check_even,
    check_prompts,
    check_reduced,
    trace_states,
    whole_positions,
)

FILE_BYTES = 2**26  # of states in one file, and in memory while it fills
MANIFEST, GATES = "trace.json", "gates.safetensors"


@dataclass(frozen=True)
class StoredTrace:
    """A trace whose states lie on disk.

    Attributes:
        folder: where; one folder per prompt, one file for some positions of a layer, in safetensors.
        positions, layers, d_k, d_v: as in `StateTrace`.
        n_prompts: how many.

    Example:
        >>> import tempfile
        >>> from staterank_utils import effective_rank, load_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored = stream_states(load_model("hybrid"), torch.arange(8).reshape(1, 8), positions=[1, 8], folder=folder)
        ...     [some] = stored.states(0, layer=4)
        ...     ranks = stored.measure(effective_rank).values
        weights 68.8 MB; tokens 1 x 8 = 8; states 2.4 MB a moment, 4.7 MB if kept
        >>> some.shape, ranks.shape, ranks[:, :, 0].max().item()  # (position, head, d_k, d_v), (layer, prompt, position, head)
        (torch.Size([2, 16, 64, 64]), torch.Size([9, 1, 2, 16]), 1)
    """

    folder: Path
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    d_k: int
    d_v: int
    n_prompts: int

    def states(self, prompt: int, *, layer: int) -> Iterator[Float[Tensor, "position head d_k d_v"]]:
        """The states of a layer behind a prompt, some positions at a time, in order.

        Args:
            prompt: its number, from 0.
            layer: its index in the model.

        Raises:
            ValueError: a prompt or layer that the trace does not have.
        """
        if layer not in self.layers or not 0 <= prompt < self.n_prompts:
            raise ValueError(
                f"no states of prompt {prompt}, layer {layer}: prompts 0..{self.n_prompts - 1}, layers {list(self.layers)}"
            )
        for file in sorted(_of_prompt(self.folder, prompt).glob(f"layer{layer:03d}_*.safetensors")):
            yield load_file(file)["states"]

    def measure(self, reduce: Callable[[Tensor], Tensor]) -> StateTrace:
        """The trace with what `reduce` makes of its states, as `trace_states` would have made it.

        Args:
            reduce: as there; it is given (1, position, head, d_k, d_v).
        """
        values = [
            torch.stack(
                [
                    torch.cat([_reduced(reduce, part) for part in self.states(prompt, layer=layer)])
                    for prompt in tqdm(range(self.n_prompts), desc=f"layer {layer}", leave=False)
                ]
            )
            for layer in self.layers
        ]
        gates = [load_file(_of_prompt(self.folder, prompt) / GATES) for prompt in range(self.n_prompts)]
        log_decay, write_strength = (torch.cat([g[name] for g in gates], 1) for name in ("log_decay", "write_strength"))
        return StateTrace(
            torch.stack(values), self.positions, self.layers, self.d_k, self.d_v, log_decay, write_strength
        )


def stream_states(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch token"],
    *,
    positions: Sequence[int],
    folder: Path | str,
) -> StoredTrace:
    """As `trace_states` with all states kept, but on disk, prompt by prompt; says beforehand what that takes.

    Call again to resume an interrupted run: prompts that are stored whole are not read again. In memory are the
    model's own states and FILE_BYTES for each layer.

    Args:
        model, input_ids, positions: as there.
        folder: of the trace; made if it is not there.

    Returns:
        The trace, to be measured as often as one likes.

    Raises:
        ValueError: the folder holds the trace of other prompts, positions, weights or ablated heads.
        TypeError, ValueError: as in `trace_states`, before anything is written.
        OSError: the disk has less room than the states take.

    Example:
        >>> import tempfile
        >>> from staterank_utils import load_model, nuclear_norm
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored = stream_states(load_model("hybrid"), torch.arange(8).reshape(2, 4), positions=[4], folder=folder)
        ...     stored.measure(nuclear_norm).values.shape
        weights 68.8 MB; tokens 2 x 4 = 8; states 2.4 MB a moment, 4.7 MB if kept
        torch.Size([9, 2, 1, 16])
    """
    folder, positions = Path(folder), whole_positions(positions)
    check_prompts(model, input_ids, positions)
    layers = linear_layers(model)
    check_even(layers)
    needed = budget(model, input_ids, positions=positions)
    stored = StoredTrace(
        folder, tuple(positions), tuple(layer.index for layer in layers), layers[0].d_k, layers[0].d_v, len(input_ids)
    )  # fmt: skip
    made_of = {
        "positions": list(positions),
        "prompts": _digest([input_ids]),
        "weights": _fingerprint(model),
        "ablated heads": ablations(model),
    }
    _check_agreement(folder / MANIFEST, made_of)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(len(input_ids)) if not (_of_prompt(folder, i) / GATES).exists()]
    room, wanted = shutil.disk_usage(folder).free, len(missing) * len(positions) * needed.moment
    if wanted > room:
        raise OSError(f"{folder} has {in_words(room)} left and the states take {in_words(wanted)}: choose another folder, fewer prompts or fewer positions")  # fmt: skip
    write_json(folder / MANIFEST, made_of)
    tqdm.write(str(needed))
    for i in tqdm(
        missing, desc="prompts to disk", initial=len(input_ids) - len(missing), total=len(input_ids), leave=False
    ):
        target = _of_prompt(folder, i)
        shutil.rmtree(target, ignore_errors=True)  # what a broken run left of this prompt
        target.mkdir()
        to_disk = _ToDisk(target)
        trace = trace_states(model, input_ids[i : i + 1], positions=positions, reduce=to_disk)
        _save({"log_decay": trace.log_decay, "write_strength": trace.write_strength}, target / GATES)
    return stored


class _ToDisk(Reducer):
    """Writes the states of one prompt, and keeps nothing of them."""

    def __init__(self, folder: Path):
        super().__init__(None)
        self.folder, self.n_bytes = folder, FILE_BYTES
        self._held: dict[int, list[Tensor]] = {}
        self._n_written: dict[int, int] = {}

    def add(self, layer: int, kept: list[Tensor], states: Float[Tensor, "batch position head d_k d_v"]) -> None:
        held = self._held.setdefault(layer, [])
        held.append(states[0].float().cpu())
        kept.append(torch.empty(states.shape[:2]))
        if sum(part.nbytes for part in held) >= FILE_BYTES:
            self._write(layer)

    def finish(self) -> None:
        """Write what is left."""
        for layer in list(self._held):
            self._write(layer)

    def _write(self, layer: int) -> None:
        states = torch.cat(self._held.pop(layer))
        first = self._n_written.get(layer, 0)
        self._n_written[layer] = first + len(states)
        _save({"states": states}, self.folder / f"layer{layer:03d}_{first:08d}.safetensors")


def _reduced(reduce: Callable[[Tensor], Tensor], states: Float[Tensor, "position head d_k d_v"]) -> Tensor:
    made = reduce(states[None])
    check_reduced(made, states[None], reduce)
    return made[0]


def _of_prompt(folder: Path, prompt: int) -> Path:
    return folder / f"prompt{prompt:06d}"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with whole_or_not(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def _check_agreement(manifest: Path, made_of: dict[str, Any]) -> None:
    """Refuse to go on with a trace that was made of something else."""
    there = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else made_of
    for name, value in made_of.items():
        if there.get(name) != value:
            raise ValueError(
                f"{manifest.parent} holds the trace of other {name}: choose another folder, or remove this one"
            )


def _digest(tensors: Sequence[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(
            str(tuple(tensor.shape)).encode()
            + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()


def _fingerprint(model: PreTrainedModel) -> str:
    """Of every parameter and buffer its name, dtype, shape and every number."""
    total = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        total.update(f"{name} {tensor.dtype};".encode() + _digest([tensor]).encode())
    return total.hexdigest()
