"""Recurrent cells: LSTM and layer-norm LSTM, and what every cell of this package has in common.

Shape letters: B batch, D input features, H units, G gates.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.recurrent.gates import add_bias, layer_norm, lstm_memory, lstm_output
from hyperjax.recurrent.scan import OUTPUT, Weights, product

Array = jax.Array
GATES = ("i", "g", "f", "o")  # input, candidate, forget, output; stored as separate arrays, computed side by side


def orthogonal(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Rows or columns orthonormal, whichever are fewer (Saxe et al., arXiv 1312.6120)."""
    return nn.initializers.orthogonal()(key, shape, dtype)


class Cell(nn.RNNCellBase):
    """A cell that the fast scan can take apart; with `nn.RNN` it works as any other Flax cell does.

    A subclass names its parameters in `weights` and its pointwise maths in `step`; everything else follows.

    Attributes:
      units: H, the width of the output h.
      keep: probability of keeping a unit of the candidate tanh(g) (recurrent dropout without memory loss). Below 1 a
        `dropout` PRNG is needed unless `deterministic`.
      variational: in the scan, one dropout mask for all time steps of a sequence instead of one a step.
      deterministic: True switches dropout off.
      dtype: what matrix products are computed in, for example jnp.bfloat16; None is `param_dtype`.
      param_dtype: float32 or float64, of parameters, layer norms and state.

    Raises:
      ValueError: units below 1, keep outside (0, 1], or a param_dtype other than float32 and float64; at construction.
    """

    units: int
    keep: float = 1.0
    variational: bool = False
    deterministic: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    gates: ClassVar[tuple[str, ...]] = GATES

    def __post_init__(self):
        if self.units < 1:
            raise ValueError(f"units is {self.units}; a cell needs at least 1")
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"keep is {self.keep}, a probability of keeping a unit; choose it in (0, 1], 1 for no dropout"
            )
        if jnp.dtype(self.param_dtype) not in (jnp.dtype("float32"), jnp.dtype("float64")):
            raise ValueError(
                f"param_dtype is {jnp.dtype(self.param_dtype)}; parameters and state stay float32 or float64, "
                "for narrower products set dtype"
            )
        super().__post_init__()

    def weights(self, features: int) -> Weights:
        """Creates or reads the parameters for inputs of `features` columns.

        Raises:
          TypeError: the subclass does not define `weights`.
        """
        raise TypeError(f"{type(self).__name__} has to define `weights`")

    def step(self, small: Any, carry: tuple, xp: dict, hp: dict, noise: Array | None) -> tuple:
        """One time step after the big products: returns the new carry. A pure function of its arguments.

        Raises:
          TypeError: the subclass does not define `step`.
        """
        raise TypeError(f"{type(self).__name__} has to define `step`")

    def gate(self, small: Any, carry: tuple, x: Array, xp: dict, hp: dict) -> Array:
        """The input as the late weights read it, for cells that have any; see `Weights`.

        Raises:
          TypeError: the subclass does not define `gate` although it has late weights.
        """
        raise TypeError(f"{type(self).__name__} has late weights and has to define `gate`")

    def state_sizes(self) -> tuple[int, ...]:
        """The width of each array of the carry."""
        return (self.units, self.units)

    @property
    def drops(self) -> bool:
        """Whether it drops units: keep below 1 and not deterministic."""
        return self.keep < 1 and not self.deterministic

    def masks(self, key: Array, times: Array, batch: int) -> Array:
        """Dropout masks [T, B, H], True where a unit is kept; time t draws from fold_in(key, t), or from the key."""

        def draw(t):
            at_t = key if self.variational else jax.random.fold_in(key, t)
            return jax.random.bernoulli(at_t, self.keep, (batch, self.units))

        return jax.vmap(draw)(times)

    def scaled(self, mask: Array | None) -> Array | None:
        """A mask as the factors of the units that it keeps, 1 / keep, and 0; None stays None."""
        return None if mask is None else mask.astype(self.param_dtype) / self.keep

    def __call__(self, carry: tuple, inputs: Array) -> tuple[tuple, Array]:
        """One step.

        Args:
          carry: tuple of [B, .] arrays; see `initialize_carry`.
          inputs: [B, D].

        Returns:
          (new carry, h [B, H]).
        """
        inputs = inputs.astype(self.param_dtype)
        w = self.weights(inputs.shape[-1])
        xp = {k: product(inputs, v, self.dtype) for k, v in w.inputs.items()}
        hp = {k: product(carry[OUTPUT], v, self.dtype) for k, v in w.recurrent.items()}
        if w.late:
            gated = self.gate(w.small, carry, inputs, xp, hp)
            xp |= {k: product(gated, v, self.dtype) for k, v in w.late.items()}
        shape = (*inputs.shape[:-1], self.units)
        mask = jax.random.bernoulli(self.make_rng("dropout"), self.keep, shape) if self.drops else None
        new = self.step(w.small, carry, xp, hp, mask)
        return new, new[OUTPUT]

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> tuple:
        """Zeros [..., width] for each array of the state; `rng` is unused, `input_shape` is [..., D]."""
        del rng
        return tuple(jnp.zeros((*input_shape[:-1], n), self.param_dtype) for n in self.state_sizes())

    @property
    def num_feature_axes(self) -> int:
        """Number of axes of a feature, which Flax asks for: 1."""
        return 1

    def side_by_side(self, prefix: str, init: Any, shape: tuple[int, int]) -> Array:
        """One matrix a gate, each a parameter of its own, for one product: [rows, G columns]."""
        return jnp.concatenate([self.param(prefix + y, init, shape, self.param_dtype) for y in self.gates], -1)

    def stacked(self, prefix: str, init: Any, units: int) -> Array:
        """One vector a gate, each a parameter of its own: [G, units]."""
        return jnp.stack([self.param(prefix + y, init, (units,), self.param_dtype) for y in self.gates])

    def by_gate(self, y: Array) -> Array:
        """[..., G N] as [..., G, N]."""
        return y.reshape(*y.shape[:-1], len(self.gates), y.shape[-1] // len(self.gates))

    def norm_weights(self, prefix: str, units: int) -> dict[str, Array]:
        """Gain and shift of the layer norms of an LSTM's gates [G, units] and memory [units]."""
        gains = {"gamma": nn.initializers.ones, "beta": nn.initializers.zeros}
        small = {name: self.stacked(f"{prefix}{name}_", init, units) for name, init in gains.items()}
        memory = {n: self.param(f"{prefix}{n}_c", init, (units,), self.param_dtype) for n, init in gains.items()}
        return small | {f"{name}_c": value for name, value in memory.items()}


class LSTM(Cell):
    """LSTM, with layer norm on each gate and on the memory if asked.

    y = LN(W_h h + W_x x + b) for each gate y; c' = s(f) c + s(i) dropout(tanh(g)); h' = s(o) tanh(LN(c')).
    The carry is (c, h), as in `flax.linen.LSTMCell`.

    Attributes:
      layer_norm: normalise the four gates and the memory.
      forget_bias: added to the forget gate; the paper gives none, public code uses 1.
      epsilon: of the layer norms.

    Raises:
      ValueError: units below 1, keep outside (0, 1], or a param_dtype other than float32 and float64; at construction.

    Reference: Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, appendix A.2 (the baselines of Table 3).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import hyperjax as hj
      >>> rnn, x = hj.FastRNN(hj.LSTM(units=16)), jnp.zeros((2, 7, 8))  # [B, T, D]
      >>> variables = jax.jit(rnn.init)(jax.random.key(0), x)
      >>> (c, h), outputs = rnn.apply(variables, x)
      >>> c.shape, h.shape, outputs.shape
      ((2, 16), (2, 16), (2, 7, 16))
      >>> hj.budget.count_parameters(rnn, x)  # 4 (D H + H H + H)
      1600
    """

    layer_norm: bool = False
    forget_bias: float = 1.0
    epsilon: float = 1e-3

    @nn.compact
    def weights(self, features: int) -> Weights:
        """Creates or reads the parameters for inputs of `features` columns."""
        H = self.units
        inputs = {"x": self.side_by_side("W_x", orthogonal, (features, H))}
        recurrent = {"h": self.side_by_side("W_h", orthogonal, (H, H))}
        small = {"b": self.stacked("b_", nn.initializers.zeros, H)}
        return Weights(inputs, recurrent, small | (self.norm_weights("", H) if self.layer_norm else {}))

    def step(self, small, carry, xp, hp, noise):
        """From (c, h), [B, H] each, and the products, [B, 4 H], to the new (c, h)."""
        y = add_bias(self.by_gate(xp["x"] + hp["h"]), small["b"])
        return lstm_step(self, small, carry[0], y, self.scaled(noise))


def lstm_step(cell: Any, small: dict, c: Array, y: Array, mask: Array | None) -> tuple[Array, Array]:
    """From pre-activations [..., G, H] to (c, h), with the layer norms of `small` where the cell has them."""
    if cell.layer_norm:
        y = layer_norm(y, small["gamma"], small["beta"], cell.epsilon)
    i, g, f, o = (each.squeeze(-2) for each in jnp.split(y, len(GATES), -2))
    c = lstm_memory(c, i, g, f + cell.forget_bias, mask)
    seen = layer_norm(c, small["gamma_c"], small["beta_c"], cell.epsilon) if cell.layer_norm else c
    return c, lstm_output(o, seen)
