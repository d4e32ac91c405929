"""Data of several tasks: the container, batches of rows, and the synthetic regression of the MMoE paper.

N rows, B rows of a batch, d features, m sinusoids.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from hyperjax.data.batches import EpochOrder
from hyperjax.routing.tasks import Regression, Task, check_labels

SPLITS = ("train", "valid", "test")


class TaskSplit(NamedTuple):
    """Arrays by name, [N, ...], of which `TaskData.encode` makes the inputs, and labels by task, [N, ...].

    Attributes:
        features: by name.
        labels: by task.
    """

    features: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    @property
    def rows(self) -> int:
        """Number of rows N."""
        return len(next(iter(self.features.values())))


@dataclasses.dataclass(frozen=True, eq=False)
class TaskData:
    """Rows with a label for each of several tasks, split into train, valid and test.

    Args:
        name: short name of the data.
        train: the training split.
        valid: the validation split.
        test: the test split.
        tasks: kinds of task by name.
        encode: the inputs of B rows, given their features: a pure JAX function to [B, d] float32.
        notes: what a run must tell its user about this data, a sentence each.

    Raises:
        ValueError: labels do not fit the tasks (`check_labels`), or a split has more rows of one array than of another.
    """

    name: str
    train: TaskSplit
    valid: TaskSplit
    test: TaskSplit
    tasks: dict[str, Task]
    encode: Callable[[dict[str, jax.Array]], jax.Array]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        for name in SPLITS:
            split = getattr(self, name)
            try:
                check_labels(self.tasks, split.labels)
            except ValueError as error:
                raise ValueError(f"{name} split of {self.name!r}: {error}") from error
            _check_rows(split, f"{name} split of {self.name!r}")

    @functools.cached_property
    def width(self) -> int:
        """Number of features d of an encoded row."""
        row = {
            name: jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)
            for name, array in self.train.features.items()
        }
        return jax.eval_shape(self.encode, row).shape[-1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the tasks and of the splits' arrays, as they are before `encode`."""
        digest = hashlib.sha256(repr(self.tasks).encode())
        for split in (self.train, self.valid, self.test):
            for arrays in split:
                for name, array in arrays.items():
                    digest.update(f"{name!r} {array.shape} {array.dtype.str}".encode())
                    digest.update(np.ascontiguousarray(array).data if array.size else b"")
        return digest.hexdigest()[:16]


class RowBatches:
    """Shuffled minibatches. An epoch holds each row at most once: the last N mod B of its order are left out.

    What a step sees depends on the seed and its number alone: a run that resumes needs no iterator state.

    Args:
        split: features and labels.
        batch: batch size B.
        seed: 0 or more; fixes the order of every epoch.

    Raises:
        ValueError: features and labels differ in their rows, B is below 1 or above N, or the seed is negative.
    """

    def __init__(self, split: TaskSplit, batch: int, seed: int = 0):
        _check_rows(split, "split")
        self.split, self.order = split, EpochOrder(split.rows, batch, seed, "rows")
        self.batch, self.seed, self.steps_per_epoch = self.order.batch, self.order.seed, self.order.steps_per_epoch

    def batch_at(self, step: int, rows: slice = slice(None)) -> dict[str, dict[str, np.ndarray]]:
        """Returns the batch of a training step.

        Args:
            step: number of the step, from 0, over all epochs.
            rows: those of the batch to return, where several processes read one part each.

        Returns:
            `features` and `labels`, by name, [B, ...].

        Raises:
            ValueError: `step` is negative.
        """
        index = self.order.rows_at(step)[rows]
        features, labels = ({name: array[index] for name, array in arrays.items()} for arrays in self.split)
        return {"features": features, "labels": labels}


class Sinusoids(NamedTuple):
    """What generates the labels of two regression tasks: weights [2, d], alpha [m] and beta [m]."""

    weights: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray

    def labels(self, x: np.ndarray) -> np.ndarray:
        """Returns the labels without noise, w·x + Σ_i sin(alpha_i w·x + beta_i), [2, N] float64, of inputs [N, d]."""
        wx = self.weights @ x.T.astype(np.float64)
        return wx + sum(np.sin(alpha * wx + beta) for alpha, beta in zip(self.alpha, self.beta, strict=True))


def draw_sinusoids(
    correlation: float,
    *,
    features: int = 100,
    count: int = 4,
    alpha: tuple[float, float] = (1.0, 3.0),
    scale: float = 1.0,
    seed: int = 0,
) -> Sinusoids:
    """Draws what generates the labels of `synthetic_regression`: arguments and errors as there, with `count` for m."""
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation is {correlation}, expected -1 to 1, the cosine of the tasks' weights")
    for what, value, least in (("features", features, 2), ("sinusoids", count, 0), ("seed", seed, 0)):
        if value != int(value) or value < least:
            raise ValueError(f"{what} is {value}, expected an integer of at least {least}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, expected a finite number above 0, such as 1")
    if len(alpha) != 2 or not 0 <= alpha[0] <= alpha[1] < math.inf:
        raise ValueError(f"alpha is {alpha}, expected a range of frequencies from 0 up, such as (1, 3)")
    rng = np.random.default_rng((seed, 0, 3))  # (seed, n) alone orders epoch n of the batches of that seed
    u1, u2 = rng.standard_normal((2, features))
    u1 /= np.linalg.norm(u1)
    u2 -= (u2 @ u1) * u1
    u2 /= np.linalg.norm(u2)
    weights = scale * np.stack([u1, correlation * u1 + math.sqrt(1 - correlation**2) * u2])
    return Sinusoids(weights, rng.uniform(*alpha, count) / scale, rng.uniform(0, 2 * math.pi, count))


def synthetic_regression(
    correlation: float,
    *,
    features: int = 100,
    rows: tuple[int, int, int] = (10_000, 2_000, 2_000),
    sinusoids: int = 4,
    alpha: tuple[float, float] = (1.0, 3.0),
    scale: float = 1.0,
    noise: float = 0.01,
    seed: int = 0,
) -> TaskData:
    """Makes two regression tasks, `first` and `second`, whose relatedness is chosen.

    With orthogonal unit vectors u1, u2 and inputs x ~ N(0, I):

        w_1 = c u1,   w_2 = c (p u1 + sqrt(1 - p²) u2)
        y_k = w_k·x + Σ_{i=1..m} sin(alpha_i w_k·x + beta_i) + eps_k,   eps_k ~ N(0, 0.01)

    The paper leaves m, c, alpha and beta open. Here alpha_i ~ U(1, 3) / c and beta_i ~ U(0, 2π), the same for both
    tasks: w·x has standard deviation c, so that a sinusoid turns by one to three radians per standard deviation
    whatever c is. The best linear model leaves about half of the variance (median over draws), and a small network
    learns most of that half. Nothing is standardised; the least mean squared error is `noise`.

    Args:
        correlation: p in [-1, 1], the cosine of w_1 and w_2; `notes` say how the labels correlate.
        features: d, 2 or more.
        rows: rows of train, valid and test, 2 or more each.
        sinusoids: m, 0 or more; 0 leaves linear tasks.
        alpha: range of c alpha_i, within [0, inf); higher frequencies are harder to learn.
        scale: c, above 0.
        noise: variance of eps, 0 or more.
        seed: 0 or more. All values of `correlation` share u1, u2, alpha, beta, the inputs and the noise, and
            a longer split changes no other.

    Returns:
        The tasks; the feature `x` is [N, d] float32, as the network sees it.

    Raises:
        ValueError: an argument is out of its range.

    Reference:
        Ma et al., "Modeling task relationships in multi-task learning with multi-gate mixture-of-experts" (2018),
        section 3.2, equations 2 to 4.
    """
    function = draw_sinusoids(correlation, features=features, count=sinusoids, alpha=alpha, scale=scale, seed=seed)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}, expected a variance, a finite number of at least 0")
    if len(rows) != 3 or any(size != int(size) or size < 2 for size in rows):
        raise ValueError(f"rows are {rows}, expected three integers of at least 2: train, valid, test")
    splits = []
    for number, size in enumerate(rows, 1):
        x = np.random.default_rng((seed, number, 1)).standard_normal((size, features), np.float32)
        error = np.random.default_rng((seed, number, 2)).standard_normal((size, 2)).T
        first, second = (function.labels(x) + math.sqrt(noise) * error).astype(np.float32)
        splits.append(TaskSplit({"x": x}, {"first": first, "second": second}))
    train, valid, test = splits
    label_correlation = np.corrcoef(list(train.labels.values()))[0, 1]
    sizes = f"{rows[0]:,} train, {rows[1]:,} valid, {rows[2]:,} test; {features} features"
    note = f"synthetic regression ({sizes}; weights correlate {correlation:g}, labels {label_correlation:.3f})"
    tasks: dict[str, Task] = {"first": Regression(), "second": Regression()}
    return TaskData("synthetic", train, valid, test, tasks, _as_they_are, (note,))


def _as_they_are(features: dict[str, jax.Array]) -> jax.Array:
    return features["x"]


def _check_rows(split: TaskSplit, what: str) -> None:
    rows = {name: len(array) for arrays in split for name, array in arrays.items()}
    if not split.features or len(set(rows.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in rows.items()) if split.features else "no features"
        raise ValueError(f"{what} has {found}, expected features and labels of as many rows; leave none out")
