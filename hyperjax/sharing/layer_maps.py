"""Which layer uses which layer's weights: a tuple with, for each of L layers, the number of the weights that it uses.

    config = dataclasses.replace(config, attention_map=cycle(12, 3), ffn_map=cycle(12, 3))   # norms stay private
    config = Maps.same(middle_cycle(12, 2)).on(config)                                      # the same

N loops over the weights, G groups.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

LayerMap = tuple[int, ...]
Sized = TypeVar("Sized")


class Maps(NamedTuple):
    """A map for each kind of weights; None is private weights for every layer.

    Attributes:
        attention: of attention weights, those to an encoder included.
        ffn: of feed-forward networks.
        norm: of normalisations: private costs little and keeps quality.
    """

    attention: LayerMap | None = None
    ffn: LayerMap | None = None
    norm: LayerMap | None = None

    @classmethod
    def same(cls, layer_map: LayerMap) -> "Maps":
        """One map for attention and feed-forward networks; private norms."""
        return cls(layer_map, layer_map)

    def on(self, config: Sized) -> Sized:
        """The config with these maps: a Transformer's, or BERT's.

        Raises:
            ValueError: a map is not of its number of layers, or points to a layer that is not there.
        """
        sized: Any = config
        for name, layer_map in self._asdict().items():
            if layer_map is not None:
                check_map(layer_map, sized.layers, f"the {name} map")
        return dataclasses.replace(sized, attention_map=self.attention, ffn_map=self.ffn, norm_map=self.norm)


def identity(layers: int) -> LayerMap:
    """No sharing: 0 1 2 3.

    Raises:
        ValueError: fewer than 1 layer.
    """
    _check(layers)
    return tuple(range(layers))


def all_shared(layers: int) -> LayerMap:
    """One set of weights: 0 0 0 0.

    Raises:
        ValueError: fewer than 1 layer.

    Reference: Lan et al., "ALBERT" (2020), section 3.1.
    """
    _check(layers)
    return (0,) * layers


def groups(layers: int, number: int) -> LayerMap:
    """G groups of neighbours, as equal as can be, floor(l G / L): 0 0 1 1 2 2.

    Raises:
        ValueError: fewer than 1 group, or more than there are layers.

    Reference: ALBERT's `num_hidden_groups`.
    """
    _check(layers)
    if not 1 <= number <= layers:
        raise ValueError(f"{number} groups of {layers} layers, expected 1 to {layers}")
    return tuple(l * number // layers for l in range(layers))


def sequence(layers: int, loops: int) -> LayerMap:
    """Each set of weights N times in a row, floor(l / N): 0 0 1 1 2 2.

    Raises:
        ValueError: fewer than 1 layer, or loops that do not divide the layers.

    Reference: Takase, Kiyono, "Lessons on Parameter Sharing across Layers in Transformers" (2021), section 2.
    """
    _check(layers, loops)
    return tuple(l // loops for l in range(layers))


def cycle(layers: int, loops: int) -> LayerMap:
    """All sets of weights, N times over, l mod (L / N): 0 1 2 0 1 2.

    Raises:
        ValueError: fewer than 1 layer, or loops that do not divide the layers.

    Reference: Takase, Kiyono (2021), section 2; Bae et al., "Relaxed Recursive Transformers" (2024).
    """
    _check(layers, loops)
    return tuple(l % (layers // loops) for l in range(layers))


def middle_cycle(layers: int, loops: int) -> LayerMap:
    """The first and last layer private, a cycle between them: 0 1 2 1 2 5.

    Raises:
        ValueError: fewer than 3 layers, or loops that do not divide those between the first and last.

    Reference: Bae et al., "Mixture-of-Recursions" (2025), the best map from scratch there.
    """
    if layers < 3:
        raise ValueError(f"there are {layers} layers, expected 3 or more: the first and last stay private")
    _check(layers - 2, loops, "the layers between the first and last, ")
    inner = cycle(layers - 2, loops)
    return (0, *(1 + number for number in inner), layers - 1)


def cycle_reverse(layers: int, loops: int) -> LayerMap:
    """A cycle whose last pass runs backwards: 0 1 2 2 1 0.

    Raises:
        ValueError: fewer than 1 layer, or loops that do not divide the layers.

    Reference: Takase, Kiyono (2021), section 2.
    """
    numbers = cycle(layers, loops)
    unique = layers // loops
    return numbers[: layers - unique] + numbers[:unique][::-1] if loops > 1 else numbers


def canonical(layer_map: Sequence[int]) -> LayerMap:
    """The same groups, each numbered by its first layer: 7 7 3 3 becomes 0 0 2 2."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(number, l) for l, number in enumerate(layer_map))


def members(layer_map: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The layers that use each set of weights."""
    found: dict[int, list[int]] = {}
    for l, number in enumerate(layer_map):
        found.setdefault(number, []).append(l)
    return {number: tuple(layers) for number, layers in found.items()}


def check_map(layer_map: Sequence[int], layers: int, name: str = "the map") -> None:
    """Refuses what is not a tuple of a layer's number for each layer."""
    if not isinstance(layer_map, tuple) or len(layer_map) != layers:
        raise ValueError(f"{name} is {layer_map!r}, expected a tuple of {layers} numbers, one for each layer")
    wrong = next((n for n in layer_map if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < layers), None)
    if wrong is not None:
        raise ValueError(f"{name} points to layer {wrong!r}, expected 0 to {layers - 1}: there are {layers} layers")


def _check(layers: int, loops: int = 1, of: str = "") -> None:
    if layers < 1:
        raise ValueError(f"there are {layers} layers, expected 1 or more")
    if loops < 1 or layers % loops:
        raise ValueError(f"{loops} loops over {of}{layers}, expected a divisor of it")
