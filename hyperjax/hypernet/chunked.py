"""`Chunked`: one small head makes every piece of a large target, told apart by an embedding a piece.

K chunks, c parameters a chunk, F features, n size of a parameter; `...` the batch of z, if there is one.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.hypernet.generators import Generator, Native
from hyperjax.initializers import Spread, native_spread, rms_norm, unit_rows
from hyperjax.paramtree import ParamSpec

Array = jax.Array


class Chunked(Generator):
    """chunk_k = H (f(z) * e_k): a head shared by all chunks, and an embedding e_k [F] for each.

    f(z) = 1 + A z. A kernel of at least one chunk is cut into chunks of its own, so that no vector of the whole target
    is ever made; all smaller parameters share chunks. What the head makes has variance 1, and each kernel is it
    times a fixed number, its spread (collection "frozen"): this is what makes chunks start right. Vectors (biases,
    scales) are a learned value plus what the head makes times a learned number that starts at 0.

    Weights: c F + K F + E F, about 2 F sqrt(n) + E F for a target of n parameters, beside its vectors.

    Attributes:
        chunk: c; None is the square root of the number of parameters.
        features: F.
        spread: how spread out each kernel starts (`hyperjax.initializers`).

    Raises:
        ValueError: a chunk below 1; from `HyperNetwork.from_target`.

    Reference: von Oswald et al., "Continual learning with hypernetworks", ICLR 2020, section 3 (there the embedding is
    an input of the generator, not a factor).

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> model, x = nn.Dense(1000), jnp.ones((1, 1000))
        >>> hj.budget.count_parameters(model, x)
        1001000
        >>> hyper = hj.HyperNetwork.from_target(model, x, embedding_dim=64, generator=hj.Chunked())
        >>> hj.budget.count_parameters(hyper, x)  # with hj.Linear() it would be 65,065,064
        133355
    """

    chunk: int | None = None
    features: int = 64
    spread: Spread = native_spread

    def refuse(self) -> str | None:
        """Returns why it cannot make `leaves`, or None: a chunk below 1."""
        if self.chunk is not None and self.chunk < 1:
            return f"chunk is {self.chunk}, expected a whole number of at least 1, or None"
        return None

    @property
    def chunk_size(self) -> int:
        """c, the parameters that the head makes at once."""
        return self.chunk or math.isqrt(sum(spec.size for spec in self.leaves) - 1) + 1

    @nn.compact
    def __call__(self, z, task_id=None, native=None):
        """Returns {path: [..., *shape]} of z [..., E]."""
        c, F = self.chunk_size, self.features
        f = (1.0 + nn.Dense(F, use_bias=False, name="condition")(z)) / math.sqrt(2.0)
        bias = self.param("condition_bias", nn.initializers.zeros, (F,), jnp.float32)
        f = f + bias.reshape((1,) * (f.ndim - 1) + (F,))
        weights = self.param("head", nn.initializers.normal(1 / math.sqrt(F)), (c, F), jnp.float32)

        def pieces(name: str, size: int, gain: Array | None = None) -> Array:
            e_KF = self.param(f"chunks.{name}", unit_rows, (-(-size // c), F))
            f_KF = rms_norm(f[..., None, :] * e_KF.reshape((1,) * (f.ndim - 1) + e_KF.shape))
            f_KF = f_KF if gain is None else gain * f_KF  # rather than the product, which is far larger
            made = jnp.tensordot(f_KF, weights, axes=(-1, -1))
            return made.reshape(*f.shape[:-1], -1)[..., :size]

        made = {}
        small = [spec for spec in self.leaves if len(spec.shape) < 2 or spec.size < c]
        for spec in self.leaves:
            if spec not in small:
                gain, mean = self._scale(spec, native)
                value = pieces(spec.name, spec.size, gain)
                made[spec.path] = value.reshape(*f.shape[:-1], *spec.shape) + mean
        if small:
            ends = [sum(spec.size for spec in small[: i + 1]) for i in range(len(small))]
            parts = jnp.split(pieces("small", ends[-1]), ends[:-1], axis=-1)
            for spec, part in zip(small, parts, strict=True):
                gain, mean = self._scale(spec, native)
                value = gain * part.reshape(*f.shape[:-1], *spec.shape)
                made[spec.path] = value + mean.reshape((1,) * (value.ndim - mean.ndim) + mean.shape)
        return made

    def _scale(self, spec: ParamSpec, native: Native) -> tuple[Array, Array]:
        """What the head's values for a parameter are multiplied by, and what is added."""

        def spread(*_) -> Array:
            return jnp.zeros((), jnp.float32) if native is None else jnp.float32(self.spread(spec, native[spec.path]))

        def start(_) -> Array:
            return spread() if len(spec.shape) < 2 else jnp.zeros((), jnp.float32)

        def centre(_) -> Array:
            if native is None:
                return jnp.zeros((), jnp.float32)
            value = jnp.mean(jnp.asarray(native[spec.path], jnp.float32))
            return value if self.spread is native_spread else jnp.where(spread() > 0, 0.0, value)

        gain = self.param(f"{spec.name}.gain", start)
        if len(spec.shape) < 2:
            return gain, self.from_native(f"{spec.name}.base", spec, native)
        # A matrix that starts constant (the scales of stacked layers, a kernel of zeros) has a gain that learns, too.
        fixed: Any = self.variable("frozen", f"{spec.name}.spread", spread).value
        return jnp.where(fixed > 0, fixed, gain), self.param(f"{spec.name}.mean", centre)
