"""Who makes which parameter: rules by path become one configured generator for each group of parameters.

Tasks may have targets of their own, with parameters of other shapes. Parameters are grouped by rule and by the targets
they occur in, so that what all targets share comes from one generator, and a head of a size of its own from another.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from hyperjax.hypernet.generators import Generator
from hyperjax.hypernet.target import Target
from hyperjax.hypernet.ungenerated import Frozen, Learned, PerTask
from hyperjax.paramtree import ParamSpec, Selector, select

Rule = tuple[Selector, Generator]


def plan(
    targets: Sequence[Target], generator: Generator, rules: Sequence[Rule], tasks: int
) -> tuple[tuple[Generator, ...], tuple[tuple[int, ...], ...]]:
    """Assigns every parameter to a generator.

    Args:
        targets: one for all tasks, or one for each.
        generator: for the parameters that no rule selects.
        rules: (pattern or predicate, generator); the first that selects a path counts.
        tasks: number of tasks, 0 if there are none.

    Returns:
        The configured generators, and for each target the indices of those that make its parameters.

    Raises:
        ValueError: a pattern selects nothing, something is no generator, or a generator cannot make what it should.
    """
    specs = list(dict.fromkeys(spec for target in targets for spec in target.structure.specs))
    where = {spec: tuple(i for i, t in enumerate(targets) if spec in t.structure.specs) for spec in specs}
    paths = list(dict.fromkeys(spec.path for spec in specs))
    chosen: dict[str, int] = {}
    for number, rule in enumerate(rules):
        selector, made_by = _rule(rule)
        _check_generator(made_by)
        for path in select(selector, paths):
            chosen.setdefault(path, number)
    _check_generator(generator)
    choices = [*(rule[1] for rule in rules), generator]

    groups: dict[tuple[Any, ...], list[ParamSpec]] = {}
    for spec in specs:
        number = chosen.get(spec.path, len(rules))
        whole = not jnp.issubdtype(spec.dtype, jnp.inexact)
        if whole and number == len(rules):  # what cannot be differentiated is kept
            groups.setdefault((-1, where[spec]), []).append(spec)
            continue
        if not spec.floating and not isinstance(choices[number], Frozen if whole else (Frozen, Learned, PerTask)):
            also = "" if whole else " or Learned()"
            name = _name(choices[number])
            raise ValueError(
                f"{spec.path} is {spec.dtype}, which {name} cannot make; give it a rule with Frozen(){also}"
            )
        groups.setdefault((number, where[spec]), []).append(spec)

    generators = []
    for (number, owners), leaves in groups.items():
        chosen_one = Frozen() if number < 0 else choices[number]
        own_tasks = tuple(range(tasks)) if len(targets) == 1 else owners
        made = chosen_one.clone(parent=None, name=None, leaves=tuple(leaves), tasks=own_tasks if tasks else ())
        problem = made.refuse()
        if problem:
            raise ValueError(f"{_name(made)}: {problem}")
        generators.append(made)
    uses = [tuple(i for i, (_, owners) in enumerate(groups) if t in owners) for t in range(len(targets))]
    return tuple(generators), tuple(uses)


def _rule(rule: Any) -> Rule:
    if not isinstance(rule, tuple) or len(rule) != 2 or not (isinstance(rule[0], str) or callable(rule[0])):
        raise ValueError(f"a rule is {rule!r}, expected (pattern or predicate on the path, generator)")
    return rule


def _check_generator(generator: Any) -> None:
    if not isinstance(generator, Generator):
        hint = ", an instance: add ()" if isinstance(generator, type) and issubclass(generator, Generator) else ""
        raise ValueError(f"the generator is {generator!r}, expected a hyperjax Generator such as Linear(){hint}")


def _name(generator: Generator) -> str:
    return type(generator).__name__


def needs_task(generator: Generator) -> bool:
    """Whether the task id decides, not only the embedding."""
    return isinstance(generator, PerTask)
