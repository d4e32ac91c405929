"""Specialised networks for deployment: one task's network as bytes that need nothing but JAX to run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hyperjax import serving
from hyperjax.hypernet.network import HyperNetwork

Array = jax.Array


def export(
    hyper: HyperNetwork,
    variables: Mapping[str, Any],
    *inputs: Any,
    task_id: int | None = None,
    z: Array | None = None,
    condition: Any = None,
    platforms: Sequence[str] = serving.PLATFORMS,
    any_batch: bool = True,
    **keywords: Any,
) -> bytes:
    """Serialises one specialised network, its weights inside.

        Path("digits.bin").write_bytes(export(hyper, variables, x, task_id=3))
        # elsewhere, with jax alone:
        y = jax.export.deserialize(bytearray(Path("digits.bin").read_bytes())).call(x)

    Args:
        hyper, variables: the hypernetwork.
        *inputs: arrays like those it will be called with.
        task_id, z, condition: one network's, as in `HyperNetwork.__call__`.
        platforms: what it shall run on: "cpu", "cuda", "rocm", "tpu".
        any_batch: let the leading axis, which all inputs then share, have any length.
        **keywords: further inputs of the target, fixed at these values.

    Returns:
        The bytes of `jax.export.Exported.serialize`.

    Raises:
        ValueError: more than one network is asked for, inputs without a common leading axis, or an unknown platform.
    """
    network = hyper.specialize(variables, task_id=task_id, z=z, condition=condition)
    arrays = [jnp.asarray(x) for x in inputs]
    free = ("batch",) if any_batch else ()
    return serving.export(lambda *inputs: network(*inputs, **keywords), *arrays, free=free, platforms=platforms)
