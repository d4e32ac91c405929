"""What a Transformer may be told to leave out, as data.

B samples, L positions, H heads, N blocks of a feed-forward network, k chosen positions, C capacity of a block.
"""

from typing import Any, NamedTuple

import flax.struct
import jax

Array = jax.Array


class Chosen(NamedTuple):
    """The positions that take part in a layer; the others pass it by. Only these are computed.

    Attributes:
        index: [B, k] positions in rising order, so that causal attention among them stays causal.
        weight: [B, k] by which the layer's update of each is multiplied.
    """

    index: Array  # type: ignore[assignment]
    weight: Array


class Dispatch(NamedTuple):
    """The positions that each block of a feed-forward network computes, at most C each. Only these are computed.

    Attributes:
        index: [N, C] numbers of positions, b * L + t; of a free place any number.
        weight: [N, C] by which the block's output is multiplied; of a free place 0.
    """

    index: Array  # type: ignore[assignment]
    weight: Array


@flax.struct.dataclass
class Gates:
    """Gates of one layer, or of all with a leading axis of layers; None leaves everything as it is.

    Arrays multiply: they train, and they cost what they would without. To save time with fixed shapes, give `Chosen`
    or `Dispatch` plans, or cut the weights out (`hyperjax.pruning.compact`).

    Attributes:
        heads: [..., H], multiplies each head's output; the leading axes are none (for all), B or B, L.
        blocks: [..., N], multiplies N contiguous blocks of hidden units of the feed-forward network; or a `Dispatch`.
            An expert is such a block, and the gates of experts are these.
        cross: [..., H], as `heads`, of the attention to an encoder.
        layer: [...], multiplies the updates of attention and feed-forward network; axes none or B.
        tokens: [B, L], multiplies the updates of each position, and takes those with 0 out of the others' attention;
            or `Chosen`.
    """

    heads: Any = None
    blocks: Any = None
    cross: Any = None
    layer: Any = None
    tokens: Any = None

    def of(self, layer: int) -> "Gates":
        """The gates of one layer, of those of all."""
        return jax.tree.map(lambda gate: gate[layer], self)
