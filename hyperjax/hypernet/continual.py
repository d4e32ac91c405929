"""Continual learning with one hypernetwork: the output regulariser holds the weights of old tasks in place.

M slots for old tasks (-1 is an empty one), T tasks.

    old = pad_tasks(range(task), T - 1)  # one shape for every task: nothing compiles anew
    remembered = remember(hyper, variables, old)  # once, before the task begins
    loss = task_loss + output_regularizer(hyper, variables, remembered, old, beta)  # in every step of it
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.hypernet.network import HyperNetwork
from hyperjax.hypernet.plan import needs_task
from hyperjax.hypernet.ungenerated import lookup

Array = jax.Array
Variables = Mapping[str, Any]
Weights = dict[str, dict[str, Array]]  # generator -> path -> [M, *shape]
EMPTY = -1


def pad_tasks(task_ids: Iterable[int], size: int) -> np.ndarray:
    """Puts task ids into slots of a fixed number, so that their number may change under `jit`.

    Args:
        task_ids: at most `size` of them.
        size: number of slots M, as the number of tasks that there will be, less one.

    Returns:
        [M] int32: the ids, then -1.

    Raises:
        ValueError: there are more ids than slots.
    """
    ids = np.fromiter(task_ids, np.int32)
    if len(ids) > size:
        raise ValueError(f"there are {len(ids)} old tasks for {size} slots; raise size")
    return np.concatenate([ids, np.full(size - len(ids), EMPTY, np.int32)])


def remember(hyper: HyperNetwork, variables: Variables, task_ids: Any) -> Weights:
    """Generates the weights to keep for old tasks, all in one call.

    Only what an embedding decides is kept. Parameters that are learned directly (`Learned`), frozen or kept per task
    (`PerTask`) are not: no embedding brings them back, and a task's own copy does not change with another task.

    Args:
        hyper: a hypernetwork with a table of embeddings.
        variables: its own, at the time to remember.
        task_ids: [M] old tasks; -1 is an empty slot, which holds anything.

    Returns:
        The weights in float32, [M, *shape] each, by generator and path: M times the generated part of the target.

    Raises:
        ValueError: a task id out of range (inside `jit`, where its value is not known, its weights are NaN), a
            hypernetwork without a table, or one that generates nothing from it.
    """
    ids = _check(hyper, task_ids)
    if ids.size == 0:  # one slot to learn the shapes from
        return jax.tree.map(lambda w: w[:0], remember(hyper, variables, jnp.array([EMPTY])))
    weights: Weights = hyper.apply(variables, ids, method=_generate)  # type: ignore[assignment]
    if not weights:
        raise ValueError("every parameter is learned directly, per task or frozen: there are no weights to remember")
    return jax.lax.stop_gradient(weights)


def output_regularizer(
    hyper: HyperNetwork, variables: Variables, remembered: Weights, task_ids: Any, beta: Any
) -> Array:
    """beta / n * sum_t ||h(e_t, Theta*) - h(e_t, Theta)||^2 over the n old tasks, without a loop over them.

    Its gradient reaches the generators only: neither the embeddings e_t of old tasks, which stay where they were
    learned, nor what is not generated, nor what is remembered.

    Args:
        hyper: the hypernetwork.
        variables: its variables now, Theta and the table of embeddings.
        remembered: h(e_t, Theta*), as `remember` returned it for the same slots.
        task_ids: [M] old tasks; -1 is an empty slot and does not count. A random sample of them will do as well, with
            their rows of `remembered`.
        beta: 0 or more.

    Returns:
        A float32 scalar; 0 without old tasks.

    Raises:
        ValueError: as `remember` does; beta is negative or infinite; `remembered` has other slots.

    Reference: von Oswald et al., "Continual learning with hypernetworks", ICLR 2020, section 2.1, without the
    look-ahead (the change that the task's own loss is about to make is not added to Theta).
    """
    ids = _check(hyper, task_ids)
    if not isinstance(beta, jax.core.Tracer) and not 0 <= float(beta) < math.inf:
        raise ValueError(f"beta is {beta}, expected a finite number of at least 0")
    slots = sorted({len(w) for w in jax.tree.leaves(remembered)})
    if slots != [len(ids)]:
        raise ValueError(f"remembered holds {slots} tasks and task_ids {len(ids)}; give the ids it was made with")
    if ids.size == 0:
        return jnp.zeros(())
    weights: Weights = hyper.apply(variables, ids, method=_generate)  # type: ignore[assignment]
    distances = jax.tree.map(_squared_distance, weights, jax.lax.stop_gradient(remembered))
    total = jnp.zeros(())
    for name, by_path in distances.items():
        owners = hyper.generators[int(name)].tasks
        others = [task for task in range(hyper.num_embeddings) if task not in owners]  # whose targets have no such part
        counts = (ids != EMPTY) & ~jnp.isin(ids, jnp.asarray(others, jnp.int32))
        total += jnp.where(counts, sum(by_path.values()), 0.0).sum()
    return beta / jnp.maximum(jnp.sum(ids != EMPTY), 1) * total


def output_regularizer_from_variables(
    hyper: HyperNetwork, variables: Variables, old_variables: Variables, task_ids: Any, beta: Any
) -> Array:
    """`output_regularizer` with Theta* itself in memory, in place of the weights that it generated.

    The memory is one more hypernetwork, however many the tasks; the price is to generate twice in each step.

    Args:
        hyper, variables, task_ids, beta: as in `output_regularizer`.
        old_variables: the variables when the newest task began: Theta* with its table.

    Returns:
        A float32 scalar; 0 without old tasks.
    """
    return output_regularizer(hyper, variables, remember(hyper, old_variables, task_ids), task_ids, beta)


def continual_scores(accuracies: np.ndarray) -> dict[str, float]:
    """Sums up how a learner did on T tasks in turn.

    Args:
        accuracies: [T, T], row k the accuracy in each task after task k was learned; NaN in tasks to come.

    Returns:
        `accuracy`, the mean over all tasks after the last; `accuracy_when_learned`, the mean of each task's just after
        it was learned; `forgetting`, how far each task but the last is below its best, in the mean.

    Raises:
        ValueError: the matrix is not square, or its last row has gaps.

    Reference: Chaudhry et al., "Riemannian walk for incremental learning", ECCV 2018, section 3.1.
    """
    shape = np.shape(accuracies)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"accuracies have shape {shape}, expected [tasks, tasks]: a row after each task")
    last = np.asarray(accuracies)[-1]
    if np.isnan(last).any():
        raise ValueError(f"accuracies of task {np.isnan(last).argmax()} are missing in the last row; evaluate all")
    falls = np.nanmax(accuracies[:-1, :-1], axis=0) - last[:-1] if len(last) > 1 else np.zeros(1)
    values = {"accuracy": last, "accuracy_when_learned": np.diag(accuracies), "forgetting": falls}
    return {name: float(value.mean()) for name, value in values.items()}


def accuracy_table(accuracies: np.ndarray, names: Sequence[str]) -> str:
    """Returns an accuracy matrix, as `continual_scores` takes it, as lines of text in percent."""
    width = max(6, *map(len, names))
    lines = [["after task, in task:", *(name.rjust(width) for name in names)]]
    for after, row in enumerate(accuracies):
        lines.append([names[after].ljust(20), *(f"{100 * value:.1f}".rjust(width) for value in row[: after + 1])])
    return "\n".join(map(" ".join, lines))


def _generate(hyper: HyperNetwork, ids: Array) -> Weights:
    """Runs, inside of the module, each generator that depends on the embedding, for all slots at once."""
    z = jax.lax.stop_gradient(lookup(hyper.embedding, jnp.where(ids == EMPTY, 0, ids)))
    made: Weights = {}
    for number, generator in enumerate(hyper.generators):
        if needs_task(generator):
            continue
        leaves = generator(z, None)
        own = {s.path: leaves[s.path] for s in generator.leaves if leaves[s.path].ndim > len(s.shape)}
        if own:
            made[str(number)] = {path: leaf.astype(jnp.float32) for path, leaf in own.items()}
    return made


def _squared_distance(new: Array, old: Array) -> Array:
    """[M, ...] twice -> [M]."""
    return jnp.sum(jnp.square(new - old).reshape(len(new), -1), axis=1)


def _check(hyper: HyperNetwork, task_ids: Any) -> Array:
    """Returns task ids [M], -1 where a slot is empty."""
    if not hyper.num_embeddings or hyper.encoder is not None:
        raise ValueError("this hypernetwork has no table of task embeddings: give num_embeddings, and no encoder")
    ids = task_ids if isinstance(task_ids, jax.core.Tracer) else np.asarray(task_ids)
    if ids.size == 0:
        ids = np.zeros(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"task_ids are {task_ids}, expected a vector [M] of whole numbers")
    if isinstance(ids, np.ndarray) and ids.size and (ids.min() < EMPTY or ids.max() >= hyper.num_embeddings):
        last = hyper.num_embeddings - 1
        raise ValueError(f"task_ids are {ids.tolist()}, expected 0 to {last}, or {EMPTY} for an empty slot")
    return jnp.asarray(ids)
