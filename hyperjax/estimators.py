"""Discrete choices that can be trained: samples of gates and masks, with gradients to what they were drawn from.

Pure functions of a PRNG key (first, where there is one) and arrays: no module, no state, the same numbers with and
without `jit` and under `vmap`. Maths is done in float32 at least; results have the type of the logits.

| function | forward | gradient |
|---|---|---|
| `hard_concrete` | in [0, 1], exactly 0 or 1 with some probability | pathwise: unbiased for its own expectation |
| `gumbel_softmax`, `gumbel_sigmoid` | soft, in (0, 1) | pathwise: unbiased for its own expectation |
| the same with `hard=True` | exactly 0 or 1 | straight-through: that of the soft sample, biased |
| `bernoulli_straight_through` | exactly 0 or 1 | straight-through: that of the probability, biased |
| `threshold_mask`, `top_k_mask` | exactly 0 or 1, no randomness | straight-through: of a sigmoid or softmax, biased |
| `reinforce` | mean loss of sampled gates | score function: unbiased for Bernoulli gates, noisy |
| `hard_concrete_l0`, `_one` | probabilities in closed form | exact |

Example:
    >>> import jax, jax.numpy as jnp
    >>> from hyperjax import estimators
    >>> scores = jnp.array([0.3, -1.0, 2.0])
    >>> estimators.top_k_mask(scores, k=2).tolist()
    [1.0, 0.0, 1.0]
    >>> jax.grad(lambda s: estimators.threshold_mask(s)[0])(jnp.zeros(3)).tolist()  # that of a sigmoid
    [0.25, 0.0, 0.0]
    >>> estimators.gumbel_softmax(jax.random.key(0), jnp.array([-jnp.inf, 0.0]), hard=True).tolist()
    [0.0, 1.0]
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # Louizos et al., section 4


def hard_concrete(key: Array, log_alpha: Any, *, beta: Any = BETA, gamma: Any = GAMMA, zeta: Any = ZETA) -> Array:
    """Samples gates z: a binary concrete variable s, stretched to (gamma, zeta) and clipped to [0, 1].

    u ~ U(0, 1); s = sigmoid((log u - log(1 - u) + log_alpha) / beta); z = clip(s (zeta - gamma) + gamma, 0, 1).
    Gradient: pathwise; zero where the sample is clipped.

    Args:
        key: PRNG key.
        log_alpha: location, any shape; an independent gate for each element.
        beta: temperature, above 0; the smaller, the closer to a Bernoulli variable of probability sigmoid(log_alpha).
        gamma: lower end of the stretch, at most 0; below 0, some samples are exactly 0.
        zeta: upper end of the stretch, at least 1; above 1, some samples are exactly 1.

    Returns:
        z in [0, 1], of the shape and type of `log_alpha`.

    Raises:
        ValueError: beta, gamma or zeta is out of range (seen only where they are no tracers).

    Reference:
        Louizos, Welling, Kingma, "Learning sparse neural networks through L0 regularization" (2018), eq. 10-11.
    """
    check_hard_concrete(beta, gamma, zeta)
    log_alpha, dtype = _widen(log_alpha)
    noise = jax.random.logistic(key, log_alpha.shape, log_alpha.dtype)
    return _stretch(jax.nn.sigmoid((noise + log_alpha) / beta), gamma, zeta).astype(dtype)


def hard_concrete_deterministic(log_alpha: Any, *, gamma: Any = GAMMA, zeta: Any = ZETA) -> Array:
    """The gates to evaluate and serve with: clip(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1).

    Gradient: exact, zero where clipped.

    Args:
        log_alpha, gamma, zeta: as of `hard_concrete`.

    Returns:
        z in [0, 1], of the shape and type of `log_alpha`.

    Raises:
        ValueError: gamma or zeta is out of range.

    Reference:
        Louizos et al. (2018), eq. 13.
    """
    check_hard_concrete(1.0, gamma, zeta)
    log_alpha, dtype = _widen(log_alpha)
    return _stretch(jax.nn.sigmoid(log_alpha), gamma, zeta).astype(dtype)


def hard_concrete_l0(log_alpha: Any, *, beta: Any = BETA, gamma: Any = GAMMA, zeta: Any = ZETA) -> Array:
    """The expected L0 norm of each gate, P(z != 0) = sigmoid(log_alpha - beta log(-gamma / zeta)).

    Its sum is the expected number of open gates, the penalty to train with. A gate that is served as 0 may still be
    open with a probability of about a third. Gradient: exact.

    Args:
        log_alpha, beta, gamma, zeta: as of `hard_concrete`.

    Returns:
        Probabilities in [0, 1], of the shape and type of `log_alpha`.

    Raises:
        ValueError: beta, gamma or zeta is out of range.

    Reference:
        Louizos et al. (2018), eq. 12.
    """
    check_hard_concrete(beta, gamma, zeta)
    log_alpha, dtype = _widen(log_alpha)
    return jax.nn.sigmoid(log_alpha - beta * jnp.log(-gamma / jnp.asarray(zeta, log_alpha.dtype))).astype(dtype)


def hard_concrete_one(log_alpha: Any, *, beta: Any = BETA, gamma: Any = GAMMA, zeta: Any = ZETA) -> Array:
    """The probability that a gate is exactly 1, sigmoid(log_alpha - beta log((1 - gamma) / (zeta - 1))).

    Gradient: exact.

    Args:
        log_alpha, beta, gamma, zeta: as of `hard_concrete`.

    Returns:
        Probabilities in [0, 1], of the shape and type of `log_alpha`.

    Raises:
        ValueError: beta, gamma or zeta is out of range.

    Reference:
        From the same variable: P(s > (1 - gamma) / (zeta - gamma)), as of Louizos et al. (2018), eq. 10-11.
    """
    check_hard_concrete(beta, gamma, zeta)
    log_alpha, dtype = _widen(log_alpha)
    return jax.nn.sigmoid(log_alpha - beta * jnp.log((1 - gamma) / jnp.asarray(zeta - 1, log_alpha.dtype))).astype(
        dtype
    )


def hard_concrete_log_alpha(open_probability: Any, *, beta: Any = BETA, gamma: Any = GAMMA, zeta: Any = ZETA) -> Array:
    """The location whose gates are open, z != 0, with the given probability: the inverse of `hard_concrete_l0`.

    Args:
        open_probability: in (0, 1), any shape.
        beta: as of `hard_concrete`.
        gamma: as of `hard_concrete`, and below 0: gates that are never 0 have no such location.
        zeta: as of `hard_concrete`.

    Returns:
        log_alpha, float32 or the type of `open_probability`.

    Raises:
        ValueError: a probability is outside of (0, 1), or beta, gamma or zeta out of range.
    """
    check_hard_concrete(beta, gamma, zeta, open_probability)
    probability, dtype = _widen(open_probability)
    return (
        jax.scipy.special.logit(probability) + beta * jnp.log(-gamma / jnp.asarray(zeta, probability.dtype))
    ).astype(dtype)


def gumbel_softmax(key: Array, logits: Any, temperature: Any = 1.0, *, hard: bool = False, axis: int = -1) -> Array:
    """Samples a choice among the entries along an axis, relaxed.

    y = softmax((logits + Gumbel noise) / temperature). The largest entry of y is a sample of the categorical
    distribution softmax(logits), at any temperature. Without noise: `top_k_mask(logits, 1)`.

    Args:
        key: PRNG key.
        logits: any shape; finite, or -inf for entries that are never chosen (not all along the axis).
        temperature: above 0; the smaller, the closer to one-hot and the noisier the gradient.
        hard: whether the result is exactly one-hot (the first of equals), with the gradient of y: biased
            straight-through. Otherwise y with its pathwise gradient.
        axis: the axis to choose along.

    Returns:
        Shape and type of `logits`, summing to 1 along the axis.

    Raises:
        ValueError: the temperature is not above 0.

    Reference:
        Jang, Gu, Poole, "Categorical reparameterization with Gumbel-softmax" (2017); Maddison et al. (2017).
    """
    _check_positive("temperature", temperature)
    logits, dtype = _widen(logits)
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    noisy -= jax.lax.stop_gradient(noisy.max(axis, keepdims=True))  # before dividing: the quotient may overflow
    lowest = jnp.finfo(noisy.dtype).min / 4
    noisy = jnp.where(noisy == -jnp.inf, lowest, noisy)  # infinity times 0 in the temperature's gradient is NaN
    soft = jax.nn.softmax(noisy / temperature, axis)
    if hard:
        soft = _straight_through(_one_hot_max(noisy, axis), soft)
    return soft.astype(dtype)


def gumbel_sigmoid(key: Array, logits: Any, temperature: Any = 1.0, *, hard: bool = False) -> Array:
    """Samples gates that are open with probability sigmoid(logits), relaxed: the binary concrete distribution.

    y = sigmoid((logits + logistic noise) / temperature). Without noise: `threshold_mask(logits)`.

    Args:
        key: PRNG key.
        logits: any shape; an independent gate for each element.
        temperature: above 0.
        hard: whether the result is 1 where y > 1/2 and else 0, an exact Bernoulli sample, with the gradient of y:
            biased straight-through. Otherwise y with its pathwise gradient.

    Returns:
        Shape and type of `logits`.

    Raises:
        ValueError: the temperature is not above 0.

    Reference:
        Maddison, Mnih, Teh, "The concrete distribution" (2017), appendix B.
    """
    _check_positive("temperature", temperature)
    logits, dtype = _widen(logits)
    noisy = logits + jax.random.logistic(key, logits.shape, logits.dtype)
    soft = jax.nn.sigmoid(noisy / temperature)
    if hard:
        soft = _straight_through((noisy > 0).astype(soft.dtype), soft)
    return soft.astype(dtype)


def bernoulli_straight_through(key: Array, logits: Any) -> Array:
    """Samples gates of 0 or 1, open with probability sigmoid(logits), with the gradient of that probability.

    Gradient: straight-through, biased unless the loss is linear in each gate.

    Args:
        key: PRNG key.
        logits: any shape; an independent gate for each element.

    Returns:
        Shape and type of `logits`.

    Reference:
        Bengio, Léonard, Courville, "Estimating or propagating gradients through stochastic neurons" (2013).
    """
    logits, dtype = _widen(logits)
    probability = jax.nn.sigmoid(logits)
    sample = jax.random.bernoulli(key, probability).astype(probability.dtype)
    return _straight_through(sample, probability).astype(dtype)


def threshold_mask(scores: Any, threshold: Any = 0.0, *, temperature: Any = 1.0) -> Array:
    """1 where a score is above the threshold, else 0, also where they are equal.

    Gradient: straight-through, that of sigmoid((scores - threshold) / temperature), biased.

    Args:
        scores: any shape.
        threshold: broadcasts to the scores; may be learned.
        temperature: above 0; the smaller, the fewer scores have a gradient to speak of.

    Returns:
        Shape and type of `scores`.

    Raises:
        ValueError: the temperature is not above 0, or the threshold has a shape of its own.
    """
    _check_positive("temperature", temperature)
    scores, dtype = _widen(scores)
    level = jnp.asarray(threshold, scores.dtype)
    try:
        gap = scores - jnp.broadcast_to(level, scores.shape)
    except ValueError:
        message = f"threshold has shape {level.shape}, expected one that broadcasts to {scores.shape}"
        raise ValueError(message) from None
    hard = (gap > 0).astype(gap.dtype)
    return _straight_through(hard, jax.nn.sigmoid(gap / temperature)).astype(dtype)


def top_k_mask(scores: Any, k: Any, *, temperature: Any = 1.0, axis: int = -1) -> Array:
    """1 for the k largest scores along an axis, else 0; of equal scores the first ones count as larger.

    Gradient: straight-through, that of k softmax(scores / temperature), biased; like the mask, whose sum is always k,
    it moves no weight in or out of the axis.

    Args:
        scores: any shape; NaN is never chosen before a number.
        k: whole number, or an array of them that broadcasts against the scores with the axis of length 1.
        temperature: above 0.
        axis: the axis to choose along.

    Returns:
        Shape and type of `scores`.

    Raises:
        ValueError: k is no whole number of 0 to the length of the axis (seen only where it is no tracer) or has a
            shape of its own, or the temperature is not above 0.
    """
    _check_positive("temperature", temperature)
    scores, dtype = _widen(scores)
    length = scores.shape[axis]
    whole = f"a whole number of 0 to {length}, the length of axis {axis}"
    _check("k", k, lambda k: (k >= 0) & (k <= length) & (k == np.floor(k)), whole)
    k = jnp.asarray(k)
    if k.ndim and (k.ndim != scores.ndim or k.shape[axis] != 1):
        expected = f"a number, or {scores.ndim} axes with length 1 along axis {axis}"
        raise ValueError(f"k has shape {k.shape} for scores {scores.shape}, expected {expected}")
    rank = jnp.argsort(jnp.argsort(-scores, axis, stable=True), axis)
    hard = (rank < k).astype(scores.dtype)
    finite = jnp.nan_to_num(scores, nan=jnp.finfo(scores.dtype).min)  # NaN and infinities: no gradient, not NaN
    shifted = finite - jax.lax.stop_gradient(finite.max(axis, keepdims=True))
    return _straight_through(hard, k * jax.nn.softmax(shifted / temperature, axis)).astype(dtype)


def exponential_temperature(rate: float = 1e-4, minimum: float = 0.5, initial: float = 1.0) -> optax.Schedule:
    """The temperature schedule max(minimum, initial exp(-rate step)); any other Optax schedule will do as well.

    Args:
        rate: decay in a step, above 0; the reference has 1e-5 and 1e-4.
        minimum: the lowest temperature, above 0 and at most `initial`.
        initial: the temperature of step 0.

    Returns:
        Step number -> temperature.

    Raises:
        ValueError: a value is out of range.

    Reference:
        Jang, Gu, Poole (2017), section 4.
    """
    _check_positive("rate", rate)
    if not 0 < minimum <= initial:
        raise ValueError(f"minimum is {minimum}, expected above 0 and at most the initial temperature {initial}")
    return optax.exponential_decay(initial, 1 / rate, math.exp(-1), end_value=minimum)  # exp(-rate) rounds to 1


def reinforce(key: Array, logits: Any, loss_fn: Callable[[Array], Array], samples: int = 8) -> Array:
    """The mean loss of sampled Bernoulli gates, with a gradient that is right on average: the yardstick for others.

    The gradient with respect to the logits is the mean of (loss - baseline) d log P(gates), the baseline of a sample
    being the mean loss of all others; a single sample has none (plain REINFORCE). Whatever else the loss depends on
    has its usual gradient. Gradient: unbiased for the expectation over gates of 0 and 1; its noise is its price.

    Args:
        key: PRNG key.
        logits: any shape; gates are 1 with probability sigmoid(logits), independently.
        loss_fn: gates of the shape of `logits` -> scalar; need not be differentiable in the gates.
        samples: how many sets of gates to draw, 1 or more.

    Returns:
        Scalar.

    Raises:
        ValueError: `samples` is below 1, or the loss is no scalar.

    Reference:
        Williams (1992); Kool, van Hoof, Welling, "Buy 4 REINFORCE samples, get a baseline for free!" (2019).
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected 1 or more; 2 or more have a baseline")
    logits, dtype = _widen(logits)
    probability = jnp.broadcast_to(jax.nn.sigmoid(logits), (samples, *logits.shape))
    gates = jax.random.bernoulli(key, probability).astype(logits.dtype)
    losses = jax.vmap(lambda gate: loss_fn(gate.astype(dtype)))(gates)
    if losses.ndim != 1:
        raise ValueError(f"loss_fn returns shape {losses.shape[1:]}, expected a scalar; take the mean of its result")
    log_prob = jax.vmap(lambda gate: -jnp.sum(jax.nn.softplus(jnp.where(gate > 0, -logits, logits))))(gates)
    baseline = (losses.sum() - losses) / (samples - 1) if samples > 1 else jnp.zeros_like(losses)
    advantage = jax.lax.stop_gradient(losses - baseline)
    return losses.mean() + (advantage * (log_prob - jax.lax.stop_gradient(log_prob))).mean()


def _widen(x: Any) -> tuple[Array, Any]:
    """Returns x in float32 or wider, and the type that the result is to have."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)), x.dtype


@jax.custom_jvp
def _straight_through(hard: Array, soft: Array) -> Array:
    """Returns `hard` with the gradient of `soft`; exactly `hard`, also where `soft` is NaN."""
    return hard


@_straight_through.defjvp
def _straight_through_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


def _stretch(s: Array, gamma: Any, zeta: Any) -> Array:
    return jnp.clip(s * (zeta - gamma) + gamma, 0.0, 1.0)


def _one_hot_max(x: Array, axis: int) -> Array:
    return jax.nn.one_hot(x.argmax(axis), x.shape[axis], axis=axis, dtype=x.dtype)


def _check(name: str, value: Any, good: Callable[[np.ndarray], Any], expected: str) -> None:
    """Raises an error that names the first value that is not good; tracers have none to look at."""
    if not isinstance(value, jax.core.Tracer):
        bad = np.asarray(value)[~good(np.asarray(value))]
        if bad.size:
            raise ValueError(f"{name} is {bad[0]}, expected {expected}")


def _check_positive(name: str, value: Any) -> None:
    _check(name, value, lambda v: (v > 0) & np.isfinite(v), "above 0 and finite")


def check_hard_concrete(beta: Any, gamma: Any, zeta: Any, open_probability: Any = None) -> None:
    """Raises the ValueError of `hard_concrete`, or of `hard_concrete_log_alpha` if a probability is given."""
    _check_positive("beta", beta)
    _check(
        "gamma", gamma, lambda g: (g <= 0) & np.isfinite(g), f"0 or below: samples are clipped at 0, usual is {GAMMA}"
    )
    _check("zeta", zeta, lambda z: (z >= 1) & np.isfinite(z), f"1 or above: samples are clipped at 1, usual is {ZETA}")
    if open_probability is not None:
        inside = "inside of (0, 1), such as 0.9"
        _check("open_probability", open_probability, lambda p: (p > 0) & (p < 1), inside)
        _check("gamma", gamma, lambda g: g != 0, "below 0, such as -0.1: with 0, gates are never exactly 0")
