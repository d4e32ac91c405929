"""The pure half of a hypernetwork: generators and their variables as values, outside of any module's scope."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.errors import ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeVariableNotFoundError

from hyperjax.hypernet.generators import Generator, Leaves
from hyperjax.hypernet.modulated import Factors, Modulated
from hyperjax.hypernet.target import Target

Array = jax.Array
Task = Array | int | None


class Part(NamedTuple):
    """A generator that JAX's transformations apply to.

    Attributes:
        module: unbound.
        variables: its own.
        task: its own index of the task, where that is not the caller's.
    """

    module: Generator
    variables: Mapping[str, Any]
    task: int | None = None


class Maker(NamedTuple):
    """Makes the parameters of one target.

    Attributes:
        target: whose parameters.
        parts: all its generators.
        dtype: of the parameters; None is the target's own.
        remat: generate again in the backward pass.
    """

    target: Target
    parts: tuple[Part, ...]
    dtype: Any
    remat: bool

    def leaves(self, z: Array | None, task: Task) -> Leaves:
        """Returns {path: [..., *shape]}; what does not depend on z or task has no batch axis."""

        static = isinstance(task, int)

        def make(variables: list[Any], z: Array | None, traced: Array | None) -> Leaves:
            made: Leaves = {}
            for part, own in zip(self.parts, variables, strict=True):
                own_task = (task if static else traced) if part.task is None else part.task
                made.update(_checked(part.module, _apply(part.module, own, z, own_task)))
            return made

        run = jax.checkpoint(make) if self.remat else make
        return self.cast(run([part.variables for part in self.parts], z, None if static else task))  # type: ignore[arg-type]

    def factored(self) -> bool:
        """Whether every generator that reads z hands out factors."""
        return all(isinstance(part.module, Modulated) or not part.module.needs_z for part in self.parts)

    def factors(self, z: Array, task: Task) -> Factors:
        """Returns {path: factors or value}, if `factored`."""
        made: Factors = {}
        for part in self.parts:
            own_task = task if part.task is None else part.task
            if isinstance(part.module, Modulated):
                new: Any = part.module.apply(part.variables, z, own_task, method="factors")
            else:
                new = _apply(part.module, part.variables, z, own_task)
            made.update(new)
        return made

    def cast(self, leaves: Leaves) -> Leaves:
        """Gives each parameter its dtype."""
        wanted = {s.path: (self.dtype or s.dtype) if s.floating else s.dtype for s in self.target.structure.specs}
        return {path: leaf.astype(wanted[path]) for path, leaf in leaves.items()}

    def tree(self, leaves: Leaves) -> Any:
        """Returns the target's pytree."""
        return self.target.structure.unflatten(leaves)


def _apply(module: Generator, variables: Mapping[str, Any], z: Array | None, task: Task) -> Any:
    try:
        return module.apply(variables, z, task)
    except (ScopeCollectionNotFound, ScopeParamNotFoundError, ScopeVariableNotFoundError) as error:
        raise ValueError(
            f"the variables lack some of {type(module).__name__}; pass all that init returned, "
            'with "frozen" beside "params"'
        ) from error


def _checked(module: Generator, made: Any) -> Leaves:
    """What a generator returned, which a user may have written."""
    for spec in module.leaves:
        shape = jnp.shape(made[spec.path]) if spec.path in made else None
        if shape is None or shape[len(shape) - len(spec.shape) :] != spec.shape:
            raise ValueError(f"{type(module).__name__} made {spec.path} {shape}, expected [..., *{spec.shape}]")
    return made
