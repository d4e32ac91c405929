"""Generators that modulate learned weights: `Scale`, W = d(z) * W_0, and `LowRank`, W = W_0 + A(z) B(z).

Both can hand out their factors instead of W, so that a batch of embeddings needs no batch of W (`per_sample.py`).
Vectors and scalars (biases, normalisation scales) are shifted, b = b_0 + s(z), as no factor can move a bias from 0.

r rank, E width of z; `...` the batch of z, if there is one.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.hypernet.generators import Generator
from hyperjax.paramtree import ParamSpec

Array = jax.Array


class Scaled(NamedTuple):
    """W = W_0 * d: base [*shape], scale [..., out], or [..., *shape] if `full`."""

    base: Array
    scale: Array
    full: bool

    def dense(self) -> Array:
        """Returns W [..., *shape]."""
        batch = self.scale.ndim - (self.base.ndim if self.full else 1)
        ones = () if self.full else (1,) * (self.base.ndim - 1)
        scale = self.scale.reshape(*self.scale.shape[:batch], *ones, *self.scale.shape[batch:])
        return self.base.reshape((1,) * batch + self.base.shape) * scale


class LowRankSum(NamedTuple):
    """W = W_0 + A B: base [*shape], a [..., *shape[:-1], r], b [..., r, shape[-1]]."""

    base: Array
    a: Array
    b: Array

    def dense(self) -> Array:
        """Returns W [..., *shape]."""
        batch = self.b.ndim - 2
        flat = self.a.reshape(*self.a.shape[:batch], -1, self.a.shape[-1])
        product = (flat @ self.b).reshape(*self.b.shape[:batch], *self.base.shape)
        return self.base.reshape((1,) * batch + self.base.shape) + product


Factors = dict[str, Scaled | LowRankSum | Array]


class Modulated(Generator):
    """Base of generators that can keep W apart as factors.

    Attributes:
        freeze_base: keep W_0 (and b_0) in the collection "frozen", where no optimizer sees it, instead of "params".
    """

    freeze_base: bool = False

    def factors(self, z: Array, task_id=None, native=None) -> Factors:
        """Returns {path: factors of a kernel, or value of a vector [..., *shape]}."""
        raise TypeError(f"{type(self).__name__} defines no factors(z, task_id, native)")

    def __call__(self, z, task_id=None, native=None):
        made = self.factors(z, task_id, native)
        return {path: value if isinstance(value, jax.Array) else value.dense() for path, value in made.items()}

    def base(self, spec: ParamSpec, native) -> Array:
        """W_0 or b_0."""
        return self.from_native(f"{spec.name}.base", spec, native, "frozen" if self.freeze_base else "params")

    def shifted(self, spec: ParamSpec, z: Array, native) -> Array:
        """b_0 + s(z), with s = 0 at the start."""
        weights = self.param(f"{spec.name}.shift", nn.initializers.zeros, (*spec.shape, z.shape[-1]), jnp.float32)
        shift = jnp.tensordot(z, weights, axes=(-1, -1))
        base = self.base(spec, native)
        return base.reshape((1,) * (shift.ndim - base.ndim) + base.shape) + shift


class Scale(Modulated):
    """W = d(z) * W_0 with d(z) = 1 + D z: a factor for each output (the last axis), or for each weight.

    Attributes:
        full: a factor for each weight; for each output otherwise, which a batch of embeddings applies to outputs.
        spread: standard deviation of D z at the start.

    Reference: Ha, Dai, Le, arXiv 1609.09106, section 3.2, equations 8 to 10.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> x, trained = jnp.ones((1, 2)), {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.zeros(2)}
        >>> hyper = hj.HyperNetwork.from_target(nn.Dense(2), x, embedding_dim=8, generator=hj.Scale(), params=trained)
        >>> variables = jax.jit(hyper.init)(jax.random.key(0), x)
        >>> hyper.generate(variables, z=jnp.zeros(8))["kernel"].tolist()  # d(0) = 1: the network that it started from
        [[1.0, 2.0], [3.0, 4.0]]
    """

    full: bool = False
    spread: float = 0.1

    @nn.compact
    def factors(self, z, task_id=None, native=None):
        """Returns {path: `Scaled`, or the value of a vector [..., *shape]} of z [..., E]."""
        made: Factors = {}
        for spec in self.leaves:
            if len(spec.shape) < 2:
                made[spec.path] = self.shifted(spec, z, native)
                continue
            rows = spec.shape if self.full else spec.shape[-1:]
            start = nn.initializers.normal(self.spread / math.sqrt(z.shape[-1]))
            weights = self.param(f"{spec.name}.scale", start, (*rows, z.shape[-1]), jnp.float32)
            made[spec.path] = Scaled(self.base(spec, native), 1.0 + jnp.tensordot(z, weights, axes=(-1, -1)), self.full)
        return made


class LowRank(Modulated):
    """W = W_0 + (alpha / r) A(z) B(z): each kernel, as a matrix [fan_in, out], plus a generated one of rank r.

    A(z) starts random and B(z) at 0, so that W starts as W_0.

    Attributes:
        rank: r.
        alpha: factor of the product; None is r.

    Raises:
        ValueError: a rank below 1; from `HyperNetwork.from_target`.

    Reference: Hu et al., "LoRA", ICLR 2022, section 4.1, there without z.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> x, trained = jnp.ones((1, 2)), {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.zeros(2)}
        >>> lora = hj.LowRank(rank=1, freeze_base=True)
        >>> hyper = hj.HyperNetwork.from_target(nn.Dense(2), x, embedding_dim=8, generator=lora, params=trained)
        >>> variables = jax.jit(hyper.init)(jax.random.key(0), x)
        >>> hyper.generate(variables, task_id=0)["kernel"].tolist()  # B(z) starts at 0
        [[1.0, 2.0], [3.0, 4.0]]
    """

    rank: int = 4
    alpha: float | None = None

    def refuse(self) -> str | None:
        """Returns why it cannot make `leaves`, or None: a rank below 1."""
        return f"rank is {self.rank}, expected a whole number of at least 1" if self.rank < 1 else None

    @nn.compact
    def factors(self, z, task_id=None, native=None):
        """Returns {path: `LowRankSum`, or the value of a vector [..., *shape]} of z [..., E]."""
        made: Factors = {}
        factor = 1.0 if self.alpha is None else self.alpha / self.rank
        for spec in self.leaves:
            if len(spec.shape) < 2:
                made[spec.path] = self.shifted(spec, z, native)
                continue
            fan_in = math.prod(spec.shape[:-1])
            start = nn.initializers.normal(1 / math.sqrt(fan_in * z.shape[-1]))
            a = self.param(f"{spec.name}.a", start, (*spec.shape[:-1], self.rank, z.shape[-1]), jnp.float32)
            size = (self.rank, spec.shape[-1], z.shape[-1])
            b = self.param(f"{spec.name}.b", nn.initializers.zeros, size, jnp.float32)
            A, B = jnp.tensordot(z, a, axes=(-1, -1)), jnp.tensordot(z, b, axes=(-1, -1))
            made[spec.path] = LowRankSum(self.base(spec, native), A, factor * B)
        return made
