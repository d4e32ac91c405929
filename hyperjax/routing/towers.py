"""What every multi-task network here is built of: layers with ReLU, batches of experts, and a tower for each task.

B samples, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.routing.tasks import Task

Array = jax.Array
Widths = Sequence[int] | Mapping[str, Sequence[int]]


def are_widths(value: Any) -> bool:
    """Whether this is a sequence of whole numbers above 0; it may be empty."""
    return isinstance(value, Sequence) and all(isinstance(width, (int, np.integer)) and width >= 1 for width in value)


def tower_widths(towers: Widths, tasks: Mapping[str, Task]) -> dict[str, tuple[int, ...]]:
    """The hidden widths of each task's tower.

    Args:
        towers: the widths of all towers, or widths by task.
        tasks: kinds by name.

    Returns:
        Hidden widths by task, sorted by name: the order in which networks here number their tasks. Flax sorts dicts
        under its transforms (`nn.remat`), so that any other order would not last.

    Raises:
        ValueError: there is no task, one is of no kind, a task has no tower, a tower no task, or a width is no whole
            number above 0.
    """
    if not tasks:
        raise ValueError("there are no tasks, expected one or more; name each with its kind, such as Binary()")
    if not isinstance(tasks, Mapping):
        raise ValueError(f"tasks are {tasks!r}, expected kinds by name, such as {{'income': Binary()}}")
    for name, task in tasks.items():
        if not isinstance(task, Task):
            raise ValueError(f"task {name!r} is {task!r}, expected a kind, such as Binary()")
    if not isinstance(towers, Mapping):
        towers = {name: towers for name in tasks}
    for one, others, what in ((tasks, towers, "no tower"), (towers, tasks, "a tower but is no task")):
        odd = [name for name in one if name not in others]
        if odd:
            raise ValueError(f"{odd[0]!r} has {what}; the tasks are {', '.join(tasks)}")
    for name, widths in towers.items():
        if not are_widths(widths):
            raise ValueError(
                f"the tower of {name!r} has widths {widths!r}, expected a sequence of whole numbers above 0: (16,)"
            )
    return {name: tuple(towers[name]) for name in sorted(tasks, key=str)}


class Tower(nn.Module):
    """The layers of one task: hidden ones with ReLU, and an output of the task's shape.

    Attributes:
        task: the kind of the task.
        hidden: widths of the hidden layers; may be empty.
    """

    task: Task
    hidden: Sequence[int] = (16,)

    @nn.compact
    def __call__(self, v: Array) -> Array:
        """Maps [B, features] to [B, *task.shape]."""
        for i, width in enumerate(self.hidden):
            v = nn.relu(nn.Dense(width, name=f"layer_{i}")(v))
        return nn.Dense(self.task.outputs, name="output")(v).reshape(v.shape[0], *self.task.shape)


class Experts(nn.Module):
    """E small networks of one shape, each with weights of its own, computed together.

    Attributes:
        number: how many, E.
        widths: widths of the layers of each, each with ReLU.
    """

    number: int
    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, features], the same for all, or [E, B, features], one for each, to [E, B, width]."""
        draw = nn.initializers.lecun_normal(batch_axis=0)
        for i, width in enumerate(self.widths):
            kernel = self.param(f"kernel_{i}", draw, (self.number, x.shape[-1], width))
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.number, 1, width))
            product = jnp.einsum("bd,edw->ebw" if x.ndim == 2 else "ebd,edw->ebw", x, kernel)
            x = nn.relu(product + bias)
        return x
