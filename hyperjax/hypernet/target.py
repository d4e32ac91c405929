"""Targets: any network as a pure function of its parameters, its other state and its inputs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from hyperjax.paramtree import Structure, structure

Array = jax.Array
State = dict[str, Any]  # collection -> pytree, of what is neither parameter nor input


class Call(NamedTuple):
    """What the target is called with: `rngs` by stream, and which collections it may change."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rngs: Mapping[str, Array]
    mutable: Callable[[str], bool]


class Target:
    """A network whose parameters come from outside.

    Attributes:
        structure: its parameters, in order.
        state: names of its other collections, as "batch_stats".
    """

    structure: Structure
    state: tuple[str, ...] = ()

    def init(self, key: Array, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, State]:
        """Returns parameters and state as the network itself would start them."""
        raise NotImplementedError

    def apply(self, params: Any, state: State, call: Call) -> tuple[Any, State]:
        """Returns (outputs, the collections that changed)."""
        raise NotImplementedError

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
        shapes = jax.eval_shape(lambda: self.module.init(jax.random.key(0), *args, **kwargs))
        self.state = tuple(name for name in shapes if name not in ("params", "intermediates"))
        self.structure = structure(shapes.get("params", {}))
        self.params = params
        if params is not None:
            check_params(self.structure, params)

    def init(self, key, args, kwargs):
        variables = dict(self.module.init(key, *args, **kwargs))
        params = variables.pop("params", {}) if self.params is None else self.params
        return params, {name: variables[name] for name in self.state}

    def apply(self, params, state, call):
        mutable = [name for name in (*self.state, "intermediates", "perturbations") if call.mutable(name)]
        out = self.module.apply(
            self.variables(params, state), *call.args, rngs=dict(call.rngs), mutable=mutable or False, **call.kwargs
        )
        return (out[0], dict(out[1])) if mutable else (out, {})

    def variables(self, params, state):
        return {"params": params, **state}


class FunctionTarget(Target):
    """A pure function apply(params, *inputs): Haiku, Equinox, or nothing but JAX.

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
        self._init = init or (lambda key: params)

    def init(self, key, args, kwargs):
        return self._init(key), {}

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


def check_params(expected: Structure, params: Any) -> None:
    """Raises ValueError for parameters of another structure or with other shapes."""
    given = structure(params)
    ours, theirs = {s.path: s.shape for s in expected.specs}, {s.path: s.shape for s in given.specs}
    for path in ours.keys() | theirs.keys():
        if ours.get(path) != theirs.get(path):
            raise ValueError(
                f"params has {path} {theirs.get(path, 'missing')}, expected {ours.get(path, 'no such parameter')}"
            )


def _no_init(init: Any, what: str) -> None:
    if init is not None:
        raise ValueError(f"init is for functions; {what} initializes itself, or starts from params=TREE")


def _is_nnx(model: Any) -> bool:
    from flax import nnx

    return isinstance(model, nnx.Module)
