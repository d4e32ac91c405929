"""How the losses of several tasks become one: pure functions.

Optax has none of the weightings; what it has is used: its optimisers train theta and the log variances.

Where arrays are [T], the order of the tasks is the caller's, the same in all of them.
T tasks.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax.routing.tasks import Regression, Task

Array = jax.Array


def fixed(losses: Mapping[str, Array], weights: Mapping[str, Any]) -> Array:
    """The weighted sum of the losses.

    Args:
        losses: scalars by task.
        weights: numbers of at least 0 by task, one for each; traced ones are not checked for their sign.

    Returns:
        A scalar.

    Raises:
        ValueError: a task has no weight, a weight has no task, or a weight is negative or not finite.
    """
    _check_names(losses, weights, "weight")
    for name, weight in weights.items():
        if not isinstance(weight, jax.core.Tracer) and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of {name!r} is {weight}, expected a finite number of at least 0")
    return sum((weights[name] * loss for name, loss in losses.items()), start=jnp.zeros(()))


def uncertainty(losses: Mapping[str, Array], log_variances: Mapping[str, Array], tasks: Mapping[str, Task]) -> Array:
    """Weighs each loss L by a learned variance exp(s) of its task: start the s at 0, and train them with the network.

    exp(-s) L / 2 + s / 2 for `Regression`, least at s = log L; exp(-s) L + s / 2 for the rest, least at s = log(2 L).

    Args:
        losses: scalars by task.
        log_variances: the s, scalars by task.
        tasks: kinds by name.

    Returns:
        A scalar; it may be negative.

    Raises:
        ValueError: a task has no log variance or no kind, or one of these belongs to no task.

    Reference:
        Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
        CVPR 2018, eq. 7 and 10.
    """
    _check_names(losses, log_variances, "log variance")
    _check_names(losses, tasks, "kind")
    total = jnp.zeros(())
    for name, loss in losses.items():
        s = log_variances[name]
        total += jnp.exp(-s) * loss * (0.5 if isinstance(tasks[name], Regression) else 1.0) + s / 2
    return total


def gradnorm(theta: Array, norms: Array, losses: Array, initial: Array, alpha: Any) -> tuple[Array, Array]:
    """Weights that pull the tasks' gradients to one norm, the larger for a task that has been learned less.

    The weights are T softmax(theta), so they are positive and their sum stays T; start theta at 0.
    G_i = w_i norm_i;  r_i = (L_i / L_i(0)) / mean;  L_grad = sum_i |G_i - stop_gradient(mean(G) r_i^alpha)|.

        def total(params, theta, batch):
            norms = task_gradient_norms(lambda last: losses_of({**params, "last": last}, batch), params["last"])
            losses = losses_of(params, batch)
            weights, balance = gradnorm(theta, norms, losses, initial, alpha=1.5)
            return weights @ losses + balance

    Args:
        theta: [T], trained by L_grad alone, with an optimiser of its own.
        norms: [T] norms of the gradients of the unweighted losses with respect to the last shared parameters.
        losses: [T] losses of this step.
        initial: [T] losses of the first step, above 0; or log K for a task of K classes.
        alpha: strength of the pull towards equal rates of training; 0 makes the norms equal. The paper: 0.12 and 1.5.

    Returns:
        The weights [T], without gradient, and L_grad, whose gradient reaches theta only.

    Raises:
        ValueError: the arrays are not all [T], or `initial` holds a known number that is not above 0.

    Reference:
        Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
        ICML 2018, eq. 2; there the weights are scaled back to the sum T after each step.
    """
    _check_vectors(theta=theta, norms=norms, losses=losses, initial=initial)
    _check_positive("initial", initial)
    weights = len(theta) * jax.nn.softmax(theta)
    norms, losses, initial = jax.lax.stop_gradient((norms, losses, initial))
    rate = losses / initial
    balanced = weights * norms
    target = jax.lax.stop_gradient(balanced.mean() * (rate / rate.mean()) ** alpha)
    return jax.lax.stop_gradient(weights), jnp.abs(balanced - target).sum()


def task_gradient_norms(losses_fn: Callable[[Any], Array], params: Any) -> Array:
    """Returns the norm of each task's gradient, by one forward pass and T backward ones.

    Args:
        losses_fn: parameters -> [T], the unweighted losses.
        params: pytree; for `gradnorm`, of the last layer that all tasks share.

    Returns:
        [T], without gradient.

    Raises:
        ValueError: `losses_fn` returns something other than a vector.
    """
    losses, pull = jax.vjp(losses_fn, params)
    if jnp.ndim(losses) != 1:
        raise ValueError(f"losses_fn returns the shape {jnp.shape(losses)}, expected a vector: stack the tasks' losses")
    gradients = jax.vmap(pull)(jnp.eye(len(losses), dtype=losses.dtype))
    return jax.lax.stop_gradient(jax.vmap(optax.tree.norm)(gradients))


def dynamic_average(recent: Array, earlier: Array, temperature: Any = 2.0) -> Array:
    """Weights T softmax(ratio / temperature), ratio = recent / earlier: more for a loss that falls more slowly.

    Args:
        recent: [T] losses averaged over the last epoch.
        earlier: [T] those of the epoch before, above 0; before there are two epochs, pass one array as both.
        temperature: above 0; the larger, the more alike the weights.

    Returns:
        [T], of the sum T, without gradient.

    Raises:
        ValueError: the arrays are not all [T], or a known number that should be above 0 is not.

    Reference:
        Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, eq. 7 (DWA).
    """
    _check_vectors(recent=recent, earlier=earlier)
    _check_positive("earlier", earlier)
    _check_positive("temperature", temperature)
    return jax.lax.stop_gradient(len(recent) * jax.nn.softmax(recent / earlier / temperature))


def _check_names(losses: Mapping[str, Any], given: Mapping[str, Any], what: str) -> None:
    for one, others, problem in (
        (losses, given, f"task {{!r}} has no {what}; give one"),
        (given, losses, f"there is a {what} of {{!r}}, which has no loss; the tasks are {', '.join(losses)}"),
    ):
        odd = [name for name in one if name not in others]
        if odd:
            raise ValueError(problem.format(odd[0]))


def _check_vectors(**arrays: Any) -> None:
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or any(shape != first for shape in shapes.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the shapes are {listed}; expected one number for each task in all of them")


def _check_positive(name: str, values: Any) -> None:
    if not isinstance(values, jax.core.Tracer) and not np.all(np.asarray(values) > 0):
        raise ValueError(f"{name} is {values}, expected numbers above 0")
