"""Scaling of the loss, so that gradients in float16 neither vanish nor overflow.

Float16 ends at 65,504 and has nothing between 0 and 6e-8. The loss is multiplied by a factor before the gradient is
taken and the gradient divided by it after. The factor halves at a step whose gradient overflows, which is left out, and
doubles after so many steps in a row that did not.

Reference: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


class ScaledState(NamedTuple):
    """The state of an optimizer whose loss is scaled.

    Attributes:
        scale: factor of the loss, scalar float32, a power of two.
        good: steps since it changed, scalar int32.
        every: steps after which it doubles, scalar int32.
        inner: the optimizer's own state.
    """

    scale: Array
    good: Array
    every: Array
    inner: Any


def scale_loss(
    optimizer: optax.GradientTransformation, start: float = 2.0**15, every: int = 1000
) -> optax.GradientTransformation:
    """Wraps an optimizer so that `hyperjax.training.make_step` scales the loss.

    Args:
        optimizer: any optax transformation; it gets gradients that are divided by the factor again.
        start: the first factor.
        every: steps without overflow after which it doubles.

    Returns:
        A transformation whose state is `ScaledState`, which is to be the outermost.

    Raises:
        ValueError: `start` is no power of two of at least 1, or `every` is below 1.
    """
    if start < 1 or math.frexp(start)[0] != 0.5:
        raise ValueError(f"start is {start}, expected a power of two of at least 1, such as 2**15")
    if every < 1:
        raise ValueError(f"every is {every}, expected 1 step or more")

    def init(params):
        return ScaledState(jnp.float32(start), jnp.int32(0), jnp.int32(every), optimizer.init(params))

    def update(updates, state, params=None):
        updates, inner = optimizer.update(updates, state.inner, params)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformation(init, update)


def adjusted(state: ScaledState, good: Array) -> ScaledState:
    """The state with the factor of the next step.

    Args:
        state: of this step.
        good: whether its loss and gradient are finite, scalar bool.
    """
    streak = jnp.where(good, state.good + 1, 0)
    grow = streak >= state.every
    scale = jnp.where(good, jnp.where(grow, 2 * state.scale, state.scale), jnp.maximum(state.scale / 2, 1.0))
    return state._replace(scale=jnp.minimum(scale, 2.0**24), good=jnp.where(grow, 0, streak))
