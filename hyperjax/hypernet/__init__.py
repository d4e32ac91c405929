"""Hypernetworks: an embedding goes in, the parameters of any target network come out.

Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from hyperjax import hypernet
    >>> model, x = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)]), jnp.ones((5, 28))
    >>> rules = [("layers_2", hypernet.PerTask())]  # a head for each task; the rest is generated
    >>> hyper = hypernet.HyperNetwork.from_target(model, x, embedding_dim=8, num_embeddings=3, rules=rules)
    >>> variables = jax.jit(hyper.init)(jax.random.key(0), x, task_id=0)
    >>> jax.jit(hyper.apply)(variables, x, task_id=jnp.array([0, 1, 2, 1, 0])).shape  # weights for each sample
    (5, 10)
    >>> model.apply(hyper.materialize(variables, task_id=1), x).shape  # one task's network by itself
    (5, 10)
"""

from hyperjax.hypernet import continual
from hyperjax.hypernet.adaptation import Adapted, adapt, adapt_many
from hyperjax.hypernet.cache import CacheStats, WeightCache
from hyperjax.hypernet.chunked import Chunked
from hyperjax.hypernet.conv_tiles import ConvTiles
from hyperjax.hypernet.deploy import export
from hyperjax.hypernet.diagnostics import (
    Familiarity,
    GenerationShare,
    embedding_prior,
    embedding_similarity,
    generation_share,
)
from hyperjax.hypernet.generators import MLP, Generator, Linear, SeparableMLP
from hyperjax.hypernet.modulated import LowRank, Scale
from hyperjax.hypernet.network import HyperNetwork
from hyperjax.hypernet.ungenerated import Frozen, Learned, PerTask

__all__ = [
    "MLP",
    "Adapted",
    "CacheStats",
    "Chunked",
    "ConvTiles",
    "Familiarity",
    "Frozen",
    "GenerationShare",
    "Generator",
    "HyperNetwork",
    "Learned",
    "Linear",
    "LowRank",
    "PerTask",
    "Scale",
    "SeparableMLP",
    "WeightCache",
    "adapt",
    "adapt_many",
    "continual",
    "embedding_prior",
    "embedding_similarity",
    "export",
    "generation_share",
]
