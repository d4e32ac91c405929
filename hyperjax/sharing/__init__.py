"""Parameter sharing: one set of weights for many uses, chosen by hand or found by search.

Ties, of any parameters of any Linen module:

    tied = tie(model, [Tie("decoder/kernel", to="embed/embedding", through=jnp.transpose)], tokens)
    variables = tied.init(key, tokens)
    y = tied.apply(variables, tokens)

Layers of Transformers, from scratch by `Maps.same(cycle(12, 3)).on(config)`, or from a trained network:

    cost = medoid(1 - cka_matrix(layer_features(model.apply(variables, tokens))))
    maps = Maps.same(contiguous(cost, layers=12, groups=4))
    tied, params = convert(model, variables["params"], maps, tokens, through=LowRank(16))

Example:
    >>> import jax.numpy as jnp
    >>> from hyperjax import budget, sharing, transformer
    >>> sharing.cycle(6, 3)  # three passes over two sets of weights
    (0, 1, 0, 1, 0, 1)
    >>> config = transformer.Config(vocabulary=98, layers=6, width=128, heads=4, ffn=512)
    >>> shared = sharing.Maps.same(sharing.cycle(6, 3)).on(config)
    >>> [budget.count_parameters(transformer.Decoder(c), jnp.zeros((1, 4), int)) for c in (config, shared)]
    [1206400, 419968]
"""

from hyperjax.sharing.bert import Bert, BertConfig
from hyperjax.sharing.bert_files import read_bert
from hyperjax.sharing.convert import align_groups, convert, replan, soft_tie, stepwise
from hyperjax.sharing.layer_maps import (
    LayerMap,
    Maps,
    all_shared,
    canonical,
    cycle,
    cycle_reverse,
    groups,
    identity,
    middle_cycle,
    sequence,
)
from hyperjax.sharing.layer_ties import decoder_on_encoder, layer_ties, one_wide_ffn
from hyperjax.sharing.links import Link, Tie
from hyperjax.sharing.maps import ByEmbedding, LowRank, Scale
from hyperjax.sharing.mixture import Mixture
from hyperjax.sharing.search import contiguous, greedy, mean_pair, measured, medoid, most_sets, residual
from hyperjax.sharing.similarity import align, cka_matrix, layer_features, layers_of, linear_cka, weight_distances
from hyperjax.sharing.tie import Tied, tie
from hyperjax.sharing.tools import Memory, cosines, memory, use_gradients, xavier

__all__ = [
    "Bert",
    "BertConfig",
    "ByEmbedding",
    "LayerMap",
    "Link",
    "LowRank",
    "Maps",
    "Memory",
    "Mixture",
    "Scale",
    "Tie",
    "Tied",
    "align",
    "align_groups",
    "all_shared",
    "canonical",
    "cka_matrix",
    "contiguous",
    "convert",
    "cosines",
    "cycle",
    "cycle_reverse",
    "decoder_on_encoder",
    "greedy",
    "groups",
    "identity",
    "layer_features",
    "layer_ties",
    "layers_of",
    "linear_cka",
    "mean_pair",
    "measured",
    "medoid",
    "memory",
    "middle_cycle",
    "most_sets",
    "one_wide_ffn",
    "read_bert",
    "replan",
    "residual",
    "sequence",
    "soft_tie",
    "stepwise",
    "tie",
    "use_gradients",
    "weight_distances",
    "xavier",
]
