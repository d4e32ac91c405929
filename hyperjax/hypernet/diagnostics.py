"""Diagnostics: how alike task embeddings are, what generating costs, and whether an embedding is far from all trained.

B batch of embeddings, E width of an embedding, T tasks.
"""

import math
import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.hypernet import conditions
from hyperjax.hypernet.network import HyperNetwork

Array = jax.Array
BLOCK = 1024  # rows of a [T, T] matrix that exist at once


def embedding_similarity(table: Array) -> Array:
    """Returns the cosine similarity of all pairs of embeddings.

    Args:
        table: [T, E], as from `hyper.embeddings(variables)`; anything but a matrix of floats is a ValueError.

    Returns:
        [T, T], from -1 to 1; 0 for an embedding of length 0, even with itself.
    """
    table = _check_table(table)
    length = jnp.linalg.norm(table, axis=1, keepdims=True)
    unit = table / jnp.where(length > 0, length, 1.0)
    return jnp.clip(jnp.matmul(unit, unit.T, precision="highest"), -1.0, 1.0)


class GenerationShare(NamedTuple):
    """What generation costs: medians, in seconds, of compiled calls."""

    generate_seconds: float  # making the parameters, alone
    forward_seconds: float  # the whole forward pass
    generate_step_seconds: float  # making the parameters, and from their gradient the hypernetwork's, alone
    step_seconds: float  # the whole forward and backward pass

    @property
    def forward_share(self) -> float:
        """Share of generation in the forward pass."""
        return self.generate_seconds / self.forward_seconds

    @property
    def step_share(self) -> float:
        """Share of generation in the forward and backward pass."""
        return self.generate_step_seconds / self.step_seconds


def generation_share(
    hyper: HyperNetwork, variables: Mapping[str, Any], *inputs: Any, repeats: int = 20, **keywords: Any
) -> GenerationShare:
    """Measures how much of a step's time is spent generating.

    Alone, generation writes all parameters to memory; within the whole, XLA may spare that, and a batch of embeddings
    for `Scale` or `LowRank` never becomes whole parameters. So a share can come out above 1.

    Args:
        hyper: the hypernetwork.
        variables: its variables; gradients are those of "params".
        *inputs, **keywords: of `hyper.apply`: the target's, and `task_id=`, `z=` or `condition=`, `rngs=`, `mutable=`.
        repeats: calls timed of each kind, after one that compiles.

    Raises:
        ValueError: repeats is no whole number of at least 1, or what `hyper.apply` refuses.
    """
    if not isinstance(repeats, (int, np.integer)) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f"repeats is {repeats!r}, expected a whole number of at least 1")
    task_id = keywords.pop("task_id", None)  # static, so that one out of range is refused
    rest = {name: value for name, value in variables.items() if name != "params"}
    leaves, tree = jax.tree.flatten((rest, inputs, keywords))  # what is no array among them stays static
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))}

    def fill(params: Any, arrays: dict[int, Any]) -> Any:
        rest, inputs, keywords = jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return {**rest, "params": params}, inputs, {**keywords, "task_id": task_id}

    def forward(params: Any, arrays: dict[int, Any]) -> Any:
        own, inputs, keywords = fill(params, arrays)
        out = hyper.apply(own, *inputs, **keywords)
        return out[0] if keywords.get("mutable") else out

    def step(params: Any, arrays: dict[int, Any]) -> Any:
        squares = lambda params: [jnp.sum(jnp.square(y)) for y in _floating(forward(params, arrays))]  # noqa: E731
        return jax.value_and_grad(lambda params: sum(squares(params), jnp.zeros(())))(params)

    def generate(params: Any, arrays: dict[int, Any]) -> list[Array]:
        own, _, keywords = fill(params, arrays)
        return _floating(hyper.generate(own, **{k: keywords.get(k) for k in ("task_id", "z", "condition", "rngs")}))

    def generate_step(params: Any, arrays: dict[int, Any], gradient: list[Array]) -> Any:
        made, pull_back = jax.vjp(lambda params: generate(params, arrays), params)
        return made, pull_back(gradient)

    given = (variables["params"], arrays)
    gradient = [jnp.ones(leaf.shape, leaf.dtype) for leaf in jax.eval_shape(generate, *given)]
    calls = [jax.jit(function) for function in (generate, forward, generate_step, step)]
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for i, call in enumerate(calls):  # in turns, so that a busy moment hits all alike
            start = time.perf_counter()
            jax.block_until_ready(call(*given, gradient) if i == 2 else call(*given))
            if repeat:  # the first compiles
                seconds[i].append(time.perf_counter() - start)
    return GenerationShare(*map(statistics.median, seconds))


class Familiarity(NamedTuple):
    """How far an embedding is from all trained ones; make it with `Familiarity.fit(hyper.embeddings(variables))`.

    The score is the distance to the nearest trained embedding (not to their mean: they may lie in clusters), in
    standard deviations a coordinate. It is Mahalanobis', with a covariance shrunk to the identity by OAS [1], so that a
    direction in which the table hardly varies counts more once T is large enough to tell. Rotating, shifting or scaling
    everything changes nothing.

    The threshold is a quantile of what the trained embeddings would score if each were left out, of the covariance
    too: a fresh embedding of the same distribution, whatever it is, is exchangeable with them, and above it about as
    often as the false positive rate says [2]. This needs T >= 1 / rate - 1: 19 for 0.05. With fewer, the covariance is
    a multiple of the identity, and the threshold one that Gaussian embeddings stay below: the nearest is no further
    than the root mean square of all T distances, |z - mean|^2 plus a known part, which follows F(v, v (T - 1)) with v
    effective dimensions, from the spectrum [3]. That is cautious; but at T = 2 v is E, for want of a spectrum.

    Reference: [1] Chen et al., "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 2010, equation 23.
        [2] Barber et al., "Predictive inference with the jackknife+", Annals of Statistics 2021. [3] tr C^2 as in
        Srivastava, "Some tests concerning the covariance matrix in high dimensional data", J. Japan Statist. Soc. 2005.
    """

    rows: Array  # the trained embeddings [T, E], whitened
    mean: Array  # [E], subtracted before whitening
    whiten: Array  # [E, E]
    threshold: Any  # the score to warn above

    @classmethod
    def fit(cls, table: Any, false_positive_rate: float = 0.05) -> "Familiarity":
        """Measures a table [T, E] of at least 2 trained embeddings.

        Raises:
            ValueError: fewer than 2 different embeddings, some not finite, a false_positive_rate that is not between 0
                and 1, or a call inside `jit`.
        """
        if not isinstance(false_positive_rate, (int, float, np.number)) or not 0 < false_positive_rate < 1:
            raise ValueError(f"false_positive_rate is {false_positive_rate!r}, expected a number between 0 and 1")
        x_TE = np.asarray(_outside_jit(_check_table(table), "Familiarity.fit"), np.float64)
        (T, E), n = x_TE.shape, len(x_TE) - 1
        if not np.isfinite(x_TE).all() or not np.ptp(x_TE, axis=0).any():
            what = "all rows equal" if np.isfinite(x_TE).all() else "not all finite"
            raise ValueError(f"the table is {T} x {E}, {what}; expected at least 2 different, finite embeddings")
        mean = x_TE.mean(axis=0)
        scale = math.sqrt(np.sum((x_TE - mean) ** 2) / (n * E))
        c_TE = (x_TE - mean) / scale
        covariance = c_TE.T @ c_TE / n  # S, of trace E
        power = float(np.sum(covariance**2))  # tr S^2
        whiten, rank = np.eye(E), math.ceil((1 - false_positive_rate) * (T + 1) - 1e-9)
        if rank <= T:
            apart = (n + 1 - 2 / E) * (power - E)
            shrinkage = min(1.0, ((1 - 2 / E) * power + E**2) / apart) if apart > 0 else 1.0
            whiten = np.linalg.inv(np.linalg.cholesky((1 - shrinkage) * covariance + shrinkage * whiten)).T
            left_out = _leave_one_out(c_TE @ whiten, (1 - shrinkage) * T / n**2)
            threshold = float(np.sort(left_out)[rank - 1]) / math.sqrt(E)
        else:
            threshold = _gaussian_threshold(power, T, E, false_positive_rate)
        whiten /= scale * math.sqrt(E)
        rows, mean_E, whiten_EE = (jnp.asarray(v, jnp.float32) for v in ((x_TE - mean) @ whiten, mean, whiten))
        return cls(rows, mean_E, whiten_EE, threshold)

    @jax.jit
    def score(self, z: Array) -> Array:
        """Returns the out-of-distribution score of z [E] or [B, E], a number or [B]; NaN where z is."""
        z = conditions.check_z(z, self.mean.shape[0])
        centred = z - self.mean.reshape((1,) * (z.ndim - 1) + (-1,))
        white = jnp.matmul(centred, self.whiten, precision="highest")
        along = jnp.matmul(white, self.rows.T, precision="highest")
        sizes = jnp.sum(self.rows**2, axis=1).reshape((1,) * (z.ndim - 1) + (-1,))
        nearest = jnp.argmin(sizes - 2 * along, axis=-1)
        return jnp.linalg.norm(white - self.rows[nearest], axis=-1)  # from the difference: exact near 0

    def check(self, z: Array) -> Array:
        """Returns the score of z [E] or [B, E], and warns, once for a batch, if one is above the threshold or NaN."""
        score = _outside_jit(self.score(z), "Familiarity.check")
        scores = np.atleast_1d(score)
        far = ~(scores <= self.threshold)
        if far.any():
            which = f"{far.sum()} of {len(far)} embeddings z are" if len(far) > 1 else "z is"
            worst = f"out-of-distribution score {scores[far].max():.3g}, threshold {self.threshold:.3g}"
            warnings.warn(f"{which} far from all {len(self.rows)} trained: {worst}; mistrust the weights", stacklevel=2)
        return score


def embedding_prior(z: Array, std: Any = 1.0) -> Array:
    """A prior N(0, std^2 I) on embeddings, as a term of the loss: add weight * embedding_prior(z).

    Args:
        z: [..., E], embeddings or a table of them.
        std: standard deviation of each coordinate, above 0; embeddings start with mean square 1.

    Returns:
        The mean over embeddings of |z|^2 / (2 std^2), which is -log p(z) up to a constant.

    Raises:
        ValueError: z is no array of floats [..., E], or std is not one number above 0.
    """
    z = jnp.asarray(z)
    if not z.ndim or not jnp.issubdtype(z.dtype, jnp.floating):
        raise ValueError(f"z is {z.dtype} of shape {z.shape}, expected floating point numbers [..., E]")
    if jnp.ndim(std) or not (isinstance(std, jax.core.Tracer) or 0 < std < math.inf):
        raise ValueError(f"std is {std}, expected one number above 0")
    return jnp.mean(jnp.sum(jnp.square(z / std), axis=-1)) / 2


def _leave_one_out(w_TE: np.ndarray, weight: float) -> np.ndarray:
    """Distance [T] from each whitened row to the nearest other, in the metric of the covariance C without that row.

    That is C - weight c c', whose inverse is C^-1 + weight u u' / (1 - weight c' u), u = C^-1 c (Sherman and Morrison).
    """
    sizes = np.sum(w_TE**2, axis=1)
    nearest = np.empty(len(w_TE))
    for start in range(0, len(w_TE), BLOCK):
        own = sizes[start : start + BLOCK, None]
        gram = w_TE[start : start + BLOCK] @ w_TE.T
        squared = own + sizes[None] - 2 * gram + weight * (own - gram) ** 2 / (1 - weight * own)
        squared[np.arange(len(own)), np.arange(start, start + len(own))] = np.inf
        nearest[start : start + BLOCK] = np.sqrt(np.maximum(squared.min(axis=1), 0.0))
    return nearest


def _gaussian_threshold(power: float, T: int, E: int, rate: float) -> float:
    """A score that Gaussian embeddings exceed with probability `rate` at most, for a covariance of trace E."""
    from scipy.special import fdtri

    n, v = T - 1, float(E)
    if n > 1:
        unbiased = n**2 / ((n - 1) * (n + 2)) * (power - E**2 / n)  # of tr C^2
        v = min(v, max(1.0, E**2 / unbiased)) if unbiased > 0 else v
    return math.sqrt((1 + 1 / T) * fdtri(v, v * n, 1 - rate) + n / T)


def _floating(tree: Any) -> list[Array]:
    return [leaf for leaf in map(jnp.asarray, jax.tree.leaves(tree)) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _outside_jit(value: Array, what: str) -> Array:
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{what} was called inside jit, where values are not known; call it outside")
    return value


def _check_table(table: Any) -> Array:
    table = jnp.asarray(table)
    if table.ndim != 2 or not table.size or not jnp.issubdtype(table.dtype, jnp.floating):
        raise ValueError(f"the table is {table.dtype} of shape {table.shape}, expected floating point numbers [T, E]")
    return table
