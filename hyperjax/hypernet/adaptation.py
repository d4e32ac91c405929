"""Few-shot adaptation: gradient steps on an embedding alone, for one task or for many at once.

E width of an embedding, N tasks, T embeddings in the table, n samples of a task, S steps.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax.hypernet import conditions
from hyperjax.hypernet.network import HyperNetwork
from hyperjax.hypernet.per_sample import MEMORY

Array = jax.Array
Loss = Callable[[Any, Any], Array]
STARTS = ("mean", "zeros", "nearest")


class Adapted(NamedTuple):
    """What adaptation returns; `adapt_many` puts the axis N in front of every array.

    Attributes:
        z: the embedding after the last step [E].
        losses: the loss before each step and after the last [S + 1], with the prior if there is one.
        trajectory: z at the same moments [S + 1, E], to stop early where other data say so.
        seconds: how long the steps took, the search for a start included, compilation not.
        compile_seconds: how long compilation took; next to nothing where an earlier call has done it.
    """

    z: Array
    losses: Array
    trajectory: Array
    seconds: float
    compile_seconds: float


def adapt(
    hyper: HyperNetwork,
    variables: Mapping[str, Any],
    inputs: Any,
    targets: Any,
    loss_fn: Loss,
    *,
    start: Any = "mean",
    steps: int = 50,
    optimizer: optax.GradientTransformation | float = 0.1,
    prior_std: float | None = None,
    **keywords: Any,
) -> Adapted:
    """Fits the embedding z of one new task to its data; every variable of the hypernetwork stays as it is.

    All steps are one compiled call, kept for later calls with data of the same shapes: pass the same `loss_fn`, and
    the same optimizer or a number. Not for use inside `jit`.

    Args:
        hyper: the hypernetwork.
        variables: its variables; BatchNorm needs to use its stored statistics, as with `train=False` in `keywords`.
        inputs: the target's input [n, ...], or a tuple of several.
        targets: what `loss_fn` compares with [n, ...], an array or a pytree.
        loss_fn: (outputs, targets) -> losses of any shape, whose mean counts.
        start: where z starts: "mean" of the table of embeddings, "zeros", "nearest" (the embedding of the table with
            the lowest loss on this data, by trying all of them), or an array [E].
        steps: S.
        optimizer: an optax transformation, or a number: the learning rate of Adam, which may change from call to call
            without compiling again.
        prior_std: standard deviation s of a prior z ~ N(0, s^2): |z|^2 / (2 s^2) is added to the mean loss. Give
            s sqrt(n) for the posterior's mode, where the loss is the negative log likelihood of a sample.
        **keywords: the target's other keyword inputs, and `task_id` where something is kept per task; hashable, and
            constants of the compiled call.

    Returns:
        The embedding, what it cost, and how it got there.

    Raises:
        ValueError: a start, number, width or length that makes no sense, or a start from a table that does not exist.

    Reference: Zintgraf et al., "Fast context adaptation via meta-learning", ICML 2019, equation 3, with weights that
    are generated from the context.
    """
    return _adapt(hyper, variables, inputs, targets, loss_fn, start, steps, optimizer, prior_std, keywords, many=False)


def adapt_many(
    hyper: HyperNetwork,
    variables: Mapping[str, Any],
    inputs: Any,
    targets: Any,
    loss_fn: Loss,
    *,
    start: Any = "mean",
    steps: int = 50,
    optimizer: optax.GradientTransformation | float = 0.1,
    prior_std: float | None = None,
    **keywords: Any,
) -> Adapted:
    """Fits one embedding for each of N tasks, all of them in one `vmap`, which holds N sets of weights at once.

    Args:
        hyper, variables, loss_fn, steps, optimizer, prior_std, keywords: as in `adapt`.
        inputs: [N, n, ...], or a tuple of such arrays.
        targets: [N, n, ...], an array or a pytree.
        start: as in `adapt`, or an array [N, E].

    Returns:
        As `adapt`, with z [N, E], losses [N, S + 1] and trajectory [N, S + 1, E].

    Raises:
        ValueError: as in `adapt`.
    """
    return _adapt(hyper, variables, inputs, targets, loss_fn, start, steps, optimizer, prior_std, keywords, many=True)


def _adapt(
    hyper: HyperNetwork,
    variables: Mapping[str, Any],
    inputs: Any,
    targets: Any,
    loss_fn: Loss,
    start: Any,
    steps: int,
    optimizer: optax.GradientTransformation | float,
    prior_std: float | None,
    keywords: dict[str, Any],
    many: bool,
) -> Adapted:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    tasks = _check_data(inputs, targets, many)
    z = _check_start(hyper, variables, start, tasks)
    rate = _check_numbers(steps, optimizer, prior_std)
    _check_hashable(loss_fn, keywords)
    # What is a number here is an argument of the compiled call, so that another one compiles nothing.
    precision = np.float32(0.0 if prior_std is None else 1 / prior_std**2)
    static = {
        "hyper": hyper,
        "loss_fn": loss_fn,
        "optimizer": None if rate is not None else optimizer,
        "steps": int(steps),
        "start": start if z is None else None,
        "keywords": tuple(sorted(keywords.items())),
        "axis": None if not many else (None if z is None or z.ndim == 1 else 0, 0, 0),
    }
    began = time.perf_counter()
    run = _run.lower(dict(variables), z, inputs, targets, rate, precision, **static).compile()
    compiled = time.perf_counter()
    z, losses, trajectory = jax.block_until_ready(run(dict(variables), z, inputs, targets, rate, precision))
    return Adapted(z, losses, trajectory, time.perf_counter() - compiled, compiled - began)


@functools.partial(jax.jit, static_argnames=("hyper", "loss_fn", "optimizer", "steps", "start", "keywords", "axis"))
def _run(
    variables: Any,
    z: Array | None,
    inputs: tuple[Any, ...],
    targets: Any,
    rate: Array | None,
    precision: Array,
    *,
    hyper: HyperNetwork,
    loss_fn: Loss,
    optimizer: optax.GradientTransformation | None,
    steps: int,
    start: str | None,
    keywords: tuple[tuple[str, Any], ...],
    axis: tuple[int | None, ...] | None,
) -> tuple[Array, Array, Array]:
    made = optax.adam(rate) if optimizer is None else optimizer

    def one(given: Array | None, inputs: tuple[Any, ...], targets: Any) -> tuple[Array, Array, Array]:
        def loss(z: Array) -> Array:
            losses = loss_fn(hyper.apply(variables, *inputs, z=z, **dict(keywords)), targets)
            if not isinstance(losses, jax.Array):
                raise ValueError(f"loss_fn returned a {type(losses).__name__}, expected one array of losses")
            return jnp.mean(losses)

        def objective(z: Array) -> Array:
            return loss(z) + 0.5 * precision * jnp.sum(jnp.square(z))

        def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
            z, state = carry
            value, gradient = jax.value_and_grad(objective)(z)
            updates, state = made.update(gradient, state, z)
            return (z + updates, state), (value, z)

        if given is not None:
            first = given
        elif start == "zeros":
            first = jnp.zeros(hyper.embedding_dim)
        elif start == "mean":
            first = jnp.mean(hyper.embeddings(variables), axis=0)
        else:
            first = _nearest(hyper, hyper.embeddings(variables), loss)
        (z, _), (losses, trajectory) = jax.lax.scan(step, (first, made.init(first)), length=steps)
        return z, jnp.append(losses, objective(z)), jnp.concatenate([trajectory, z[None]])

    return one(z, inputs, targets) if axis is None else jax.vmap(one, axis)(z, inputs, targets)


def _nearest(hyper: HyperNetwork, table: Array, loss: Callable[[Array], Array]) -> Array:
    """The row of the table [T, E] with the lowest loss; in blocks where all sets of weights do not fit `MEMORY`."""
    size = max(sum(spec.bytes for spec in target.structure.specs) for target in hyper.targets)
    losses = jax.lax.map(loss, table, batch_size=min(len(table), max(1, MEMORY // max(size, 1))))
    return table[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))]


def _check_data(inputs: tuple[Any, ...], targets: Any, many: bool) -> int | None:
    """Raises ValueError unless all arrays agree on N and n; returns N, None for one task."""
    axes = "[tasks, samples, ...]" if many else "[samples, ...]"
    leading, first = None, ""
    for name, tree in (("inputs", inputs), ("targets", targets)):
        for leaf in jax.tree.leaves(tree):
            shape, count = np.shape(leaf), 2 if many else 1
            if len(shape) < count or 0 in shape[:count]:
                raise ValueError(f"{name} has an array of shape {shape}, expected {axes}, with at least one of each")
            if leading is not None and shape[:count] != leading[:count]:
                raise ValueError(f"{name} has shape {shape}, but {first} has {leading}; expected equal {axes}")
            leading, first = leading or shape, first or name
    if leading is None:
        raise ValueError("there are no inputs and no targets; give the data of the task to adapt to")
    return leading[0] if many else None


def _check_start(hyper: HyperNetwork, variables: Mapping[str, Any], start: Any, tasks: int | None) -> Array | None:
    """Returns z where `start` is an array, None where it is a name."""
    if not hyper.num_embeddings and hyper.encoder is None:
        raise ValueError("a static hypernetwork has no z to adapt; build it with num_embeddings of at least 1")
    if isinstance(start, str):
        if start not in STARTS:
            raise ValueError(f"start is {start!r}, expected one of {', '.join(STARTS)}, or an array of embeddings")
        if start != "zeros" and "embedding" not in variables["params"]:
            raise ValueError(f"start is {start!r}, but this hypernetwork has no table of embeddings; give zeros or z")
        return None
    z = conditions.check_z(start, hyper.embedding_dim, "start")
    if z.ndim == 2 and z.shape[0] != tasks:
        expected = "one embedding" if tasks is None else f"one embedding, or one for each of {tasks} tasks"
        raise ValueError(f"start has shape {z.shape}, expected {expected}: [{hyper.embedding_dim}] each")
    return z


def _check_numbers(steps: Any, optimizer: Any, prior_std: Any) -> np.float32 | None:
    """Returns Adam's learning rate, None where `optimizer` is a transformation."""
    if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps is {steps!r}, expected a whole number of at least 0")
    if prior_std is not None and not 0 < prior_std < math.inf:
        raise ValueError(f"prior_std is {prior_std!r}, expected a positive number, or None for no prior")
    if isinstance(optimizer, optax.GradientTransformation):
        return None
    if not isinstance(optimizer, (int, float, np.number)) or not 0 < optimizer < math.inf:
        raise ValueError(f"optimizer is {optimizer!r}, expected an optax transformation, or a positive learning rate")
    return np.float32(optimizer)


def _check_hashable(loss_fn: Any, keywords: dict[str, Any]) -> None:
    if not callable(loss_fn):
        raise ValueError(f"loss_fn is {loss_fn!r}, expected a function (outputs, targets) -> losses")
    for name, value in [("loss_fn", loss_fn), *keywords.items()]:
        try:
            hash(value)
        except TypeError:
            raise ValueError(
                f"{name} is a {type(value).__name__}, which is not hashable; arrays belong into inputs, as a tuple"
            ) from None
