"""Many small training runs in one compiled program: seeds and hyperparameters side by side, under `vmap`.

R runs, N rows of data, B batch, n steps.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax.training.state import TrainState

Array = jax.Array
Hyper = Mapping[str, Array]


class Trials(NamedTuple):
    """What `make_trials` returns.

    Attributes:
        start: (seeds [R], hyper {name: [R]}) -> the states of R runs, every leaf [R, ...].
        advance: (states, hyper, seeds, rows, steps) -> (states, metrics {name: [R, n]}), n = `steps` updates later.
            It compiles once for each n, number of runs and shape of rows, and donates the states.
    """

    start: Callable[[Any, Hyper], TrainState]
    advance: Callable[..., tuple[TrainState, dict[str, Array]]]


def make_trials(
    init: Callable[[Array, Hyper], Any],
    loss_fn: Callable[[Any, Hyper, Any, Array, Array], tuple[Array, dict[str, Array]]],
    optimizer: Callable[[Hyper], optax.GradientTransformation],
    batch: int,
    *,
    own_rows: bool = False,
) -> Trials:
    """Builds a function that advances many runs at once.

    A run's batches are drawn from its own key with replacement, all on the device, so that steps need no host. What a
    run does depends on its seed and hyperparameters, not on its neighbours.

    Args:
        init: (key, hyper of one run, whose values are tracers) -> parameters.
        loss_fn: (params, hyper of one run, batch, key, step) -> (scalar loss, dict of scalar metrics).
        optimizer: hyper of one run -> an optax transformation.
        batch: rows in a batch, B.
        own_rows: whether each run has rows of its own, [R, N, ...], in place of [N, ...] for all.

    Returns:
        The functions.

    Raises:
        ValueError: `batch` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected 1 or more rows")

    def start_one(seed: Array, hyper: Hyper) -> TrainState:
        params = init(jax.random.fold_in(jax.random.key(seed), 0), hyper)
        return TrainState.create(params, optimizer(hyper))

    def step_one(state: TrainState, hyper: Hyper, seed: Array, rows: Any) -> tuple[TrainState, dict[str, Array]]:
        train_key = jax.random.fold_in(jax.random.key(seed), 1)
        row_key, loss_key = jax.random.split(jax.random.fold_in(train_key, state.step))
        index = jax.random.randint(row_key, (batch,), 0, jax.tree.leaves(rows)[0].shape[0])
        drawn = jax.tree.map(lambda array: array[index], rows)
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = gradient(state.params, hyper, drawn, loss_key, state.step)
        updates, opt_state = optimizer(hyper).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), {"loss": loss, **metrics}

    all_runs = jax.vmap(step_one, (0, 0, 0, 0 if own_rows else None))

    @partial(jax.jit, static_argnums=4, donate_argnums=0)
    def advance(states, hyper, seeds, rows, steps):
        states, metrics = jax.lax.scan(lambda s, _: all_runs(s, hyper, seeds, rows), states, None, steps)
        return states, jax.tree.map(lambda values: values.T, metrics)

    def start(seeds: Any, hyper: Hyper) -> TrainState:
        # One by one and without `jit`: compiling all the random draws of a network takes longer than its training.
        each = [start_one(seed, {name: values[i] for name, values in hyper.items()}) for i, seed in enumerate(seeds)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    return Trials(start, advance)


def apply_in_blocks(
    apply: Callable[[Any, Any], Any], params: Any, rows: Any, block: int = 4096, *, own_rows: bool = False
) -> Any:
    """Applies the networks of many runs to all rows of a split, a block at a time.

    Args:
        apply: (parameters of one run, rows) -> pytree of outputs, [block, ...].
        params: [R, ...].
        rows: pytree of arrays [N, ...], or [R, N, ...] with `own_rows`.
        block: rows at a time.
        own_rows: as in `make_trials`.

    Returns:
        NumPy arrays, [R, N, ...].

    Raises:
        ValueError: `block` is below 1, or there are no rows.
    """
    if block < 1:
        raise ValueError(f"block is {block}, expected 1 or more rows")
    axis = 1 if own_rows else 0
    size = jax.tree.leaves(rows)[0].shape[axis]
    if size < 1:
        raise ValueError("there are no rows to apply the networks to, expected 1 or more; give a larger split")
    block = min(block, size)
    call = _all_runs(apply, own_rows)
    starts = range(0, size, block)
    parts = [call(params, jax.tree.map(partial(_block, start=at, block=block, axis=axis), rows)) for at in starts]
    parts = [jax.tree.map(np.asarray, part) for part in parts]
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays, 1), *parts)
    return jax.tree.map(lambda array: array[:, :size], joined)


@lru_cache(maxsize=8)
def _all_runs(apply: Callable[[Any, Any], Any], own_rows: bool) -> Callable[[Any, Any], Any]:
    return jax.jit(jax.vmap(apply, (0, 0 if own_rows else None)))


def _block(array: Any, start: int, block: int, axis: int) -> Array:
    """Takes a block of rows; the last one is filled up with copies of the last row, for one compilation serves all."""
    last = array.shape[axis] - 1
    return jnp.take(jnp.asarray(array), jnp.minimum(jnp.arange(start, start + block), last), axis)
