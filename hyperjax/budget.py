"""What a network costs, the width that meets a budget, and the Lagrangian that steers to a target.

Costs are parameters and floating-point operations. Counting them computes and compiles nothing: shapes are enough, so
inputs may be arrays or `jax.ShapeDtypeStruct`s. A ramp of the Lagrangian's target is
`optax.linear_schedule(start, end, steps)`; Optax's optimisers train its multipliers.

Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import hyperjax as hj
    >>> x = jax.ShapeDtypeStruct((1, 20), jnp.float32)
    >>> make = lambda width: nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(10)])
    >>> hj.budget.count_parameters(make(100), x)
    3110
    >>> hj.budget.flops(lambda x, w: x @ w, x, jnp.zeros((20, 100)))  # 2 * 20 * 100
    4000
    >>> hj.budget.fit_width(make, 50_000, x).layers[0].features
    1613
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.interpreters import partial_eval

from hyperjax import paramtree

Array = jax.Array

OPAQUE = ("while", "pallas_call", "shard_map")  # how often these run what they hold is not to be read off


def count_parameters(model: nn.Module, x: Any) -> int:
    """The number of a network's parameters, those of the collection "params".

    Args:
        model: called as `model.init(key, x)`.
        x: its input, of which only shape and dtype count.

    Returns:
        Their number.
    """
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    return paramtree.count(variables.get("params", {}))


def flops(fn: Callable[..., Any], *args: Any) -> int:
    """The floating-point operations of a function's matrix products and convolutions, two for each multiply-add.

    It counts what is written: a `scan` by its length, where XLA's own analysis counts one step; the dearest branch of a
    `cond`; no elementwise operation; and in a convolution also the products with padding. What no output depends on
    is left out, as the compiler leaves it out. Count a training step by the function that makes its gradient.

    Args:
        fn: such as `model.apply`, under `jit` or not.
        args: its arguments: pytrees of arrays.

    Returns:
        Their number.

    Raises:
        ValueError: products stand in a `while_loop`, whose steps are not known, or in a Pallas kernel or `shard_map`.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return count_flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def fit_width(
    make: Callable[[int], nn.Module], budget: int, x: Any, low: int = 1, high: int = 4096, tolerance: float = 0.1
) -> nn.Module:
    """Finds by bisection the network whose number of parameters comes closest to a budget; of two, the smaller.

    Args:
        make: width -> network; the number of parameters must increase with the width.
        budget: number of parameters.
        x: the network's input, as in `count_parameters`.
        low: least width.
        high: greatest width.
        tolerance: greatest distance from the budget, as a share of it.

    Returns:
        The network.

    Raises:
        ValueError: `low` to `high` holds no width, or the closest network is further from the budget than that.
    """
    if not 1 <= low <= high:
        raise ValueError(f"the widths are {low} to {high}, expected 1 <= low <= high")
    count = functools.cache(lambda width: count_parameters(make(width), x))
    below, above = low, high
    if count(high) <= budget:
        below = high
    elif count(low) >= budget:
        above = low
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if count(middle) <= budget else (below, middle)
    best = min(sorted({below, above}), key=lambda width: abs(count(width) - budget))
    if abs(count(best) - budget) > tolerance * budget:
        nearest = " and ".join(f"{count(width):,} at width {width}" for width in sorted({below, above}))
        raise ValueError(
            f"the budget is {budget:,} parameters, but widths {low} to {high} come no closer than {nearest}, expected "
            f"within {tolerance:.0%}; change the budget, the other sizes of the network, or tolerance"
        )
    return make(best)


class Multipliers(NamedTuple):
    """The two multipliers of `lagrangian`, arrays of one shape.

    Attributes:
        linear: l1.
        quadratic: l2.
    """

    linear: Any
    quadratic: Any

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> "Multipliers":
        """Where they start."""
        return cls(jnp.zeros(shape), jnp.zeros(shape))


def lagrangian(size: Array, target: Any, multipliers: Multipliers) -> Array:
    """Steers a size to a target: l1 (size - target) + l2 (size - target)^2, added to the loss.

    The network descends on it and the multipliers ascend, by one gradient and one Optax transformation:

        params = {"model": variables["params"], "multipliers": Multipliers.zeros()}
        optimizer = optax.partition(
            {"descend": optax.adam(1e-3), "ascend": ascend(optax.adam(1e-2))},
            {"model": "descend", "multipliers": "ascend"},
        )
        target = optax.linear_schedule(1.0, 0.5, 1000)
        loss = task_loss + lagrangian(expected_share, target(step), params["multipliers"])

    Args:
        size: what is to be steered, best as a share of the full size.
        target: what it should become, in the same unit.
        multipliers: l1 and l2.

    Returns:
        A scalar for scalars.

    Reference:
        Xia, Zhong, Chen, "Structured Pruning Learns Compact and Accurate Models" (CoFi), ACL 2022, section 3;
        after Wang, Wohlwend, Lei, "Structured Pruning of Large Language Models", EMNLP 2020.

    Example:
        >>> import jax.numpy as jnp
        >>> from hyperjax.budget import Multipliers, lagrangian
        >>> float(lagrangian(jnp.float32(0.75), 0.5, Multipliers(linear=2.0, quadratic=4.0)))  # 2 / 4 + 4 / 16
        0.75
    """
    excess = size - target
    return multipliers.linear * excess + multipliers.quadratic * jnp.square(excess)


def ascend(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns the optimiser that climbs where `optimizer` descends."""
    return optax.chain(optax.scale(-1.0), optimizer)


def count_flops(jaxpr: core.Jaxpr) -> int:
    """As `flops`, of a jaxpr as it stands."""
    return sum(count_flops_of(equation) for equation in jaxpr.eqns)


def count_flops_of(equation: core.JaxprEqn) -> int:
    """As `flops`, of one of its equations.

    Raises:
        ValueError: as `flops`.
    """
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        shapes: list[Any] = [var.aval for var in (*equation.invars, *equation.outvars)]
        left, right, out = (aval.shape for aval in shapes)
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            terms = math.prod(left[axis] for axis in contracted)
        else:
            terms = math.prod(right) // right[params["dimension_numbers"].rhs_spec[0]]
        return 2 * terms * math.prod(out)
    inner = [count_flops(jaxpr) for jaxpr in inner_jaxprs(equation)]
    if name in OPAQUE and any(inner):
        raise ValueError(f"a {name} holds matrix products: how often it runs them is not known; use scan, or count one")
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def inner_jaxprs(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """The programs that an equation holds, such as the body of a loop."""
    leaves = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, (core.Jaxpr, core.ClosedJaxpr))
    )
    return [
        leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf
        for leaf in leaves
        if isinstance(leaf, (core.Jaxpr, core.ClosedJaxpr))
    ]
