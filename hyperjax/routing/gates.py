"""Gated connections: what the sub-networks of one level read from those of the level below.

B samples, J sources (sub-networks below), I readers (sub-networks above, or towers), T tasks.
D_j, E_i width of source j and of what reader i takes in; D, E their sums.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import estimators

Array = jax.Array
Per = Literal["connection", "task", "sample"]


@dataclasses.dataclass(frozen=True)
class HardConcrete:
    """Settings of hard concrete gates; the numbers may be tracers.

    Attributes:
        beta: temperature.
        gamma: lower end of the stretch, below 0.
        zeta: upper end of the stretch, at least 1.
        open: probability P(z != 0) that a gate starts with.

    Raises:
        ValueError: a number is out of range; see `hyperjax.estimators.hard_concrete`.

    Reference:
        Louizos et al. (2018). Ma et al., "SNR" (AAAI 2019) searched beta in [0.5, 0.9], gamma in [-1, -0.1] and zeta
        in [1.1, 2].

    Example:
        >>> import jax.numpy as jnp
        >>> import hyperjax as hj
        >>> gates = hj.HardConcrete(open=0.9)
        >>> gates.deterministic(jnp.array([-3.0, 0.0, 3.0])).round(3).tolist()  # as served: closed, half open, open
        [0.0, 0.5, 1.0]
        >>> round(float(gates.l0(gates.start())), 3)
        0.9
    """

    beta: Any = estimators.BETA
    gamma: Any = estimators.GAMMA
    zeta: Any = estimators.ZETA
    open: Any = 0.9

    def __post_init__(self):
        estimators.check_hard_concrete(self.beta, self.gamma, self.zeta, self.open)

    @property
    def _stretch(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "zeta": self.zeta}

    def start(self) -> Array:
        """The log alpha that gates start with."""
        return estimators.hard_concrete_log_alpha(self.open, beta=self.beta, **self._stretch)

    def sample(self, key: Array, log_alpha: Array) -> Array:
        """Samples gates to train with."""
        return estimators.hard_concrete(key, log_alpha, beta=self.beta, **self._stretch)

    def deterministic(self, log_alpha: Any) -> Array:
        """The gates to evaluate and serve with."""
        return estimators.hard_concrete_deterministic(log_alpha, **self._stretch)

    def l0(self, log_alpha: Array) -> Array:
        """The probability that each gate is open, P(z != 0)."""
        return estimators.hard_concrete_l0(log_alpha, beta=self.beta, **self._stretch)


class Connection(nn.Module):
    """v_i = sum_j z_ij W_ij u_j + b_i ("trans") or sum_j z_ij u_j ("aver") for every reader i.

    The W_ij are the blocks of one kernel [D, E], so that a level is one product; the gates scale blocks of the kernel,
    not the B times larger activations, unless each sample has gates of its own.

    Attributes:
        sources: widths D_j of the sources; equal for "aver".
        readers: widths E_i of what each reader takes in; for "aver" only their number counts.
        kind: "trans" or "aver".
        gates: settings of the gates, or None for none.
        per: what a gate is drawn for: each connection; each connection and task; each connection and sample.
        tasks: number of tasks T.
        to_towers: whether the readers are the towers of the tasks, which have a gate for each task anyway.
        router: hidden widths of the small network that makes log alpha from a sample, with `per="sample"`.

    Reference:
        Ma et al. (AAAI 2019), eq. 4-5.
    """

    sources: Sequence[int]
    readers: Sequence[int]
    kind: str = "trans"
    gates: HardConcrete | None = None
    per: Per = "connection"
    tasks: int = 1
    to_towers: bool = False
    router: Sequence[int] = (16,)

    @nn.compact
    def __call__(self, u: Array, x: Array, key: Array | None) -> tuple[list[Array], Array | None, Array | None]:
        """Connects a level.

        Args:
            u: outputs of the sources, side by side: [B, D], or [T, B, D] once each task has its own.
            x: the network's input, [B, features], for the router.
            key: PRNG key to sample gates with; None for the deterministic ones.

        Returns:
            What each reader takes in, [B, E_i] or [T, B, E_i]; the gates z; their log alpha. Both are [I, J],
            [T, I, J] or [B, I, J], or None without gates.
        """
        log_alpha = z = None
        if self.gates is not None:
            log_alpha = self._log_alpha(x)
            z = self.gates.deterministic(log_alpha) if key is None else self.gates.sample(key, log_alpha)
        weights = None if z is None else z.astype(u.dtype)
        v = self._trans(u, weights) if self.kind == "trans" else self._aver(u, weights)
        return v, z, log_alpha

    def _log_alpha(self, x: Array) -> Array:
        assert self.gates is not None
        shape: tuple[int, ...] = (len(self.readers), len(self.sources))
        start = self.gates.start()
        if self.per == "sample":
            h = x
            for i, width in enumerate(self.router):
                h = nn.relu(nn.Dense(width, name=f"router_{i}")(h))
            # Nearly the same gates for all samples at first, so that training starts as it does without a router.
            out = nn.Dense(int(np.prod(shape)), kernel_init=nn.initializers.normal(0.02), name="router_output")(h)
            return out.reshape(-1, *shape).astype(jnp.float32) + start
        if self.per == "task" and not self.to_towers:
            shape = (self.tasks, *shape)
        return self.param("log_alpha", lambda key: jnp.full(shape, start, jnp.float32))

    def _trans(self, u: Array, z: Array | None) -> list[Array]:
        total = (sum(self.sources), sum(self.readers))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), total)
        bias = self.param("bias", nn.initializers.zeros, total[1:])[None]
        columns = spans(self.readers)
        if z is not None and self.per == "sample":
            rows = np.repeat(np.arange(len(self.sources)), self.sources)
            return [(u * z[:, i, rows]) @ kernel[:, at] + bias[:, at] for i, at in enumerate(columns)]
        weights = kernel if z is None else scale_blocks(kernel, z, self.sources, self.readers)
        if self.to_towers and u.ndim == 3:
            return [u[t] @ weights[:, at] + bias[:, at] for t, at in enumerate(columns)]
        v = (
            u @ weights
            if weights.ndim == 2
            else jnp.einsum("bd,tde->tbe" if u.ndim == 2 else "tbd,tde->tbe", u, weights)
        )
        v = v + bias.reshape((1,) * (v.ndim - 1) + (-1,))
        return [v[..., at] for at in columns]

    def _aver(self, u: Array, z: Array | None) -> list[Array]:
        apart = u.reshape(*u.shape[:-1], len(self.sources), self.sources[0])
        if z is None:
            return [apart.sum(-2)] * len(self.readers)
        if self.to_towers and u.ndim == 3:
            return [jnp.einsum("j,bjd->bd", z[t], apart[t]) for t in range(self.tasks)]
        gates, samples = {2: ("ij", ""), 3: ("bij", "") if self.per == "sample" else ("tij", "t")}[z.ndim]
        streams = "t" if u.ndim == 3 else ""
        return list(jnp.einsum(f"{gates},{streams}bjd->i{samples or streams}bd", z, apart))


def spans(widths: Sequence[int]) -> list[slice]:
    """Where each of several arrays that stand side by side begins and ends."""
    ends = list(itertools.accumulate(widths, initial=0))
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def scale_blocks(kernel: Array, z: Array, rows: Sequence[int], columns: Sequence[int]) -> Array:
    """Scales the blocks of a matrix.

    Args:
        kernel: [D, E], of blocks [D_j, E_i].
        z: [..., I, J], the scale of each block.
        rows: heights D_j.
        columns: widths E_i.

    Returns:
        [..., D, E].
    """
    z = jnp.swapaxes(z, -1, -2)
    lead = z.shape[:-2]
    if len(set(rows)) == len(set(columns)) == 1:
        blocks = kernel.reshape((1,) * len(lead) + (len(rows), rows[0], len(columns), columns[0]))
        return (blocks * z[..., :, None, :, None]).reshape(*lead, *kernel.shape)
    # Products with 0-1 matrices: unlike an index, their gradient is a product too, and no slow scatter.
    tall, wide = (np.repeat(np.eye(len(w), dtype=np.float32), w, axis=0) for w in (rows, columns))
    exact = jax.lax.Precision.HIGHEST
    spread = jnp.einsum("dj,...ji,ei->...de", tall, z, wide, precision=exact)
    return kernel.reshape((1,) * len(lead) + kernel.shape) * spread.astype(kernel.dtype)
