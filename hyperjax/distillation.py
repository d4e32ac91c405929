"""Learning from the dense network's answers as well as from the data."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def distillation(logits: Array, teacher: Array, temperature: Any = 1.0) -> Array:
    """Forward divergence KL(teacher || student) of each prediction, times the temperature squared.

    Args:
        logits: the student's, [..., V].
        teacher: of equal shape; no gradient flows into it.
        temperature: divides both; its square keeps the gradient's size.

    Returns:
        [...], in nats; the caller averages.

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0 (seen only where it is no tracer).

    Reference:
        Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network" (2015), section 2.
    """
    if logits.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {logits.shape} and the teacher's {teacher.shape}, expected one"
        )
    if not isinstance(temperature, jax.core.Tracer) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, expected a number above 0, such as 2")
    target = jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature
    log_p, log_q = jax.nn.log_softmax(target), jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    return temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
