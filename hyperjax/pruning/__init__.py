"""Transformers that prune themselves: heads, feed-forward blocks, layers, tokens and experts, within a budget.

model = Gated(config, prune=("heads", "blocks"), choice=HardConcrete())  # a decoder; per="token" decides by token
variables = model.init(key, tokens)
out = model.apply(variables, tokens, key)  # training: gates are drawn with the key
loss = cross_entropy(out["logits"]) + lagrangian(out["share"], 0.6, multipliers)
out = model.apply(variables, tokens)  # as it is served
small = compact(model, variables)  # faster: small.model.apply(small.variables, tokens)
"""

from hyperjax.budget import Multipliers, ascend, lagrangian
from hyperjax.distillation import distillation
from hyperjax.pruning.buckets import Buckets
from hyperjax.pruning.choices import Choice, GumbelSigmoid, HardConcrete, Threshold, TopK
from hyperjax.pruning.compact import Compacted, compact, cut
from hyperjax.pruning.depths import MixtureOfDepths
from hyperjax.pruning.experts import Experts
from hyperjax.pruning.flops import Costs, costs, share
from hyperjax.pruning.gated import Gated
from hyperjax.pruning.serving import BucketServer, skip_decode

__all__ = [
    "BucketServer",
    "Buckets",
    "Choice",
    "Compacted",
    "Costs",
    "Experts",
    "Gated",
    "GumbelSigmoid",
    "HardConcrete",
    "MixtureOfDepths",
    "Multipliers",
    "Threshold",
    "TopK",
    "ascend",
    "compact",
    "costs",
    "cut",
    "distillation",
    "lagrangian",
    "share",
    "skip_decode",
]
