"""`ConvTiles`: the static convolution hypernetwork, which draws kernels from basic tiles.

T tiles, E width of a tile's embedding, d hidden width, c channels of a tile, h w receptive field.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.hypernet.generators import Generator
from hyperjax.initializers import unit_rows
from hyperjax.paramtree import ParamSpec

Array = jax.Array


class ConvTiles(Generator):
    """K = <W_out, W_i e + B_i> + B_out for each input channel i: a basic kernel [h, w, c, c] from each embedding e.

    A kernel [h, w, in, out] is tiled from ceil(in/c) x ceil(out/c) basic ones, the last cropped; all tiles of a
    receptive field share the generator. Without a condition, e is the tile's own embedding: the paper's static
    hypernetwork, whose weights are T E + c (E d + d) + h w c (d + 1). With one, z scales each embedding:
    e * (1 + C z).

    Attributes:
        tile: c.
        embedding: E.
        hidden: d.

    Raises:
        ValueError: a parameter that is no kernel [h, w, in, out]; from `HyperNetwork.from_target`.

    Reference: Ha, Dai, Le, arXiv 1609.09106, section 3.1, equations 2 to 4.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> conv, images = nn.Conv(32, (3, 3), use_bias=False), jnp.ones((1, 8, 8, 16))
        >>> tiles = hj.ConvTiles(tile=16, embedding=64, hidden=64)
        >>> hyper = hj.HyperNetwork.from_target(conv, images, embedding_dim=64, num_embeddings=0, generator=tiles)
        >>> hj.budget.count_parameters(hyper, images)  # the paper's shared generator, 75,920, and 2 tiles of 64
        76048
    """

    tile: int = 16
    embedding: int = 64
    hidden: int = 64

    needs_z = False

    def refuse(self) -> str | None:
        """Returns why it cannot make `leaves`, or None: one is no kernel [h, w, in, out]."""
        bad = next((spec for spec in self.leaves if len(spec.shape) != 4), None)
        if bad:
            return f"{bad.path} has shape {bad.shape}, expected [height, width, in, out]; narrow the rule's pattern"
        return None

    @nn.compact
    def __call__(self, z, task_id=None, native=None):
        """Returns {path: kernel [..., h, w, in, out]} of z [..., E], or of None."""
        made = {}
        for field in dict.fromkeys(spec.shape[:2] for spec in self.leaves):
            made.update(self._draw(field, [spec for spec in self.leaves if spec.shape[:2] == field], z, native))
        return made

    def _draw(self, field: tuple[int, ...], specs: list[ParamSpec], z: Array | None, native) -> dict[str, Array]:
        h, w = field
        c, E, d = self.tile, self.embedding, self.hidden
        name = f"{h}x{w}"
        w_in = self.param(f"{name}.w_in", nn.initializers.normal(E**-0.5), (c, d, E), jnp.float32)
        b_in = self.param(f"{name}.b_in", nn.initializers.zeros, (c, d), jnp.float32)
        level = sum(jnp.std(native[spec.path]) for spec in specs) / len(specs) if native else 1.0
        start = jax.nn.initializers.normal(d**-0.5)
        w_out = self.param(f"{name}.w_out", lambda key: jnp.float32(start(key, (h, w, c, d), jnp.float32) * level))
        b_out = self.param(f"{name}.b_out", nn.initializers.zeros, (h, w, c), jnp.float32)

        def basic(e_TE: Array) -> Array:
            a = jnp.einsum("...te,ide->...tid", e_TE, w_in)
            a = a + b_in.reshape((1,) * (a.ndim - 2) + b_in.shape)
            kernels = jnp.einsum("...tid,hwod->...thwio", a, w_out)
            return kernels + b_out.reshape((1,) * (kernels.ndim - 4) + (h, w, 1, c))

        made = {}
        for spec in specs:
            rows, columns = -(-spec.shape[2] // c), -(-spec.shape[3] // c)

            def embed(key: Array, spec=spec, rows=rows, columns=columns) -> Array:
                e = unit_rows(key, (rows * columns, E))
                if native is None:
                    return e
                # The generator is linear at the start, so an embedding's length sets the spread of its kernel.
                drawn = jnp.std(_assemble(basic(e), rows, columns, spec))
                return jnp.float32(e * jnp.where(drawn > 0, jnp.std(native[spec.path]) / drawn, 1.0))

            e = self.param(f"{spec.name}.tiles", embed)
            if z is not None:
                scale = nn.Dense(E, use_bias=False, kernel_init=nn.initializers.normal(0.1 * z.shape[-1] ** -0.5))
                e = e.reshape((1,) * (z.ndim - 1) + e.shape) * (1.0 + scale(z))[..., None, :]
            made[spec.path] = _assemble(basic(e), rows, columns, spec)
        return made


def _assemble(tiles: Array, rows: int, columns: int, spec: ParamSpec) -> Array:
    """[..., rows * columns, h, w, c, c] -> [..., h, w, in, out]."""
    *batch, _, h, w, c, _ = tiles.shape
    grid = tiles.reshape(*batch, rows, columns, h, w, c, c)
    n = len(batch)
    order = (*range(n), n + 2, n + 3, n, n + 4, n + 1, n + 5)
    kernel = jnp.transpose(grid, order).reshape(*batch, h, w, rows * c, columns * c)
    return kernel[..., : spec.shape[2], : spec.shape[3]]
