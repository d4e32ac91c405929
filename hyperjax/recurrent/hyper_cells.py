"""HyperRNN and HyperLSTM: recurrent nets whose weights a smaller net of the same kind scales at every time step.

Shape letters: B batch, D input features, H units, S units of the hyper cell, G gates (1 or 4), Z one embedding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import constant, normal, ones, zeros

from hyperjax.recurrent import platform
from hyperjax.recurrent.cells import Cell, lstm_step, orthogonal
from hyperjax.recurrent.gates import add_bias
from hyperjax.recurrent.scan import Weights, product

Array = jax.Array
KINDS = ("h", "x", "b")  # what an embedding generates: scales of W_h h, scales of W_x x, a bias


def per_gate(init: Any, gates: int) -> Any:
    """The initializer of `gates` matrices side by side, each drawn by itself."""

    def draw(key, shape, dtype):
        shape = (*shape[:-1], shape[-1] // gates)
        return jnp.concatenate([init(k, shape, dtype) for k in jax.random.split(key, gates)], -1)

    return draw


class HyperCell(Cell):
    """What HyperRNN and HyperLSTM share: the embeddings and the vectors d_h, d_x, d_b made from them.

    Attributes:
      hyper_units: S, the width of the hyper cell.
      embedding: Z, the paper's N_z.

    Raises:
      ValueError: units, hyper_units or embedding below 1, and as `Cell`; at construction.
    """

    hyper_units: int = 128
    embedding: int = 4

    def __post_init__(self):
        for name in ("hyper_units", "embedding"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a hyper cell needs at least 1")
        super().__post_init__()

    @property
    def columns(self) -> int:
        """The width of one gate's product with h or x, before the embedding acts on it."""
        return self.units

    def main_and_hyper(self, product: Array) -> tuple[Array, Array]:
        """The product with x or h, taken apart: the main cell's and the hyper cell's columns."""
        main, hyper = jnp.split(product, [len(self.gates) * self.columns], -1)
        return main, hyper

    def main_matrices(self, prefix: str, rows: int) -> Array:
        """Every gate's W_h or W_x, side by side: [rows, G columns]."""
        return self.side_by_side(prefix, orthogonal, (rows, self.columns))

    def embedding_weights(self) -> dict[str, Array]:
        """Parameters of h_hat -> z: at first every z_h and z_x is 1 and every z_b near 0."""
        p, S, columns = self.param_dtype, self.hyper_units, len(self.gates) * self.embedding
        W_h, b_h = self.param("W_z_h", zeros, (S, columns), p), self.param("b_z_h", ones, (columns,), p)
        W_x, b_x = self.param("W_z_x", zeros, (S, columns), p), self.param("b_z_x", ones, (columns,), p)
        W_b = self.param("W_z_b", normal(0.01), (S, columns), p)
        return {"W": jnp.concatenate([W_h, W_x, W_b], -1), "b": jnp.concatenate([b_h, b_x, jnp.zeros_like(b_h)])}

    def generator_weights(self, kinds: tuple[str, ...] = KINDS) -> dict[str, Array]:
        """Parameters of h_hat -> z -> d: at first every d_h and d_x is 0.1 and every d_b is 0."""
        shape, small, d = (self.embedding, self.units), self.embedding_weights(), []
        for kind in kinds:
            init = zeros if kind == "b" else constant(0.1 / self.embedding)
            d.append([self.param(f"W_d_{kind}{y}", init, shape, self.param_dtype) for y in self.gates])
        return small | {"d": jnp.stack([jnp.stack(of_kind) for of_kind in d])}

    def embeddings(self, small: dict[str, Array], h_hat: Array) -> Array:
        """The embeddings z = W h_hat + b, kind by gate: [..., 3, G, Z], in the parameters' own precision."""
        z = add_bias(product(h_hat, small["W"]), small["b"])
        return z.reshape(*z.shape[:-1], len(KINDS), len(self.gates), self.embedding)

    def generate(self, small: dict[str, Array], h_hat: Array) -> tuple[Array, ...]:
        """The generated vectors d_h, d_x, d_b = W_z z, each [..., G, H] (equation 12)."""
        return _scales(self.embeddings(small, h_hat), small["d"])

    def modulated(self, small: dict[str, Array], h_hat: Array, hp: Array, xp: Array) -> Array:
        """Each gate's d_h (W_h h) + d_x (W_x x) + d_b, from its products with h and x: [..., G, H]."""
        return modulate(self.embeddings(small, h_hat), small["d"], self.by_gate(hp), self.by_gate(xp))


def _scales(z: Array, d: Array) -> tuple[Array, ...]:
    """From z [..., K, G, Z] and d [K, G, Z, H]: K arrays z d, each [..., G, H]."""
    K, G, Z, H = d.shape
    z = z.reshape(*z.shape[:-3], K * G, Z)
    together = lax.dot_general(z, d.reshape(K * G, Z, H), (((z.ndim - 1,), (1,)), ((z.ndim - 2,), (0,))))
    return tuple(jnp.split(jnp.moveaxis(together, 0, -2), K, -2))


def _modulate_at_once(z: Array, d: Array, hp: Array, xp: Array) -> Array:
    d_h, d_x, d_b = _scales(z, d)
    return d_h * hp + d_x * xp + d_b


def _modulate_by_gate(z: Array, d: Array, hp: Array, xp: Array) -> Array:
    K, G, Z, H = d.shape
    zs, ds = _parts(z.reshape(*z.shape[:-3], K * G, Z), -2), _parts(d.reshape(K * G, Z, H), 0)
    scales = [product(each, w) for each, w in zip(zs, ds, strict=True)]
    gates = zip(scales[:G], scales[G : 2 * G], scales[2 * G :], _parts(hp, -2), _parts(xp, -2), strict=True)
    return jnp.stack([d_h * h + d_x * x + d_b for d_h, d_x, d_b, h, x in gates], -2)


def _parts(a: Array, axis: int) -> list[Array]:
    return [part.squeeze(axis) for part in jnp.split(a, a.shape[axis], axis)]


# Of z [..., 3, G, Z], d [3, G, Z, H], products with h and with x [..., G, H]: y [..., G, H].
modulate = platform.in_two_forms(_modulate_by_gate, _modulate_at_once)


class HyperRNN(HyperCell):
    """HyperRNN: h' = tanh(d_h (W_h h) + d_x (W_x x) + d_b), with d made by a smaller RNN over [h; x].

    The carry is (h_hat, h). There is no memory to protect, so `keep` must stay 1.

    Raises:
      ValueError: units, hyper_units or embedding below 1, keep other than 1, or a param_dtype other than float32 and
        float64; at construction.

    Reference: Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, section 3.2, equations 5-8.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import hyperjax as hj
      >>> rnn, x = hj.FastRNN(hj.HyperRNN(units=16, hyper_units=4)), jnp.zeros((2, 7, 8))  # [B, T, D]
      >>> ((h_hat, h), outputs), variables = jax.jit(rnn.init_with_output)(jax.random.key(0), x)
      >>> h_hat.shape, h.shape, outputs.shape
      ((2, 4), (2, 16), (2, 7, 16))
    """

    gates = ("",)

    def __post_init__(self):
        if self.keep != 1:
            raise ValueError(
                f"keep is {self.keep}; HyperRNN has no gated memory for recurrent dropout, leave keep at 1"
            )
        super().__post_init__()

    def state_sizes(self):
        """The widths of h_hat and h: S, H."""
        return (self.hyper_units, self.units)

    @nn.compact
    def weights(self, features):
        """Creates or reads the parameters for inputs of `features` columns."""
        p, H, S = self.param_dtype, self.units, self.hyper_units
        inputs = (self.main_matrices("W_x", features), self.param("hyper_W_x", orthogonal, (features, S), p))
        recurrent = (self.main_matrices("W_h", H), self.param("hyper_W_h", orthogonal, (H, S), p))
        small = {
            "b": self.param("b", zeros, (H,), p),
            "hyper_U": self.param("hyper_U", orthogonal, (S, S), p),
            "hyper_b": self.param("hyper_b", zeros, (S,), p),
            "z": self.generator_weights(),
        }
        return Weights({"x": jnp.concatenate(inputs, -1)}, {"h": jnp.concatenate(recurrent, -1)}, small)

    def step(self, small, carry, xp, hp, noise):
        """From (h_hat [B, S], h [B, H]) and the products, [B, H + S], to the new ones."""
        (main_x, hyper_x), (main_h, hyper_h) = self.main_and_hyper(xp["x"]), self.main_and_hyper(hp["h"])
        h_hat = hyper_x + hyper_h + product(carry[0], small["hyper_U"], self.dtype)
        h_hat = jnp.tanh(add_bias(h_hat, small["hyper_b"]))
        y = self.modulated(small["z"], h_hat, main_h, main_x).squeeze(-2)
        return h_hat, jnp.tanh(add_bias(y, small["b"]))


class HyperLSTM(HyperCell):
    """HyperLSTM: y = LN(d_h (W_h h) + d_x (W_x x) + d_b) for each gate y, with d made by a smaller LSTM over [h; x].

    The carry is (c, h, c_hat, h_hat). The embeddings read h_hat of the *current* step; the paper prints the previous
    one, the public implementations use this.

    Attributes:
      layer_norm: in the main cell and, as in the paper, in the hyper cell too.
      forget_bias, epsilon: as in `LSTM`, for both cells.
      gate_input: the hyper cell also scales the columns of W_x: the main cell reads 2 sigmoid(W_m z_m) x instead of x,
        with z_m an embedding like the others. At first the factor is 1. Not part of the paper: the gate is that of
        the Mogrifier LSTM (Melis, Kocisky, Blunsom, arXiv 1909.01792), generated by the hyper cell instead of h.

    Raises:
      ValueError: units, hyper_units or embedding below 1, keep outside (0, 1], or a param_dtype other than float32 and
        float64; at construction.

    Reference: Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, equations 10-13 and appendix A.2.2-A.2.3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import hyperjax as hj
      >>> rnn, x = hj.FastRNN(hj.HyperLSTM(units=16, hyper_units=4)), jnp.zeros((2, 7, 8))  # [B, T, D]
      >>> ((c, h, c_hat, h_hat), outputs), variables = jax.jit(rnn.init_with_output)(jax.random.key(0), x)
      >>> h.shape, h_hat.shape, outputs.shape
      ((2, 16), (2, 4), (2, 7, 16))
    """

    layer_norm: bool = False
    forget_bias: float = 1.0
    epsilon: float = 1e-3
    gate_input: bool = False

    def state_sizes(self):
        """The widths of c, h, c_hat and h_hat: H, H, S, S."""
        return (self.units, self.units, self.hyper_units, self.hyper_units)

    @nn.compact
    def weights(self, features):
        """Creates or reads the parameters for inputs of `features` columns."""
        p, H, S = self.param_dtype, self.units, self.hyper_units
        main_inputs, recurrent = self.main_matrices("W_x", features), self.main_matrices("W_h", H)
        main = {"b": self.stacked("b_", zeros, H)}
        side_by_side = per_gate(orthogonal, len(self.gates))  # [h; x] is multiplied in two parts
        hyper_inputs = self.param("hyper_W_x", side_by_side, (features, 4 * S), p)
        recurrent = jnp.concatenate([recurrent, self.param("hyper_W_h", side_by_side, (H, 4 * S), p)], -1)
        hyper = {
            "U": self.param("hyper_U", side_by_side, (S, 4 * S), p),
            "b": self.by_gate(self.param("hyper_b", zeros, (4 * S,), p)),
        }
        if self.layer_norm:
            main |= self.norm_weights("", H)
            hyper |= self.norm_weights("hyper_", S)
        small = {"main": main, "hyper": hyper, "z": self.generator_weights()}
        if not self.gate_input:
            return Weights({"x": jnp.concatenate([main_inputs, hyper_inputs], -1)}, {"h": recurrent}, small)
        small["gate"] = {
            "W_m": self.param("W_z_m", zeros, (S, self.embedding), p),
            "b_m": self.param("b_z_m", ones, (self.embedding,), p),
            "d_m": self.param("W_d_m", zeros, (self.embedding, features), p),
        }
        return Weights({"hyper": hyper_inputs}, {"h": recurrent}, small, {"main": main_inputs})

    def hyper_step(self, small, carry, x, h):
        """The new (c_hat, h_hat), from the hyper cell's columns of the products with x and h."""
        total = x + h + product(carry[3], small["U"], self.dtype)
        return lstm_step(self, small, carry[2], add_bias(self.by_gate(total), small["b"]), None)

    def gate(self, small, carry, x, xp, hp):
        """2 sigmoid(W_m z_m) x, [B, D], with `gate_input`."""
        w, (_, hyper_h) = small["gate"], self.main_and_hyper(hp["h"])
        _, h_hat = self.hyper_step(small["hyper"], carry, xp["hyper"], hyper_h)
        z = add_bias(product(h_hat, w["W_m"]), w["b_m"])
        return 2 * jax.nn.sigmoid(product(z, w["d_m"])) * x

    def step(self, small, carry, xp, hp, noise):
        """From (c, h, c_hat, h_hat) and the products, [B, 4 H + 4 S], to the new ones."""
        main_x, hyper_x = (xp["main"], xp["hyper"]) if self.gate_input else self.main_and_hyper(xp["x"])
        main_h, hyper_h = self.main_and_hyper(hp["h"])
        c_hat, h_hat = self.hyper_step(small["hyper"], carry, hyper_x, hyper_h)
        y = add_bias(self.modulated(small["z"], h_hat, main_h, main_x), small["main"]["b"])
        return (*lstm_step(self, small["main"], carry[0], y, self.scaled(noise)), c_hat, h_hat)
