"""Every public name is documented, and every example in its docstring runs and gives what it shows."""

import doctest
import inspect
from typing import Any

import pytest

import hyperjax


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
