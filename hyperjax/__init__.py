"""hyperjax: networks whose parameters are produced by something else, in JAX.

The wings: `hyperjax.hypernet` (hypernetworks for any target network) and `hyperjax.recurrent` (HyperLSTM and its
baselines). Beside them `hyperjax.data` (text and images) and `hyperjax.training` (loop, checkpoints, workdirs), which
the scripts in `experiments/` are made of.
"""

from hyperjax import hypernet, initializers, recurrent
from hyperjax.hypernet import (
    MLP,
    Chunked,
    ConvTiles,
    Frozen,
    Generator,
    HyperNetwork,
    Learned,
    Linear,
    LowRank,
    PerTask,
    Scale,
    SeparableMLP,
)
from hyperjax.recurrent import LSTM, FastRNN, HyperLSTM, HyperRNN, LanguageModel, generate

__version__ = "0.1.0"
__all__ = [
    "LSTM",
    "MLP",
    "Chunked",
    "ConvTiles",
    "FastRNN",
    "Frozen",
    "Generator",
    "HyperLSTM",
    "HyperNetwork",
    "HyperRNN",
    "LanguageModel",
    "Learned",
    "Linear",
    "LowRank",
    "PerTask",
    "Scale",
    "SeparableMLP",
    "generate",
    "hypernet",
    "initializers",
    "recurrent",
]
