"""What Optax leaves to its users: a rate that rises and falls, the mean of the parameters, decay of matrices alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hyperjax.loss_scale import ScaledState


def schedule(learning_rate: float, steps: int, decay: float = 0.0, warmup: int = 0) -> optax.Schedule:
    """A constant learning rate that may rise along a line at first and end in half a cosine.

    Args:
        learning_rate: the rate between rise and fall.
        steps: length of the whole run.
        decay: the final fraction of the run over which the rate falls to zero: 0 never, 1 from the first step on.
        warmup: number of steps over which the rate rises to where it would be without; the first one is not zero.

    Returns:
        Step number -> learning rate.
    """
    falling = round(decay * steps)
    rate = optax.constant_schedule(learning_rate)
    if falling:
        cosine = optax.cosine_decay_schedule(learning_rate, falling)
        rate = optax.join_schedules([rate, cosine], [steps - falling])
    if not warmup:
        return rate
    return lambda step: rate(step) * jnp.minimum(1.0, (step + 1) / warmup)


class AveragedState(NamedTuple):
    """State of `average_params`: the wrapped optimizer's, the number of updates and the mean of the parameters."""

    inner: Any
    updates: jax.Array
    mean: Any


def average_params(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Wraps an optimizer so that its state also holds an exponential moving average of the parameters.

    The training itself is unchanged. After t updates the mean keeps min(decay, t / (t + 9)) of itself, so that the
    initial values are soon forgotten; read it with `averaged_params`.

    Args:
        optimizer: any optax transformation whose updates are added to the parameters.
        decay: in [0, 1), for example 0.999; about 1 / (1 - decay) updates count.

    Returns:
        A transformation that needs `params` in its `update`.

    Raises:
        ValueError: decay outside [0, 1).

    Reference: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM 1992.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}, the weight of the past in a moving average; choose it in [0, 1)")

    def init(params):
        return AveragedState(optimizer.init(params), jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None):
        updates, inner = optimizer.update(updates, state.inner, params)
        new = optax.apply_updates(params, updates)
        kept = jnp.minimum(decay, state.updates / (state.updates + 9))
        mean = optax.incremental_update(new, state.mean, 1 - kept)
        return updates, AveragedState(inner, state.updates + 1, mean)

    return optax.GradientTransformation(init, update)


def averaged_params(opt_state: Any, params: Any) -> Any:
    """The mean that `average_params` keeps as the outermost wrapper but for a scaled loss, or else `params`.

    Args:
        opt_state: state of the optimizer.
        params: the parameters themselves.

    Returns:
        As `params`.
    """
    opt_state = opt_state.inner if isinstance(opt_state, ScaledState) else opt_state
    return opt_state.mean if isinstance(opt_state, AveragedState) else params


def matrices(params: Any) -> Any:
    """True for parameters of two axes or more: what weight decay shrinks, unlike biases and gains.

    Args:
        params: pytree of arrays.

    Returns:
        A pytree of bools, for the `mask` of Optax.
    """
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
