"""How spread out generated parameters start: as their own initializer has them, or by hyperfan.

A *spread* is a function (spec, native) -> standard deviation that a generated parameter shall start with, 0 for one
that starts as its native value exactly. `native` is the parameter as the target itself would have drawn it.

Reference: Chang, Flokas, Lipson, "Principled Weight Initialization for Hypernetworks", ICLR 2020.

Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import hyperjax as hj
    >>> x, generator = jnp.ones((1, 50)), hj.Linear(spread=hj.initializers.hyperfan_in(relu=True))
    >>> hyper = hj.HyperNetwork.from_target(nn.Dense(400), x, embedding_dim=16, generator=generator)
    >>> kernel = hyper.generate(jax.jit(hyper.init)(jax.random.key(0), x))["kernel"]
    >>> round(float(kernel.std()), 2)  # sqrt(2 / fan_in)
    0.2
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hyperjax.paramtree import ParamSpec

Array = jax.Array
Spread = Callable[[ParamSpec, Array], Array]


def native_spread(spec: ParamSpec, native: Array) -> Array:
    """The standard deviation of the native draw; 0 for vectors and scalars, so that scales start at 1, biases at 0.

    Args:
        spec: of the parameter.
        native: [*shape], the draw.

    Returns:
        A scalar, float32.
    """
    if len(spec.shape) < 2:
        return jnp.zeros(())
    return jnp.std(native.astype(jnp.float32))


def hyperfan_in(relu: bool = True, bias: bool = False) -> Spread:
    """Spread that keeps the variance of activations: Var W = r / (beta fan_in), r = 2 after ReLU, else 1.

    Args:
        relu: whether the target's activations are ReLUs.
        bias: whether biases are generated too; then beta = 2, and they take the other half: Var b = r / 2.

    Returns:
        A spread, for the generators' attribute `spread`.

    Reference:
        Chang, Flokas, Lipson, "Principled Weight Initialization for Hypernetworks", ICLR 2020.
    """
    gain = 2.0 if relu else 1.0

    def spread(spec: ParamSpec, native: Array) -> Array:
        if len(spec.shape) < 2:
            is_bias = bias and spec.path.rsplit("/", 1)[-1] == "bias"
            return jnp.sqrt(gain / 2.0) if is_bias else jnp.zeros(())
        return jnp.sqrt(gain / ((2.0 if bias else 1.0) * fans(spec)[0]))

    return spread


def hyperfan_out(relu: bool = True) -> Spread:
    """Spread that keeps the variance of gradients: Var W = r / fan_out, r = 2 after ReLU, else 1.

    Args:
        relu: whether the target's activations are ReLUs.

    Returns:
        A spread, for the generators' attribute `spread`.

    Reference:
        Chang, Flokas, Lipson, "Principled Weight Initialization for Hypernetworks", ICLR 2020.
    """
    gain = 2.0 if relu else 1.0

    def spread(spec: ParamSpec, native: Array) -> Array:
        return jnp.zeros(()) if len(spec.shape) < 2 else jnp.sqrt(gain / fans(spec)[1])

    return spread


def fans(spec: ParamSpec) -> tuple[float, float]:
    """Returns (fan_in, fan_out) of a kernel [..., in, out], whose leading axes are its receptive field.

    Those of an attention layer are [in, heads, width] in `query`, `key` and `value`, and [heads, width, out] in `out`.
    """
    *parents, layer, _ = ("", "", *spec.path.split("/"))
    if len(spec.shape) == 3 and any("attention" in name.lower() for name in parents):
        a, b, c = spec.shape
        if layer in ("query", "key", "value"):
            return float(a), float(b * c)
        if layer == "out":
            return float(a * b), float(c)
    field = math.prod(spec.shape[:-2])
    return float(field * spec.shape[-2]), float(field * spec.shape[-1])


def unit_rows(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """Embeddings [n, E] in uniformly random directions, each with mean square exactly 1.

    What a linear head makes of such a row has the variance that its initialization promises, for each row rather
    than on average.

    Args:
        key: PRNG key.
        shape: (n, E).
        dtype: of the embeddings.

    Returns:
        [n, E].
    """
    rows = jax.random.normal(key, shape, dtype)
    return rows * jax.lax.rsqrt(jnp.mean(rows**2, axis=-1, keepdims=True) + 1e-12)


def rms_norm(features: Array) -> Array:
    """Scales the last axis to mean square 1; has no parameters."""
    return features * jax.lax.rsqrt(jnp.mean(features**2, axis=-1, keepdims=True) + 1e-6)
