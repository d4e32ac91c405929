"""Which connections of a trained SNR network still carry anything from the input to a task.

I readers, J sources of a connection; a stream is the whole network, or one task's where each has gates of its own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hyperjax.routing.gates import spans
from hyperjax.routing.snr import SNR, normalise, reader_widths, served_gates
from hyperjax.routing.towers import tower_widths


class Pathways(NamedTuple):
    """What is left of a network. Indices are those of the whole network; level 0 reads the input itself.

    Attributes:
        first: sub-networks of level 0 that are needed.
        reads: for each level after it, the towers last, and each stream: reader -> the sources it still reads.
        shifts: likewise: reader -> what it gets from sources whose output is a constant, added up.
        lost: tasks that no path leads to.
    """

    first: tuple[int, ...]
    reads: list[list[dict[int, tuple[int, ...]]]]
    shifts: list[list[dict[int, np.ndarray]]]
    lost: list[str]


def trace(model: SNR, variables: Mapping[str, Any]) -> Pathways:
    """Follows a network's open gates from the input up, and from the tasks down.

    Args:
        model: a network with gates per connection or task.
        variables: its variables, concrete arrays.

    Returns:
        The pathways.

    Raises:
        ValueError: the gates depend on the sample, or there are none.
    """
    gates, levels, params = served_gates(model, variables), normalise(model.levels), variables["params"]
    towers = list(tower_widths(model.towers, model.tasks))
    streams = len(towers) if model.per == "task" else 1
    constants: list[list[np.ndarray | None]] = [[None] * len(levels[0]) for _ in range(streams)]  # None: it varies
    reads: list[list[dict[int, tuple[int, ...]]]] = []
    shifts: list[list[dict[int, np.ndarray]]] = []
    for number, (name, z) in enumerate(gates.items(), 1):
        to_towers = name == "towers"
        found: list[dict[int, tuple[int, ...]]] = [{} for _ in range(streams)]
        moved: list[dict[int, np.ndarray]] = [{} for _ in range(streams)]
        above: list[list[np.ndarray | None]] = []
        for s in range(streams):
            z_ij = z if z.ndim == 2 else z[s]
            readers = [s] if to_towers and streams > 1 else range(len(z_ij))
            for i in readers:
                found[s][i] = tuple(int(j) for j in np.flatnonzero(z_ij[i]) if constants[s][j] is None)
                moved[s][i] = _shift(model, params, number, name, i, z_ij[i], constants[s])
            if not to_towers:
                above.append([None if found[s][i] else _output(model, params, number, i, moved[s][i]) for i in readers])
        reads.append(found)
        shifts.append(moved)
        constants = above
    lost = [name for t, name in enumerate(towers) if not reads[-1][t if streams > 1 else 0][t]]
    for level in range(len(reads) - 1, 0, -1):
        for s in range(streams):
            needed = {j for sources in reads[level][s].values() for j in sources}
            reads[level - 1][s] = {i: sources for i, sources in reads[level - 1][s].items() if i in needed}
    first = {j for stream in reads[0] for sources in stream.values() for j in sources}
    return Pathways(tuple(sorted(first)), reads, shifts, lost)


def _shift(model: SNR, params: Mapping[str, Any], number: int, name: str, i: int, z_j, constants) -> np.ndarray:
    """What reader i gets from sources whose output is a constant: z_ij W_ij u_j or z_ij u_j, added up."""
    rows = spans([widths[-1] for widths in normalise(model.levels)[number - 1]])
    column = spans(reader_widths(model)[name])[i]
    total: np.ndarray = np.zeros(())
    for j in np.flatnonzero(z_j):
        u_j = constants[j]
        if u_j is not None:
            w_ij = np.asarray(params[name]["kernel"][rows[j], column], np.float64) if model.connection == "trans" else 1
            total = total + float(z_j[j]) * (u_j @ w_ij if model.connection == "trans" else u_j)
    return total


def _output(model: SNR, params: Mapping[str, Any], number: int, i: int, shift: np.ndarray) -> np.ndarray:
    """The constant that a sub-network without varying sources puts out."""
    u, start = shift, 0
    if model.connection == "trans":
        name = f"level_{number}"
        bias = np.asarray(params[name]["bias"], np.float64)[spans(reader_widths(model)[name])[i]]
        u, start = np.maximum(shift + bias, 0), 1
    for layer in range(start, len(normalise(model.levels)[number][i])):
        dense = params[f"level_{number}_sub_{i}_layer_{layer}"]
        kernel, bias = (np.asarray(dense[leaf], np.float64) for leaf in ("kernel", "bias"))
        u = np.maximum((u @ kernel if u.ndim else 0.0) + bias, 0)
    return u
