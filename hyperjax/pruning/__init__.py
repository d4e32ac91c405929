"""Transformers that prune themselves: heads, feed-forward blocks, layers, tokens and experts, within a budget.

model = Gated(config, prune=("heads", "blocks"), choice=HardConcrete())  # a decoder; per="token" decides by token
variables = model.init(key, tokens)
out = model.apply(variables, tokens, key)  # training: gates are drawn with the key
loss = cross_entropy(out["logits"]) + lagrangian(out["share"], 0.6, multipliers)
out = model.apply(variables, tokens)  # as it is served
small = compact(model, variables)  # faster: small.model.apply(small.variables, tokens)

Example:
    >>> import jax, jax.numpy as jnp
    >>> from hyperjax.pruning import Gated, HardConcrete, compact
    >>> from hyperjax.transformer import Config
    >>> model = Gated(Config(vocabulary=20, layers=1, width=16, heads=4, ffn=32), choice=HardConcrete())
    >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 5), int))
    >>> logits = variables["params"]["routers_heads"]  # [layers, heads]; what training would move
    >>> logits["logits"] = jnp.array([[-9.0, 9.0, 9.0, -9.0]])
    >>> compact(model, variables).model.config.heads
    (2,)
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
