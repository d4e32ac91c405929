"""HyperRNN and HyperLSTM: recurrent nets whose weights a smaller net of the same kind scales at every time step.

Shape letters: B batch, D input features, H units, S units of the hyper cell, G gates (1 or 4), Z one embedding.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import constant, normal, ones, zeros

from hyperjax.recurrent.cells import GATES, Cell, add_bias, lstm_step, norm_weights, orthogonal
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

    def main_matrix(self, name: str, rows: int) -> Array:
        """One gate's W_h or W_x."""
        return self.param(name, orthogonal, (rows, self.columns), self.param_dtype)

    def embedding_weights(self, gates: tuple[str, ...]) -> dict[str, Array]:
        """Parameters of h_hat -> z: at first every z_h and z_x is 1 and every z_b near 0."""
        p, S, columns = self.param_dtype, self.hyper_units, len(gates) * self.embedding
        return {
            "W_h": self.param("W_z_h", zeros, (S, columns), p),
            "b_h": self.param("b_z_h", ones, (columns,), p),
            "W_x": self.param("W_z_x", zeros, (S, columns), p),
            "b_x": self.param("b_z_x", ones, (columns,), p),
            "W_b": self.param("W_z_b", normal(0.01), (S, columns), p),
        }

    def generator_weights(self, gates: tuple[str, ...], kinds: tuple[str, ...] = KINDS) -> dict[str, Array]:
        """Parameters of h_hat -> z -> d: at first every d_h and d_x is 0.1 and every d_b is 0."""
        Z, small = self.embedding, self.embedding_weights(gates)
        for kind in kinds:
            init = zeros if kind == "b" else constant(0.1 / Z)
            for y in gates:
                small[f"d_{kind}{y}"] = self.param(f"W_d_{kind}{y}", init, (Z, self.units), self.param_dtype)
        return small

    def embeddings(self, small: dict[str, Array], h_hat: Array, gates: tuple[str, ...]) -> dict[str, Array]:
        """The embeddings z = W h_hat + b as {"hi": [B, Z], ...}, kind then gate; in the parameters' own precision."""
        W = jnp.concatenate([small[f"W_{kind}"] for kind in KINDS], -1)
        b = jnp.concatenate([small["b_h"], small["b_x"], jnp.zeros_like(small["b_h"])])
        z = iter(jnp.split(add_bias(product(h_hat, W), b), len(KINDS) * len(gates), -1))
        return {kind + y: next(z) for kind in KINDS for y in gates}

    def generate(self, small: dict[str, Array], h_hat: Array, gates: tuple[str, ...]) -> dict[str, Array]:
        """The generated vectors d = W_z z as {"hi": [B, H], ...}, kind then gate (equation 12)."""
        z = self.embeddings(small, h_hat, gates)
        return {name: product(z_y, small[f"d_{name}"]) for name, z_y in z.items()}

    def modulated(
        self, small: dict[str, Array], h_hat: Array, hp: dict[str, Array], xp: dict[str, Array]
    ) -> dict[str, Array]:
        """Each gate's d_h (W_h h) + d_x (W_x x) + d_b, from its products with h and x."""
        d = self.generate(small, h_hat, tuple(hp))
        return {y: d["h" + y] * hp[y] + d["x" + y] * xp[y] + d["b" + y] for y in hp}


class HyperRNN(HyperCell):
    """HyperRNN: h' = tanh(d_h (W_h h) + d_x (W_x x) + d_b), with d made by a smaller RNN over [h; x].

    The carry is (h_hat, h). There is no memory to protect, so `keep` must stay 1.

    Reference: Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, section 3.2, equations 5-8.
    """

    def __post_init__(self):
        if self.keep != 1:
            raise ValueError(
                f"keep is {self.keep}; HyperRNN has no gated memory for recurrent dropout, leave keep at 1"
            )
        super().__post_init__()

    def state_sizes(self):
        return (self.hyper_units, self.units)

    @nn.compact
    def weights(self, features):
        p, H, S = self.param_dtype, self.units, self.hyper_units
        inputs = {
            "x": self.main_matrix("W_x", features),
            "hyper": self.param("hyper_W_x", orthogonal, (features, S), p),
        }
        recurrent = {
            "h": self.main_matrix("W_h", H),
            "hyper": self.param("hyper_W_h", orthogonal, (H, S), p),
        }
        small = {
            "b": self.param("b", zeros, (H,), p),
            "hyper_U": self.param("hyper_U", orthogonal, (S, S), p),
            "hyper_b": self.param("hyper_b", zeros, (S,), p),
            "z": self.generator_weights(("",)),
        }
        return Weights(inputs, recurrent, small)

    def step(self, small, carry, xp, hp, noise):
        h_hat = xp["hyper"] + hp["hyper"] + product(carry[0], small["hyper_U"], self.dtype)
        h_hat = jnp.tanh(add_bias(h_hat, small["hyper_b"]))
        y = self.modulated(small["z"], h_hat, {"": hp["h"]}, {"": xp["x"]})[""]
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

    Reference: Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, equations 10-13 and appendix A.2.2-A.2.3.
    """

    layer_norm: bool = False
    forget_bias: float = 1.0
    epsilon: float = 1e-3
    gate_input: bool = False

    def state_sizes(self):
        return (self.units, self.units, self.hyper_units, self.hyper_units)

    @nn.compact
    def weights(self, features):
        p, H, S = self.param_dtype, self.units, self.hyper_units
        main_inputs = {f"x_{y}": self.main_matrix(f"W_x{y}", features) for y in GATES}
        recurrent = {f"h_{y}": self.main_matrix(f"W_h{y}", H) for y in GATES}
        main = {f"b_{y}": self.param(f"b_{y}", zeros, (H,), p) for y in GATES}
        # The hyper cell is narrow, so its gates stand side by side in one product; [h; x] is multiplied in two parts.
        side_by_side = per_gate(orthogonal, 4)
        inputs = {"hyper": self.param("hyper_W_x", side_by_side, (features, 4 * S), p)}
        recurrent["hyper"] = self.param("hyper_W_h", side_by_side, (H, 4 * S), p)
        hyper = {
            "U": self.param("hyper_U", side_by_side, (S, 4 * S), p),
            "b": self.param("hyper_b", zeros, (4 * S,), p),
        }
        if self.layer_norm:
            main |= norm_weights(self, "", H)
            hyper |= norm_weights(self, "hyper_", S)
        small = {"main": main, "hyper": hyper, "z": self.generator_weights(GATES)}
        if not self.gate_input:
            return Weights(inputs | main_inputs, recurrent, small)
        small["gate"] = {
            "W_m": self.param("W_z_m", zeros, (S, self.embedding), p),
            "b_m": self.param("b_z_m", ones, (self.embedding,), p),
            "d_m": self.param("W_d_m", zeros, (self.embedding, features), p),
        }
        return Weights(inputs, recurrent, small, main_inputs)

    def hyper_step(self, hyper, carry, xp, hp):
        """The new (c_hat, h_hat)."""
        total = add_bias(xp["hyper"] + hp["hyper"] + product(carry[3], hyper["U"], self.dtype), hyper["b"])
        return lstm_step(self, hyper, carry[2], dict(zip(GATES, jnp.split(total, 4, -1), strict=True)), None)

    def gate(self, small, carry, x, xp, hp):
        w, h_hat = small["gate"], self.hyper_step(small["hyper"], carry, xp, hp)[1]
        z = add_bias(product(h_hat, w["W_m"]), w["b_m"])
        return 2 * jax.nn.sigmoid(product(z, w["d_m"])) * x

    def step(self, small, carry, xp, hp, noise):
        c, main = carry[0], small["main"]
        c_hat, h_hat = self.hyper_step(small["hyper"], carry, xp, hp)
        y = self.modulated(small["z"], h_hat, {k: hp[f"h_{k}"] for k in GATES}, {k: xp[f"x_{k}"] for k in GATES})
        gates = {k: add_bias(y[k], main[f"b_{k}"]) for k in GATES}
        return (*lstm_step(self, main, c, gates, self.scaled(noise)), c_hat, h_hat)
