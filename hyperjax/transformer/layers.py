"""Attention, feed-forward network and rotary positions, with gates.

B samples, L queries, S keys, D width, H heads, K width of a head, F hidden units, N blocks of them, C capacity.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.transformer.gates import Dispatch

Array = jax.Array
INIT = nn.initializers.lecun_normal
TABLE = 8192  # positions whose angles may be a constant of a program
HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


class Rotary(NamedTuple):
    """The angles that positions turn queries and keys by: their cosines and sines, [1 or B, L, K/2].

    Made once for all layers, and where positions are known beforehand, before the program runs: sines are dear, and XLA
    would fuse them into every layer and compute them anew for each head.

    Attributes:
        cos: cosines.
        sin: sines.
    """

    cos: Array | np.ndarray
    sin: Array | np.ndarray

    @classmethod
    def of(cls, positions: Array | np.ndarray, width: int, base: float = 10_000.0) -> "Rotary":
        """The angles of positions [1 or B, L] for heads of a width K; base of the wavelengths."""
        half = width // 2
        frequencies = np.float32(base) ** (-np.arange(half, dtype=np.float32) / half)
        angles: Any = positions.astype(np.float32)[..., None] * frequencies[None, None]
        maths = np if isinstance(positions, np.ndarray) else jnp
        return cls(maths.cos(angles), maths.sin(angles))

    @classmethod
    def at(cls, used: Any, length: int, room: int | None, width: int) -> "Rotary":
        """The angles of `length` positions behind `used` ones of at most `room`."""
        known = isinstance(length, int)  # and not a symbol, of a program that is exported for any
        if known and isinstance(used, int):
            return cls.of(np.arange(used, used + length)[None], width)
        if not known or room is None or room > TABLE:
            return cls.of(used + jnp.arange(length)[None], width)
        table = cls.of(np.arange(room)[None], width)
        return cls(*(jax.lax.dynamic_slice_in_dim(jnp.asarray(a), used, length, 1) for a in table))


def attend(q_BLHK: Array, k_BSHK: Array, v_BSHK: Array, **options: Any) -> Array:
    """`jax.nn.dot_product_attention`, which in float16 is not there on CPUs: they compute it in float32."""
    attention = partial(jax.nn.dot_product_attention, **options)
    if q_BLHK.dtype != jnp.float16:
        return attention(q_BLHK, k_BSHK, v_BSHK)
    wide = lambda *arrays: attention(*(a.astype(jnp.float32) for a in arrays)).astype(jnp.float16)  # noqa: E731
    return jax.lax.platform_dependent(q_BLHK, k_BSHK, v_BSHK, cpu=wide, default=attention)


class Attention(nn.Module):
    """Multi-head attention without biases, through `jax.nn.dot_product_attention`.

    Attributes:
        heads: H, 1 or more.
        head_width: K.
        width: D of what goes in and comes out.
        causal: whether a query sees no key behind it; by order, not by position.
        dtype: of the products.

    Reference: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.
    """

    heads: int
    head_width: int
    width: int
    causal: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        into, sizes = INIT(in_axis=0, out_axis=(1, 2)), (self.width, self.heads, self.head_width)
        self.query = self.param("query", into, sizes)
        self.key = self.param("key", into, sizes)
        self.value = self.param("value", into, sizes)
        self.out = self.param("out", INIT(in_axis=(0, 1), out_axis=2), (self.heads, self.head_width, self.width))

    def keys_values(self, x_BSD: Array, rotary: Rotary | None = None) -> tuple[Array, Array]:
        """Returns keys and values [B, S, H, K]; with rotary positions, keys are turned by them."""
        k_BSHK, v_BSHK = self._project(x_BSD, self.key), self._project(x_BSD, self.value)
        return (k_BSHK if rotary is None else rotate(k_BSHK, rotary)), v_BSHK

    def __call__(
        self,
        x_BLD: Array,
        keys_values: tuple[Array, Array],
        rotary: Rotary | None = None,
        mask: Array | None = None,
        gates: Array | None = None,
        ordered: bool = True,
    ) -> Array:
        """Attends.

        Args:
            x_BLD: what asks, [B, L, D].
            keys_values: what `keys_values` returned.
            rotary: positions that turn the queries; None leaves them.
            mask: True where a query may see a key, [B, 1, 1 or L, S].
            gates: of the heads, [H], [B, H] or [B, L, H].
            ordered: whether queries and keys are the same positions, of which causal attention masks the later ones;
                False leaves that to the mask.

        Returns:
            [B, L, D].
        """
        q_BLHK = self._project(x_BLD, self.query)
        q_BLHK = q_BLHK if rotary is None else rotate(q_BLHK, rotary)
        k_BSHK, v_BSHK = keys_values
        sizes = q_BLHK.shape[1], k_BSHK.shape[1]
        fused = self._fused(mask, sizes)
        if fused and mask is not None:
            mask = jnp.broadcast_to(mask, mask.shape[:2] + sizes)  # as cuDNN wants it
        o_BLHK = attend(
            q_BLHK,
            k_BSHK,
            v_BSHK,
            mask=mask,
            is_causal=self.causal and ordered,
            implementation="cudnn" if fused else None,
        )
        out_HKD = self.out
        if gates is not None and gates.ndim == 1:
            out_HKD = out_HKD * gates[:, None, None]  # cheaper than scaling every position
        elif gates is not None:
            o_BLHK = o_BLHK * expand(gates, 3)[..., None].astype(o_BLHK.dtype)
        return jnp.einsum("blhk,hkd->bld", o_BLHK, out_HKD.astype(self.dtype))

    def _project(self, x_BLD: Array, kernel_DHK: Array) -> Array:
        return jnp.einsum("bld,dhk->blhk", x_BLD, kernel_DHK.astype(self.dtype))

    def _fused(self, mask: Array | None, sizes: tuple[int, int]) -> bool:
        """Whether cuDNN's kernel takes this: 16 bits, CUDA 8.0 or later, and under a mask even lengths to train."""
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
        able = capability[:1].isdigit() and float(capability) >= 8 and jnp.dtype(self.dtype) in HALF
        even = mask is None or not any(size % 2 for size in sizes)
        return able and even and self.head_width % 8 == 0 and self.head_width <= 128


class FeedForward(nn.Module):
    """Two matrices with GELU between them, or three with SwiGLU; no biases. Its hidden units can be gated by blocks.

    Attributes:
        hidden: F, 1 or more.
        width: D of what goes in and comes out.
        activation: "gelu" or "swiglu".
        dtype: of the products.

    Reference: Shazeer, "GLU Variants Improve Transformer" (2020), section 2, for SwiGLU.
    """

    hidden: int
    width: int
    activation: str = "gelu"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.up = self.param("up", INIT(), (self.width, self.hidden))
        self.gate = self.param("gate", INIT(), (self.width, self.hidden)) if self.activation == "swiglu" else None
        self.down = self.param("down", INIT(), (self.hidden, self.width))

    def __call__(self, x_BLD: Array, gates: Any = None) -> Array:
        """Computes [B, L, D] from [B, L, D]; gates of blocks [N], [B, N] or [B, L, N], or a `Dispatch`.

        Raises:
            ValueError: the blocks do not divide the hidden units.
        """
        if isinstance(gates, Dispatch):
            return self._dispatched(x_BLD, gates)
        u_BLF = self._activate(*(x_BLD @ kernel.astype(self.dtype) for kernel in self._kernels()))
        down_FD = self.down
        if gates is not None:
            self._check_blocks(gates.shape[-1])
            gate_F = jnp.repeat(gates, self.hidden // gates.shape[-1], -1)
            if gates.ndim == 1:
                down_FD = down_FD * gate_F[:, None]  # cheaper than scaling every position
            else:
                u_BLF = u_BLF * expand(gate_F, 3).astype(u_BLF.dtype)
        return u_BLF @ down_FD.astype(self.dtype)

    def _dispatched(self, x_BLD: Array, plan: Dispatch) -> Array:
        blocks = plan.index.shape[0]
        self._check_blocks(blocks)
        x_TD = x_BLD.reshape(-1, self.width)
        x_NCD = x_TD.at[plan.index].get(mode="clip")
        kernels = (k.astype(self.dtype).reshape(self.width, blocks, -1) for k in self._kernels())
        u_NCF = self._activate(*(jnp.einsum("ncd,dnf->ncf", x_NCD, kernel) for kernel in kernels))
        u_NCF = u_NCF * plan.weight[..., None].astype(u_NCF.dtype)
        y_NCD = jnp.einsum("ncf,nfd->ncd", u_NCF, self.down.astype(self.dtype).reshape(blocks, -1, self.width))
        return jnp.zeros_like(x_TD).at[plan.index].add(y_NCD, mode="drop").reshape(x_BLD.shape)

    def _kernels(self) -> tuple[Array, ...]:
        return (self.up,) if self.gate is None else (self.up, self.gate)

    def _activate(self, u: Array, gate: Array | None = None) -> Array:
        return jax.nn.gelu(u) if gate is None else jax.nn.silu(gate) * u

    def _check_blocks(self, blocks: int) -> None:
        if blocks < 1 or self.hidden % blocks:
            raise ValueError(f"{blocks} blocks do not divide the {self.hidden} hidden units; choose a divisor")


def rotate(x_BLHK: Array, rotary: Rotary) -> Array:
    """Turns pairs (x_i, x_{i + K/2}) by the angle position * base^(-2i/K).

    Args:
        x_BLHK: queries or keys [B, L, H, K], K even.
        rotary: the angles, of these positions and this K.

    Returns:
        [B, L, H, K].

    Reference:
        Su et al., "RoFormer: Enhanced transformer with rotary position embedding" (2021), section 3.2.

    Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.4.2.
    """
    half = x_BLHK.shape[-1] // 2
    cos, sin = (angles[:, :, None] for angles in rotary)
    a, b = x_BLHK[..., :half].astype(jnp.float32), x_BLHK[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BLHK.dtype)


def expand(gate: Array, ndim: int) -> Array:
    """Puts axes of length 1 before the last one (of gates for all) or after the first (of gates by sample)."""
    missing = ndim - gate.ndim
    if missing < 0 or gate.ndim < 1:
        raise ValueError(f"gates have shape {gate.shape}, expected {ndim} axes at most: samples, positions, units")
    if gate.ndim == 1:
        return gate.reshape((1,) * missing + gate.shape)
    return gate.reshape(gate.shape[:1] + (1,) * missing + gate.shape[1:])
