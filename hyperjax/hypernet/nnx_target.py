"""An `flax.nnx` module as a target: its `Param`s are generated, its other variables are state."""

from typing import Any

import jax
from flax import nnx

from hyperjax.hypernet.target import Target, check_params
from hyperjax.paramtree import structure


class NNXTarget(Target):
    """A copy of an nnx module; the module itself is never changed.

    Random streams are not state: they are seeded by the `rngs` of each call, and a stream that is drawn from without
    a seed is refused, as it would repeat itself.

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
            own = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
            check_params(self.structure, own)
        self.params = own
        self.rest = {_collection(kind): nnx.filter_state(rest, kind) for kind in _kinds(rest)}
        self.state = tuple(self.rest)

    def init(self, key, args, kwargs):
        return self.params, {name: nnx.to_pure_dict(part) for name, part in self.rest.items()}

    def apply(self, params, state, call):
        module = self.variables(params, state)
        seeds = dict(call.rngs)
        before = _counts(module)
        if "params" in seeds:  # as in Linen, the stream that stands in for all others
            seeds = {name: jax.random.fold_in(seeds["params"], i) for i, (name, _) in enumerate(before)} | seeds
        nnx.reseed(module, **seeds)
        before = _counts(module)
        out = module(*call.args, **call.kwargs)
        for (name, value), (_, old) in zip(_counts(module), before, strict=True):
            if name not in seeds and value is not old:
                raise ValueError(f"the target draws from the random stream {name!r}; pass rngs={{{name!r}: key}}")
        changed = {
            name: nnx.to_pure_dict(nnx.state(module, kind)) for name, kind in self._names() if call.mutable(name)
        }
        return out, changed

    def variables(self, params, state):
        parts = [
            _filled(self.template, params),
            _copy(self.rng),
            *(_filled(self.rest[name], state[name]) for name in self.state),
        ]
        return nnx.merge(self.graph, *parts)

    def _names(self):
        return [(name, kind) for name, part in self.rest.items() for kind in _kinds(part)]


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


def _collection(kind: type) -> str:
    """BatchStat -> "batch_stats", as Linen names it; other types by their name."""
    return "batch_stats" if kind is nnx.BatchStat else kind.__name__.lower()


def _counts(module: nnx.Module) -> list[tuple[str, Any]]:
    found = jax.tree.leaves(nnx.state(module, nnx.RngCount), is_leaf=lambda v: isinstance(v, nnx.Variable))
    return [(variable.tag, variable.get_raw_value()) for variable in found]
