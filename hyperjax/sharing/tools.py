"""What sharing does to gradients, starts and memory.

U uses of a parameter.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperjax.initializers import fans
from hyperjax.paramtree import ParamSpec
from hyperjax.sharing.maps import matrix_shape
from hyperjax.sharing.tie import Tied

Array = jax.Array


def use_gradients(tied: Tied, params: Any, loss: Callable[[Any], Array]) -> dict[str, dict[str, Array]]:
    """The gradient of each shared parameter, by use: their sum is what training sees.

    Args:
        tied: the network.
        params: its parameters.
        loss: of the parameters of `tied.module`, a scalar.

    Returns:
        {path of a source: {path of a use: gradient, of the source's shape}}.
    """
    full = flatten_dict(jax.grad(loss)(tied.expand(params)), sep="/")
    flat, found = flatten_dict(params, sep="/"), {}
    for source, uses in tied.uses.items():

        def made(theta: Array, source: str = source, uses: list[str] = uses) -> list[Array]:
            values = flatten_dict(tied.expand(unflatten_dict({**flat, source: theta}, sep="/")), sep="/")
            return [values[use] for use in uses]

        _, pull = jax.vjp(made, flat[source])
        each = [
            [full[use] if n == m else jnp.zeros_like(full[use]) for m, use in enumerate(uses)] for n in range(len(uses))
        ]
        found[source] = {use: pull(cotangents)[0] for use, cotangents in zip(uses, each, strict=True)}
    return found


def cosines(gradients: Mapping[str, Array]) -> np.ndarray:
    """Cosines between the gradients of one parameter's uses, [U, U]: below 0 they pull against one another; 0 where one
    is zero."""
    flat = np.stack([np.asarray(g, np.float64).ravel() for g in gradients.values()])
    norms = np.linalg.norm(flat, axis=1)
    unit = flat / np.where(norms > 0, norms, 1)[:, None]
    return unit @ unit.T


def xavier(tied: Tied, params: Any, key: Array, tolerance: float = 2.0) -> Any:
    """Draws shared kernels anew, to suit all uses: Var = 2 / (fan_in + fan_out), each use with its own fans.

    Where uses want different variances, the variance is the harmonic mean, so that none gets much more than it wants;
    what a map does to the variance is measured and divided out. An embedding looked up has fan_in 1.

    Args:
        tied: the network.
        params: its parameters.
        key: PRNG key.
        tolerance: from how large a ratio of variances on to warn.

    Returns:
        The parameters, in which sources of two or more axes are new.

    Reference: Glorot, Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010),
    equation 16.
    """
    flat = dict(flatten_dict(params, sep="/"))
    for number, (source, uses) in enumerate(tied.uses.items()):
        theta = flat[source]
        if theta.ndim < 2:
            continue
        unit = jax.random.normal(jax.random.fold_in(key, number), theta.shape, theta.dtype)
        drawn = unflatten_dict({**flat, source: unit}, sep="/")
        values = flatten_dict(jax.eval_shape(tied.expand, drawn), sep="/")
        made = flatten_dict(tied.expand(drawn), sep="/")
        wanted = {}
        for use in uses:
            gain = float(jnp.var(made[use])) or 1.0
            wanted[use] = 2 / sum(fans_of(use, values[use].shape)) / gain
        if max(wanted.values()) > tolerance * min(wanted.values()):
            listed = ", ".join(f"{use} {math.sqrt(v):.3g}" for use, v in wanted.items())
            warnings.warn(
                f"the uses of {source} want different standard deviations: {listed}; it gets their harmonic mean "
                "(of variances)",
                stacklevel=2,
            )
        variance = len(wanted) / sum(1 / v for v in wanted.values())
        flat[source] = unit * math.sqrt(variance)
    return unflatten_dict(flat, sep="/")


def fans_of(path: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(fan_in, fan_out) of a kernel as its use has them; of a table that is looked up, 1 and its width."""
    if path.rsplit("/", 1)[-1] == "embedding":
        return 1.0, float(shape[-1])
    if len(shape) == 3:  # of attention
        rows, columns = matrix_shape(shape)
        return float(rows), float(columns)
    return fans(ParamSpec(path, shape, np.dtype(np.float32)))


class Memory(NamedTuple):
    """What a training step holds, in bytes.

    Attributes:
        params: of the parameters, each once.
        optimizer: of the optimiser's state.
        peak: of the compiled step: arguments, results that do not take their place, and intermediates, by XLA's plan.
    """

    params: int
    optimizer: int
    peak: int


def memory(step: Callable[..., Any], params: Any, opt_state: Any, *args: Any) -> Memory:
    """Compiles a step and reads off what it needs.

    Args:
        step: step(params, opt_state, *args), under `jit` or not.
        params, opt_state, *args: arrays or their shapes.

    Returns:
        Bytes.
    """
    compiled = (step if hasattr(step, "lower") else jax.jit(step)).lower(params, opt_state, *args).compile()
    found: Any = compiled.memory_analysis()
    peak = (
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    )
    return Memory(_bytes(params), _bytes(opt_state), int(peak))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
