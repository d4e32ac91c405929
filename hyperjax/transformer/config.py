"""The shape of a Transformer stack, checked before anything is compiled."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

ACTIVATIONS = ("gelu", "swiglu")
POSITIONS = ("learned", "rotary")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of an encoder or decoder. What layers share is given by maps: layer l uses the weights of number map[l].

    Attributes:
        vocabulary: number of input symbols.
        layers: number of layers computed.
        width: of the state between layers.
        heads: attention heads, of all layers or of each; a layer with 0 has no attention.
        cross_heads: heads of the attention to an encoder, where there is one; None: as many as `heads`.
        head_width: of a query, key and value; None is width / heads.
        ffn: hidden width of the feed-forward networks, of all layers or of each; a layer with 0 has none.
        activation: "gelu", or "swiglu", whose third matrix gates the hidden units.
        positions: "learned", a table of `length` rows; or "rotary", in queries and keys, with no limit.
        length: longest input of learned positions, and default size of a cache.
        dropout: share of each sub-layer's update, and of the embeddings, that training drops.
        outputs: width of the logits; None is the vocabulary's for a decoder, and no logits for an encoder.
        attention_map: number of the attention weights that each layer uses; None: layer l has its own, number l.
        ffn_map: likewise of feed-forward networks.
        norm_map: likewise of normalisations.
        dtype: of the products and of the state; parameters, normalisation, softmax and logits stay float32.

    Raises:
        ValueError: a size is out of range, or does not fit another.
    """

    vocabulary: int
    layers: int = 4
    width: int = 128
    heads: int | tuple[int, ...] = 4
    cross_heads: int | tuple[int, ...] | None = None
    head_width: int | None = None
    ffn: int | tuple[int, ...] = 512
    activation: str = "gelu"
    positions: str = "rotary"
    length: int = 512
    dropout: float = 0.0
    outputs: int | None = None
    attention_map: tuple[int, ...] | None = None
    ffn_map: tuple[int, ...] | None = None
    norm_map: tuple[int, ...] | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("vocabulary", "layers", "width", "length", "head_width", "outputs"):
            value, optional = getattr(self, name), name in ("head_width", "outputs")
            if not (_whole(value, 1) or (optional and value is None)):
                raise ValueError(f"{name} is {value!r}, expected a whole number from 1{' or None' * optional}")
        for name, text, known in (
            ("activation", self.activation, ACTIVATIONS),
            ("positions", self.positions, POSITIONS),
        ):
            if text not in known:
                raise ValueError(f"{name} is {text!r}, expected {' or '.join(known)}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a share of at least 0 and below 1")
        for name in ("heads", "cross_heads", "ffn"):
            given = self.heads if getattr(self, name) is None else getattr(self, name)
            values = given if isinstance(given, tuple) else (given,) * self.layers
            if len(values) != self.layers or not all(_whole(value, 0) for value in values):
                raise ValueError(
                    f"{name} is {given!r}, expected a whole number from 0, or a tuple of one for each of {self.layers} "
                    "layers"
                )
        if self.head_width is None and (isinstance(self.heads, tuple) or self.heads == 0 or self.width % self.heads):
            raise ValueError(f"heads is {self.heads}, which does not divide the width {self.width}; give head_width")
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(f"a head is {self.head_size} wide, expected an even number for rotary positions")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype is {self.dtype}, expected a floating type, such as float32 or bfloat16")
        self._check_maps()

    @property
    def heads_by_layer(self) -> tuple[int, ...]:
        """Number of heads of each layer."""
        return self.heads if isinstance(self.heads, tuple) else (self.heads,) * self.layers

    @property
    def cross_heads_by_layer(self) -> tuple[int, ...]:
        """Number of heads of each layer's attention to an encoder."""
        heads = self.heads if self.cross_heads is None else self.cross_heads
        return heads if isinstance(heads, tuple) else (heads,) * self.layers

    @property
    def ffn_by_layer(self) -> tuple[int, ...]:
        """Hidden width of each layer's feed-forward network."""
        return self.ffn if isinstance(self.ffn, tuple) else (self.ffn,) * self.layers

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_width or self.width // int(self.heads)  # type: ignore[arg-type]

    def weights_of(self, kind: str) -> tuple[int, ...]:
        """Numbers of the weights that the layers use; `kind` is "attention", "ffn" or "norm"."""
        numbers = getattr(self, f"{kind}_map")
        return tuple(range(self.layers)) if numbers is None else numbers

    def _check_maps(self) -> None:
        heads = tuple(zip(self.heads_by_layer, self.cross_heads_by_layer, strict=True))
        sizes: dict[str, tuple] = {"attention": heads, "ffn": self.ffn_by_layer, "norm": (self.width,) * self.layers}
        for kind, by_layer in sizes.items():
            numbers = self.weights_of(kind)
            listed = isinstance(numbers, tuple) and len(numbers) == self.layers
            if not listed or not all(_whole(number, 0) for number in numbers):
                raise ValueError(
                    f"{kind}_map is {numbers!r}, expected a tuple of a whole number from 0 for each of {self.layers} "
                    "layers"
                )
            if max(numbers) >= self.layers:
                raise ValueError(
                    f"{kind}_map points to layer {max(numbers)}, expected 0 to {self.layers - 1}: there are "
                    f"{self.layers} layers"
                )
            first: dict[int, object] = {}
            for number, size in zip(numbers, by_layer, strict=True):
                if first.setdefault(number, size) != size:
                    raise ValueError(
                        f"{kind}_map is {numbers}, which gives weights {number} the sizes {first[number]} and {size}"
                    )


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)
