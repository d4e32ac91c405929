"""An `flax.nnx` module as a target: its `Param`s are generated, its other variables are state."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from hyperjax.hypernet.target import Target, fitted
from hyperjax.paramtree import structure


class NNXTarget(Target):
    """A copy of an nnx module; the module itself is never changed.

    Random streams are not state: they are seeded by the `rngs` of each call, and a stream that is drawn from without
    a seed is refused, as it would repeat itself. So is state that changes but is not mutable. Modes such as
    `use_running_average` are the module's at the time: evaluate with a second target made from `nnx.view`.

    Args:
        module: the module; its parameters' values are those that generated ones start like.
        params: other values to start from: a nested dict, or an `nnx.State`.
    """

    def __init__(self, module: nnx.Module, params: Any = None):
        parts: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
        self.graph, values, self.rng, rest = parts
        own = nnx.to_pure_dict(values)
        self.template = values
        self.structure = structure(own)
        if params is not None:
            own = fitted(self.structure, nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params)
        self.params = own
        self.kinds = {_collection(kind): _exactly(kind) for kind in _kinds(rest)}
        self.rest = {name: nnx.filter_state(rest, only) for name, only in self.kinds.items()}
        self.state = {name: structure(nnx.to_pure_dict(part)) for name, part in self.rest.items()}

    def init(self, key, args, kwargs):
        return self.params, {name: nnx.to_pure_dict(part) for name, part in self.rest.items()}

    def apply(self, params, state, call):
        module = self.variables(params, state)
        seeds = dict(call.rngs)
        before = _counts(module)
        if "params" in seeds:  # as in Linen, the stream that stands in for all others
            seeds = {name: jax.random.fold_in(seeds["params"], i) for i, (name, _) in enumerate(before)} | seeds
        nnx.reseed(module, **seeds)
        before, kept = _counts(module), self._values(module)
        out = module(*call.args, **call.kwargs)
        for (name, value), (_, old) in zip(_counts(module), before, strict=True):
            if name not in seeds and value is not old:
                raise ValueError(f"the target draws from the random stream {name!r}; pass rngs={{{name!r}: key}}")
        after = self._values(module)
        moved = [name for name in kept if any(a is not b for a, b in zip(after[name], kept[name], strict=True))]
        if any(not call.mutable(name) for name in moved):
            raise ValueError(
                f"the target changes its state; pass mutable={sorted(moved)}, or give it in evaluation mode"
            )
        changed = [name for name in kept if call.mutable(name)]
        return out, {name: nnx.to_pure_dict(nnx.state(module, self.kinds[name])) for name in changed}

    def variables(self, params, state):
        parts = [
            _filled(self.template, params),
            _copy(self.rng),
            *(_filled(self.rest[name], state[name]) for name in self.state),
        ]
        return nnx.merge(self.graph, *parts)

    def _values(self, module: nnx.Module) -> dict[str, list[Any]]:
        def is_variable(v: Any) -> bool:
            return isinstance(v, nnx.Variable)

        states = {name: nnx.state(module, only) for name, only in self.kinds.items()}
        leaves = {name: jax.tree.leaves(state, is_leaf=is_variable) for name, state in states.items()}
        return {name: [variable.get_raw_value() for variable in found] for name, found in leaves.items()}


def _filled(template: nnx.State, values: Any) -> nnx.State:
    """A copy of a state with other values."""
    state = _copy(template)
    nnx.replace_by_pure_dict(state, values)
    return state


def _copy(state: nnx.State) -> nnx.State:
    """New variables, which belong to the transformation that is being traced."""
    return jax.tree.map(lambda leaf: leaf, state)


def _kinds(state: nnx.State) -> list[type]:
    return list(
        dict.fromkeys(type(leaf) for leaf in jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable)))
    )


def _exactly(kind: type) -> Callable[[Any, Any], bool]:
    """A filter: `nnx.Variable` as such would also mean every kind derived from it."""
    return lambda path, variable: type(variable) is kind


def _collection(kind: type) -> str:
    """BatchStat -> "batch_stats", as Linen names it; other types by their name."""
    return "batch_stats" if kind is nnx.BatchStat else kind.__name__.lower()


def _counts(module: nnx.Module) -> list[tuple[str, Any]]:
    found = jax.tree.leaves(nnx.state(module, nnx.RngCount), is_leaf=lambda v: isinstance(v, nnx.Variable))
    return [(variable.tag, variable.get_raw_value()) for variable in found]
