"""The pure half of a hypernetwork: generators and their variables as values, outside of any module's scope."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

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
                new: Any = part.module.apply(own, z, own_task)
                made.update(new)
            return made

        run = jax.checkpoint(make) if self.remat else make
        return self.cast(run([part.variables for part in self.parts], z, None if static else task))  # type: ignore[arg-type]

    def factors(self, z: Array, task: Task) -> Factors | None:
        """Returns {path: factors or value}; None unless every generator of kernels hands out factors."""
        made: Factors = {}
        for part in self.parts:
            own_task = task if part.task is None else part.task
            if isinstance(part.module, Modulated):
                new: Any = part.module.apply(part.variables, z, own_task, method="factors")
            elif part.module.needs_z:
                return None
            else:
                new = part.module.apply(part.variables, z, own_task)
            made.update(new)
        return made

    def cast(self, leaves: Leaves) -> Leaves:
        """Gives each parameter its dtype."""
        wanted = {s.path: (self.dtype or s.dtype) if s.floating else s.dtype for s in self.target.structure.specs}
        return {path: leaf.astype(wanted[path]) for path, leaf in leaves.items()}

    def tree(self, leaves: Leaves) -> Any:
        """Returns the target's pytree."""
        return self.target.structure.unflatten(leaves)
