"""The reference says of everything public what it is, and shows it in an example that is run."""

import doctest
import importlib
import inspect
import json
import pkgutil
import re
from functools import cached_property
from types import ModuleType
from typing import Any

import conformance
import pytest
from architectures import ARCHITECTURES

import staterank
import staterank_utils
from book.assemble import conformance_tables
from staterank_utils.architectures import LinearLayer, ModelAdapter
from staterank_utils.results import STORED

# All but one Triton kernel, which `recurrence` calls: not every machine has triton.
MODULES = [staterank] + [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(staterank_utils.__path__, f"{staterank_utils.__name__}.")
    if module.name != "staterank_utils.recurrence_kernel"
]


def public(module: ModuleType) -> dict[str, Any]:
    """Functions, also cached ones, and classes that a module defines under a public name."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isroutine(inspect.unwrap(thing)))
        and thing.__module__ == module.__name__
        and thing.__name__ == name  # else it is another name for something
    }


def is_adapter(thing: Any) -> bool:
    """Whether it is the adapter of one family, which says of its own what the base class describes."""
    return (
        inspect.isclass(thing)
        and issubclass(thing, LinearLayer | ModelAdapter)
        and not {LinearLayer, ModelAdapter} & {thing}
    )


PUBLIC = [
    pytest.param(module, name, thing, id=f"{module.__name__.rpartition('.')[-1]}.{name}")
    for module in MODULES
    for name, thing in public(module).items()
]


def test_every_kind_of_public_thing_is_looked_at() -> None:
    names = {parameter.id for parameter in PUBLIC}
    # a function, a cached one, a context manager, one without gradients, a class, a data class
    assert {
        "spectra.effective_rank",
        "evaluation.line_ends",
        "surgery.ablate_heads",
        "evaluation.evaluate",
        "by_task.TaskScores",
        "strata.Estimate",
    } <= names
    assert not {"core.Float", "surgery.Head", "by_task.evaluate"} & names


@pytest.mark.parametrize(("module", "name", "thing"), PUBLIC)
def test_everything_public_has_an_example_that_can_fail(module: ModuleType, name: str, thing: Any) -> None:
    text = inspect.getdoc(thing) or ""
    assert text, f"{name} has no docstring"
    if is_adapter(thing):  # (the conformance suite is its example)
        return
    assert "\nExample:\n" in text, f"the docstring of {name} has no section 'Example:'"
    [found] = doctest.DocTestFinder(recurse=False).find(thing, name, module=module)
    assert any(example.want for example in found.examples), f"the example of {name} shows no result"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_doctest_finds_every_example(module: ModuleType) -> None:
    found = {test.name.removeprefix(f"{module.__name__}.") for test in doctest.DocTestFinder().find(module)}
    assert set(public(module)) <= found


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_method_says_what_it_does(module: ModuleType) -> None:
    silent = [
        f"{name}.{key}"
        for name, thing in public(module).items()
        if inspect.isclass(thing)
        for key, member in vars(thing).items()
        if not key.startswith("_") and key not in getattr(thing, "__dataclass_fields__", ())
        if not (is_adapter(thing) and key in LinearLayer.__annotations__)  # whose docstring says what they are
        if (inspect.isroutine(member) or isinstance(member, property | cached_property))
        if not inspect.getdoc(getattr(thing, key))
    ]
    assert not silent


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_stored_tables_of_architectures_are_complete(device: str) -> None:
    rows = json.loads((STORED / f"conformance_{device}.json").read_text())["rows"]
    absent = set(ARCHITECTURES) - {row["model"] for row in rows}
    assert len(rows) + len(absent) == len(ARCHITECTURES)
    if absent:  # an architecture may wait for a GPU, and then the page says so
        assert device == "gpu"
        assert f" yet: {', '.join(sorted(absent))}." in conformance_tables()
    for dtype, properties in conformance.PROPERTIES.items():
        assert set(rows[0][dtype]) == set(properties)


def test_an_index_of_packages_can_show_the_readme() -> None:
    """There it stands alone: what it leads to or shows has a whole address."""
    text = (STORED.parent / "README.md").read_text()
    places = re.findall(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)\"", text)
    assert places
    for place in (written or in_html for written, in_html in places):
        assert place.startswith(("https://", "#")), place
