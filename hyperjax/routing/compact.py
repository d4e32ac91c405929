"""Compaction: what a trained SNR network serves with, once everything behind a closed gate is cut out.

B samples; a stream is the whole network, or one task's where each has gates of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.routing.gates import spans
from hyperjax.routing.pathways import Pathways, trace
from hyperjax.routing.snr import SNR, connection_sizes, normalise, reader_widths, subnetwork, tower
from hyperjax.routing.tasks import Task
from hyperjax.routing.towers import tower_widths

Array = jax.Array
# Readers; the sources that all of them read; whether they get constants too, which cannot go into shared biases.
Group = tuple[tuple[int, ...], tuple[int, ...], bool]
LOST = "train with a smaller weight of the L0 penalty, or a larger target"


class CompactSNR(nn.Module):
    """An SNR network without gates: each reader is joined to the sources it has left. `compact` makes it.

    Readers of the same sources share a product. Of gates per task, the network of each task is computed on its own,
    from weights W_ij that they share; the last connections, to the tasks' own towers, are no one else's.

    Attributes:
        first: sub-networks of level 0, by their number in the whole network.
        reads: by level after it, the towers last, and stream: the groups.
        levels: widths of the layers of every sub-network of the whole network.
        inputs: by level after the first: width of what each reader of the whole network takes in.
        tasks: kinds by name.
        towers: hidden widths by task.
        connection: "trans" or "aver".
    """

    first: tuple[int, ...]
    reads: tuple[tuple[tuple[Group, ...], ...], ...]
    levels: tuple[tuple[tuple[int, ...], ...], ...]
    inputs: tuple[tuple[int, ...], ...]
    tasks: Mapping[str, Task]
    towers: Mapping[str, Sequence[int]]
    connection: str = "trans"

    @nn.compact
    def __call__(self, x: Array, key: Array | None = None) -> tuple[dict[str, Array], dict[str, Any]]:
        """Answers all tasks: x [B, features] to logits by task, and an empty dict; the key has no use here.

        Raises:
            ValueError: x is no matrix.
        """
        if jnp.ndim(x) != 2:
            raise ValueError(f"x has shape {jnp.shape(x)}, expected [B, features]; flatten each sample")
        widths = [self.levels[0][i][0] for i in self.first]
        kernel, bias = self._weights("level_0", x.shape[-1], sum(widths))
        v = x @ kernel + bias[None]
        start = {i: v[:, at] for i, at in zip(self.first, spans(widths), strict=True)}
        u = self._subnetworks(0, [start]) * len(self.reads[0])
        names, read = list(self.towers), self._trans if self.connection == "trans" else self._aver
        for number, level in enumerate(self.reads, 1):
            taken = read(number, level, u)
            u = self._subnetworks(number, taken) if number < len(self.levels) else taken
        answers = {}
        for t, v_t in sorted((t, v_t) for stream in u for t, v_t in stream.items()):
            name = names[t]
            answers[name] = tower(v_t, self.tasks[name], self.towers[name], self.connection, f"tower_{name}")
        return answers, {}

    def shared(self, number: int) -> bool:
        """Whether several tasks read the connections of a level, each through its own gates."""
        return len(self.reads[0]) > 1 and number < len(self.levels)

    def _weights(self, name: str, features: int, outputs: int) -> tuple[Array, Array]:
        kernel = self.param(f"{name}_kernel", nn.initializers.lecun_normal(), (features, outputs))
        return kernel, self.param(f"{name}_bias", nn.initializers.zeros, (outputs,))

    def _subnetworks(self, number: int, v: Sequence[Mapping[int, Array]]) -> list[dict[int, Array]]:
        """Runs each sub-network of a level once, on all streams that need it."""
        u: list[dict[int, Array]] = [{} for _ in v]
        own_from = 1 if self.connection == "trans" or number == 0 else 0
        for i in sorted(set().union(*v)):
            streams = [s for s in range(len(v)) if i in v[s]]
            rows = jnp.concatenate([v[s][i] for s in streams])
            rows = subnetwork(rows, self.levels[number][i], own_from, f"level_{number}_sub_{i}")
            for s, part in zip(streams, jnp.split(rows, len(streams)), strict=True):
                u[s][i] = part
        return u

    def _trans(self, number: int, level, u: Sequence[Mapping[int, Array]]) -> list[dict[int, Array]]:
        below, inputs = self.levels[number - 1], self.inputs[number - 1]
        blocks: dict[tuple[int, int], Array] = {}
        draw = nn.initializers.lecun_normal()
        biases: dict[int, Array] = {}
        if self.shared(number):  # tasks share the W_ij and b_i, each with its own gates
            for i in sorted({i for groups in level for group in groups for i in group[0]}):
                biases[i] = self.param(f"level_{number}_bias_{i}", nn.initializers.zeros, (inputs[i],))
            for i, j in sorted({(i, j) for groups in level for group in groups for i in group[0] for j in group[1]}):
                blocks[i, j] = self.param(f"level_{number}_block_{i}_{j}", draw, (below[j][-1], inputs[i]))
        v: list[dict[int, Array]] = []
        for s, groups in enumerate(level):
            found: dict[int, Array] = {}
            for readers, sources, shifted in groups:
                widths, name = [inputs[i] for i in readers], f"level_{number}_stream_{s}_reader_{readers[0]}"
                if blocks:
                    z = self.param(f"{name}_gates", nn.initializers.ones, (len(sources), len(readers)))
                    columns = [[z[n, m] * blocks[i, j] for n, j in enumerate(sources)] for m, i in enumerate(readers)]
                    kernel = jnp.concatenate([jnp.concatenate(column) for column in columns], -1)
                    bias = jnp.concatenate([biases[i] for i in readers])
                    if shifted:
                        bias += self.param(f"{name}_shift", nn.initializers.zeros, bias.shape)
                else:
                    kernel, bias = self._weights(name, sum(below[j][-1] for j in sources), sum(widths))
                v_g = jnp.concatenate([u[s][j] for j in sources], -1) @ kernel + bias[None]
                found |= {i: v_g[:, at] for i, at in zip(readers, spans(widths), strict=True)}
            v.append(found)
        return v

    def _aver(self, number: int, level, u: Sequence[Mapping[int, Array]]) -> list[dict[int, Array]]:
        width = self.levels[number - 1][0][-1]
        v: list[dict[int, Array]] = []
        for s, groups in enumerate(level):
            found: dict[int, Array] = {}
            for readers, sources, shifted in groups:
                name = f"level_{number}_stream_{s}_reader_{readers[0]}"
                z = self.param(f"{name}_gates", nn.initializers.ones, (len(sources), len(readers)))
                total = [sum(z[n, m] * u[s][j] for n, j in enumerate(sources)) for m in range(len(readers))]
                if shifted:
                    shift = self.param(f"{name}_shift", nn.initializers.zeros, (len(readers), 1, width))
                    total = [v_i + shift[m] for m, v_i in enumerate(total)]
                found |= dict(zip(readers, total, strict=True))
            v.append(found)
        return v


class Compacted(NamedTuple):
    """A compact network.

    Attributes:
        model: a Linen module, called as the network it comes from.
        variables: its variables: what is left of the old ones, copied.
        connections: number of gated connections before and after; with gates per task, of all tasks.
        subnetworks: number of sub-networks before and after; with gates per task one counts while any task uses it.
        params: number of weights before and after; gates count where they cannot be multiplied into the weights. With
            gates per task, weights that another task still needs stay, and so a constant may cost more than it saves.
    """

    model: CompactSNR
    variables: dict[str, Any]
    connections: tuple[int, int]
    subnetworks: tuple[int, int]
    params: tuple[int, int]


def compact(model: SNR, variables: Mapping[str, Any]) -> Compacted:
    """Cuts out every W_ij behind a closed gate, and every sub-network that nothing reads or that reads nothing.

    A sub-network that reads nothing still puts out a constant, because of its biases; the constant moves into the
    biases of those that read it. So the compact network computes what the network with its gates computes, to
    rounding, for any input. Gates of "trans" are multiplied into the weights, unless tasks share these.

    Args:
        model: a network with gates per connection or task.
        variables: its trained variables, concrete arrays.

    Returns:
        The compact network.

    Raises:
        ValueError: a task has lost its last path to the input, the gates depend on the sample, there are none, or the
            variables are of another network.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> model = hj.SNR(levels=((8, 8), (8, 8)), tasks={"income": hj.routing.Binary(), "job": hj.routing.Binary()})
        >>> params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 10)))["params"]
        >>> log_alpha = params["towers"]["log_alpha"]  # [tasks, sub-networks]
        >>> params["towers"]["log_alpha"] = log_alpha.at[:, 1].set(-9.0)  # no task reads the second sub-network
        >>> small = hj.compact(model, {"params": params})
        >>> small.connections, small.subnetworks  # before and after
        ((8, 4), (4, 3))
    """
    paths = trace(model, variables)
    if paths.lost:
        raise ValueError(
            f"task {paths.lost[0]!r} has lost its last path to the input, so its answer is one for all samples; {LOST}"
        )
    shared = [model.per == "task"] * (len(model.levels) - 1) + [False]
    reads = tuple(
        tuple(_groups(stream, shifts if apart else {}) for stream, shifts in zip(*level, strict=True))
        for apart, *level in zip(shared, paths.reads, paths.shifts, strict=True)
    )
    small = CompactSNR(
        paths.first,
        reads,
        normalise(model.levels),
        tuple(tuple(widths) for widths in reader_widths(model).values()),
        model.tasks,
        tower_widths(model.towers, model.tasks),
        model.connection,
    )
    old = jax.tree.map(np.asarray, dict(variables["params"]))
    params = _params(model, small, paths, old)
    gates = {name: old[name]["log_alpha"] for name in connection_sizes(model)}
    total = sum(z.size for z in gates.values())
    left = sum(len(sources) for level in paths.reads for stream in level for sources in stream.values())
    used = len(paths.first) + sum(len(set().union(*level)) for level in paths.reads[:-1])
    folded = model.connection == "trans" and model.per == "connection"
    before = sum(leaf.size for leaf in jax.tree.leaves(old)) - (total if folded else 0)
    after = sum(leaf.size for leaf in jax.tree.leaves(params))
    counts = {"connections": (total, left), "subnetworks": (sum(map(len, model.levels)), used)}
    dtype = old["level_0"]["kernel"].dtype
    return Compacted(
        small, {"params": jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)}, **counts, params=(before, after)
    )


def lost_tasks(model: SNR, variables: Mapping[str, Any]) -> list[str]:
    """The tasks that `compact` refuses: every path from the input to them has a closed gate.

    Args:
        model: a network with gates per connection or task.
        variables: its variables.

    Returns:
        Their names.

    Raises:
        ValueError: the gates depend on the sample, there are none, or the variables are of another network.
    """
    return trace(model, variables).lost


def _groups(stream: Mapping[int, tuple[int, ...]], shifts: Mapping[int, np.ndarray]) -> tuple[Group, ...]:
    """Puts readers of the same sources together."""
    together: dict[tuple[int, ...], list[int]] = {}
    for reader, sources in stream.items():
        together.setdefault(sources, []).append(reader)
    return tuple(
        (tuple(readers), sources, any(bool(np.any(shifts.get(i, 0))) for i in readers))
        for sources, readers in together.items()
    )


def _params(model: SNR, small: CompactSNR, paths: Pathways, old: Mapping[str, Any]) -> dict[str, Any]:
    """Takes the compact network's parameters out of those of the whole one."""
    levels, inputs = small.levels, reader_widths(model)
    at = spans([widths[0] for widths in levels[0]])
    new: dict[str, Any] = {
        f"level_0_{leaf}": np.concatenate([old["level_0"][leaf][..., at[i]] for i in small.first], -1)
        for leaf in ("kernel", "bias")
    }
    used = {0: set(small.first)} | {n: set().union(*level) for n, level in enumerate(paths.reads[:-1], 1)}
    kept = {f"level_{number}_sub_{i}_" for number, subs in used.items() for i in subs}
    new |= {name: leaves for name, leaves in old.items() if any(name.startswith(start) for start in kept)}
    new |= {name: leaves for name, leaves in old.items() if name.startswith("tower_")}
    for number, (name, level) in enumerate(zip(inputs, small.reads, strict=True), 1):
        rows, columns = spans([widths[-1] for widths in levels[number - 1]]), spans(inputs[name])
        z = np.asarray(model.gates.deterministic(old[name]["log_alpha"]))  # type: ignore[union-attr]
        for s, groups in enumerate(level):
            z_ij = z if z.ndim == 2 else z[s]
            for readers, sources, shifted in groups:
                group = f"level_{number}_stream_{s}_reader_{readers[0]}"
                gates = z_ij[np.ix_(readers, sources)].T
                shifts = [paths.shifts[number - 1][s][i] for i in readers]
                if model.connection == "aver":
                    new[f"{group}_gates"] = gates
                    if shifted:
                        width = levels[number - 1][0][-1]
                        new[f"{group}_shift"] = np.stack([np.broadcast_to(one, (1, width)) for one in shifts])
                    elif not small.shared(number):
                        for i, one in zip(readers, shifts, strict=True):
                            _absorb(new, small, number, i, one)
                    continue
                b = {i: old[name]["bias"][columns[i]] for i in readers}
                w = {(i, j): old[name]["kernel"][rows[j], columns[i]] for i in readers for j in sources}
                if small.shared(number):
                    new[f"{group}_gates"] = gates
                    new |= {f"level_{number}_bias_{i}": b_i for i, b_i in b.items()}
                    new |= {f"level_{number}_block_{i}_{j}": w_ij for (i, j), w_ij in w.items()}
                    if shifted:
                        parts = [np.broadcast_to(one, len(b[i])) for i, one in zip(readers, shifts, strict=True)]
                        new[f"{group}_shift"] = np.concatenate(parts)
                else:
                    new[f"{group}_kernel"] = np.block([[z_ij[i, j] * w[i, j] for i in readers] for j in sources])
                    new[f"{group}_bias"] = np.concatenate([b[i] + one for i, one in zip(readers, shifts, strict=True)])
    return new


def _absorb(new: dict[str, Any], small: CompactSNR, number: int, i: int, shift: np.ndarray) -> None:
    """Moves a constant that the reader i of "aver" gets into the biases of its first layer."""
    if not np.any(shift):
        return
    if number < len(small.levels):
        name, holder = f"level_{number}_sub_{i}_layer_0", new
    else:
        task = list(small.towers)[i]
        name, holder = "layer_0" if small.towers[task] else "output", dict(new[f"tower_{task}"])
        new[f"tower_{task}"] = holder
    dense = holder[name]
    holder[name] = {"kernel": dense["kernel"], "bias": dense["bias"] + shift @ dense["kernel"]}
