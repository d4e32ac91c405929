"""A character language model: one-hot symbols, recurrent layers, a softmax readout; and the rows of Table 3.

Shape letters: B batch, T time, V vocabulary, H units.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.recurrent.cells import LSTM, Cell
from hyperjax.recurrent.gates import add_bias
from hyperjax.recurrent.hyper_cells import HyperLSTM, HyperRNN
from hyperjax.recurrent.layer import FastRNN
from hyperjax.recurrent.scan import product

Array = jax.Array
SKIPS = ("none", "residual", "highway")
CELLS = ("lstm", "ln_lstm", "hyper_rnn", "hyper_lstm", "ln_hyper_lstm")

# Ha, Dai, Le, arXiv 1609.09106, Table 3 and appendix A.3: keyword arguments of LanguageModel.
PAPER_MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"cell": "lstm", "units": 1000, "keep": 0.90},
    "lstm_1250": {"cell": "lstm", "units": 1250, "keep": 0.90},
    "lstm_2x1000": {"cell": "lstm", "units": 1000, "layers": 2, "keep": 0.90},
    "ln_lstm": {"cell": "ln_lstm", "units": 1000, "keep": 0.90},
    "hyper_lstm": {"cell": "hyper_lstm", "units": 1000, "keep": 0.90},
    "ln_hyper_lstm": {"cell": "ln_hyper_lstm", "units": 1000, "keep": 0.90},
    "ln_hyper_lstm_large": {"cell": "ln_hyper_lstm", "units": 1000, "embedding": 16, "keep": 0.85},
    "ln_hyper_lstm_2x": {"cell": "ln_hyper_lstm", "units": 1000, "layers": 2, "embedding": 16, "keep": 0.80},
}


class LanguageModel(nn.Module):
    """Predicts the next symbol of a text.

    Attributes:
      cell: one of `CELLS`.
      vocabulary: V, the number of symbols.
      units: H, the width of each layer.
      layers: how many cells stand on one another.
      hyper_units, embedding: of the hyper cells; ignored by the others.
      keep: keep probability of dropout on the one-hot input, on every layer's output and on every LSTM's candidate.
      variational: draw these masks once a sequence instead of once a step (Gal and Ghahramani, arXiv 1512.05287); on
        the input whole symbols are then dropped.
      weight_keep: see `FastRNN`.
      input_units: E, width of a learned embedding of the symbols; 0 feeds the one-hot vectors themselves.
      tied: read out with the embedding's transpose, after a projection H -> E where the two differ (Press and Wolf,
        arXiv 1608.05859; Inan et al., arXiv 1611.01462).
      skip: what every layer but the first adds to its output: "none"; "residual", its input; "highway", a learned
        mixture t h + (1 - t) x, t = sigmoid(W x + b) (Srivastava, Greff, Schmidhuber, arXiv 1505.00387).
      gate_input: of HyperLSTMs.
      dtype: of the matrix products, for example "bfloat16"; None is float32.
      remat_chunk: see `FastRNN`.

    Raises:
      ValueError: an unknown cell or skip, vocabulary or layers below 1, tied without `input_units`, gate_input of a
        cell that is no HyperLSTM; at construction. Of units, keep and weight_keep, when it is called; see the cells and
        `FastRNN`.

    Reference: Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, section 4.3 and appendix A.3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import hyperjax as hj
      >>> model, tokens = hj.LanguageModel("lstm", vocabulary=50, units=16), jnp.zeros((2, 7), int)
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> jax.jit(model.apply)({"params": params}, tokens)["logits"].shape
      (2, 7, 50)
      >>> paper = hj.LanguageModel(vocabulary=50, **hj.recurrent.PAPER_MODELS["ln_hyper_lstm"])
      >>> hj.budget.count_parameters(paper, tokens)  # as in Table 3
      4923154
    """

    cell: str
    vocabulary: int
    units: int
    layers: int = 1
    hyper_units: int = 128
    embedding: int = 4
    keep: float = 1.0
    dtype: Any = None
    remat_chunk: int | None = None
    variational: bool = False
    weight_keep: float = 1.0
    input_units: int = 0
    tied: bool = False
    skip: str = "none"
    gate_input: bool = False

    def __post_init__(self):
        if self.cell not in CELLS:
            raise ValueError(f"unknown cell {self.cell!r}; choose one of {', '.join(CELLS)}")
        for name in ("vocabulary", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.input_units < 0:
            raise ValueError(f"input_units is {self.input_units}; choose a width, or 0 for one-hot vectors")
        if self.tied and not self.input_units:
            raise ValueError("tied is True, but there is no embedding to tie to; choose input_units of at least 1")
        if self.skip not in SKIPS:
            raise ValueError(f"unknown skip {self.skip!r}; choose one of {', '.join(SKIPS)}")
        if self.gate_input and "hyper_lstm" not in self.cell:
            raise ValueError(f"gate_input is True, but the cell {self.cell!r} is no HyperLSTM; leave it False")
        super().__post_init__()

    @nn.nowrap
    def make_cell(self, deterministic: bool = True) -> Cell:
        """A new cell of this model's kind, not yet part of any module.

        Raises:
          ValueError: units, hyper_units, embedding or keep out of range.
        """
        common: dict[str, Any] = {"deterministic": deterministic, "dtype": self.dtype, "parent": None}
        common |= {"units": self.units, "keep": self.keep, "variational": self.variational}
        if self.cell in ("lstm", "ln_lstm"):
            return LSTM(**common, layer_norm=self.cell == "ln_lstm")
        hyper: dict[str, Any] = {"hyper_units": self.hyper_units, "embedding": self.embedding}
        if self.cell == "hyper_rnn":
            return HyperRNN(**common | {"keep": 1.0}, **hyper)
        return HyperLSTM(**common, **hyper, layer_norm=self.cell == "ln_hyper_lstm", gate_input=self.gate_input)

    @nn.nowrap
    def initialize_carry(self, batch: int) -> tuple:
        """The state before any text: a tuple over layers of tuples of zeros [B, .]."""
        cell = self.make_cell()
        return tuple(cell.initialize_carry(jax.random.key(0), (batch, 1)) for _ in range(self.layers))

    @nn.compact
    def __call__(self, tokens: Array, carry: tuple | None = None, *, deterministic: bool = True) -> dict[str, Any]:
        """Reads text and predicts, at every position, the symbol that follows.

        Args:
          tokens: [B, T] int ids; -1 is no symbol, the zero vector that stands before a text.
          carry: the state to go on from, see `initialize_carry`; None is zeros.
          deterministic: False applies dropout and needs a `dropout` PRNG key.

        Returns:
          {"logits": [B, T, V] float32, "carry": state after the last symbol, "hidden": tuple of [B, T, H] a layer}.

        Raises:
          ValueError: no token, or a carry of another shape; see `FastRNN`.
        """
        carry = self.initialize_carry(tokens.shape[0]) if carry is None else carry
        over_time = (1,) if self.variational else ()
        drop = nn.Dropout(1 - self.keep, broadcast_dims=over_time, deterministic=deterministic)
        h = drop(jax.nn.one_hot(tokens, self.vocabulary))
        if E := self.input_units:
            table = self.param("embedding", nn.initializers.normal(E**-0.5), (self.vocabulary, E))
            h = product(h, table)
        states, hidden = [], []
        for n in range(self.layers):
            options: dict[str, Any] = {"remat_chunk": self.remat_chunk, "weight_keep": self.weight_keep}
            state, out = FastRNN(self.make_cell(deterministic), **options, name=f"layer_{n}")(h, carry[n])
            h = drop(out) if n == 0 or self.skip == "none" else self._joined(h, drop(out), n)
            states.append(state)
            hidden.append(h)
        if self.tied:
            h = h if self.units == E else nn.Dense(E, dtype=self.dtype, name="projection")(h)
            bias = self.param("readout_bias", nn.initializers.zeros, (self.vocabulary,))
            logits = add_bias(product(h, table.T, self.dtype), bias)
        else:
            logits = nn.Dense(self.vocabulary, dtype=self.dtype, name="readout")(h)
        return {"logits": logits.astype(jnp.float32), "carry": tuple(states), "hidden": tuple(hidden)}

    def _joined(self, x: Array, out: Array, n: int) -> Array:
        if self.skip == "residual":
            return x + out
        dense = nn.Dense(self.units, dtype=self.dtype, bias_init=nn.initializers.constant(1.0), name=f"highway_{n}")
        t = jax.nn.sigmoid(dense(x).astype(out.dtype))  # at first most of it is the layer's own output
        return t * out + (1 - t) * x
