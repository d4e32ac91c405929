"""Maps with parameters of their own, from a source theta to what is tied to it: theta' = f(theta).

Each splits the axes of theta into rows and columns where it needs the fewest parameters: a query kernel [D, H, K] is a
matrix [D, H K], one of a convolution [3, 3, in, out] is [9 in, out]. Any function of an array is a map without any.

R rows, C columns, r rank, E width of an embedding.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.initializers import unit_rows

Array = jax.Array


class LowRank(nn.Module):
    """theta' = theta + A B with A [R, r] and B [r, C]; of a vector, theta + b. Starts as theta.

    Attributes:
        rank: r, 1 or more; above the smaller side it is that, and any theta' can be met exactly.

    Reference: Bae et al., "Relaxed Recursive Transformers" (2024), section 2.3; Hu et al., "LoRA" (2022), section 4.1.
    """

    rank: int = 8

    @nn.compact
    def __call__(self, theta: Array) -> Array:
        """Returns theta + A B, of the shape of theta.

        Raises:
            ValueError: a rank below 1.
        """
        if theta.ndim < 2:
            return theta + self.param("b", nn.initializers.zeros, theta.shape)
        rows, columns = matrix_shape(theta.shape)
        rank = self._rank(rows, columns)
        a = self.param("a", nn.initializers.normal(1 / math.sqrt(rows)), (rows, rank))
        b = self.param("b", nn.initializers.zeros, (rank, columns))
        return theta + (a @ b).reshape(theta.shape)

    def fit(self, theta: Array, value: Array) -> dict[str, Array]:
        """The A and B nearest to a theta': U S and V^T of the r largest singular values of theta' - theta."""
        if theta.ndim < 2:
            return {"b": value - theta}
        rows, columns = matrix_shape(theta.shape)
        left = (np.asarray(value, np.float64) - np.asarray(theta, np.float64)).reshape(rows, columns)
        u, s, vt = np.linalg.svd(left, full_matrices=False)  # in double precision: at full rank nothing may be lost
        rank = self._rank(rows, columns)
        return {"a": jnp.asarray(u[:, :rank] * s[:rank], jnp.float32), "b": jnp.asarray(vt[:rank], jnp.float32)}

    def _rank(self, rows: int, columns: int) -> int:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected a whole number from 1")
        return min(self.rank, rows, columns)


class Scale(nn.Module):
    """theta' = theta * d with a learned factor for each column; of a vector, for each element. Starts as theta."""

    @nn.compact
    def __call__(self, theta: Array) -> Array:
        """Returns theta with each column times its factor, of the shape of theta."""
        columns = matrix_shape(theta.shape)[1]
        return scaled(theta, self.param("scale", nn.initializers.ones, (columns,)))

    def fit(self, theta: Array, value: Array) -> dict[str, Array]:
        """The factors nearest to a theta', by least squares; 1 where theta is 0."""
        a, b = (x.astype(jnp.float32).reshape(-1, matrix_shape(theta.shape)[1]) for x in (theta, value))
        square = (a * a).sum(0)
        return {"scale": jnp.where(square > 0, (a * b).sum(0) / jnp.where(square > 0, square, 1), 1.0)}


class ByEmbedding(nn.Module):
    """theta' = theta * (1 + D z): each use has an embedding z, and those of one source share the generator D.

    D starts at 0, so theta' starts as theta.

    Attributes:
        width: E, of the embedding.

    Reference: Ha, Dai, Le, arXiv 1609.09106, section 3.2, equations 8 to 10; `hyperjax.hypernet.Scale` for one weight.
    """

    width: int = 4

    @nn.compact
    def __call__(self, theta: Array) -> Array:
        """Returns theta * (1 + D z), of the shape of theta.

        Raises:
            ValueError: a width below 1.
        """
        if self.width < 1:
            raise ValueError(f"width is {self.width}, expected a whole number from 1")
        columns = matrix_shape(theta.shape)[1]
        z = self.param("z", lambda key: unit_rows(key, (1, self.width))[0])
        generator = self.variable("shared", "generator", jnp.zeros, (columns, self.width))
        return scaled(theta, 1.0 + generator.value @ z)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: the split of the axes with the fewest of both together. A vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    splits = [(math.prod(shape[:a]), math.prod(shape[a:])) for a in range(1, len(shape))]
    return min(splits, key=sum)


def scaled(theta: Array, factors: Array) -> Array:
    """Each column times its factor, [C]."""
    return (theta.reshape(-1, factors.shape[0]) * factors[None]).reshape(theta.shape)
