"""The fast scan over time: input products before the loop, big weight gradients as one product after it.

Shape letters: T time, B batch, D input features, H units, N columns of one weight.

Differentiating `lax.scan` over a cell adds a full-size weight gradient at every step and keeps the input product
inside the loop. A recurrent cell touches its big weights only through x @ W_x and h @ W_h, so here the cell is
given as data (`Weights`) and a pointwise `step`, and the products are done around it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hyperjax.recurrent import platform

Array = jax.Array
OUTPUT = 1  # the position in every carry of h, the state that the recurrent weights multiply and that the cell returns


class Weights(NamedTuple):
    """A recurrent cell's parameters, sorted by how they are used.

    Attributes:
      inputs: name -> [D, N], multiplied by the input.
      recurrent: name -> [H, N], multiplied by the cell's output h.
      small: any pytree; read by the step itself; its gradient is summed inside the loop on CPUs, after it elsewhere.
      late: name -> [D, N], multiplied by the input as the cell gates it within the step; most cells have none.
    """

    inputs: dict[str, Array]
    recurrent: dict[str, Array]
    small: Any
    late: dict[str, Array] = {}  # noqa: RUF012 - nobody writes to it


Step = Callable[[Any, tuple, dict, dict, Any], tuple]  # (small, carry, x products, h products, noise) -> carry
Gate = Callable[[Any, tuple, Array, dict, dict], Array]  # (small, carry, x, x products, h products) -> gated x


def product(x: Array, w: Array, dtype: Any = None) -> Array:
    """x @ w over the last axis of x, computed in `dtype` and returned in float32 (or wider)."""
    out = jnp.promote_types(jnp.result_type(x, w), jnp.float32)
    if dtype is not None:
        x, w = x.astype(dtype), w.astype(dtype)
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=out)


def _transposed(dy: Array, w: Array, dtype: Any) -> Array:
    return product(dy, w.T, dtype)


def _outer(x_TBD: Array, dy_TBN: Array, dtype: Any, cpu: bool) -> Array:
    """The gradient of a weight, summed over time and batch.

    A CPU multiplies faster if both are one axis. Elsewhere they stay two: merged, a batch that is split over devices
    would have to be gathered.
    """
    if cpu:
        x, dy = x_TBD.reshape(-1, x_TBD.shape[-1]), dy_TBN.reshape(-1, dy_TBN.shape[-1])
        return product(x.T, dy, dtype)
    out = jnp.promote_types(jnp.result_type(x_TBD, dy_TBN), jnp.float32)
    if dtype is not None:
        x_TBD, dy_TBN = x_TBD.astype(dtype), dy_TBN.astype(dtype)
    return lax.dot_general(x_TBD, dy_TBN, (((0, 1), (0, 1)), ((), ())), preferred_element_type=out)


def deferred_scan(
    step: Step,
    weights: Weights,
    carry: tuple,
    x_TBD: Array,
    noise: Any = None,
    *,
    gate: Gate | None = None,
    dtype: Any = None,
) -> tuple[tuple, Array]:
    """Runs a cell over time.

    Args:
      step: function of (weights.small, carry, {name: x_t @ W}, {name: h @ W}, noise_t) -> new carry that works along
        the last axis of its arrays, whatever axes stand before it.
      weights: the cell's parameters; see `Weights`.
      carry: the initial state, a tuple of [B, .] arrays whose entry 1 is h.
      x_TBD: [T, B, D] inputs.
      noise: pytree of arrays [T, B, ...] that take no gradient (dropout masks), or None.
      gate: what `weights.late` multiply: (weights.small, carry, x_t, products as for `step`) -> [B, D]. The step finds
        these products beside those of the input. Needed if there are late weights.
      dtype: what the big products are computed in; None keeps the parameters' own. The state stays float32.

    Returns:
      (final carry, h at every step [T, B, H]).

    Raises:
      ValueError: late weights without a gate.
    """
    if weights.late and gate is None:
        raise ValueError(f"weights.late holds {', '.join(weights.late)}, but there is no gate for them; give one")
    gated_input: Any = gate

    @jax.custom_vjp
    def run(weights, carry, x_TBD, noise):
        return forward(weights, carry, x_TBD, noise, saves=False)[0]

    def forward(weights, carry, x_TBD, noise, saves=True):
        xp = {k: product(x_TBD, w, dtype) for k, w in weights.inputs.items()}

        def body(carry, at_t):
            x_t, xp_t, noise_t = at_t
            hp = {k: product(carry[OUTPUT], w, dtype) for k, w in weights.recurrent.items()}
            gated, late = None, {}
            if weights.late:
                gated = gated_input(weights.small, carry, x_t, xp_t, hp)
                late = {k: product(gated, w, dtype) for k, w in weights.late.items()}
            new = step(weights.small, carry, xp_t | late, hp, noise_t)
            return new, (new[OUTPUT], (carry, hp, gated, late) if saves else None)

        last, (h_TBH, saved) = lax.scan(body, carry, (x_TBD if weights.late else None, xp, noise))
        return (last, h_TBH), (weights, x_TBD, noise, xp, saved)

    def backward(residuals, cotangents):
        on_cpu, elsewhere = partial(pull, cpu=True), partial(pull, cpu=False)
        return platform.choose(residuals, cotangents, cpu=on_cpu, accelerator=elsewhere)

    def pull(residuals, cotangents, cpu):
        """The gradients; those of the small weights summed in the loop, or found for all steps at once after it."""
        weights, x_TBD, noise, xp, (carries, hp, gated, late) = residuals
        dlast, dh_TBH = cotangents
        x_late = x_TBD if weights.late else None

        def at(products, t):
            return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, t, keepdims=False), products)

        def body(state, at_t):
            dcarry, dsmall, products, (xp_t, hp_t) = state
            t, (carry, x_t, late_t, noise_t), dh = at_t
            dnew = (*dcarry[:OUTPUT], dcarry[OUTPUT] + dh, *dcarry[OUTPUT + 1 :])
            early = (weights.small, carry, xp_t, hp_t)
            _, back = jax.vjp(lambda s, c, x, h, late: step(s, c, x | late, h, noise_t), *early, late_t)
            *dearly, dlate = back(dnew)
            dx = dgated = None
            if weights.late:
                dgated = sum(_transposed(dlate[k], w, dtype) for k, w in weights.late.items())
                _, back = jax.vjp(lambda s, c, x, h, x_t: gated_input(s, c, x_t, x, h), *early, x_t)
                *through, dx = back(dgated)
                dearly = jax.tree.map(jnp.add, dearly, through)
            dsmall_t, dcarry, dxp, dhp = dearly
            dh = dcarry[OUTPUT]
            for k, w in weights.recurrent.items():
                dh = dh + _transposed(dhp[k], w, dtype)
            dcarry = (*dcarry[:OUTPUT], dh, *dcarry[OUTPUT + 1 :])
            # A gradient takes the place of its product: half the memory on CPUs (elsewhere the products are read again
            # after the loop). XLA copies nothing only where a step's product was read before, so the state holds it.
            products = jax.tree.map(lambda a, d: lax.dynamic_update_index_in_dim(a, d, t, 0), products, (dxp, dhp))
            dsmall = jax.tree.map(jnp.add, dsmall, dsmall_t) if cpu else None
            return (dcarry, dsmall, products, at(products, t - 1)), (dx, dlate, None if cpu else (dnew, dgated))

        zeros = jax.tree.map(jnp.zeros_like, weights.small) if cpu else None
        times, products = jnp.arange(x_TBD.shape[0]), (xp, hp)
        read = (times, (carries, x_late, late, noise), dh_TBH)
        state, (dx_TBD, dlate, dstates) = lax.scan(body, (dlast, zeros, products, at(products, -1)), read, reverse=True)
        dcarry, dsmall, (dxp, dhp), _ = state
        if not cpu:

            def states(small):  # all steps at once; not merged into one batch, which may be split over devices
                new = step(small, carries, xp | late, hp, noise)
                return new, gated_input(small, carries, x_late, xp, hp) if late else None

            _, back = jax.vjp(states, weights.small)
            (dsmall,) = back(dstates)
        dinputs = {k: _outer(x_TBD, dxp[k], dtype, cpu) for k in weights.inputs}
        drecurrent = {k: _outer(carries[OUTPUT], dhp[k], dtype, cpu) for k in weights.recurrent}
        dlate = {k: _outer(gated, dlate[k], dtype, cpu) for k in weights.late}
        dx_TBD = jnp.zeros_like(x_TBD) if dx_TBD is None else dx_TBD
        dx_TBD = sum((_transposed(dxp[k], w, dtype) for k, w in weights.inputs.items()), dx_TBD)
        return Weights(dinputs, drecurrent, dsmall, dlate), dcarry, dx_TBD, None

    run.defvjp(forward, backward)
    return run(weights, carry, x_TBD, noise)
