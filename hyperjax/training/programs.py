"""What a compiled program does, read from XLA's text of it: what its devices exchange, and how much they multiply.

XLA's own cost analysis counts the body of a loop once; here everything counts as often as it runs.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

BITS = {
    "pred": 8,
    "f8": 8,
    "s8": 8,
    "u8": 8,
    "bf16": 16,
    "f16": 16,
    "s16": 16,
    "u16": 16,
    "s64": 64,
    "u64": 64,
    "f64": 64,
}
SHAPE = re.compile(r"([a-z]+[0-9]*)\w*\[([0-9,]*)\]")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """An exchange between devices.

    Attributes:
        kind: as XLA calls it, such as `all-reduce`.
        size: bytes of its result on each device.
        group: number of devices that take part together.
        times: how often it runs.
    """

    kind: str
    size: int
    group: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, in all runs of it, by the algorithms on a ring."""
        part = (self.group - 1) / max(1, self.group)
        each = {"all-reduce": 2 * part, "reduce-scatter": self.group - 1, "collective-permute": 1}
        return self.times * self.size * each.get(self.kind, part)


class Operation(NamedTuple):
    """A line of a program: its name, the text of its result's shape, what it does, to what, and how often."""

    name: str
    shape: str
    kind: str
    rest: str
    times: int


def operations(text: str) -> Iterator[tuple[Operation, dict[str, str]]]:
    """Every operation of a program that runs, with the shapes by name of the computation that it stands in.

    Args:
        text: `compiled.as_text()`.
    """
    computations: dict[str, list[re.Match]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if (header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)) is not None:
            lines = computations[header.group(2)] = []
            entry = header.group(2) if header.group(1) else entry
        elif (found := OPERATION.match(line)) is not None:
            lines.append(found)
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        shapes = {found.group(1): found.group(2) for found in computations[name]}
        for found in computations[name]:
            operation = Operation(found.group(1), found.group(2), found.group(3), found.group(4), times)
            yield operation, shapes
            trips = (
                re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.rest) if operation.kind == "while" else None
            )
            for inner in re.findall(r"(?:calls|body|to_apply|branch_computations)=\{?%?([\w.\-]+)", operation.rest):
                waiting.append((inner, times * int(trips.group(1)) if trips else times))


def collectives(text: str, devices: int) -> list[Collective]:
    """What the devices of a program exchange.

    Args:
        text: `compiled.as_text()`.
        devices: how many it runs on.
    """
    found = []
    for operation, shapes in operations(text):
        kind = operation.kind.removesuffix("-start")
        if kind in KINDS:
            size = _bytes(operation.shape)
            if operation.kind.endswith("-start") and kind != "all-reduce":  # its result repeats what it was given
                size -= sum(
                    _bytes(shapes.get(name, "")) for name in re.findall(r"%([\w.\-]+)", operation.rest.split(")")[0])
                )
            found.append(Collective(kind, size, _group(operation.rest, devices), operation.times))
    return [each for each in found if each.group > 1 or each.kind == "collective-permute"]


def product_flops(text: str) -> float:
    """Floating-point operations of the matrix products of a program, on each device."""
    total = 0.0
    for operation, shapes in operations(text):
        if operation.kind == "dot":
            first = re.match(r"%?([\w.\-]+)", operation.rest)
            axes = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", operation.rest)
            given = _dimensions(shapes[first.group(1)])[0] if first else []
            summed = math.prod(given[int(axis)] for axis in axes.group(1).split(",") if axis) if axes else 1
            total += 2.0 * operation.times * math.prod(_dimensions(operation.shape)[0]) * summed
    return total


def flops(compiled: Any) -> float:
    """Floating-point operations of a program on each device: XLA's count, with the products in loops as often as run.

    Args:
        compiled: of `jax.jit(...).lower(...).compile()`.
    """
    text = compiled.as_text()
    once = re.sub(r'"known_trip_count":\{"n":"\d+"', '"known_trip_count":{"n":"1"', text)
    return compiled.cost_analysis()["flops"] + product_flops(text) - product_flops(once)


def _dimensions(shape: str) -> list[list[int]]:
    return [[int(n) for n in sizes.split(",") if n] for _, sizes in SHAPE.findall(shape)]


def _bytes(shape: str) -> int:
    return sum(
        BITS.get(kind, 32) // 8 * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in SHAPE.findall(shape)
    )


def _group(rest: str, devices: int) -> int:
    """The number of devices in a group, in any of the ways in which XLA writes groups."""
    if (listed := re.search(r"replica_groups=\{\{([0-9,]*)\}", rest)) is not None:
        return len(listed.group(1).split(","))
    if (tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)) is not None:
        return int(tiled.group(1))
    if (mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('axis.*?)\}", rest)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh.group(2)))
    return devices
