"""What a Transformer costs: floating-point operations, whole and by head, hidden unit, layer and position.

Counted as XLA does: two for each multiply-add of every product that is computed, masked scores of causal attention
included; one for each elementwise operation; exponentials and the like apart, so none here. Gathering costs nothing.

B samples, L positions, D width, H heads, K width of a head, F hidden units, N blocks of them.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from hyperjax.transformer import Config, Gates

SOFTMAX = 6  # elementwise operations for each score: scale, mask, maximum, difference, sum, quotient
NORM = 9  # and for each element of a normalisation
ACTIVATION = {"gelu": 9, "swiglu": 4}  # and for each hidden unit
ROTARY = 6  # and for each element of a query or key


class Costs(NamedTuple):
    """Operations for one sample.

    Attributes:
        fixed: what gates never save: output, last normalisation.
        attention: by layer, of one head: the part that grows with the number of positions.
        scores: by layer, of one head: the part that grows with its square.
        unit: by layer, of one hidden unit.
        layer: by layer, what is left of it without heads and units: normalisations and sums.
        heads: number by layer.
        units: number by layer.
    """

    fixed: float
    attention: tuple[float, ...]
    scores: tuple[float, ...]
    unit: tuple[float, ...]
    layer: tuple[float, ...]
    heads: tuple[int, ...]
    units: tuple[int, ...]

    @property
    def total(self) -> float:
        """Operations of the whole stack."""
        rows = zip(self.attention, self.scores, self.unit, self.layer, self.heads, self.units, strict=True)
        return self.fixed + sum(rest + h * (a + s) + f * u for a, s, u, rest, h, f in rows)


def costs(config: Config, length: int, *, causal: bool = True, cached: int | None = None) -> Costs:
    """Counts the operations of an encoder or decoder without an encoder's memory, for one sample.

    Args:
        config: sizes.
        length: L, positions computed.
        causal: whether it is a decoder, with logits at every position.
        cached: size of the cache that they attend to, when decoding; None attends to the L positions.

    Returns:
        The costs; `total` is their sum. Times the batch, it agrees with XLA's analysis of the compiled forward pass.

    Raises:
        ValueError: a length or cache below 1 position.
    """
    if length < 1 or (cached is not None and cached < 1):
        raise ValueError(f"length is {length} and cached {cached}, expected 1 or more positions")
    c, keys = config, length if cached is None else cached
    d, k, last = c.width, c.head_size, c.outputs or (c.vocabulary if causal else 0)
    rotary = ROTARY * 2 * k * length if c.positions == "rotary" else 0
    attention = length * 8 * d * k + rotary
    scores = length * keys * (4 * k + SOFTMAX)
    unit = length * (2 * d * (3 if c.activation == "swiglu" else 2) + ACTIVATION[c.activation])
    by_layer = zip(c.heads_by_layer, c.ffn_by_layer, strict=True)
    layer = tuple(float(length * d * (NORM + 1) * ((h > 0) + (f > 0))) for h, f in by_layer)
    fixed = length * d * NORM + 2 * d * last * (length if causal else 1) + (0 if causal else length * d)
    fixed += length * d if c.positions == "learned" else 0
    n = c.layers
    return Costs(
        float(fixed),
        (float(attention),) * n,
        (float(scores),) * n,
        (float(unit),) * n,
        layer,
        c.heads_by_layer,
        c.ffn_by_layer,
    )


def share(costs: Costs, gates: Gates, mask: Any = None, *, all_keys: bool = False) -> Any:
    """The share of the operations that gates leave, were they skipped and not multiplied: differentiable in them.

    A gate of heads or blocks counts by its value, best 0 or 1 or the probability to be open; axes of positions are
    averaged. A position that a token gate takes out costs nothing in its layer and, as a key, nothing to the others.

    Args:
        costs: of the network without gates.
        gates: of all layers, with a leading axis of layers; arrays, no plans.
        mask: [B, L], False for padding, which does not count in averages over positions.
        all_keys: whether all heads compute keys and values at every position that takes part, as gates by token need:
            a later position may ask for them. They are half of what grows with the number of positions.

    Returns:
        Scalar, or [B] if a gate has an axis of samples.

    Raises:
        ValueError: a gate is a plan, or there are not as many as layers or heads.
    """
    for name in ("heads", "blocks", "layer", "tokens"):
        gate, layers = getattr(gates, name), len(costs.layer)
        if gate is not None and (isinstance(gate, tuple) or jnp.ndim(gate) < 1 or jnp.shape(gate)[0] != layers):
            raise ValueError(f"gates of {name} are {type(gate).__name__}, expected an array with {layers} layers first")
    if gates.heads is not None and any(gates.heads.shape[-1] > heads for heads in costs.heads):
        raise ValueError(
            f"there are {gates.heads.shape[-1]} gates for {min(costs.heads)} heads, expected at most as many"
        )
    total: Any = costs.fixed
    for n in range(len(costs.layer)):
        g = gates.of(n)
        tokens = 1.0 if g.tokens is None else _mean(g.tokens, mask)
        heads = costs.heads[n] * tokens if g.heads is None else _mean(_both(g.heads.sum(-1), g.tokens), mask)
        units = tokens if g.blocks is None else _mean(_both(g.blocks.mean(-1), g.tokens), mask)
        layer = 1.0 if g.layer is None else g.layer
        keys = costs.heads[n] * tokens if all_keys else heads
        attention = (heads + keys) / 2 * costs.attention[n] + heads * tokens * costs.scores[n]
        total = total + layer * (tokens * costs.layer[n] + attention + units * costs.units[n] * costs.unit[n])
    return total / costs.total


def _both(gate: Any, tokens: Any) -> Any:
    """A gate, [], [B] or [B, L], where the position takes part too."""
    if tokens is None:
        return gate
    return (gate[:, None] if gate.ndim == 1 else gate) * tokens


def _mean(gate: Any, mask: Any) -> Any:
    """Means over positions, if there are any: [B, L] to [B]; the rest as it is."""
    if gate.ndim < 2:
        return gate
    return gate.mean(1) if mask is None else (gate * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
