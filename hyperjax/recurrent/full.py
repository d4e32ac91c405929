"""The full dynamic hypernetwork: every weight matrix is W(z) = <W_z, z>, with no scaling shortcut. For small sizes.

Shape letters: B batch, H units, Z width of one embedding.

HyperRNN and HyperLSTM generate only row scales, so that d(z) (W h) costs what an ordinary cell costs. Here each gate
owns Z whole matrices, and the embedding mixes them: Z times the parameters and the arithmetic. As W(z) h is linear in
z, it is computed as the sum of z_k (W_k h), and no weight matrix per sample is ever formed.
"""

import jax.numpy as jnp
from jax.nn.initializers import orthogonal

from hyperjax.recurrent.hyper_cells import HyperCell, HyperLSTM, HyperRNN, per_gate

__all__ = ["FullHyperLSTM", "FullHyperRNN"]


class _Full(HyperCell):
    """Embeddings mix Z matrices; only the bias is generated as before, b(z) = W_bz z_b + b_0."""

    @property
    def columns(self):
        return self.embedding * self.units

    def main_matrices(self, prefix, rows):
        # z is 1 at first: the sum of Z independent matrices keeps the scale of an orthogonal one.
        init = per_gate(orthogonal(self.embedding**-0.5), self.embedding)
        return self.side_by_side(prefix, init, (rows, self.columns))

    def generator_weights(self, kinds=("b",)):
        return super().generator_weights(kinds)

    def generate(self, small, h_hat):
        """Raises:
        ValueError: always: there are no scales.
        """
        raise ValueError(f"{type(self).__name__} generates whole matrices, not scales; read `embeddings` instead")

    def modulated(self, small, h_hat, hp, xp):
        z = self.embeddings(small, h_hat)
        z_h, z_x, z_b = (each.squeeze(-3) for each in jnp.split(z, 3, -3))

        def mixed(z_BGZ, products):
            return jnp.einsum("...z,...zh->...h", z_BGZ, products.reshape(*z_BGZ.shape, self.units))

        return mixed(z_h, hp) + mixed(z_x, xp) + jnp.einsum("...gz,gzh->...gh", z_b, small["d"][0])


class FullHyperRNN(_Full, HyperRNN):
    """HyperRNN with whole generated matrices: h' = tanh(W_h(z_h) h + W_x(z_x) x + b(z_b)).

    Parameters `W_h` [H, Z H] and `W_x` [D, Z H] hold the Z matrices side by side.

    Raises:
      ValueError: as `HyperRNN`.

    Reference: Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106, section 3.2, equations 5-6.
    """


class FullHyperLSTM(_Full, HyperLSTM):
    """HyperLSTM with whole generated matrices in every gate: y = LN(W_h(z_h) h + W_x(z_x) x + b(z_b)).

    Raises:
      ValueError: as `HyperLSTM`.

    Reference: the same equations, applied to each gate of an LSTM.
    """
