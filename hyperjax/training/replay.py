"""One training step under the microscope: what a loss or gradient that was not finite came from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.paramtree import path_string
from hyperjax.training.state import LossFn, TrainState, gradient, norm, scale_of


class Examined(NamedTuple):
    """What a step would have done.

    Attributes:
        loss: the loss.
        metrics: the loss function's other metrics.
        grad_norm: global norm of the gradient, before clipping.
        norms: norm of the gradient by module, the first component of a parameter's path.
        not_finite: paths of the leaves with a NaN or an infinity: of what goes in (`batch`, `params`, `carry`), and of
            what comes out (`gradient`, `new carry`), in this order.
    """

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    norms: dict[str, float]
    not_finite: dict[str, list[str]]


def examine(loss_fn: LossFn, state: TrainState, batch: Any, key: jax.Array) -> Examined:
    """Computes the loss and the gradient of a step, without making it.

    Args:
        loss_fn: as of `make_step`.
        state: the state before the step, not donated.
        batch: the batch of the step.
        key: the run's key; the step folds its own number into it.

    Returns:
        What the step would have done.
    """

    @jax.jit
    def computed(state, batch):
        step_key = jax.random.fold_in(key, state.step)
        return gradient(loss_fn, scale_of(state))(state.params, state.carry, batch, step_key)

    (loss, (carry, metrics)), grads = computed(state, batch)
    modules: dict[str, list[jax.Array]] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        modules.setdefault(path_string(keys).split("/")[0], []).append(leaf)
    looked_at = {"batch": batch, "params": state.params, "carry": state.carry, "gradient": grads, "new carry": carry}
    return Examined(
        float(loss),
        {name: float(value) for name, value in metrics.items()},
        float(norm(grads)),
        {name: float(norm(leaves)) for name, leaves in modules.items()},
        {name: not_finite(tree) for name, tree in looked_at.items()},
    )


def not_finite(tree: Any) -> list[str]:
    """Paths of the leaves that hold a NaN or an infinity."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = []
    for keys, leaf in leaves:
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not np.isfinite(np.asarray(leaf, np.float64)).all():
            found.append(path_string(keys))
    return found
