"""Hypernetworks: an embedding goes in, the parameters of any target network come out."""

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
