"""A table of what each module of a network costs: parameters, operations, memory. Nothing is computed.

    print(hyperjax.summarize(model, x))

It looks through everything that is written with Linen modules: loops, layers called twice, tied layers, and networks
that a hypernetwork generates.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from hyperjax import budget, paramtree

MARK = re.compile(r"@(\d+)@")  # in the names of a program's operations: which module's they are


@dataclasses.dataclass
class Row:
    """A module, with all the modules that it calls.

    Attributes:
        path: names of the modules from the outermost to this one.
        kind: its class.
        calls: how often it is called, as the program is written: a loop calls its body once, and what is computed for
            nothing is left out. Of several methods, the one that is called most counts.
        total: parameters that it computes with, those of each call counted.
        unique: the same, an array that several calls or modules share counted once.
        param_bytes: of the unique ones.
        flops: floating-point operations of matrix products and convolutions.
        written_bytes: of the results of all its operations, as if none were fused.
    """

    path: tuple[str, ...]
    kind: str
    calls: int = 0
    total: int = 0
    flops: int = 0
    written_bytes: int = 0
    arrays: dict[int, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def unique(self) -> int:
        return sum(array.size for array in self.arrays.values())

    @property
    def param_bytes(self) -> int:
        return sum(array.size * np.dtype(array.dtype).itemsize for array in self.arrays.values())


@dataclasses.dataclass
class Summary:
    """What a network costs; as text, a table.

    Attributes:
        rows: of its modules, in the order in which they are first called; the first is the network.
        trained: its parameters: what an optimizer would train.
        temporary_bytes: what XLA sets aside for intermediate results on this machine; None if it was not compiled.
    """

    rows: list[Row]
    trained: int
    temporary_bytes: int | None = None

    def __str__(self) -> str:
        lines = [("module", "class", "calls", "params", "unique", "param KiB", "MFLOP", "written KiB")]
        for row in self.rows:
            counts = (f"{row.calls:,}", f"{row.total:,}", f"{row.unique:,}", f"{row.param_bytes / 1024:,.1f}")
            name = "  " * (len(row.path) - 1) + row.path[-1]
            lines.append((name, row.kind, *counts, f"{row.flops / 1e6:,.3f}", f"{row.written_bytes / 1024:,.1f}"))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(row)
            )
            for row in (zip(line, widths, strict=True) for line in lines)
        ]
        end = f"{self.trained:,} parameters to train"
        if self.temporary_bytes is not None:
            end += f"; {self.temporary_bytes / 1024:,.1f} KiB of temporary memory once compiled"
        return "\n".join([*text, end])


def summarize(
    module: Any,
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    compiled: bool = False,
    **keywords: Any,
) -> Summary:
    """Returns the costs of a network and of each module in it.

    Args:
        module: any Linen module, a `HyperNetwork` or `Tied` network included.
        *inputs: what it is called with, arrays or `jax.ShapeDtypeStruct`s.
        variables: its variables or their shapes; None makes shapes by `module.init`.
        compiled: compile it, to know the memory of intermediate results.
        **keywords: further arguments of the call, as they are.

    Returns:
        A `Summary`, whose text is a table.

    Raises:
        ValueError: products stand in a `while_loop`, whose steps are not known; see `hyperjax.budget.flops`.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> summary = hj.summarize(nn.Sequential([nn.Dense(100), nn.Dense(10)]), jnp.ones((1, 20)))
        >>> for row in summary.rows:  # print(summary) shows a table
        ...     print("/".join(row.path), row.total, row.flops)
        Sequential 3110 6000
        Sequential/layers_0 2100 4000
        Sequential/layers_1 1010 2000
    """
    if variables is None:
        rest = {
            name: value for name, value in keywords.items() if name not in ("rngs", "mutable", "capture_intermediates")
        }
        start = lambda key, *inputs: module.init({"params": key, **(keywords.get("rngs") or {})}, *inputs, **rest)  # noqa: E731
        variables = jax.eval_shape(start, jax.random.key(0), *inputs)
    calls = _Calls()

    def apply(variables, *inputs):
        with nn.intercept_methods(calls.intercept):
            return module.apply(variables, *inputs, **keywords)

    jaxpr = jax.make_jaxpr(apply)(variables, *inputs).jaxpr
    used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
    budget.flops(apply, variables, *inputs)  # refuses what cannot be counted
    calls.count(used, (), 1)
    temporary = None
    if compiled:
        plain = jax.jit(lambda variables, *inputs: module.apply(variables, *inputs, **keywords))
        analysis = plain.lower(variables, *inputs).compile().memory_analysis()
        temporary = analysis.temp_size_in_bytes if analysis is not None else None
    return Summary(calls.finished(), paramtree.count(variables.get("params", {})), temporary)


class _Call(NamedTuple):
    """A call of a module's method while the network is traced."""

    path: tuple[str, ...]
    method: str
    size: int


class _Calls:
    """The calls of modules while a network is traced, and what its program then does in each."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], Row] = {}
        self.made: list[_Call] = []
        self.used: set[int] = set()
        self.stack: list[tuple[tuple[str, ...], Any]] = []
        self.networks: list[Any] = []  # parameters of the networks that are being called, each within the one before

    def intercept(self, function: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
        module, scope = context.module, context.module.scope
        if scope is None or context.method_name == "setup":
            return function(*arguments, **keywords)
        one = type(module), scope.path  # a loop or branch has a copy of the module
        if self.stack and self.stack[-1][1] == one:
            return function(*arguments, **keywords)
        path = (*(self.stack[-1][0] if self.stack else ()), module.name or type(module).__name__)
        here = module.variables.get("params", {})
        first = not scope.path
        if first:
            self.networks.append(here)
        row = self.rows.setdefault(path, Row(path, type(module).__name__))
        stored = _leaves(_at(self.networks[-1], scope.path))
        row.arrays |= {id(array): array for array in stored or _leaves(here)}
        size = sum(array.size for array in _leaves(here)) or sum(array.size for array in stored)
        self.made.append(_Call(path, context.method_name, size))
        self.stack.append((path, one))
        try:
            with jax.named_scope(f"@{len(self.made) - 1}@"):
                return function(*arguments, **keywords)
        finally:
            self.stack.pop()
            if first:
                self.networks.pop()

    def count(self, jaxpr: core.Jaxpr, outer: tuple[int, ...], times: int) -> None:
        """Adds the operations of a program, `times` as often as they are written, to the calls they are in."""
        for equation in jaxpr.eqns:
            marks = (*outer, *map(int, MARK.findall(str(equation.source_info.name_stack))))
            self.used.update(marks)
            inner = budget.inner_jaxprs(equation)
            if equation.primitive.name == "cond":
                inner = [max(inner, key=budget.count_flops)]
            again = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
            for each in inner:
                self.count(each, marks, again)
            if inner or not marks:
                continue
            flops = times * budget.count_flops_of(equation)
            written = times * sum(_size(var.aval) for var in equation.outvars)
            for row in self._up(self.made[marks[-1]].path):
                row.flops += flops
                row.written_bytes += written

    def finished(self) -> list[Row]:
        """The rows, each with what is in the modules below it."""
        numbers = Counter((self.made[number].path, self.made[number].method) for number in self.used)
        own = {path: (dict(row.arrays), row) for path, row in self.rows.items()}
        for path, (arrays, row) in own.items():
            row.calls = max((number for (of, _), number in numbers.items() if of == path), default=0)
            size = max(call.size for call in self.made if call.path == path)
            total = max(row.calls * size, sum(array.size for array in arrays.values()))
            for above in self._up(path):
                above.total += total
                above.arrays |= arrays
        return list(self.rows.values())

    def _up(self, path: tuple[str, ...]) -> Iterator[Row]:
        """The row of a module, and those of all that it is in."""
        return (self.rows[path[:end]] for end in range(1, len(path) + 1))


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    """The parameters of a module in those of its network; nothing where it has none."""
    for name in path:
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree


def _leaves(params: Any) -> list[Any]:
    """A module's own parameters, without those of modules in it."""
    own = [leaf for leaf in params.values() if not isinstance(leaf, Mapping)] if isinstance(params, Mapping) else []
    return [array for leaf in own for array in jax.tree.leaves(leaf)]


def _size(aval: Any) -> int:
    """Bytes of an array; none of a key's."""
    plain = hasattr(aval, "shape") and not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
    return aval.size * np.dtype(aval.dtype).itemsize if plain else 0
