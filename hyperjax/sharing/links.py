"""From ties, which are patterns, to links between parameters, checked before anything is computed.

A link makes one parameter, or a block of it, from another; what is left of it beside the block are its `rest`s.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Map = Callable[[Array], Array] | nn.Module
Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Tie:
    r"""What makes parameters of a network from another one.

        Tie("decoder/kernel", to="embed/embedding", through=jnp.transpose)
        Tie(r"layer_[1-5]/(.*)", to=r"layer_0/\1")                             # whole layers
        Tie("student/conv/kernel", to="teacher/conv/kernel", through=lambda w: w[..., :8], part=np.s_[..., :8])

    Attributes:
        path: regular expression of the whole path of what is tied, as "Conv_0/kernel".
        to: path of the source, with \1 for what the first group found. A path that the network does not have is a new
            parameter, of the shape and with the start of the first that is tied to it.
        through: the map from the source to the tied parameter, or to its part: a function of an array, or a Linen
            module called with it, whose "params" belong to this tie and whose "shared" variables to all ties with its
            source (`hyperjax.sharing.maps`). None is the identity.
        part: slices of the tied parameter that the map makes, as np.s_[..., :8]; the rest is its own. None is all.
    """

    path: str
    to: str
    through: Map | None = None
    part: Any = None


@dataclasses.dataclass(frozen=True)
class Link:
    """One tied parameter: its path and shape, its source, the map, and the bounds of the part along each axis."""

    path: str
    shape: jax.ShapeDtypeStruct
    source: str
    through: Map | None
    bounds: tuple[tuple[int, int], ...]

    @property
    def rests(self) -> list[int]:
        """The axes along which something is left beside the part."""
        return [a for a, (start, stop) in enumerate(self.bounds) if stop - start < self.shape.shape[a]]

    def mapped(self, theta: Array, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Array:
        """f(theta), with the map's own parameters and those it shares."""
        if self.through is None:
            return theta
        if isinstance(self.through, nn.Module):
            made: Any = self.through.apply({"params": own, "shared": shared}, theta)
            return made
        return self.through(theta)

    def value(self, theta: Array, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Array:
        """The tied parameter, from its source, what it has of its own, and what the map shares."""
        value = self.mapped(theta, own.get("map", {}), shared).astype(self.shape.dtype)
        for a in reversed(self.rests):
            start, rest = self.bounds[a][0], own[f"rest_{a}"]
            before, after = (
                jax.lax.slice_in_dim(rest, 0, start, axis=a),
                jax.lax.slice_in_dim(rest, start, None, axis=a),
            )
            value = jnp.concatenate([before, value, after], a)
        return value

    def rest(self, value: Array) -> dict[str, Array]:
        """What of a value is not made by the map: along each axis a box, of the part's size in the axes before it."""
        found = {}
        for a in self.rests:
            box = value[tuple(slice(*bound) for bound in self.bounds[:a])]
            start, stop = self.bounds[a]
            ends = jax.lax.slice_in_dim(box, 0, start, axis=a), jax.lax.slice_in_dim(box, stop, None, axis=a)
            found[f"rest_{a}"] = jnp.concatenate(ends, a)
        return found

    def part(self, value: Array) -> Array:
        """What of a value the map makes."""
        return value[tuple(slice(*bound) for bound in self.bounds)]


def resolve(ties: Sequence[Tie], shapes: Shapes) -> tuple[list[Link], dict[str, jax.ShapeDtypeStruct]]:
    """Finds the links, each after those it needs, and the shapes of sources that the network does not have.

    Raises:
        ValueError: a pattern is none or fits nothing, a parameter is tied twice or to itself in a circle, or what the
            map makes does not fit.
    """
    links: dict[str, Link] = {}
    for tie in ties:
        try:
            pattern = re.compile(tie.path)
            found = [(path, match) for path in shapes if (match := pattern.fullmatch(path))]
            pairs = [(path, source) for path, match in found if (source := match.expand(tie.to)) != path]
        except (re.error, IndexError) as error:
            raise ValueError(f"the tie of {tie.path!r} to {tie.to!r} is no regular expression: {error}") from None
        if not pairs:
            listed = ", ".join(list(shapes)[:8]) + (", ..." if len(shapes) > 8 else "")
            raise ValueError(
                f"the tie of {tie.path!r} fits no parameter{' but its own source' * bool(found)}; the pattern is of a "
                f"whole path, and the paths are {listed}"
            )
        for path, source in pairs:
            if path in links:
                raise ValueError(f"{path} is tied twice, to {links[path].source} and to {source}; choose one")
            links[path] = Link(path, shapes[path], source, tie.through, _bounds(tie.part, shapes[path].shape, path))
    made: dict[str, jax.ShapeDtypeStruct] = {}
    for link in links.values():
        if link.source not in shapes and link.source not in made:
            _check_new(link.source, shapes)
            made[link.source] = jax.eval_shape(link.part, link.shape)
    ordered = _ordered(links)
    for link in ordered:
        _check_shape(link, {**shapes, **made}[link.source])
    return ordered, made


def _bounds(part: Any, shape: tuple[int, ...], path: str) -> tuple[tuple[int, int], ...]:
    given = (part if isinstance(part, tuple) else (part,)) if part is not None else (...,)
    if given.count(...) > 1 or len(given) - given.count(...) > len(shape):
        raise ValueError(f"the part {part} has more axes than {path}, whose shape is {shape}")
    at = given.index(...) if ... in given else len(given)
    whole = (slice(None),) * (len(shape) - len(given) + (... in given))
    slices, bounds = (*given[:at], *whole, *given[at + 1 :]), []
    for each, size in zip(slices, shape, strict=True):
        start, stop, step = each.indices(size) if isinstance(each, slice) else (0, 0, 1)
        if step != 1 or stop <= start or (each.stop or 0) > size:
            raise ValueError(f"the part {part} of {path}, whose shape is {shape}, expected slices within it, step 1")
        bounds.append((start, stop))
    return tuple(bounds)


def _check_new(source: str, shapes: Shapes) -> None:
    above = next((path for path in shapes if path.startswith(source + "/") or source.startswith(path + "/")), None)
    if above or not all(source.split("/")):
        raise ValueError(
            f"the source {source!r} is no parameter of the network and cannot be a new one"
            + (f": {above} is in its way" if above else "")
        )


def _ordered(links: Mapping[str, Link]) -> list[Link]:
    done: dict[str, Link] = {}

    def visit(path: str, seen: tuple[str, ...]) -> None:
        if path in seen:
            circle = " -> ".join((*seen[seen.index(path) :], path))
            raise ValueError(f"the ties go in a circle: {circle}; leave one of these parameters its own")
        if path in links and path not in done:
            visit(links[path].source, (*seen, path))
            done[path] = links[path]

    for path in links:
        visit(path, ())
    return list(done.values())


def _check_shape(link: Link, source: jax.ShapeDtypeStruct) -> None:
    wanted = tuple(stop - start for start, stop in link.bounds)
    named = f"{link.path} {'in part ' * bool(link.rests)}has shape {wanted}"
    through = link.through
    try:
        if isinstance(through, nn.Module):
            got = jax.eval_shape(lambda theta: through.init_with_output(jax.random.key(0), theta)[0], source)
        else:
            got = jax.eval_shape(lambda theta: link.mapped(theta, {}, {}), source)
    except (TypeError, ValueError, IndexError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(
            f"{named}; its map cannot be applied to {link.source} of shape {source.shape}: {message}"
        ) from None
    if getattr(got, "shape", None) != wanted:
        how = "" if link.through is None else "what the map makes of "
        raise ValueError(
            f"{named}, but {how}{link.source} has shape {getattr(got, 'shape', got)}; tie a part, or map it to fit"
        )
