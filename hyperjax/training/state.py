"""The state of a training run, and the step that advances it."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Optional

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hyperjax.loss_scale import ScaledState, adjusted

if TYPE_CHECKING:
    from hyperjax.training.mesh import Layout

Array = jax.Array
LossFn = Callable[[Any, Any, Any, Array], tuple[Array, tuple[Any, dict[str, Array]]]]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes; saved and restored as a whole.

    Attributes:
        step: number of updates made so far, scalar int32.
        params: pytree of parameters.
        opt_state: the optimizer's state.
        carry: what flows from batch to batch, as the recurrent state does; () where nothing does.
    """

    step: Array
    params: Any
    opt_state: Any
    carry: Any = ()

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation, carry: Any = ()) -> "TrainState":
        """Returns the state before the first step."""
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    layout: Optional["Layout"] = None,
    *,
    non_finite: Literal["stop", "skip"] = "stop",
) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
    """Builds the training step: one jitted function that donates its state.

    Args:
        loss_fn: (params, carry, batch, key) -> (scalar loss, (new carry, dict of scalar metrics)).
        optimizer: an optax transformation.
        layout: how state and batch lie on several devices; None for one.
        non_finite: what to do with a loss or gradient that is NaN or infinite. `stop` leaves it to the caller, who
            sees the metrics; `skip` leaves all of the state as it was but for the step number, so that the next batch
            comes, and adds the metric `skipped`, 1 for such a step and 0 otherwise.

    Returns:
        step(state, batch, key) -> (new state, metrics). `key` is the run's key: the step folds its own number into
        it, so that a resumed run draws what it would have drawn. The metrics gain `loss` and `grad_norm` (before
        clipping); if both are finite, so are the new parameters. With an optimizer of `hyperjax.Policy.optimizer`
        that scales the loss, also `loss_scale` and `overflowed`, 1 for a step that is left out for a smaller scale.

    Raises:
        ValueError: `non_finite` is neither.
    """
    return jax.jit(_one_step(loss_fn, optimizer, layout, non_finite), donate_argnums=0)


def make_steps(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    batch_at: Callable[[Any, Array], Any],
    layout: Optional["Layout"] = None,
    *,
    non_finite: Literal["stop", "skip"] = "stop",
) -> Callable[[TrainState, Any, Array, int], tuple[TrainState, dict[str, Array]]]:
    """Builds a function that makes several training steps on the device, without the host.

    Args:
        loss_fn, optimizer, layout, non_finite: as in `make_step`.
        batch_at: (data, step number, a traced int32) -> batch; for example `hyperjax.data.window_at`.

    Returns:
        steps(state, data, key, count) -> (state after `count` steps, metrics [count]). It compiles once per
        `count`, donates the state and draws what `make_step` would draw, to rounding.
    """
    one = _one_step(loss_fn, optimizer, layout, non_finite)

    @partial(jax.jit, static_argnums=3, donate_argnums=0)
    def steps(state, data, key, count):
        return jax.lax.scan(lambda state, _: one(state, batch_at(data, state.step), key), state, None, count)

    return steps


def _one_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, layout: Optional["Layout"], non_finite: str
) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
    if non_finite not in ("stop", "skip"):
        raise ValueError(f"non_finite is {non_finite!r}, expected stop or skip")

    def loss_of(params: Any, carry: Any, batch: Any, key: Array) -> tuple[Array, tuple[Any, dict[str, Array]]]:
        return loss_fn(params if layout is None else layout.gather(params), carry, batch, key)

    def step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        if layout is None:
            return update(state, batch, key)
        with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):  # so that modules know of it
            return layout.pin(*update(state, batch, key))

    def update(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(key, state.step)
        scale = scale_of(state)
        (loss, (carry, metrics)), grads = gradient(loss_of, scale)(state.params, state.carry, batch, step_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, **metrics, "grad_norm": norm(grads)}
        new = TrainState(state.step + 1, params, opt_state, carry)
        if scale is not None or non_finite == "skip":
            good = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state)
            new, bad = kept.replace(step=state.step + 1), 1 - good.astype(jnp.int32)
            if scale is not None:
                new = new.replace(opt_state=adjusted(new.opt_state, good))
                metrics["loss_scale"], metrics["overflowed"] = scale, bad * (scale > 1)
                bad = bad * (scale <= 1)
            if non_finite == "skip":
                metrics["skipped"] = bad
        return new, metrics

    return step


def scale_of(state: TrainState) -> Array | None:
    """The factor of the loss, or None where it is not scaled."""
    return state.opt_state.scale if isinstance(state.opt_state, ScaledState) else None


def norm(grads: Any) -> Array:
    """The global norm of a gradient, in float32 at least: squares of small numbers in float16 are 0."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads))


def gradient(loss_fn: LossFn, scale: Array | None) -> Callable[..., tuple[tuple[Array, tuple[Any, Any]], Any]]:
    """The loss, what comes with it, and its gradient, which is taken of the loss times `scale` and divided by it again.

    Args:
        loss_fn: as of `make_step`.
        scale: None is 1.
    """

    def scaled_loss(*arguments: Any) -> tuple[Array, tuple[Any, dict[str, Array], Array]]:
        loss, (carry, metrics) = loss_fn(*arguments)
        return (loss if scale is None else loss * scale), (carry, metrics, loss)

    def found(*arguments: Any) -> tuple[tuple[Array, tuple[Any, Any]], Any]:
        (_, (carry, metrics, loss)), grads = jax.value_and_grad(scaled_loss, has_aux=True)(*arguments)
        if scale is not None:  # in float32: the scale is beyond float16
            grads = jax.tree.map(lambda g: (g.astype(jnp.float32) / scale).astype(g.dtype), grads)
        return (loss, (carry, metrics)), grads

    return found
