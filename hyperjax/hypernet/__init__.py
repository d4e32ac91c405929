"""Hypernetworks: an embedding goes in, the parameters of any target network come out."""

from hyperjax.hypernet.chunked import Chunked
from hyperjax.hypernet.conv_tiles import ConvTiles
from hyperjax.hypernet.deploy import export
from hyperjax.hypernet.generators import MLP, Generator, Linear, SeparableMLP
from hyperjax.hypernet.modulated import LowRank, Scale
from hyperjax.hypernet.network import HyperNetwork
from hyperjax.hypernet.ungenerated import Frozen, Learned, PerTask

__all__ = [
    "MLP",
    "Chunked",
    "ConvTiles",
    "Frozen",
    "Generator",
    "HyperNetwork",
    "Learned",
    "Linear",
    "LowRank",
    "PerTask",
    "Scale",
    "SeparableMLP",
    "export",
]
