"""What is not generated: parameters that are learned directly, one for all tasks or one for each, or frozen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.hypernet.generators import Generator

Array = jax.Array


class Learned(Generator):
    """Parameters learned directly, shared by all tasks; they start as the target's own.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> x, rules = jnp.ones((1, 28)), [("bias", hj.Learned())]
        >>> hyper = hj.HyperNetwork.from_target(nn.Dense(10), x, embedding_dim=8, num_embeddings=3, rules=rules)
        >>> variables = jax.jit(hyper.init)(jax.random.key(0), x, task_id=0)
        >>> variables["params"]["generators_0"]["theta.bias"].shape  # the bias itself, for all three tasks
        (10,)
    """

    needs_z = False

    @nn.compact
    def __call__(self, z, task_id=None, native=None):
        """Returns {path: [*shape]}, whatever z is."""
        return {spec.path: self.from_native(spec.name, spec, native) for spec in self.leaves}


class Frozen(Generator):
    """Parameters that stay as they start, in the collection "frozen" and in their own dtype.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> x, rules = jnp.ones((1, 28)), [("bias", hj.Frozen())]
        >>> hyper = hj.HyperNetwork.from_target(nn.Dense(10), x, embedding_dim=8, rules=rules)
        >>> variables = jax.jit(hyper.init)(jax.random.key(0), x)
        >>> jax.tree.map(jnp.shape, variables["frozen"])  # train variables["params"] alone
        {'generators_0': {'theta.bias': (10,)}}
    """

    needs_z = False

    @nn.compact
    def __call__(self, z, task_id=None, native=None):
        """Returns {path: [*shape]}, whatever z is."""

        def start(spec):
            return jnp.zeros(spec.shape, spec.dtype) if native is None else jnp.asarray(native[spec.path], spec.dtype)

        return {spec.path: self.variable("frozen", spec.name, start, spec).value for spec in self.leaves}


class PerTask(Generator):
    """Parameters learned directly, a copy for each task [tasks, *shape]; all copies start as the target's own.

    A task id that is out of range, inside `jit`, gives NaN.

    Raises:
        ValueError: there are no tasks (`num_embeddings=0`); from `HyperNetwork.from_target`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> x, rules = jnp.ones((1, 28)), [("bias", hj.PerTask())]
        >>> hyper = hj.HyperNetwork.from_target(nn.Dense(10), x, embedding_dim=8, num_embeddings=3, rules=rules)
        >>> variables = jax.jit(hyper.init)(jax.random.key(0), x, task_id=0)
        >>> variables["params"]["generators_0"]["theta.bias"].shape  # a bias for each of three tasks
        (3, 10)
    """

    needs_z = False

    def refuse(self) -> str | None:
        """Returns why it cannot make `leaves`, or None: there are no tasks."""
        return None if self.tasks else "PerTask has no tasks; give num_embeddings, the number of tasks"

    @nn.compact
    def __call__(self, z, task_id=None, native=None):
        """Returns {path: [..., *shape]}, the copies of the tasks [...]."""
        made = {}
        for spec in self.leaves:

            def start(key: Array, spec=spec) -> Array:
                shape = (len(self.tasks), *spec.shape)
                dtype = jnp.float32 if spec.floating else spec.dtype
                value = jnp.zeros(spec.shape) if native is None else native[spec.path]
                return jnp.broadcast_to(jnp.asarray(value, dtype), shape)

            made[spec.path] = lookup(self.param(spec.name, start), task_id)
        return made


def lookup(table: Array, index: Array | int) -> Array:
    """Row(s) of a table [n, ...] at an index [...]; where that is out of range NaN, the least integer or False."""
    index = jnp.asarray(index)
    rows = jnp.take(table, index, axis=0, mode="clip")
    inside = ((index >= 0) & (index < table.shape[0])).reshape(index.shape + (1,) * (table.ndim - 1))
    if jnp.issubdtype(table.dtype, jnp.inexact):
        outside: Any = jnp.nan
    else:
        outside = jnp.iinfo(table.dtype).min if jnp.issubdtype(table.dtype, jnp.integer) else False
    return jnp.where(inside, rows, jnp.asarray(outside, table.dtype))
