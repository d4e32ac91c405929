"""Checks of what a hypernetwork is conditioned on: sizes, task ids, embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def check_sizes(embedding_dim: Any, num_embeddings: Any, sample_block: Any) -> None:
    """Raises ValueError for sizes that are no whole numbers in range."""
    for name, value, least in (
        ("embedding_dim", embedding_dim, 1),
        ("num_embeddings", num_embeddings, 0),
        ("sample_block", 1 if sample_block is None else sample_block, 1),
    ):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")


def check_task(task_id: Any, tasks: int) -> Array | int | None:
    """Returns a task id as a Python int, or as an array [B] or a tracer, whose value `lookup` guards."""
    if task_id is None:
        return None
    if not tasks:
        raise ValueError(f"task_id is {task_id}, but num_embeddings is 0; leave it out, or give num_embeddings")
    if isinstance(task_id, jax.core.Tracer):
        ids: Any = task_id
    else:
        ids = np.asarray(task_id)
    if ids.dtype.kind not in "iu" or ids.ndim > 1:
        raise ValueError(f"task_id is {task_id}, expected a whole number, or a vector [B] of them")
    if isinstance(ids, jax.core.Tracer):
        return ids.astype(jnp.int32)
    if ids.size and (ids.min() < 0 or ids.max() >= tasks):
        raise ValueError(f"task_id is {task_id}, expected 0 to {tasks - 1}, as num_embeddings is {tasks}")
    return int(ids) if ids.ndim == 0 else jnp.asarray(ids)


def check_z(z: Any, width: int, what: str = "z") -> Array:
    """Returns an embedding as a float32 array [E] or [B, E]."""
    shape = jnp.shape(z)
    if len(shape) not in (1, 2) or shape[-1] != width:
        raise ValueError(
            f"{what} has shape {shape}, expected [{width}] or [batch, {width}], as embedding_dim is {width}"
        )
    z = jnp.asarray(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise ValueError(f"{what} is {z.dtype}, expected floating point numbers")
    return z if z.dtype == jnp.float64 else z.astype(jnp.float32)


def check_sources(encodes: bool, tasks: int, has_task: bool, z: Array | None, condition: Any) -> None:
    """Raises ValueError unless there is exactly one source of z."""
    if condition is not None and not encodes:
        raise ValueError("condition was given, but there is no encoder; pass encoder=MODULE to from_target, or give z")
    if z is not None and not tasks and not encodes:
        raise ValueError("z was given to a static hypernetwork, which has embeddings of its own; leave it out")
    if condition is not None and z is not None:
        raise ValueError("z and condition were both given; give one of them")
    if encodes and condition is None and z is None:
        raise ValueError("the encoder has nothing to encode; give condition, or z")
    if not encodes and tasks and not has_task and z is None:
        raise ValueError(f"nothing says which weights to generate; give task_id, 0 to {tasks - 1}, or z")


def batch_size(z: Array | None, task: Array | int | None) -> int | None:
    """Returns B if each sample has an embedding or a task of its own, else None."""
    sizes = {len(v) for v in (z,) if v is not None and v.ndim == 2} | {
        len(v) for v in (task,) if isinstance(v, jax.Array) and v.ndim == 1
    }
    if len(sizes) > 1:
        raise ValueError(f"z and task_id are batches of {sorted(sizes)}, expected one size")
    return sizes.pop() if sizes else None
