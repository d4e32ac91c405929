"""Targets: any network as a pure function of its parameters, its other state and its inputs."""

import abc
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.core.scope import in_filter, subtract_filters

from hyperjax.paramtree import Structure, structure

Array = jax.Array
State = dict[str, Any]  # collection -> pytree, of what is neither parameter nor input


class Call(NamedTuple):
    """What the target is called with: `rngs` by stream, and a Flax filter of the collections it may change."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rngs: Mapping[str, Array]
    filter: Any = False

    def mutable(self, collection: str) -> bool:
        """Whether a collection may change."""
        return in_filter(self.filter, collection)


class Target(abc.ABC):
    """A network whose parameters come from outside.

    Attributes:
        structure: its parameters, in order.
        state: its other collections, as "batch_stats", and their structure.
    """

    structure: Structure
    state: Mapping[str, Structure] = MappingProxyType({})

    @abc.abstractmethod
    def init(self, key: Array, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, State]:
        """Returns parameters and state as the network itself would start them."""

    @abc.abstractmethod
    def apply(self, params: Any, state: State, call: Call) -> tuple[Any, State]:
        """Returns (outputs, the collections that changed)."""

    def variables(self, params: Any, state: State) -> Any:
        """Returns what the network by itself is applied with."""
        return params


class LinenTarget(Target):
    """A Flax Linen module.

    Args:
        module: any module that can be applied by itself.
        args, kwargs: inputs for its shapes; they are not computed with.
        params: values that its parameters start from, in place of its initializers'.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], params: Any = None):
        self.module = module.clone(parent=None, name=None)
        leaves, tree = jax.tree.flatten((args, dict(kwargs)))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]

        def start(key: Array, arrays: list[Any]) -> Any:
            values = iter(arrays)
            args, kwargs = jax.tree.unflatten(tree, [next(values) if _is_array(leaf) else leaf for leaf in leaves])
            return self.module.init(key, *args, **kwargs)

        shapes = jax.eval_shape(start, jax.random.key(0), arrays)
        self.state = {name: structure(v) for name, v in shapes.items() if name not in ("params", "intermediates")}
        self.structure = structure(shapes.get("params", {}))
        self.params = None if params is None else fitted(self.structure, params)
        self.identity = (_hashable(module), self.structure, id(params))
        self.given = params  # kept, so that no other tree gets its id

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.identity == self.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def init(self, key, args, kwargs):
        variables = dict(self.module.init(key, *args, **kwargs))
        params = variables.pop("params", {}) if self.params is None else self.params
        return params, {name: variables[name] for name in self.state}

    def apply(self, params, state, call):
        variables, rngs = self.variables(params, state), dict(call.rngs)
        if call.filter is False:
            return self.module.apply(variables, *call.args, rngs=rngs, **call.kwargs), {}
        mutable = subtract_filters(call.filter, ["params", "frozen"])
        out, changed = self.module.apply(variables, *call.args, rngs=rngs, mutable=mutable, **call.kwargs)
        return out, dict(changed)

    def variables(self, params, state):
        return {"params": params, **state}


class FunctionTarget(Target):
    """A pure function apply(params, *inputs): Haiku, Equinox, or nothing but JAX. PRNG keys are inputs like others.

    Args:
        function: apply(params, *inputs, **inputs) -> outputs.
        params: values that its parameters start from, or their shapes if `init` is given.
        init: key -> parameters.
    """

    def __init__(self, function: Callable[..., Any], params: Any, init: Callable[[Array], Any] | None = None):
        if params is None and init is None:
            raise ValueError("a function has no parameters of its own; give params=TREE or init=KEY -> TREE")
        if params is None:
            params = jax.eval_shape(init, jax.random.key(0))  # type: ignore[arg-type]
        self.function, self.structure = function, structure(params)
        if init is None and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            raise ValueError("params holds shapes without values; give arrays, or init=KEY -> TREE as well")
        self.start, self.params = init, params

    def init(self, key, args, kwargs):
        return (self.params if self.start is None else self.start(key)), {}

    def apply(self, params, state, call):
        return self.function(params, *call.args, **call.kwargs), {}


def as_target(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], params: Any = None, init: Any = None):
    """Returns the `Target` for a Linen module, an nnx module or a function.

    Raises:
        ValueError: it is none of these, or has no parameters.
    """
    target: Target
    if isinstance(model, nn.Module):
        _no_init(init, "a Linen module")
        target = LinenTarget(model, args, kwargs, params)
    elif _is_nnx(model):
        from hyperjax.hypernet.nnx_target import NNXTarget

        _no_init(init, "an nnx module")
        target = NNXTarget(model, params)
    elif callable(model):
        target = FunctionTarget(model, params, init)
    else:
        raise ValueError(
            f"the target is {type(model).__name__}, expected a Linen module, an nnx module, or a function of "
            "(params, *inputs)"
        )
    if not target.structure.specs:
        raise ValueError(f"the target {type(model).__name__} has no parameters to generate")
    return target


def fitted(expected: Structure, params: Any) -> Any:
    """Returns parameters in the containers that the target has, as dicts for `FrozenDict`s.

    Raises:
        ValueError: a parameter is missing, of another shape, or one too many.
    """
    given = structure(params)
    ours, theirs = {s.path: s.shape for s in expected.specs}, {s.path: s.shape for s in given.specs}
    for path in {**ours, **theirs}:
        if ours.get(path) != theirs.get(path):
            raise ValueError(
                f"params has {path} {theirs.get(path, 'missing')}, expected {ours.get(path, 'no such parameter')}"
            )
    return expected.unflatten(dict(zip(theirs, jax.tree.leaves(params), strict=True)))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _hashable(module: nn.Module) -> Any:
    try:
        hash(module)
    except TypeError:  # a field such as a list
        return id(module)
    return module


def _no_init(init: Any, what: str) -> None:
    if init is not None:
        raise ValueError(f"init is for functions; {what} initializes itself, or starts from params=TREE")


def _is_nnx(model: Any) -> bool:
    from flax import nnx

    return isinstance(model, nnx.Module)
