"""Layer maps as ties, for any network whose layers are called attention_0, ffn_0 and so on; encoder and decoder too.

`Maps.on(config)` computes the same where weights are equal; as ties, they can also be related by a map.
"""

import dataclasses
import re

from hyperjax.sharing.layer_maps import LayerMap, Maps, check_map, members
from hyperjax.sharing.links import Map, Tie
from hyperjax.transformer import Config

KINDS = {"attention": r"(?:cross_)?attention", "ffn": "ffn", "norm": r"\w+_norm"}  # as their parameters are called


def layer_ties(maps: Maps, through: Map | None = None, prefix: str = "stack/") -> list[Tie]:
    """Ties of layers that share weights.

    Args:
        maps: of L layers.
        through: the map from the shared weights to each layer's, as `LowRank(16)`. With it the shared weights are new
            parameters, under "groups/", every layer of a group has its own map, and biases stay private; None: all
            layers of a group are its first.
        prefix: of the paths of the layers' parameters.

    Returns:
        The ties, for `tie`.

    Raises:
        ValueError: a map points to a layer that is not there.
    """
    ties = []
    for kind, layer_map in maps._asdict().items():
        if layer_map is None:
            continue
        check_map(layer_map, len(layer_map), f"the {kind} map")
        for first, *rest in members(layer_map).values():
            for l in (rest if through is None else [first, *rest]) if rest else ():
                of = ".+" if through is None else r"(?:.+/)?(?!\w*bias$)\w+"
                path = rf"({re.escape(prefix)})({KINDS[kind]})_{l}/({of})"
                to = rf"\1\2_{first}/\3" if through is None else rf"groups/\2_{first}/\3"
                ties.append(Tie(path, to, through))
    return ties


def decoder_on_encoder(encoder: Config, decoder: Config) -> list[Tie]:
    """Ties of an `EncoderDecoder`: decoder layer l has self-attention and feed-forward network of an encoder layer.

    It is layer l modulo their number; attention to the encoder and norms stay the decoder's.

    Returns:
        The ties, for `tie`.

    Raises:
        ValueError: their sizes differ.

    Reference: Takase, Kiyono (2021), section 2; Xia et al., "Tied Transformers" (2019).
    """
    sizes = ("width", "heads", "head_size", "ffn", "activation")
    for name in sizes:
        a, b = getattr(encoder, name), getattr(decoder, name)
        if a != b:
            raise ValueError(f"the encoder's {name} is {a} and the decoder's {b}, expected one, to share layers")
    return [
        Tie(rf"decode/stack/(attention|ffn)_{l}/(.+)", rf"encode/stack/\1_{l % encoder.layers}/\2")
        for l in range(decoder.layers)
    ]


def one_wide_ffn(encoder: Config, decoder: Config, share: float = 1.0) -> tuple[Config, Config]:
    """Configs of an `EncoderDecoder` with one feed-forward network for all encoder layers, and none in the decoder.

    Args:
        encoder, decoder: as they were, with a network in each layer.
        share: its hidden units as a share of all those together; 1 keeps the number of parameters.

    Returns:
        Both configs, encoder first.

    Raises:
        ValueError: a share outside (0, 1].

    Reference: Pessoa Pires et al., "One Wide Feedforward is All You Need" (2023), section 3.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected a number above 0, at most 1")
    units = max(1, round(share * (sum(encoder.ffn_by_layer) + sum(decoder.ffn_by_layer))))
    one: LayerMap = (0,) * encoder.layers
    return dataclasses.replace(encoder, ffn=units, ffn_map=one), dataclasses.replace(decoder, ffn=0, ffn_map=None)
