"""Every public name is documented, and every example in its docstring runs and gives what it shows."""

import doctest
import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import hyperjax

WINGS = ("hypernet", "recurrent", "routing", "pruning", "sharing", "transformer", "training", "data", "plotting")
LISTED = ("hyperjax", *(f"hyperjax.{name}" for name in WINGS))
WHOLE = ("hyperjax.estimators", "hyperjax.budget", "hyperjax.initializers")  # without an `__all__`
HOME = Path(hyperjax.__file__).parent
CHECKS = ("__init__", "__post_init__", "setup")  # what makes an instance; documented by its class


def public() -> dict[str, Any]:
    """Every public function and class of the package, by the name of the module that defines it and its own."""
    found = {}
    for module in map(importlib.import_module, (*LISTED, *WHOLE)):
        for name in getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]):
            thing = getattr(module, name)
            home = str(getattr(thing, "__module__", ""))
            ours = home.startswith("hyperjax") if module.__name__ in LISTED else home == module.__name__
            if ours and (inspect.isclass(thing) or inspect.isroutine(thing)):
                found[f"{home}.{thing.__qualname__}"] = thing
    return found


def functions(thing: type, names: Iterable[str]) -> dict[str, Any]:
    """Those of its own attributes that are functions written in the package: methods, properties, class methods."""
    found = {}
    for name in names:
        value = vars(thing).get(name)
        value = getattr(value, "__func__", getattr(value, "fget", value))
        value = inspect.unwrap(value) if callable(value) else None
        if inspect.isfunction(value) and HOME in Path(value.__code__.co_filename).parents:
            found[name] = value
    return found


def methods(thing: type) -> dict[str, Any]:
    """Its own public methods, calls among them."""
    return functions(thing, [n for n in vars(thing) if n == "__call__" or (not n.startswith("_") and n != "setup")])


def raises(thing: Any) -> bool:
    """Whether its own source raises an error."""
    return bool(re.search(r"^\s*raise \w", inspect.getsource(thing), re.MULTILINE))


def documented(thing: Any) -> list[tuple[str, Any]]:
    """It and its public methods, by name."""
    made = methods(thing) if inspect.isclass(thing) else {}
    return [("", thing), *((f".{name}", method) for name, method in made.items())]


def own_docstring(thing: Any) -> str:
    """Its docstring, none if it is inherited or the signature that `dataclasses` writes."""
    found = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return "" if not found or found.startswith(f"{thing.__name__}(") else found


def examples(thing: Any, name: str) -> list[doctest.Example]:
    """The examples in a docstring, of the thing itself and not of what it holds."""
    return doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "", name)


def run(thing: Any, name: str) -> None:
    """Runs a docstring's examples in a namespace of their own; fails with doctest's report."""
    test = doctest.DocTest(examples(thing, name), {}, name, None, 0, None)
    report: list[str] = []
    runner = doctest.DocTestRunner()
    if runner.run(test, out=report.append).failed:
        pytest.fail("".join(report), pytrace=False)


@pytest.mark.parametrize("name", hyperjax.__all__)
def test_a_name_of_the_package_has_an_example_that_runs(name):
    thing = getattr(hyperjax, name)
    assert examples(thing, name), f"the docstring of hyperjax.{name} has no example"
    run(thing, name)


def wrong():
    """Adds.

    Example:
        >>> 1 + 1
        3
    """


def test_a_false_example_is_caught():
    with pytest.raises(pytest.fail.Exception, match=r"Expected:\n    3\nGot:\n    2"):
        run(wrong, "wrong")


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_and_its_methods_have_docstrings_whose_examples_run(name):
    lacking = [name + suffix for suffix, thing in documented(PUBLIC[name]) if not own_docstring(thing).strip()]
    assert not lacking
    for suffix, thing in documented(PUBLIC[name]):
        if examples(thing, name) and name.rpartition(".")[2] not in hyperjax.__all__:
            run(thing, name + suffix)


@pytest.mark.parametrize("name", PUBLIC)
def test_what_raises_says_so(name):
    thing = PUBLIC[name]
    if not inspect.isclass(thing):
        assert not raises(thing) or "Raises:" in own_docstring(thing)
        return
    checks = [check for base in thing.__mro__ for check in functions(base, CHECKS).values()]
    assert not any(map(raises, checks)) or "Raises:" in own_docstring(thing)
    found = {n: method for base in reversed(thing.__mro__) for n, method in methods(base).items()}
    assert not [n for n, method in found.items() if raises(method) and "raises" not in own_docstring(method).lower()]


def test_missing_docstrings_and_errors_are_caught(monkeypatch):
    name = "hyperjax.hypernet.network.HyperNetwork"
    monkeypatch.setattr(methods(PUBLIC[name])["embeddings"], "__doc__", "Returns the table.")
    with pytest.raises(AssertionError, match="embeddings"):
        test_what_raises_says_so(name)
    monkeypatch.setattr(methods(PUBLIC[name])["embeddings"], "__doc__", None)
    with pytest.raises(AssertionError, match="embeddings"):
        test_a_public_name_and_its_methods_have_docstrings_whose_examples_run(name)
