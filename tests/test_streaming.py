"""Traces on disk: the same as in memory, and resumed where they were interrupted."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import unchecked

from staterank_utils import budget, streaming, tracing
from staterank_utils.spectra import rank_and_norm
from staterank_utils.streaming import stream_states
from staterank_utils.surgery import ablate_heads
from staterank_utils.tracing import trace_states

POSITIONS = [1, 5, 31, 64, 65, 90]


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(0, 64, (3, 90), generator=torch.Generator().manual_seed(0))


def test_what_is_measured_from_disk_is_what_is_measured_at_once(
    tiny_model, prompts, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(streaming, "FILE_BYTES", 1)  # every position in a file of its own
    monkeypatch.setattr(tracing, "HELD_TOGETHER", 1)
    stored = stream_states(tiny_model, prompts, positions=POSITIONS, folder=tmp_path)
    kept = trace_states(tiny_model, prompts, positions=POSITIONS)
    for row, layer in enumerate(stored.layers):
        parts = list(stored.states(1, layer=layer))
        assert len(parts) == len(POSITIONS)
        assert torch.equal(torch.cat(parts), kept.values[row, 1])
    measured, at_once = (
        stored.measure(rank_and_norm),
        trace_states(tiny_model, prompts, positions=POSITIONS, reduce=rank_and_norm),
    )
    torch.testing.assert_close(measured.values, at_once.values, rtol=1e-9, atol=0)
    assert torch.equal(measured.log_decay, at_once.log_decay)
    assert torch.equal(measured.write_strength, at_once.write_strength)
    assert (measured.positions, measured.layers, measured.d) == (at_once.positions, at_once.layers, at_once.d)


def test_a_run_that_broke_off_is_gone_on_with(tiny_model, prompts, tmp_path: Path, monkeypatch) -> None:
    read, save = [], streaming._save

    def spy(model, ids, **options):
        read.append(ids[0, 0].item())
        return trace_states(model, ids, **options)

    def breaks(tensors, path: Path) -> None:
        if "prompt000001" in str(path) and path.name != "gates.safetensors" and "layer000" not in path.name:
            raise KeyboardInterrupt
        save(tensors, path)

    monkeypatch.setattr(streaming, "trace_states", spy)
    monkeypatch.setattr(streaming, "_save", breaks)
    with pytest.raises(KeyboardInterrupt):
        stream_states(tiny_model, prompts, positions=POSITIONS, folder=tmp_path)
    assert read == prompts[:2, 0].tolist()
    monkeypatch.setattr(streaming, "_save", save)
    stored = stream_states(tiny_model, prompts, positions=POSITIONS, folder=tmp_path)
    assert read == prompts[[0, 1, 1, 2], 0].tolist(), "the first is not read again, the second from its start"
    whole = trace_states(tiny_model, prompts, positions=POSITIONS)
    assert torch.equal(torch.cat(list(stored.states(1, layer=stored.layers[-1]))), whole.values[-1, 1])
    stream_states(tiny_model, prompts, positions=POSITIONS, folder=tmp_path)
    assert len(read) == 4
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_of_another_trace_is_refused(tiny_model, prompts, tmp_path: Path) -> None:
    stream_states(tiny_model, prompts[:1], positions=[4], folder=tmp_path)
    other = copy.deepcopy(tiny_model)
    next(other.parameters()).data += 1
    with pytest.raises(ValueError, match="other positions"):
        stream_states(tiny_model, prompts[:1], positions=[5], folder=tmp_path)
    with pytest.raises(ValueError, match="other prompts"):
        stream_states(tiny_model, prompts[1:2], positions=[4], folder=tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        stream_states(other, prompts[:1], positions=[4], folder=tmp_path)


@pytest.mark.parametrize("positions", [[], [4, 3], [0], [999]])
def test_what_cannot_be_traced_leaves_nothing_behind(tiny_model, prompts, tmp_path: Path, positions) -> None:
    with pytest.raises(ValueError, match="positions must increase"):
        stream_states(tiny_model, prompts[:1], positions=positions, folder=tmp_path / "states")
    with pytest.raises(TypeError, match="token ids as a tensor"):
        unchecked(stream_states)(tiny_model, [[1, 2]], positions=[1], folder=tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_too_little_room_is_said_before_anything_is_read(tiny_model, prompts, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="fewer prompts or fewer positions"):
        stream_states(tiny_model, prompts, positions=[4], folder=tmp_path)
    monkeypatch.setattr(tracing, "machine_memory", lambda: 1)
    with pytest.raises(MemoryError, match="stream_states"):
        trace_states(tiny_model, prompts, positions=[4])
    assert trace_states(tiny_model, prompts, positions=[4], reduce=rank_and_norm).values.shape[-1] == 2


def test_the_budget_is_that_of_the_states_themselves(tiny_model, prompts) -> None:
    kept = trace_states(tiny_model, prompts, positions=POSITIONS).values
    found = budget.budget(tiny_model, prompts, positions=POSITIONS)
    assert found.total == kept.nbytes
    assert (found.n_prompts, found.n_tokens) == (3, 90)


def test_states_that_are_not_there_are_refused(tiny_model, prompts, tmp_path: Path) -> None:
    stored = stream_states(tiny_model, prompts[:1], positions=[4], folder=tmp_path)
    with pytest.raises(ValueError, match=r"no states of prompt 1, layer 0: prompts 0\.\.0"):
        next(stored.states(1, layer=0))
    with pytest.raises(ValueError, match="layer 99"):
        next(stored.states(0, layer=99))


def test_a_folder_of_other_heads_or_another_dtype_is_refused(tiny_model, prompts, tmp_path: Path) -> None:
    stream_states(tiny_model, prompts[:1], positions=[4], folder=tmp_path)
    with ablate_heads(tiny_model, [(0, 1)]), pytest.raises(ValueError, match="other ablated heads"):
        stream_states(tiny_model, prompts[:1], positions=[4], folder=tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        stream_states(copy.deepcopy(tiny_model).double(), prompts[:1], positions=[4], folder=tmp_path)


def test_after_a_full_disk_fewer_positions_are_taken(tiny_model, prompts, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as full:
        full.setattr(streaming.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(OSError, match="fewer positions"):
            stream_states(tiny_model, prompts[:1], positions=[3, 4], folder=tmp_path)
    assert stream_states(tiny_model, prompts[:1], positions=[4], folder=tmp_path).n_prompts == 1
