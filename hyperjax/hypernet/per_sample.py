"""A set of weights for each sample of a batch: by factors where the generator has them, else by `vmap` in blocks.

`Scale` and `LowRank` never make a batch of W: y = d * (x W_0), y = x W_0 + (x A) B, by intercepting the layers of a
Linen target, if all its generated parameters are theirs. All others make one W a sample; where a batch of them would
take over 1 GiB, in blocks under `lax.map`, each computed again in the backward pass.

B samples, r rank; a factor is the `Scaled` or `LowRankSum` of a kernel (`modulated.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from hyperjax.hypernet.factored import apply_factored, differing_layers
from hyperjax.hypernet.maker import Maker, Task
from hyperjax.hypernet.target import Call, LinenTarget, State

Array = jax.Array
MEMORY = 2**30  # bytes of generated weights that may exist at once
PROBE = 97  # a batch size that no other axis is likely to have


def apply(
    maker: Maker,
    z: Array | None,
    task: Task,
    batch: int,
    pick: Callable[[Task], State],
    call: Call,
    block: int | None,
    starting: bool,
) -> tuple[Any, State]:
    """Applies the target with one set of parameters for each sample.

    Args:
        maker: of the parameters.
        z, task: embeddings [B, E] and tasks [B], or one for all.
        batch: B.
        pick: task -> the target's state.
        call: with the leading axis B in every array of the inputs.
        block: most sets of weights at once; None is what fits `MEMORY`.
        starting: whether this is `init`, whose updates of the state are dropped.

    Returns:
        As `Target.apply`.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path((call.args, dict(call.kwargs))):
        if _mapped(leaf) and leaf.shape[0] != batch:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"input {name} has shape {leaf.shape}, expected the leading axis {batch}: one sample for each embedding"
            )
    if z is not None and _one_state(task) and _factors_fit(maker, z, task, batch, pick, call):
        return apply_factored(maker, maker.factors(z, task), pick(task), call, batch)
    changing = [name for name in (*maker.target.state, "intermediates") if call.mutable(name)]
    if changing and not starting:
        raise ValueError(
            f"{changing[0]} cannot be updated where each sample has weights of its own; leave it out of mutable, or "
            "use Scale() or LowRank() with a Linen target"
        )
    return _blocks(maker, z, task, batch, pick, call, block, starting), {}


def _blocks(
    maker: Maker,
    z: Any,
    task: Any,
    batch: int,
    pick: Callable[[Task], State],
    call: Call,
    block: int | None,
    starting: bool,
):
    leaves, tree = jax.tree.flatten((call.args, dict(call.kwargs)))
    mapped = [leaf for leaf in leaves if _mapped(leaf)]
    keys = {name: jax.random.split(key, batch) for name, key in call.rngs.items()}
    each = {"z": _per_sample(z, 2), "task": _per_sample(task, 1), "inputs": mapped, "keys": keys}
    ndim = {spec.path: len(spec.shape) for spec in maker.target.structure.specs}

    def one(params: Any, x: dict[str, Any]) -> Any:
        values = iter(x["inputs"])
        args, kwargs = jax.tree.unflatten(tree, [next(values)[None] if _mapped(leaf) else leaf for leaf in leaves])
        own_task = task if x["task"] is None else x["task"]
        own = call._replace(args=args, kwargs=kwargs, rngs=x["keys"], filter=starting)
        out, _ = maker.target.apply(maker.tree(params), pick(own_task), own)
        for path, y in jax.tree_util.tree_leaves_with_path(out):
            if not jnp.ndim(y):
                name = jax.tree_util.keystr(path)
                raise ValueError(f"output {name} is a scalar, which a batch of z cannot make; give it the batch axis")
        return jax.tree.map(lambda y: y[0], out)

    def many(x: dict[str, Any]) -> Any:
        own_z, own_task = (z if x["z"] is None else x["z"]), (task if x["task"] is None else x["task"])
        params = maker.leaves(own_z, own_task)
        axes = {path: 0 if leaf.ndim > ndim[path] else None for path, leaf in params.items()}
        return jax.vmap(one, in_axes=(axes, 0))(params, x)

    size = sum(spec.size * np.dtype(maker.dtype or spec.dtype).itemsize for spec in maker.target.structure.specs)
    block = block or max(1, MEMORY // max(size, 1))
    if block >= batch:
        return many(each)
    count = -(-batch // block)
    index = np.minimum(np.arange(count * block), batch - 1).reshape(count, block)
    out = jax.lax.map(jax.checkpoint(many), jax.tree.map(lambda v: v[index], each))
    return jax.tree.map(lambda y: y.reshape(count * block, *y.shape[2:])[:batch], out)


def _factors_fit(maker: Maker, z: Any, task: Any, batch: int, pick: Callable[[Task], State], call: Call) -> bool:
    """Whether factors do: tried on shapes, with a batch size that shows where the batch axis goes."""
    if not isinstance(maker.target, LinenTarget) or z is None or z.ndim != 2 or not maker.factored():
        return False
    leaves, tree = jax.tree.flatten((call.args, dict(call.kwargs)))

    def run(z: Array, arrays: list[Any], rngs: Any, bases: dict[str, Array], cut: bool = False) -> Any:
        values = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(values) if _mapped(leaf) else leaf for leaf in leaves])
        factors = {p: v if p not in bases else _rebase(v, bases[p]) for p, v in maker.factors(z, task).items()}
        own = call._replace(args=args, kwargs=kwargs, rngs=rngs)
        return apply_factored(maker, factors, pick(task), own, PROBE, cut)[0]

    def resize(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct((PROBE, *leaf.shape[1:]), leaf.dtype) if _mapped(leaf) else leaf

    given = (resize(z), [resize(leaf) for leaf in leaves if _mapped(leaf)], dict(call.rngs))
    try:
        factors = jax.eval_shape(lambda z: maker.factors(z, task), given[0])
        layers = differing_layers(maker, factors)
        bases = {p: v if isinstance(v, jax.ShapeDtypeStruct) else v.base for p, v in factors.items()}
        bases = {p: v for p, v in bases.items() if p.rpartition("/")[0] in layers}
        out = jax.eval_shape(run, *given, {})
        # Apart from the layers that are known, nothing may read a parameter that differs from sample to sample.
        traced = jax.make_jaxpr(functools.partial(run, cut=True))(*given, bases).jaxpr
        used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))[1]
    except Exception:  # the target may not take another batch size at all; `vmap` then shows what is wrong, if anything
        return False
    return not any(used[len(used) - len(bases) :]) and all(
        jnp.ndim(y) and y.shape[0] == PROBE for y in jax.tree.leaves(out)
    )


def _rebase(value: Any, base: Array) -> Any:
    return base if isinstance(value, jax.Array) else value._replace(base=base)


def _one_state(task: Task) -> bool:
    return not (isinstance(task, jax.Array) and task.ndim)


def _per_sample(value: Any, ndim: int) -> Any:
    return value if isinstance(value, jax.Array) and value.ndim == ndim else None


def _mapped(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray)) and leaf.ndim > 0
