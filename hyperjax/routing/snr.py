"""Sub-network routing (SNR): levels of small networks, joined by connections that learn whether to exist.

B samples, I readers and J sources of a connection, T tasks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.routing.gates import Connection, HardConcrete, Per
from hyperjax.routing.tasks import Task
from hyperjax.routing.towers import Tower, Widths, are_widths, tower_widths

Array = jax.Array


class SNR(nn.Module):
    """A multi-level sub-network routing network, with one gate for each connection.

    Every sub-network of the first level reads the input; every sub-network of a later level, and every task's tower,
    reads all sub-networks of the level below through gates z:

        v_i = sum_j z_ij W_ij u_j  ("trans")    or    v_i = sum_j z_ij u_j  ("aver");    u_i = subnetwork_i(v_i)

    A sub-network is layers with ReLU. In "trans" the W_ij are its first layer (two linear maps in a row would be one);
    in "aver" it has a first layer of its own. So "trans" can drop each W_ij alone, "aver" only whole sub-networks.

    Attributes:
        levels: the sub-networks of each level: the width of each, or the widths of its layers.
        tasks: kinds by name.
        towers: hidden widths of the towers, of all or by task.
        connection: "trans" or "aver".
        gates: settings of the gates; None for a network without any, in time and in parameters.
        per: what has gates of its own: "connection", the paper's; "task": each task has its own path through all
            levels, which computes them T times; "sample": a small network makes log alpha from each sample.
        router: hidden widths of that small network.

    Raises:
        ValueError: a width below 1, sub-networks of unequal widths where they are averaged, a task without tower, or
            an unknown word; at construction.

    Reference:
        Ma et al., "SNR: Sub-network routing for flexible parameter sharing in multi-task learning" (AAAI 2019).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> tasks = {"income": hj.routing.Binary(), "job": hj.routing.MultiClass(5)}
        >>> model, x = hj.SNR(levels=((8, 8, 8), (8, 8, 8)), tasks=tasks), jnp.ones((4, 10))
        >>> variables = jax.jit(model.init)(jax.random.key(0), x)
        >>> outputs, info = jax.jit(model.apply)(variables, x, jax.random.key(1))
        >>> {name: logits.shape for name, logits in outputs.items()}
        {'income': (4,), 'job': (4, 5)}
        >>> round(float(info["l0"]), 3)  # 3 x 3 + 2 x 3 gates, each open with probability 0.9 at the start
        13.5
    """

    levels: Sequence[Sequence[int | Sequence[int]]]
    tasks: Mapping[str, Task]
    towers: Widths = (16,)
    connection: str = "trans"
    gates: HardConcrete | None = HardConcrete()
    per: Per = "connection"
    router: Sequence[int] = (16,)

    def __post_init__(self):
        check(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, key: Array | None = None) -> tuple[dict[str, Array], dict[str, Any]]:
        """Answers all tasks.

        Args:
            x: [B, features].
            key: PRNG key to train with: one sample of every gate for the whole batch (`per="sample"`: for each
                sample). None evaluates and serves, with deterministic gates.

        Returns:
            Logits by task, and a dict of
            `gates`: z by level ("level_1", ..., "towers"), each [I, J], [T, I, J] per task or [B, I, J] per sample,
                tasks sorted by name;
            `log_alpha`: likewise;
            `features`: outputs of the sub-networks by level, side by side, [B, widths] or [T, B, widths];
            `l0`: the expected number of open gates, sum of P(z != 0), to be weighted by lambda and added to the loss;
            `expected_share`: expected share of the connections' weights that is open, in [0, 1];
            `served_share`: the share that is open where gates are deterministic.
            The last two count each connection of "aver" as one; gates per sample are averaged over the batch.

        Raises:
            ValueError: x is no matrix.
        """
        if jnp.ndim(x) != 2:
            raise ValueError(f"x has shape {jnp.shape(x)}, expected [B, features]; flatten each sample")
        towers = tower_widths(self.towers, self.tasks)
        u: Array = x
        width: tuple[int, ...] = (x.shape[-1],)
        features: dict[str, Array] = {}
        gates: dict[str, Array] = {}
        locations: dict[str, Array] = {}
        for number, level in enumerate(normalise(self.levels)):
            name = f"level_{number}"
            first = tuple(widths[0] for widths in level)
            v = self._connect(name, width, first, number, gates, locations)(u, x, key)
            own_from = 1 if self.connection == "trans" or number == 0 else 0
            outputs = [
                subnetwork(v_i, widths, own_from, f"{name}_sub_{i}")
                for i, (v_i, widths) in enumerate(zip(v, level, strict=True))
            ]
            u, width = jnp.concatenate(outputs, -1), tuple(widths[-1] for widths in level)
            features[name] = u
        first = tuple((*hidden, self.tasks[name].outputs)[0] for name, hidden in towers.items())
        v = self._connect("towers", width, first, len(self.levels), gates, locations)(u, x, key)
        answers = {}
        for (name, hidden), v_t in zip(towers.items(), v, strict=True):
            answers[name] = tower(v_t, self.tasks[name], hidden, self.connection, f"tower_{name}")
        return answers, {"gates": gates, "log_alpha": locations, "features": features, **self._sizes(locations)}

    def _connect(self, name: str, sources, readers, number: int, gates: dict, locations: dict):
        gated = self.gates is not None and number > 0
        connection = Connection(
            sources,
            readers,
            kind=self.connection if number else "trans",
            gates=self.gates if gated else None,
            per=self.per,
            tasks=len(self.tasks),
            to_towers=name == "towers",
            router=self.router,
            name=name,
        )

        def call(u: Array, x: Array, key: Array | None) -> list[Array]:
            v, z, log_alpha = connection(u, x, None if key is None else jax.random.fold_in(key, number))
            if gated:
                gates[name], locations[name] = z, log_alpha
            return v

        return call

    def _sizes(self, locations: Mapping[str, Array]) -> dict[str, Array]:
        """Expected number of open gates, and expected and served shares of the weights behind gates."""
        if self.gates is None:
            return {}
        l0, expected, served, total = (jnp.zeros(()) for _ in range(4))
        for name, counts in connection_sizes(self).items():
            log_alpha = locations[name]
            sizes = jnp.asarray(counts, jnp.float32).reshape((1,) * (log_alpha.ndim - 2) + counts.shape)
            scale = 1 / log_alpha.shape[0] if self.per == "sample" else 1.0
            probability = self.gates.l0(log_alpha)
            l0 += scale * probability.sum()
            expected += (probability * sizes).sum()
            served += ((self.gates.deterministic(log_alpha) > 0) * sizes).sum()
            total += sizes.sum() * (log_alpha.size / math.prod(log_alpha.shape[-2:]))
        return {"l0": l0, "expected_share": expected / total, "served_share": served / total}


def subnetwork(v: Array, widths: Sequence[int], own_from: int, name: str) -> Array:
    """The layers of a sub-network from number `own_from` on; the ones before are in the connection that it reads."""
    u = nn.relu(v) if own_from else v
    for layer in range(own_from, len(widths)):
        u = nn.relu(nn.Dense(widths[layer], name=f"{name}_layer_{layer}")(u))
    return u


def tower(v: Array, task: Task, hidden: Sequence[int], kind: str, name: str) -> Array:
    """The layers of a tower, but for the first one in "trans", which is in the connection that it reads."""
    if kind == "aver":
        return Tower(task, hidden, name=name)(v)
    return Tower(task, hidden[1:], name=name)(nn.relu(v)) if hidden else v.reshape(-1, *task.shape)


def normalise(levels: Sequence[Sequence[int | Sequence[int]]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The widths of the layers of every sub-network of every level."""
    return tuple(
        tuple((sub,) if isinstance(sub, (int, np.integer)) else tuple(sub) for sub in level) for level in levels
    )


def reader_widths(model: SNR) -> dict[str, list[int]]:
    """By level with gates ("level_1", ..., "towers"), the width of what each reader takes in with "trans"."""
    levels, towers = normalise(model.levels), tower_widths(model.towers, model.tasks)
    widths = {f"level_{number}": [sub[0] for sub in level] for number, level in enumerate(levels) if number}
    return widths | {"towers": [(*hidden, model.tasks[name].outputs)[0] for name, hidden in towers.items()]}


def connection_sizes(model: SNR) -> dict[str, np.ndarray]:
    """The number of weights behind each gate.

    Args:
        model: the network.

    Returns:
        By level with gates ("level_1", ..., "towers"), [I, J] integers: the size of W_ij, or 1 for "aver".
    """
    sizes = {}
    for (name, first), below in zip(reader_widths(model).items(), normalise(model.levels), strict=True):
        outer = np.outer(first, [widths[-1] for widths in below])
        sizes[name] = outer if model.connection == "trans" else np.ones_like(outer)
    return sizes


def served_gates(model: SNR, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The gates that a trained network serves with.

    Args:
        model: a network with gates per connection or task.
        variables: its variables.

    Returns:
        By level, [I, J] or [T, I, J] in [0, 1].

    Raises:
        ValueError: the network has no gates, or makes them from each sample, or the variables are of another one.
    """
    if model.gates is None:
        raise ValueError("this network has no gates, expected hard concrete ones; build it with gates=HardConcrete()")
    if model.per == "sample":
        raise ValueError("gates per sample are known only with their samples; take them from apply's second result")
    params, served = variables.get("params", {}), {}
    for name, sizes in connection_sizes(model).items():
        streams = (len(model.tasks),) if model.per == "task" and name != "towers" else ()
        log_alpha = params.get(name, {}).get("log_alpha")
        if np.shape(log_alpha) != (*streams, *sizes.shape):
            raise ValueError(
                f"log_alpha of {name!r} has shape {np.shape(log_alpha)}, expected {(*streams, *sizes.shape)}; give the "
                'variables of this network, {"params": ...}'
            )
        served[name] = np.asarray(model.gates.deterministic(log_alpha))
    return served


def steerable_share(info: Mapping[str, Any]) -> Array:
    """The share to hand to `lagrangian`: its value is the served share, its gradient that of the expected one.

    Steering the expected share alone leaves the served one wherever it falls, as a gate that is served as 0 still has
    an open probability of about a third.

    Args:
        info: the second result of `SNR`.

    Returns:
        A scalar in [0, 1]. Gradient: straight-through, biased.
    """
    expected = info["expected_share"]
    return jax.lax.stop_gradient(info["served_share"]) + (expected - jax.lax.stop_gradient(expected))


def check(model: SNR) -> None:
    """Raises ValueError for a network that cannot be built."""
    if model.connection not in ("trans", "aver"):
        raise ValueError(f"connection is {model.connection!r}, expected 'trans' or 'aver'")
    if model.per not in ("connection", "task", "sample"):
        raise ValueError(f"per is {model.per!r}, expected 'connection', 'task' or 'sample'")
    if not (model.gates is None or isinstance(model.gates, HardConcrete)):
        raise ValueError(f"gates are {model.gates!r}, expected HardConcrete() or None")
    if model.per == "sample" and not are_widths(model.router):
        raise ValueError(f"router has widths {model.router!r}, expected a sequence of whole numbers above 0")
    tower_widths(model.towers, model.tasks)
    given = model.levels
    if not (isinstance(given, Sequence) and given and all(isinstance(level, Sequence) and level for level in given)):
        raise ValueError(
            f"levels are {given!r}, expected one or more, each a sequence of sub-networks, as in ((64, 64), (64,))"
        )
    for number, level in enumerate(given):
        if not all(are_widths([sub] if isinstance(sub, (int, np.integer)) else sub) and sub for sub in level):
            raise ValueError(
                f"level {number} has widths {level!r}, expected for each sub-network a whole number above 0, or several"
            )
    for number, level in enumerate(normalise(given)):
        last = [widths[-1] for widths in level]
        if model.connection == "aver" and len(set(last)) > 1:
            raise ValueError(
                f"level {number} has sub-networks of widths {last}, but 'aver' adds them up: give all one width, or "
                "use 'trans'"
            )
