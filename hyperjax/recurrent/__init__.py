"""Recurrent nets: LSTM, layer-norm LSTM, HyperRNN, HyperLSTM, a fast scan over time, a character language model.

Example:
  >>> import jax.numpy as jnp
  >>> from hyperjax import budget, recurrent
  >>> for name in ("lstm", "ln_lstm", "hyper_lstm", "ln_hyper_lstm"):  # parameters of the paper's Table 3
  ...     model = recurrent.LanguageModel(vocabulary=50, **recurrent.PAPER_MODELS[name])
  ...     print(name, budget.count_parameters(model, jnp.zeros((1, 4), int)))
  lstm 4254050
  ln_lstm 4264050
  hyper_lstm 4911874
  ln_hyper_lstm 4923154
"""

from hyperjax.recurrent.cells import LSTM, Cell
from hyperjax.recurrent.dynamic_evaluation import dynamic_evaluate, gradient_rms
from hyperjax.recurrent.dynamics import generated_scales, scale_changes
from hyperjax.recurrent.full import FullHyperLSTM, FullHyperRNN
from hyperjax.recurrent.hyper_cells import HyperLSTM, HyperRNN
from hyperjax.recurrent.language_model import CELLS, PAPER_MODELS, LanguageModel
from hyperjax.recurrent.layer import FastRNN
from hyperjax.recurrent.sampling import generate
from hyperjax.recurrent.scan import Weights, deferred_scan

__all__ = [
    "CELLS",
    "LSTM",
    "PAPER_MODELS",
    "Cell",
    "FastRNN",
    "FullHyperLSTM",
    "FullHyperRNN",
    "HyperLSTM",
    "HyperRNN",
    "LanguageModel",
    "Weights",
    "deferred_scan",
    "dynamic_evaluate",
    "generate",
    "generated_scales",
    "gradient_rms",
    "scale_changes",
]
