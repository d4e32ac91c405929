"""From a trained network to one that shares layers, and on from there.

    tied, start = convert(model, params, Maps.same(layer_map), tokens)             # then train it; distillation helps
    tied, start = convert(model, params, maps, tokens, through=LowRank(16))        # nearer to the original
    plain = tied.untie({"params": start})                                          # back to weights for every layer

Sharing saves parameters and what goes with them (memory, optimiser, checkpoints), not operations.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperjax.sharing.layer_maps import LayerMap, Maps, canonical, check_map, members
from hyperjax.sharing.layer_ties import KINDS, layer_ties
from hyperjax.sharing.links import Map
from hyperjax.sharing.similarity import align
from hyperjax.sharing.tie import Tied, tie

Array = jax.Array
TRANSFERS = ("mean", "first", "last", "stepwise")


def convert(
    model: nn.Module,
    params: Any,
    maps: Maps,
    *inputs: Any,
    transfer: str = "mean",
    through: Map | None = None,
    aligned: bool = False,
    prefix: str = "stack/",
    key: Array | None = None,
) -> tuple[Tied, Any]:
    """Ties layers of a trained network and gives the shared weights their start.

    Args:
        model: a `Decoder`, an `Encoder`, or any network whose layers are called so.
        params: its parameters.
        maps: which layers share.
        *inputs: example inputs.
        transfer: what shared weights become: the "mean" of the layers that use them; the "first" or "last" of these;
            or "stepwise", of U sets number u that of layer round(u (L - 1) / (U - 1)), whoever uses it.
        through: as of `layer_ties`: None is strict sharing, whose parameters are also those of the same network with
            the config `maps.on(config)`, where each map is `canonical`. `LowRank` fits what is left of each layer by
            its SVD.
        aligned: whether heads and hidden units are first put in the order of their group's first layer.
        prefix: of the layers' paths.
        key: for maps that start at random, as `ByEmbedding`.

    Returns:
        The tied network and its parameters.

    Raises:
        ValueError: an unknown transfer, a map that does not fit, or parameters of another network.

    Reference: Bae et al., "Relaxed Recursive Transformers" (2024), sections 2.2 and 2.3.
    """
    if transfer not in TRANSFERS:
        raise ValueError(f"transfer is {transfer!r}, expected one of {', '.join(TRANSFERS)}")
    for kind, layer_map in maps._asdict().items():
        if layer_map is not None:
            check_map(layer_map, len(layer_map), f"the {kind} map")
    maps = Maps(*(None if layer_map is None else canonical(layer_map) for layer_map in maps))
    tied = tie(model, layer_ties(maps, through, prefix), *inputs)
    if aligned:
        params = align_groups(params, maps, prefix)
    if transfer == "mean":
        return tied, tied.fit(params, key=key)
    flat, chosen = (
        flatten_dict(params, sep="/"),
        {kind: {} if m is None else selected(m, transfer) for kind, m in maps._asdict().items()},
    )

    def pick(source: str, parts: Mapping[str, Array]) -> Array:
        path = next(iter(parts))
        for kind, names in KINDS.items():
            found = re.fullmatch(rf"({re.escape(prefix)}(?:{names})_)(\d+)(/.+)", path)
            if found:
                return flat[f"{found[1]}{chosen[kind][int(found[2])]}{found[3]}"]
        raise ValueError(f"{path} belongs to no layer")

    return tied, tied.fit(params, pick, key)


def selected(layer_map: LayerMap, transfer: str) -> dict[int, int]:
    """The layer that each set of weights is taken from; `transfer` is "first", "last" or "stepwise"."""
    groups = members(canonical(layer_map))
    if transfer == "stepwise":
        return dict(zip(groups, stepwise(len(layer_map), len(groups)), strict=True))
    return {number: layers[0 if transfer == "first" else -1] for number, layers in groups.items()}


def stepwise(layers: int, sets: int) -> tuple[int, ...]:
    """The layers to keep of L if U are wanted, the first and last among them: round(u (L - 1) / (U - 1)).

    Raises:
        ValueError: fewer than 1 set, or more than there are layers.
    """
    if not 1 <= sets <= layers:
        raise ValueError(f"{sets} sets of {layers} layers, expected 1 to {layers}")
    return tuple(round(u * (layers - 1) / max(1, sets - 1)) for u in range(sets))


def align_groups(params: Any, maps: Maps, prefix: str = "stack/") -> Any:
    """The same network, heads and hidden units of each group's layers in the order of its first.

    Args:
        params: of the network.
        maps: which layers share.
        prefix: of the layers' paths.

    Returns:
        As `params`.

    Raises:
        ValueError: layers of a group differ in size, or have other weights than attention and feed-forward networks.
    """
    flat = flatten_dict(params, sep="/")
    for kind, layer_map in maps._asdict().items():
        if layer_map is None or kind == "norm":
            continue
        for first, *rest in members(layer_map).values():
            for l in rest:
                one, other = (_layer(flat, f"{prefix}{kind}_{n}/") for n in (l, first))
                flat |= {f"{prefix}{kind}_{l}/{name}": value for name, value in align(one, other).items()}
    return unflatten_dict(flat, sep="/")


def soft_tie(params: Any, maps: Maps, prefix: str = "stack/") -> Array:
    """How far layers are from the mean of their group: sum |W - mean|^2 / sum |W|^2, over all that will be shared.

    Added to the loss with a weight that rises, as `optax.linear_schedule(0, w, steps)`, it leads an untied network to
    where tying it changes nothing.

    Args:
        params: of the untied network.
        maps: which layers shall share.
        prefix: of the layers' paths.

    Returns:
        A scalar, differentiable in `params`; 0 where the layers of each group are equal.
    """
    flat = flatten_dict(params, sep="/")
    apart, whole = jnp.zeros(()), jnp.zeros(())
    for kind, layer_map in maps._asdict().items():
        for group in members(layer_map).values() if layer_map else ():
            if len(group) == 1:
                continue
            layers = [_matching(flat, kind, l, prefix) for l in group]
            for values in zip(*layers, strict=True):
                mean = sum(values) / len(values)
                apart += sum(jnp.square(value - mean).sum() for value in values)
                whole += sum(jnp.square(value).sum() for value in values)
    return apart / jnp.maximum(whole, 1e-30)


def replan(old: Tied, new: Tied, params: Any, opt_state: Any) -> tuple[Any, Any]:
    """Goes on training under other ties, with what the optimiser knows.

    Args:
        old, new: the same network, tied in two ways, by maps without parameters.
        params: of `old`.
        opt_state: Optax's state of them; every tree in it that is one of `params` is carried over: what was shared is
            copied to each use, and what will be shared becomes the mean.

    Returns:
        Parameters and state of `new`.

    Raises:
        ValueError: a map has parameters of its own.
    """
    for link in (*old.links, *new.links):
        if isinstance(link.through, nn.Module):
            raise ValueError(
                f"{link.path} is tied by {type(link.through).__name__}, whose parameters no other plan has; untie and "
                "start the optimiser anew"
            )
    tree: Any = jax.tree.structure(params)

    def like(part: Any) -> bool:
        return bool(jax.tree.structure(part) == tree)

    def carried(part: Any) -> Any:
        return new.fit(old.expand(part)) if like(part) else part

    return carried(params), jax.tree.map(carried, opt_state, is_leaf=like)


def _layer(flat: Mapping[str, Any], start: str) -> dict[str, Any]:
    return {path.removeprefix(start): value for path, value in flat.items() if path.startswith(start)}


def _matching(flat: Mapping[str, Array], kind: str, layer: int, prefix: str) -> list[Array]:
    pattern = re.compile(rf"{re.escape(prefix)}(?:{KINDS[kind]})_{layer}/.+")
    return [value for path, value in sorted(flat.items()) if pattern.fullmatch(path)]
