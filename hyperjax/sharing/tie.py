"""`tie`: one parameter of a network for several of its uses; any Linen module, as it is.

    tied = tie(model, [Tie("decoder/kernel", to="embed/embedding", through=jnp.transpose)], tokens)
    variables = tied.init(key, tokens)            # decoder/kernel is not in there
    y = tied.apply(variables, tokens)             # its gradient is the sum over both uses
    plain = tied.untie(variables)                 # model.apply(plain, tokens) is y

Parameters are a plain tree without what is tied, so an optimiser, a checkpoint and a count see each once.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperjax.sharing.links import Link, Tie, resolve

Array = jax.Array
Pick = Callable[[str, dict[str, Array]], Array]  # path of a source and what it is tied to -> its value
SHARED = "shared_maps"  # where parameters stand that maps share


class Tied:
    """A Linen module some of whose parameters are made from others; `tie` makes one.

    Attributes:
        module: the network by itself.
        links: the tied parameters, each after its source.
        uses: path of a source -> paths of all parameters that are made from it, itself first if the network has it.
    """

    def __init__(self, module: nn.Module, links: Sequence[Link], shapes: Mapping[str, Any], made: Mapping[str, Any]):
        self.module, self.links = module, tuple(links)
        self._shapes, self._made = dict(shapes), dict(made)
        tied = {link.path for link in links}
        self._kept = [path for path in shapes if path not in tied] + list(made)
        self.uses: dict[str, list[str]] = {}
        for link in links:
            root = link.source
            while root in tied:
                root = next(each.source for each in links if each.path == root)
            self.uses.setdefault(root, [root] if root in shapes else []).append(link.path)

    def init(self, key: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Variables as `module.init` starts them, without what is tied and with what maps add.

        Args:
            key: PRNG key, or keys by stream, of which "params" is one.
            *args, **kwargs: inputs of the module.
        """
        variables = dict(self.module.init(key, *args, **kwargs))
        own = key["params"] if isinstance(key, Mapping) else key
        return {**variables, "params": self._start(variables["params"], own, None)}

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `module.apply`: it takes `method`, `rngs`, and `mutable` for collections other than "params"."""
        return self.module.apply({**variables, "params": self.expand(variables["params"])}, *args, **kwargs)

    def replace(self, module: Any) -> "Tied":
        """The same ties of another module with the same parameters, such as one that computes in another precision."""
        new = copy.copy(self)
        new.module = module
        return new

    def expand(self, params: Any) -> Any:
        """The module's own parameters, tied ones computed: a function of `params` that can be differentiated.

        Raises:
            ValueError: parameters are missing, or more than there should be.
        """
        flat = flatten_dict(params, sep="/")
        missing = [path for path in self._kept if path not in flat]
        if missing:
            raise ValueError(f"the parameters lack {', '.join(missing[:5])}; `fit` makes them from those of the module")
        tied = next((link.path for link in self.links if link.path in flat), None)
        if tied:
            raise ValueError(f"{tied} is tied and has a value of its own; `fit` makes tied parameters from untied ones")
        found = {path: flat[path] for path in self._kept}
        for link in self.links:
            own, shared = _below(params, link.path), _below(params, shared_path(link.source))
            found[link.path] = link.value(found[link.source], own, shared)
        return unflatten_dict({path: found[path] for path in self._shapes}, sep="/")

    def untie(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of `module` that compute the same: every parameter a copy of its own."""
        copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), self.expand(variables["params"]))
        return {**variables, "params": copied}

    def fit(self, params: Any, pick: Pick | None = None, key: Array | None = None) -> Any:
        """Tied parameters that come near untied ones, as those of a trained network.

        Args:
            params: of `module`.
            pick: what a source becomes, of its path and {path: part} of all that is tied to it without a change of
                shape, itself included, in the order of layers. None is their mean.
            key: for parameters of maps that cannot be fitted; needed only by those.

        Returns:
            Parameters for `apply`. Maps with a method `fit(theta, value)` fit theirs to each use.

        Raises:
            ValueError: `params` are not those of the module.
        """
        return self._start(params, key, pick or _mean)

    def labels(self, params: Any) -> Any:
        """Labels each parameter "shared" or "private", for `optax.partition` to give each group its learning rate."""
        flat = flatten_dict(params, sep="/")
        shared = lambda path: path in self.uses or path.startswith(SHARED + "/")  # noqa: E731
        return unflatten_dict({path: "shared" if shared(path) else "private" for path in flat}, sep="/")

    def _start(self, params: Any, key: Array | None, pick: Pick | None) -> Any:
        full = flatten_dict(params, sep="/")
        for path, shape in self._shapes.items():
            if path not in full or full[path].shape != shape.shape:
                got = "nothing" if path not in full else f"shape {full[path].shape}"
                raise ValueError(f"the module's {path} has shape {shape.shape}, and the parameters have {got} there")
        direct: dict[str, dict[str, Array]] = {}
        for link in sorted(self.links, key=lambda link: _natural(link.path)):
            if link.through is None or isinstance(link.through, nn.Module):
                direct.setdefault(link.source, {})[link.path] = link.part(full[link.path])
        out: dict[str, Any] = {path: full[path] for path in self._kept if path in full}
        for source in self._kept:
            parts = direct.get(source, {})
            if source in self._made and not parts:
                raise ValueError(f"{source} is new and every map to it may change shapes; tie to a parameter instead")
            if parts and (pick is not None or source not in full):
                own = {source: full[source]} if source in full else {}
                parts = dict(sorted({**own, **parts}.items(), key=lambda item: _natural(item[0])))
                out[source] = next(iter(parts.values())) if pick is None else pick(source, parts)
        values = dict(out)
        for n, link in enumerate(self.links):
            own, shared = _own(link, values[link.source], link.part(full[link.path]), key, n, pick is not None)
            place = shared_path(link.source)
            shared = {name: out.get(f"{place}/{name}", value) for name, value in flatten_dict(shared, sep="/").items()}
            out |= {f"{place}/{name}": value for name, value in shared.items()}
            own = {"map": own, **link.rest(full[link.path])}
            values[link.path] = link.value(values[link.source], own, unflatten_dict(shared, sep="/"))
            out |= {f"{link.path}/{name}": value for name, value in flatten_dict(own, sep="/").items()}
        return unflatten_dict(out, sep="/")


def tie(module: nn.Module, ties: Sequence[Tie], *inputs: Any, **keyword_inputs: Any) -> Tied:
    """Ties parameters of a module to one another; nothing is computed.

    Args:
        module: any Linen module; its parameters keep their paths.
        ties: what is made from what.
        *inputs, **keyword_inputs: example inputs of the module, for the shapes of its parameters.

    Returns:
        The tied network.

    Raises:
        ValueError: a pattern fits nothing, a parameter is tied twice or in a circle, or shapes do not fit.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from hyperjax import sharing
        >>> model, x = nn.Sequential([nn.Dense(8, use_bias=False), nn.Dense(4, use_bias=False)]), jnp.ones((1, 4))
        >>> tied = sharing.tie(model, [sharing.Tie("layers_1/kernel", to="layers_0/kernel", through=jnp.transpose)], x)
        >>> variables = tied.init(jax.random.key(0), x)
        >>> jax.tree.map(jnp.shape, variables["params"])  # its gradient is the sum over both uses
        {'layers_0': {'kernel': (4, 8)}}
        >>> tied.apply(variables, x).shape
        (1, 4)
    """
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **keyword_inputs))
    flat = flatten_dict(shapes.get("params", {}), sep="/")
    links, made = resolve(ties, flat)
    return Tied(module, links, flat, made)


def shared_path(source: str) -> str:
    """Where what maps share for a source stands in the tree."""
    return f"{SHARED}/{source.replace('/', '.')}"


def _own(link: Link, theta: Array, value: Array, key: Array | None, number: int, fitting: bool) -> tuple[Any, Any]:
    """The map's own and shared parameters."""
    if not isinstance(link.through, nn.Module):
        return {}, {}
    fold = jax.random.fold_in(jax.random.key(0) if key is None else key, number)
    variables = link.through.init(fold, theta)
    own, shared = variables.get("params", {}), variables.get("shared", {})
    fit = getattr(link.through, "fit", None)
    return (fit(theta, value) if fitting and fit else own), shared


def _mean(source: str, parts: dict[str, Array]) -> Array:
    values = list(parts.values())
    return jnp.stack(values).mean(0).astype(values[0].dtype)


def _below(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree if isinstance(tree, Mapping) else {}


def _natural(path: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path)]
