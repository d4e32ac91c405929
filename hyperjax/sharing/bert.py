"""Encoders in BERT's shape: post-norm, biases, learned positions; their layers can share weights by maps.

B samples, L positions, D width, H heads, K width of a head, F hidden units.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.sharing.layer_maps import check_map
from hyperjax.transformer.checks import check_mask, check_tokens, known
from hyperjax.transformer.layers import attend
from hyperjax.transformer.model import drop

Array = jax.Array
INIT, ZEROS = nn.initializers.normal(0.02), nn.initializers.zeros
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT; those of BERT-base by default. Layer l uses the weights of number map[l].

    Attributes:
        vocabulary: number of tokens.
        layers: number of layers computed.
        width: D.
        heads: H, a divisor of the width.
        ffn: F.
        length: rows of the position table.
        types: kinds of segments.
        activation: "gelu" (exact), "gelu_new" (by tanh) or "relu".
        eps: added to variances.
        dropout: share of updates and embeddings that training drops; 0 leaves attention as it is too.
        pooler: whether there is a layer on the first position.
        dtype: of the products; parameters and normalisation stay float32.
        attention_map: number of the attention weights that each layer uses; None: its own.
        ffn_map: likewise of feed-forward networks.
        norm_map: likewise of normalisations.

    Raises:
        ValueError: a size is out of range, or a map points to a layer that is not there.
    """

    vocabulary: int = 30_522
    layers: int = 12
    width: int = 768
    heads: int = 12
    ffn: int = 3072
    length: int = 512
    types: int = 2
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    pooler: bool = True
    dtype: Any = jnp.float32
    attention_map: tuple[int, ...] | None = None
    ffn_map: tuple[int, ...] | None = None
    norm_map: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("vocabulary", "layers", "width", "heads", "ffn", "length", "types"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number from 1")
        if self.width % self.heads:
            raise ValueError(f"heads is {self.heads}, expected a divisor of the width {self.width}")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, expected a share of at least 0 and below 1")
        if not isinstance(self.eps, int | float) or not 0 < self.eps < 1:
            raise ValueError(f"eps is {self.eps!r}, expected a small number above 0, as 1e-12")
        try:
            floating = jnp.issubdtype(self.dtype, jnp.floating)
        except TypeError:  # the name of no type
            floating = False
        if not floating:
            raise ValueError(f"dtype is {self.dtype!r}, expected a floating type, such as float32 or bfloat16")
        for kind in ("attention", "ffn", "norm"):
            check_map(self.weights_of(kind), self.layers, f"{kind}_map")

    def weights_of(self, kind: str) -> tuple[int, ...]:
        """Numbers of the weights that the layers use; `kind` is "attention", "ffn" or "norm"."""
        numbers = getattr(self, f"{kind}_map")
        return tuple(range(self.layers)) if numbers is None else numbers


class Bert(nn.Module):
    """BERT without its heads; `read_bert` reads its parameters from a file.

    Attributes:
        config: sizes and maps.

    Reference: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2019), section 3.
    """

    config: BertConfig

    def setup(self) -> None:
        c = self.config
        table = partial(nn.Embed, features=c.width, dtype=c.dtype, embedding_init=INIT)
        self.embedding, self.position, self.type = table(c.vocabulary), table(c.length), table(c.types)
        self.embedding_norm = nn.LayerNorm(epsilon=c.eps, dtype=c.dtype)
        self.stack = BertStack(c)
        self.pooler = nn.Dense(c.width, dtype=c.dtype, kernel_init=INIT) if c.pooler else None

    def __call__(
        self, tokens: Array, *, mask: Array | None = None, types: Array | None = None, key: Array | None = None
    ) -> dict[str, Any]:
        """Encodes.

        Args:
            tokens: [B, L] int.
            mask: [B, L] bool, False for padding.
            types: [B, L] int, kinds of segments; None is all 0.
            key: PRNG key of dropout; without it nothing is dropped.

        Returns:
            `features` [B, L, D]; `pooled` [B, D], tanh of a layer on the first position, if there is one; `embedded`
            [B, L, D]; `layers`: of each its `state` and its updates `attention` and `ffn`, before they are added.

        Raises:
            ValueError: tokens are no whole numbers [B, L] of the vocabulary, or longer than the table of positions; or
                mask or types do not fit them.
        """
        c = self.config
        check_tokens(tokens, c.vocabulary)
        if tokens.shape[1] > c.length:
            raise ValueError(f"the input has length {tokens.shape[1]}, above the {c.length} rows of the position table")
        if mask is not None:
            check_mask("mask", mask, tokens.shape)
        if types is not None:
            _check_types(types, tokens.shape, c.types)
        kinds = jnp.zeros(tokens.shape, int) if types is None else types
        x_BLD = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))[None] + self.type(kinds)
        first, rest = (None, None) if key is None else tuple(jax.random.split(key))
        x_BLD = drop(first, self.embedding_norm(x_BLD), c.dropout)
        features, layers = self.stack(x_BLD, mask, rest)
        out = {"features": features, "embedded": x_BLD, "layers": layers}
        return out if self.pooler is None else {**out, "pooled": jnp.tanh(self.pooler(features[:, 0]))}


class BertStack(nn.Module):
    """The layers: x = norm(x + attention(x)), then x = norm(x + ffn(x)).

    Attributes:
        config: sizes and maps.
    """

    config: BertConfig

    def setup(self) -> None:
        c = self.config

        def each(kind: str, make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
            return {str(number): make() for number in sorted(set(c.weights_of(kind)))}

        self.attention = each("attention", lambda: BertAttention(c.heads, c.width, c.dtype))
        self.ffn = each("ffn", lambda: BertFeedForward(c.ffn, c.width, c.activation, c.dtype))
        self.attention_norm = each("norm", lambda: nn.LayerNorm(epsilon=c.eps, dtype=c.dtype))
        self.ffn_norm = each("norm", lambda: nn.LayerNorm(epsilon=c.eps, dtype=c.dtype))

    def __call__(self, x_BLD: Array, mask: Array | None, key: Array | None) -> tuple[Array, list[dict[str, Array]]]:
        """Runs all layers: the state [B, L, D], and what each layer did."""
        c, done = self.config, []
        for l in range(c.layers):
            attention, ffn, norm = (str(c.weights_of(kind)[l]) for kind in ("attention", "ffn", "norm"))
            keys = (None, None) if key is None else tuple(jax.random.split(jax.random.fold_in(key, l)))
            a_BLD = self.attention[attention](x_BLD, mask)
            x_BLD = self.attention_norm[norm](x_BLD + drop(keys[0], a_BLD, c.dropout))
            f_BLD = self.ffn[ffn](x_BLD)
            x_BLD = self.ffn_norm[norm](x_BLD + drop(keys[1], f_BLD, c.dropout))
            done.append({"attention": a_BLD, "ffn": f_BLD, "state": x_BLD})
        return x_BLD, done


class BertAttention(nn.Module):
    """Multi-head attention with biases.

    Attributes:
        heads: H.
        width: D.
        dtype: of the products.
    """

    heads: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array, mask: Array | None = None) -> Array:
        """Attends, [B, L, D], to positions where the mask [B, L] is True."""
        sizes = (self.width, self.heads, self.width // self.heads)
        projected: list[Array] = []
        for name in ("query", "key", "value"):
            kernel, bias = self.param(name, INIT, sizes), self.param(f"{name}_bias", ZEROS, sizes[1:])
            projected.append(
                jnp.einsum("bld,dhk->blhk", x_BLD, kernel.astype(self.dtype)) + bias.astype(self.dtype)[None, None]
            )
        seen = None if mask is None else mask[:, None, None, :]
        q_BLHK, k_BLHK, v_BLHK = projected
        o_BLHK = attend(q_BLHK, k_BLHK, v_BLHK, mask=seen)
        kernel, bias = self.param("out", INIT, (*sizes[1:], self.width)), self.param("out_bias", ZEROS, (self.width,))
        return jnp.einsum("blhk,hkd->bld", o_BLHK, kernel.astype(self.dtype)) + bias.astype(self.dtype)[None, None]


class BertFeedForward(nn.Module):
    """Two matrices with biases.

    Attributes:
        hidden: F.
        width: D.
        activation: as of the config.
        dtype: of the products.
    """

    hidden: int
    width: int
    activation: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Computes [B, L, D] from [B, L, D]."""
        up, up_bias = self.param("up", INIT, (self.width, self.hidden)), self.param("up_bias", ZEROS, (self.hidden,))
        down = self.param("down", INIT, (self.hidden, self.width))
        down_bias = self.param("down_bias", ZEROS, (self.width,))
        u_BLF = ACTIVATIONS[self.activation](x_BLD @ up.astype(self.dtype) + up_bias.astype(self.dtype)[None, None])
        return u_BLF @ down.astype(self.dtype) + down_bias.astype(self.dtype)[None, None]


def _check_types(types: Any, shape: tuple[int, ...], number: int) -> None:
    found, dtype = getattr(types, "shape", None), getattr(types, "dtype", type(types).__name__)
    if found != shape or not np.issubdtype(dtype, np.integer):
        raise ValueError(f"types have shape {found} and type {dtype}, expected whole numbers {shape}, as the tokens")
    values = known(types)
    if values is not None and values.size and not 0 <= values.min() <= values.max() < number:
        raise ValueError(
            f"types run from {values.min()} to {values.max()}, expected 0 to {number - 1}: there are {number} types"
        )
