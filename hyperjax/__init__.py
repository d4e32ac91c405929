"""hyperjax: networks whose parameters are produced by something else, in JAX.

The wings: `hyperjax.recurrent` (HyperLSTM and its baselines). Beside them `hyperjax.data` (text corpora) and
`hyperjax.training` (loop, checkpoints, workdirs), which the scripts in `experiments/` are made of.
"""

from hyperjax import recurrent
from hyperjax.recurrent import LSTM, FastRNN, HyperLSTM, HyperRNN, LanguageModel, generate

__version__ = "0.1.0"
__all__ = ["LSTM", "FastRNN", "HyperLSTM", "HyperRNN", "LanguageModel", "generate", "recurrent"]
