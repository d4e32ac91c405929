"""Trained functions as bytes that JAX alone runs: exported to StableHLO, with any batch size, for several platforms.

from hyperjax.serving import export
path.write_bytes(export(lambda x: model.apply(variables, x), x))
# elsewhere, in a process that has neither this library nor Flax:
run = jax.export.deserialize(bytearray(path.read_bytes())).call
y = run(x)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import export as jax_export

PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN = (*PLATFORMS, "rocm")
Axes = Sequence[str]


def export(
    function: Callable[..., Any],
    *examples: Any,
    free: Axes | Sequence[Axes] = ("batch",),
    most: Mapping[str, int] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """Serialises a pure function, with the arrays that it closes over inside.

    Args:
        function: of pytrees of arrays.
        *examples: pytrees of arrays like those that it will be called with.
        free: names of the leading axes of every array whose lengths may differ from call to call; axes of one name are
            of one length. Or such names for each example: `[("batch", "length"), ("batch",)]`. () fixes all lengths.
        most: largest lengths of axes, by name, where the function asks: of a table of positions, for example.
        platforms: what it shall run on: "cpu", "cuda", "rocm", "tpu".

    Returns:
        The bytes of `jax.export.Exported.serialize`.

    Raises:
        ValueError: an example has fewer axes than are free, axes of one name differ, `most` names no free axis, or a
            platform is unknown.
    """
    if unknown := [name for name in platforms if name not in KNOWN]:
        raise ValueError(f"platform {unknown[0]!r} is unknown, expected some of {', '.join(KNOWN)}")
    if not platforms:
        raise ValueError(f"platforms are empty, expected some of {', '.join(KNOWN)}")
    each: Any = [free] * len(examples) if all(isinstance(name, str) for name in free) else free
    if len(each) != len(examples):
        raise ValueError(f"free names the axes of {len(each)} examples, but there are {len(examples)}")
    lengths: dict[str, int] = {}
    for names, example in zip(each, examples, strict=True):
        for leaf in jax.tree.leaves(example):
            if len(leaf.shape) < len(names):
                raise ValueError(f"an input has shape {leaf.shape}, too few axes for free {', '.join(names)}")
            for name, length in zip(names, leaf.shape, strict=False):
                if lengths.setdefault(name, length) != length:
                    raise ValueError(
                        f"inputs have {lengths[name]} and {length} along {name}, expected one length; or name it apart"
                    )
    if strange := [name for name in most or {} if name not in lengths]:
        raise ValueError(f"most has {strange[0]!r}, which is no free axis, expected some of {', '.join(lengths)}")
    scope = jax_export.SymbolicScope([f"{name} <= {length}" for name, length in (most or {}).items()])
    symbols = {name: jax_export.symbolic_shape(name, scope=scope)[0] for name in lengths}

    def shape(names: Axes, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*(symbols[name] for name in names), *leaf.shape[len(names) :]), leaf.dtype)

    shapes = [
        jax.tree.map(lambda leaf, names=names: shape(names, leaf), example)
        for names, example in zip(each, examples, strict=True)
    ]
    return bytes(jax_export.export(jax.jit(function), platforms=tuple(platforms))(*shapes).serialize())
