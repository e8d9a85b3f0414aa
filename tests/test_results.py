import errno
import json
import os
from pathlib import Path

import pytest

from staterank_utils import results
from staterank_utils.results import check_parameters, provenance, write_json


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"x": [1, 2]}


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"]
)
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"x": 1})

    def fail(descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure)) as caught:
        write_json(target, {"x": 2})
    if isinstance(failure, OSError):
        assert "could not write results to" in str(caught.value)
        assert "No space left" in str(caught.value)
    assert json.loads(target.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_a_nan_is_refused_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_provenance_names_all_that_a_result_depends_on() -> None:
    made = provenance(parameters={"seed": 3}, checkpoints=[results.CHECKPOINTS / "hybrid"])
    assert set(made) == {
        "commit",
        "date",
        "seconds",
        "device",
        "python",
        "packages",
        "checkpoints",
        "n_weights",
        "parameters",
    }
    assert len(made["checkpoints"]["hybrid"]) == 64
    assert "torch" in made["packages"]


@pytest.mark.parametrize(
    "file", sorted(results.STORED.rglob("*.json")), ids=lambda file: str(file.relative_to(results.STORED))
)
def test_what_is_stored_comes_of_a_commit(file: Path) -> None:
    made = json.loads(file.read_text()).get("provenance", {"commit": "none needed"})
    assert not made["commit"].endswith("+changes"), "made from a tree with changes: make it again"


@pytest.mark.parametrize("stored", sorted((results.STORED / "quick").glob("*.json")), ids=lambda file: file.stem)
def test_a_build_gives_the_quick_results_that_are_stored(stored: Path) -> None:
    built = results.STORED.parent / "_build" / "stage" / "results" / stored.name
    if not built.exists():
        pytest.skip("`make book` has not run here")
    there, here = (json.loads(file.read_text()) for file in (stored, built))
    if there["provenance"]["parameters"] != here["provenance"]["parameters"]:
        pytest.skip("the last build had other parameters")
    assert [(row["claim"], row["model"], row["verdict"]) for row in here["rows"]] == [
        (row["claim"], row["model"], row["verdict"]) for row in there["rows"]
    ]
    for row, expected in zip(here["rows"], there["rows"], strict=True):
        for number, other in zip(row["criteria"], expected["criteria"], strict=True):
            assert number == pytest.approx(other), f"{row['claim']} ({row['model']}): run `make quick` if this is meant"
    for name, numbers in there["live"].items():
        # Sums in another order move a float32 logit by its rounding.
        assert here["live"][name] == pytest.approx(numbers, abs=1e-3), f"{name}: run `make quick` if this is meant"


def test_a_misspelt_parameter_is_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match="no parameter 'n_prompt'; did you mean 'n_prompts'"):
        check_parameters({"n_prompt": 3, "seed": 0, "In": [], "_x": 1, "module": json}, numbers=["n_prompts", "seed"])


def test_the_cell_of_parameters_can_be_run_again_and_profiles_are_checked() -> None:
    namespace = {"seed": 0, "profile": "quick"}
    check_parameters(namespace, texts=["profile"], numbers=["seed"])
    namespace["MODELS"] = ["hybrid"]
    check_parameters(namespace, texts=["profile"], numbers=["seed"])
    with pytest.raises(ValueError, match="there is no profile 'ful': choose from quick, full"):
        check_parameters({**namespace, "profile": "ful"}, texts=["profile"], numbers=["seed"])


def part_of(model: str, *, seed: int = 0) -> dict[str, object]:
    made = provenance(parameters={"model": model, "seed": seed})
    return {
        "provenance": {**made, "seconds": 2.0, "checkpoints": {model: "0"}, "n_weights": {model: 1}},
        "rows": [{"model": model}],
    }


def test_results_of_single_models_are_gathered_as_one() -> None:
    both = results.gather([part_of("a"), part_of("b")])
    assert both["provenance"]["parameters"] == {"model": "a, b", "seed": 0}
    assert both["provenance"]["seconds"] == 4.0
    assert both["provenance"]["checkpoints"] == {"a": "0", "b": "0"}
    assert both["rows"] == [{"model": "a"}, {"model": "b"}]
    assert results.gather([part_of("a")])["rows"] == [{"model": "a"}]


def test_an_embedded_model_and_one_of_a_hub_are_gathered() -> None:
    """The one has no revision, the other must have one."""
    parts = [part_of("a"), part_of("o/n")]
    for part, revision in zip(parts, ("", "v1"), strict=True):
        part["provenance"]["parameters"]["revision"] = revision
    assert results.gather(parts)["provenance"]["parameters"] == {"model": "a, o/n", "seed": 0, "revision": "v1"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (part_of("a"), "each model can be gathered once"),
        (part_of("b", seed=1), "may differ in the model alone"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(other: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        results.gather([part_of("a"), other])


def test_results_of_two_commits_are_refused() -> None:
    other = part_of("b")
    other["provenance"] = {**other["provenance"], "commit": "another"}
    with pytest.raises(ValueError, match="must have one commit"):
        results.gather([part_of("a"), other])
    with pytest.raises(ValueError, match="got none"):
        results.gather([])


def test_a_place_that_only_seems_writable_is_refused() -> None:
    place = Path("/proc/heads.csv")
    if not place.parent.exists():
        pytest.skip("no such folder here")
    with pytest.raises(
        PermissionError, match="/proc/heads.csv cannot be written: /proc is no folder that you may write into"
    ):
        results.check_writable(place)
