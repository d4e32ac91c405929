"""Pointwise maths of the recurrent cells, with backward passes that recompute instead of storing.

Shape letters: B batch, H units. Everything here acts on one time step and holds no parameters of its own.
Autodiff of these chains keeps every intermediate and recomputes tanh and exp once per consumer; the rules
below keep the inputs only and, on CPUs, evaluate each transcendental function once per pass.
"""

import jax
import jax.numpy as jnp
from jax import lax

from hyperjax.recurrent import platform

Array = jax.Array


@jax.custom_vjp
def _normalise(x_BH: Array, scale_H: Array, bias_H: Array, epsilon: float) -> Array:
    (x_BH,) = _evaluated_once(x_BH)
    mean_B1, rstd_B1 = _statistics(x_BH, epsilon)
    return (x_BH - mean_B1) * rstd_B1 * broadcast(scale_H, x_BH) + broadcast(bias_H, x_BH)


def _statistics(x_BH: Array, epsilon: float) -> tuple[Array, Array]:
    mean_B1 = jnp.mean(x_BH, -1, keepdims=True)
    variance_B1 = jnp.mean(jnp.square(x_BH - mean_B1), -1, keepdims=True)
    return mean_B1, lax.rsqrt(variance_B1 + epsilon)


def add_bias(y: Array, b: Array) -> Array:
    """y [..., H] + b [H], or [..., G, H] + [G, H], without leaning on rank promotion."""
    return y + broadcast(b, y)


def broadcast(v: Array, like: Array) -> Array:
    """v along the last axes of `like`."""
    return lax.broadcast_in_dim(v, like.shape, tuple(range(like.ndim - v.ndim, like.ndim)))


def _evaluated_once(*values: Array) -> tuple[Array, ...]:
    """Keeps a CPU from computing each value again for each of its readers, as an accelerator gladly does."""
    return platform.choose(*values, cpu=lambda *v: lax.optimization_barrier(v), accelerator=lambda *v: v)


def _normalise_forward(x_BH, scale_H, bias_H, epsilon):
    (x_BH,) = _evaluated_once(x_BH)
    mean_B1, rstd_B1 = _statistics(x_BH, epsilon)
    y_BH = (x_BH - mean_B1) * rstd_B1 * broadcast(scale_H, x_BH) + broadcast(bias_H, x_BH)
    # In a backward pass the gates' derivatives read y one by one; XLA for GPUs would normalise once for each.
    y_BH = platform.choose(y_BH, cpu=lambda y: y, accelerator=lax.optimization_barrier)
    return y_BH, (x_BH, mean_B1, rstd_B1, scale_H)


def _normalise_backward(residuals, dy_BH):
    x_BH, mean_B1, rstd_B1, scale_H = residuals
    n_BH = (x_BH - mean_B1) * rstd_B1
    batch = tuple(range(x_BH.ndim - scale_H.ndim))
    dscale_H, dbias_H = jnp.sum(dy_BH * n_BH, batch), jnp.sum(dy_BH, batch)
    dn_BH = dy_BH * broadcast(scale_H, x_BH)
    mean_dn = jnp.mean(dn_BH, -1, keepdims=True)
    mean_dn_n = jnp.mean(dn_BH * n_BH, -1, keepdims=True)
    (dx_BH,) = _evaluated_once(rstd_B1 * (dn_BH - mean_dn - n_BH * mean_dn_n))
    return dx_BH, dscale_H, dbias_H, None


_normalise.defvjp(_normalise_forward, _normalise_backward)


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float = 1e-3) -> Array:
    """Normalises the last axis to mean 0 and variance 1, then scales and shifts it.

    Args:
      x: [..., H] values.
      scale: [H] gain (gamma), or [G, H] for x of [..., G, H].
      bias: shift (beta), like `scale`.
      epsilon: added to the variance.

    Returns:
      [..., H], the dtype of `x`.

    Reference: Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450, equation 4.
    """
    return _normalise(x, scale, bias, epsilon)


@jax.custom_vjp
def lstm_memory(c_BH: Array, i_BH: Array, g_BH: Array, f_BH: Array, mask_BH: Array | None) -> Array:
    """Computes the LSTM's new memory, c' = sigmoid(f) c + sigmoid(i) mask tanh(g).

    Args:
      c_BH: [B, H] memory before the step.
      i_BH: [B, H] input gate before its sigmoid.
      g_BH: [B, H] candidate before its tanh.
      f_BH: [B, H] forget gate before its sigmoid.
      mask_BH: [B, H] dropout mask already divided by the keep probability, or None. It touches the
        candidate alone, so that nothing already remembered is dropped.

    Returns:
      [B, H] memory after the step.

    Reference: Semeniuta, Severyn, Barth, "Recurrent Dropout without Memory Loss", arXiv 1603.05118, equation 7.
    """
    return _memory_forward(c_BH, i_BH, g_BH, f_BH, mask_BH)[0]


def _memory_forward(c_BH, i_BH, g_BH, f_BH, mask_BH):
    candidate_BH = jnp.tanh(g_BH) if mask_BH is None else jnp.tanh(g_BH) * mask_BH
    new_c_BH = jax.nn.sigmoid(f_BH) * c_BH + jax.nn.sigmoid(i_BH) * candidate_BH
    return new_c_BH, (c_BH, i_BH, g_BH, f_BH, mask_BH)


def _memory_backward(residuals, dnew_BH):
    c_BH, i_BH, g_BH, f_BH, mask_BH = residuals
    i_BH, g_BH, f_BH = _evaluated_once(jax.nn.sigmoid(i_BH), jnp.tanh(g_BH), jax.nn.sigmoid(f_BH))
    mask = 1.0 if mask_BH is None else mask_BH
    di_BH = dnew_BH * g_BH * mask * i_BH * (1 - i_BH)
    dg_BH = dnew_BH * i_BH * mask * (1 - g_BH * g_BH)
    df_BH = dnew_BH * c_BH * f_BH * (1 - f_BH)
    return dnew_BH * f_BH, di_BH, dg_BH, df_BH, None if mask_BH is None else jnp.zeros_like(mask_BH)


lstm_memory.defvjp(_memory_forward, _memory_backward)


@jax.custom_vjp
def lstm_output(o_BH: Array, c_BH: Array) -> Array:
    """Computes the LSTM's output, h' = sigmoid(o) tanh(c').

    Args:
      o_BH: [B, H] output gate before its sigmoid.
      c_BH: [B, H] new memory, layer-normalised where the cell does so.

    Returns:
      [B, H] output.
    """
    return jax.nn.sigmoid(o_BH) * jnp.tanh(c_BH)


def _output_forward(o_BH, c_BH):
    return lstm_output(o_BH, c_BH), (o_BH, c_BH)


def _output_backward(residuals, dh_BH):
    o_BH, t_BH = _evaluated_once(jax.nn.sigmoid(residuals[0]), jnp.tanh(residuals[1]))
    return dh_BH * t_BH * o_BH * (1 - o_BH), dh_BH * o_BH * (1 - t_BH * t_BH)


lstm_output.defvjp(_output_forward, _output_backward)
