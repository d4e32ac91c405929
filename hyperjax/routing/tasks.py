"""What a task asks of the network: the width of its output, its loss, and how its answers are scored.

B samples, K classes, labels or targets.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A kind of task; the instances are values that compare equal when their fields do."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample's output: () or (K,)."""

    @property
    def outputs(self) -> int:
        """Width of the last layer of the task's tower."""
        return int(np.prod(self.shape, dtype=int))

    @abc.abstractmethod
    def loss(self, logits: Array, labels: Array) -> Array:
        """The loss of each sample.

        Args:
            logits: [B, *shape], what the tower returns.
            labels: [B] or [B, K], as the kind says.

        Returns:
            [B] float32.
        """

    @abc.abstractmethod
    def problem(self, labels: np.ndarray) -> str | None:
        """What is wrong with labels of the right shape, "VALUE, expected ..." in words, or None."""

    @abc.abstractmethod
    def scores(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Scores of a whole split, by name: `auc`, `accuracy`, `r2` (higher is better), `mse` (lower is)."""

    def label_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of the labels of so many samples."""
        return (rows, *self.shape)


@dataclasses.dataclass(frozen=True)
class Binary(Task):
    """Yes or no. Logits [B]; labels [B] of 0 and 1."""

    @property
    def shape(self):
        """(): one logit."""
        return ()

    def loss(self, logits, labels):
        """The cross entropy of each sample, [B] float32."""
        return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels.astype(jnp.float32))

    def problem(self, labels):
        """What is wrong with labels, or None: one is neither 0 nor 1."""
        return _outside(labels, 1)

    def scores(self, logits, labels):
        """`auc`, the area under the ROC curve.

        Raises:
            ValueError: all labels are equal.
        """
        return {"auc": _auc(logits, labels)}


@dataclasses.dataclass(frozen=True)
class MultiClass(Task):
    """One of K classes. Logits [B, K]; labels [B] integers in [0, K).

    Attributes:
        classes: K, 2 or more.

    Raises:
        ValueError: fewer than 2 classes.
    """

    classes: int

    def __post_init__(self):
        if self.classes < 2:
            raise ValueError(f"classes is {self.classes}, expected 2 or more; a task of one class has nothing to learn")

    @property
    def shape(self):
        """(K,), a logit for each class."""
        return (self.classes,)

    def loss(self, logits, labels):
        """The cross entropy of each sample, [B] float32."""
        labels = labels.astype(jnp.int32) if labels.dtype == bool else labels
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)

    def label_shape(self, rows):
        """(rows,): an integer for each sample."""
        return (rows,)

    def problem(self, labels):
        """What is wrong with labels, or None: one is not in [0, K)."""
        return _outside(labels, self.classes - 1)

    def scores(self, logits, labels):
        """`accuracy`: the share of samples whose largest logit is that of their class."""
        return {"accuracy": float(np.mean(np.argmax(logits, -1) == labels))}


@dataclasses.dataclass(frozen=True)
class MultiLabel(Task):
    """Any of K labels at once. Logits [B, K]; labels [B, K] of 0 and 1. The loss is the mean over the labels.

    Attributes:
        labels: K, 1 or more.

    Raises:
        ValueError: fewer than 1 label.
    """

    labels: int

    def __post_init__(self):
        if self.labels < 1:
            raise ValueError(f"labels is {self.labels}, expected 1 or more")

    @property
    def shape(self):
        """(K,), a logit for each label."""
        return (self.labels,)

    def loss(self, logits, labels):
        """The mean cross entropy over the labels of each sample, [B] float32."""
        return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels.astype(jnp.float32)).mean(-1)

    def problem(self, labels):
        """What is wrong with labels, or None: one is neither 0 nor 1."""
        return _outside(labels, 1)

    def scores(self, logits, labels):
        """`auc`, the mean over the labels.

        Raises:
            ValueError: a label is equal in all samples.
        """
        return {"auc": float(np.mean([_auc(logits[:, k], labels[:, k]) for k in range(self.labels)]))}


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """Real numbers. Outputs and labels [B], or [B, K] with `targets=K`. The loss is the squared error, mean over K.

    Attributes:
        targets: K, 1 or more; None for a single number.

    Raises:
        ValueError: fewer than 1 target.
    """

    targets: int | None = None

    def __post_init__(self):
        if self.targets is not None and self.targets < 1:
            raise ValueError(f"targets is {self.targets}, expected 1 or more, or None for a single number")

    @property
    def shape(self):
        """(), or (K,) of K targets."""
        return () if self.targets is None else (self.targets,)

    def loss(self, logits, labels):
        """The squared error of each sample, [B] float32, the mean over its targets."""
        error = jnp.square(logits.astype(jnp.float32) - labels.astype(jnp.float32))
        return error if self.targets is None else error.mean(-1)

    def problem(self, labels):
        """What is wrong with labels, or None: one is not finite."""
        bad = labels[~np.isfinite(labels)]
        return f"{bad.flat[0]}, expected finite numbers" if bad.size else None

    def scores(self, logits, labels):
        """`mse`, and `r2`, the coefficient of determination: means over the targets.

        Raises:
            ValueError: a target is equal in all samples.
        """
        labels = np.asarray(labels, np.float64)
        if not np.all(np.ptp(labels, 0)):
            raise ValueError(
                f"all {len(labels)} labels of a target are equal: no R2 without some that differ; give a larger split"
            )
        errors = np.square(logits - labels).mean(0)
        return {"mse": float(errors.mean()), "r2": float(np.mean(1 - errors / labels.var(0)))}


def check_labels(tasks: Mapping[str, Task], labels: Mapping[str, Any]) -> None:
    """Checks the labels of a split, on the host, before anything is compiled.

    Args:
        tasks: kinds by name.
        labels: labels by name of the task; all tasks have as many samples.

    Raises:
        ValueError: a task has no labels, labels belong to no task, or they have the wrong type, shape or range.
    """
    if not tasks:
        raise ValueError("there are no tasks, expected one or more; name each with its kind, such as Binary()")
    lost = [name for name in tasks if name not in labels]
    if lost:
        raise ValueError(f"task {lost[0]!r} has no labels and so no loss; give its labels, or leave the task out")
    extra = [name for name in labels if name not in tasks]
    if extra:
        raise ValueError(f"labels {extra[0]!r} belong to no task; the tasks are {', '.join(tasks)}")
    rows: int | None = None
    for name, task in tasks.items():
        values = np.asarray(labels[name])
        if rows is None:
            if not values.ndim:
                raise ValueError(f"labels of {name!r} are {labels[name]!r}, expected an array, of one label a sample")
            rows = len(values)
        if values.shape != task.label_shape(rows):
            raise ValueError(
                f"labels of {name!r} have shape {values.shape}, expected {task.label_shape(rows)} of {task}"
            )
        if not isinstance(task, Regression) and values.dtype.kind not in "biu":
            raise ValueError(f"labels of {name!r} have dtype {values.dtype}, expected integers; convert them")
        if values.dtype.kind not in "biuf":
            raise ValueError(f"labels of {name!r} have dtype {values.dtype}, expected numbers; convert them")
        problem = task.problem(values)
        if problem:
            raise ValueError(f"labels of {name!r} hold {problem} for {task}")


def task_losses(tasks: Mapping[str, Task], outputs: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, Any]:
    """The mean loss of each task.

    Args:
        tasks: kinds by name.
        outputs: what the network returns, by task, [B, *shape].
        labels: labels by task.

    Returns:
        Scalars by task, float32.

    Raises:
        ValueError: a task has no output or no labels, or one of another shape. A label out of range is not seen here,
            where labels are traced, and makes the loss NaN: call `check_labels` on the data.
    """
    losses = {}
    for name, task in tasks.items():
        logits, wanted = _checked(name, task, outputs, labels)
        losses[name] = task.loss(jnp.asarray(logits), jnp.asarray(wanted)).mean()
    return losses


def task_scores(tasks: Mapping[str, Task], outputs: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, float]:
    """Scores of a split by "TASK_SCORE", as in "income_auc"; arguments as of `task_losses`, over the whole split.

    Returns:
        Numbers by "TASK_SCORE"; the scores of each kind of task are those of its `scores`.

    Raises:
        ValueError: as `task_losses`; or a task has no AUC or R2, because all its labels are equal.
    """
    scores: dict[str, float] = {}
    for name, task in tasks.items():
        logits, wanted = _checked(name, task, outputs, labels)
        try:
            found = task.scores(np.asarray(logits, np.float32), np.asarray(wanted))
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from None
        scores |= {f"{name}_{score}": value for score, value in found.items()}
    return scores


def _checked(name: str, task: Task, outputs: Mapping[str, Any], labels: Mapping[str, Any]) -> tuple[Any, Any]:
    """A task's output and labels, found to be there and to fit: mean losses hide a wrong shape by broadcasting."""
    for what, given in (("output", outputs), ("labels", labels)):
        if name not in given:
            raise ValueError(f"task {name!r} has no {what} and so no loss; give it, or leave the task out")
    shape, given = np.shape(outputs[name]), np.shape(labels[name])
    if shape[:1] == () or shape[1:] != task.shape:
        raise ValueError(f"output of {name!r} has shape {shape}, expected {('B', *task.shape)} of {task}")
    if given != task.label_shape(shape[0]):
        raise ValueError(f"labels of {name!r} have shape {given}, expected {task.label_shape(shape[0])} of {task}")
    return outputs[name], labels[name]


def _outside(labels: np.ndarray, most: int) -> str | None:
    bad = labels[(labels < 0) | (labels > most)]
    return f"{bad.flat[0]}, expected 0 to {most}" if bad.size else None


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    if len(np.unique(labels)) < 2:
        raise ValueError(f"all {len(labels)} labels are {labels[0]}: no AUC without both 0 and 1; give a larger split")
    return float(roc_auc_score(labels, scores))
