"""hyperjax: networks whose parameters are produced by something else, in JAX.

The wings: `hyperjax.hypernet` (hypernetworks for any target network), `hyperjax.recurrent` (HyperLSTM and its
baselines), `hyperjax.routing` (multi-task networks that learn what to share), `hyperjax.pruning` (Transformers, from
`hyperjax.transformer`, that compute only what an input needs) and `hyperjax.sharing` (one set of weights for many uses;
layers that share). Under them `hyperjax.estimators` (discrete choices with gradients) and `hyperjax.budget` (what a
network costs, and how it is held to a budget). Beside them `hyperjax.data` (text, images, tables) and
`hyperjax.training` (loop, checkpoints, workdirs), which the scripts in `experiments/` are made of.
"""

from hyperjax import budget, estimators, hypernet, initializers, pruning, recurrent, routing, sharing, transformer
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
from hyperjax.precision import Policy
from hyperjax.recurrent import LSTM, FastRNN, HyperLSTM, HyperRNN, LanguageModel, generate
from hyperjax.routing import SNR, HardConcrete, MMoE, compact
from hyperjax.summary import summarize

__version__ = "0.1.0"
__all__ = [
    "LSTM",
    "MLP",
    "SNR",
    "Chunked",
    "ConvTiles",
    "FastRNN",
    "Frozen",
    "Generator",
    "HardConcrete",
    "HyperLSTM",
    "HyperNetwork",
    "HyperRNN",
    "LanguageModel",
    "Learned",
    "Linear",
    "LowRank",
    "MMoE",
    "PerTask",
    "Policy",
    "Scale",
    "SeparableMLP",
    "budget",
    "compact",
    "estimators",
    "generate",
    "hypernet",
    "initializers",
    "pruning",
    "recurrent",
    "routing",
    "sharing",
    "summarize",
    "transformer",
]
