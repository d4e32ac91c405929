"""FastRNN: a recurrent layer over time that runs its cell through the deferred scan.

Shape letters: B batch, T time, C steps of one rematerialised chunk, D input features, H units.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.recurrent.cells import Cell
from hyperjax.recurrent.scan import deferred_scan

Array = jax.Array


class FastRNN(nn.Module):
    """Runs a cell over time; the same parameters, names and numbers as `flax.linen.RNN(cell)`, in less time.

    Attributes:
      cell: any cell of `hyperjax.recurrent`.
      time_major: True for inputs [T, B, D] and outputs [T, B, H].
      remat_chunk: keep for the backward pass only the state every `remat_chunk` steps and compute the rest again;
        about sqrt(T) makes memory grow as sqrt(T). None keeps everything.
      weight_keep: probability of keeping each entry of the matrices that multiply h, drawn anew at every call and the
        same at all its steps (DropConnect: Merity, Keskar, Socher, arXiv 1708.02182, section 2). Below 1 a `dropout`
        PRNG is needed unless the cell is deterministic.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import hyperjax as hj
      >>> rnn, x = hj.FastRNN(hj.LSTM(units=16)), jnp.ones((2, 6, 8))  # [B, T, D]
      >>> variables = jax.jit(rnn.init)(jax.random.key(0), x)
      >>> carry, outputs = rnn.apply(variables, x)
      >>> same = nn.RNN(hj.LSTM(units=16)).apply(variables, x)  # Flax's loop, with the same variables
      >>> outputs.shape, round(float(jnp.abs(outputs - same).max()), 2)
      ((2, 6, 16), 0.0)
    """

    cell: Cell
    time_major: bool = False
    remat_chunk: int | None = None
    weight_keep: float = 1.0

    @nn.compact
    def __call__(self, inputs: Array, initial_carry: tuple | None = None) -> tuple[tuple, Array]:
        """Runs over all steps.

        Args:
          inputs: [B, T, D], or [T, B, D] if `time_major`.
          initial_carry: the state to start from; None is zeros. An earlier call's carry continues its text.

        Returns:
          (carry after the last step, outputs [B, T, H]).

        Raises:
          ValueError: inputs that are not 3-D or have no time step, a carry of another shape, remat_chunk < 1,
            weight_keep outside (0, 1].
        """
        if inputs.ndim != 3 or 0 in inputs.shape:
            layout = "[time, batch, features]" if self.time_major else "[batch, time, features]"
            raise ValueError(f"inputs have shape {inputs.shape}; FastRNN expects non-empty {layout}")
        if self.remat_chunk is not None and self.remat_chunk < 1:
            raise ValueError(
                f"remat_chunk is {self.remat_chunk}; give a number of steps >= 1, or None to keep everything"
            )
        x_TBD = (inputs if self.time_major else inputs.swapaxes(0, 1)).astype(self.cell.param_dtype)
        if not 0 < self.weight_keep <= 1:
            raise ValueError(f"weight_keep is {self.weight_keep}, a probability; choose it in (0, 1], 1 drops nothing")
        steps, batch, features = x_TBD.shape
        carry = self.cell.initialize_carry(jax.random.key(0), (batch, features))
        if initial_carry is not None:
            expected, got = (jax.tree.map(jnp.shape, tuple(c)) for c in (carry, initial_carry))
            if expected != got:
                raise ValueError(
                    f"initial_carry has shapes {got}; this cell with a batch of {batch} expects {expected}"
                )
            carry = tuple(jnp.asarray(c, self.cell.param_dtype) for c in initial_carry)
        key = self.cell.make_rng("dropout") if self.cell.drops else None
        weights = self.cell.weights(features)
        if self.weight_keep < 1 and not self.cell.deterministic:
            drop = nn.Dropout(1 - self.weight_keep, deterministic=False)
            weights = weights._replace(recurrent={k: drop(w) for k, w in weights.recurrent.items()})
        gate = self.cell.gate if weights.late else None

        def run(weights, carry, x_CBD, times):
            noise = None if key is None else self.cell.masks(key, times, batch)
            return deferred_scan(self.cell.step, weights, carry, x_CBD, noise, gate=gate, dtype=self.cell.dtype)

        times = jnp.arange(steps)
        if self.remat_chunk is None or self.remat_chunk >= steps:
            carry, h_TBH = run(weights, carry, x_TBD, times)
        else:
            carry, h_TBH = _in_chunks(
                partial(jax.checkpoint(run, prevent_cse=False), weights), carry, x_TBD, times, self.remat_chunk
            )
        return carry, h_TBH if self.time_major else h_TBH.swapaxes(0, 1)


def _in_chunks(run, carry, x_TBD, times, chunk):
    whole = x_TBD.shape[0] // chunk * chunk
    split = jax.tree.map(lambda a: a[:whole].reshape(-1, chunk, *a.shape[1:]), (x_TBD, times))
    carry, h = jax.lax.scan(lambda c, xs: run(c, *xs), carry, split)
    h = h.reshape(whole, *h.shape[2:])
    if whole == x_TBD.shape[0]:
        return carry, h
    carry, tail = run(carry, x_TBD[whole:], times[whole:])
    return carry, jnp.concatenate([h, tail])
