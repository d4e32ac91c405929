"""Pytrees of parameters as data: specs by path, flattening and rebuilding, counts."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Selector = str | Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What is known of a parameter before it has a value.

    Attributes:
        path: names from the root, joined by "/", as in "Conv_0/kernel".
        shape: its shape.
        dtype: its NumPy dtype.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Memory that its value takes."""
        return self.size * self.dtype.itemsize

    @property
    def floating(self) -> bool:
        """Whether it is a real number that a network can generate."""
        return bool(jnp.issubdtype(self.dtype, jnp.floating))

    @property
    def name(self) -> str:
        """What a generator calls the parameter that makes this one: no name of its own begins so."""
        return "theta." + self.path.replace("/", ".")


@dataclasses.dataclass(frozen=True)
class Structure:
    """The shape of a whole pytree: `specs` in the order of its leaves, and the `treedef` that they hang on."""

    specs: tuple[ParamSpec, ...]
    treedef: Any

    def flatten(self, tree: Any) -> dict[str, Any]:
        """Returns {path: leaf} of a tree of this structure."""
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            raise ValueError(f"the parameters are a tree {treedef}, expected {self.treedef}")
        return {spec.path: leaf for spec, leaf in zip(self.specs, leaves, strict=True)}

    def unflatten(self, leaves: Mapping[str, Any]) -> Any:
        """Returns the tree with these leaves."""
        return jax.tree.unflatten(self.treedef, [leaves[spec.path] for spec in self.specs])


def path_string(keys: Sequence[Any]) -> str:
    """Returns a key path of `jax.tree_util` as "a/b/0"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def structure(tree: Any) -> Structure:
    """Describes a pytree of arrays, shapes (`jax.ShapeDtypeStruct`) or numbers.

    Raises:
        ValueError: two leaves have one path, or a leaf is no array.
    """
    with_path, treedef = jax.tree_util.tree_flatten_with_path(tree)
    specs = []
    for keys, leaf in with_path:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(leaf, (int, float, complex)):
            kind = type(leaf).__name__
            raise ValueError(
                f"the parameters hold a {kind} at {path_string(keys)}, expected arrays only; partition first"
            )
        value = leaf if hasattr(leaf, "shape") else jnp.asarray(leaf)
        specs.append(ParamSpec(path_string(keys), tuple(value.shape), np.dtype(value.dtype)))
    names = [spec.name for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        path = twice.removeprefix("theta.").replace(".", "/")
        raise ValueError(f"two parameters have the path {path!r}; rename a key that has a / or . in it")
    return Structure(tuple(specs), treedef)


def count(tree: Any) -> int:
    """Returns the number of parameters in a pytree."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def select(selector: Selector, paths: Sequence[str]) -> list[str]:
    """Returns the paths that a selector means.

    Args:
        selector: a regular expression, searched for anywhere in the path, or a predicate on the path.
        paths: what to choose from.

    Raises:
        ValueError: the expression does not compile, or nothing is selected.
    """
    if isinstance(selector, str):
        try:
            pattern = re.compile(selector)
        except re.error as error:
            raise ValueError(f"{selector!r} is no regular expression: {error}") from None
        chosen = [path for path in paths if pattern.search(path)]
    else:
        chosen = [path for path in paths if selector(path)]
    if not chosen:
        listed = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
        raise ValueError(f"the pattern {selector!r} selects none of the target's parameters: {listed}")
    return chosen
