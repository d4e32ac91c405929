"""How fast sub-network routing is: a training step and a serving step, with gates, without, and compacted.

    python experiments/bench_routing.py --json bench.json
    python experiments/bench_routing.py --width 128 --closed 0.7

Everything runs in one process, in turn (training, then serving), so that the ratios hold although the machine's speed
drifts: SNR; the same network without gates; a compact SNR, after a share of its gates was closed at random; that one
with its gates as they are (masked), and with its gates multiplied into the weights of the network without gates
(dense); SNR-Aver, MMoE and shared bottom at equal numbers of parameters. A training step is one donated `jit` with Adam
1e-3. Beside the times stand the operations of the matrix products, two for each multiply-add, and the speed reached.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax import routing, training
from hyperjax.paramtree import count
from hyperjax.timing import compiled, in_turn

Figures = dict[str, float]
ADAM = optax.adam(1e-3)
LAMBDA = 1e-4  # weight of the L0 penalty


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the measurement."""

    features: int = 64  # width of the input
    levels: int = 3  # levels of sub-networks; layers of an expert of MMoE, and of the shared bottom
    subnetworks: int = 8  # sub-networks of each level; experts of MMoE
    width: int = 128  # width of each sub-network of SNR; the others get the width that makes them equally large
    tasks: int = 4  # binary tasks
    tower: int = 16  # hidden width of each task's tower
    batch: int = 512  # samples of a step
    closed: float = 0.5  # share of the gates that are closed before compaction
    repeats: int = 20  # turns of each training step, two timed runs after one untimed; the median counts
    serving_repeats: int = 60  # likewise of each serving step
    seed: int = 0  # of the data, the parameters and the gates that are closed
    json: str | None = None  # file to write the figures to


class Candidate(NamedTuple):
    """What is timed: `flops`, the operations, and `runs` are by "step" and "serve", as far as it does these."""

    label: str
    params: int
    flops: dict[str, int]
    runs: dict[str, Callable[[], Any]]


class Data(NamedTuple):
    """One batch: inputs [B, features], labels [B] by task, and the kinds of the tasks by name."""

    x: jax.Array
    labels: dict[str, jax.Array]
    tasks: dict[str, routing.Task]


def make_data(config: Config) -> Data:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0), config.tasks + 1)
    names = [f"task_{t}" for t in range(config.tasks)]
    labels = {name: jax.random.bernoulli(key, 0.5, (config.batch,)) for name, key in zip(names, keys[1:], strict=True)}
    x = jax.random.normal(keys[0], (config.batch, config.features))
    return Data(x, jax.tree.map(jnp.int32, labels), {name: routing.Binary() for name in names})


def snr(config: Config, data: Data, width: int, **options: Any) -> routing.SNR:
    levels = ((width,) * config.subnetworks,) * config.levels
    return routing.SNR(levels, tasks=data.tasks, towers=(config.tower,), **options)


def networks(config: Config, data: Data) -> dict[str, tuple[str, nn.Module]]:
    """Labels and networks by name; their numbers of parameters are those of the SNR without gates, or near."""
    common: dict[str, Any] = {"tasks": data.tasks, "towers": (config.tower,)}

    def aver(width: int) -> nn.Module:
        return snr(config, data, width, connection="aver")

    def mmoe(width: int) -> nn.Module:
        return routing.MMoE(experts=config.subnetworks, widths=(width,) * config.levels, **common)

    def shared_bottom(width: int) -> nn.Module:
        return routing.SharedBottom(bottom=(width,) * config.levels, **common)

    ungated = snr(config, data, config.width, gates=None)
    budget = routing.count_parameters(ungated, data.x)

    def fitted(make: Callable[[int], nn.Module]) -> nn.Module:
        return routing.fit_width(make, budget, data.x)

    return {
        "ungated": ("SNR without gates", ungated),
        "snr": ("SNR", snr(config, data, config.width)),
        "snr_aver": ("SNR-Aver", fitted(aver)),
        "mmoe": ("MMoE", fitted(mmoe)),
        "shared_bottom": ("shared bottom", fitted(shared_bottom)),
    }


def loss_of(model: nn.Module, data: Data) -> Callable:
    """The tasks' losses and the L0 penalty as a function of (params, key, x, labels)."""

    def loss(params: Any, key: jax.Array, x: jax.Array, labels: Mapping[str, jax.Array]) -> jax.Array:
        outputs, info = model.apply({"params": params}, x, key)
        total = sum(routing.task_losses(data.tasks, outputs, labels).values())
        return total + LAMBDA * info["l0"] if "l0" in info else total

    return loss


def trained(label: str, model: nn.Module, data: Data, seed: int) -> Candidate:
    """A network to be trained and served; a step overwrites its own state and draws gates of its own."""
    gradient = jax.value_and_grad(loss_of(model, data))
    gate_key = jax.random.fold_in(jax.random.key(seed), 1)

    def start(x: jax.Array) -> Any:
        params = model.init(jax.random.key(seed), x)["params"]
        return params, ADAM.init(params), jnp.zeros((), jnp.int32)

    def step(state: Any, x: jax.Array, labels: Mapping[str, jax.Array]) -> Any:
        params, moments, number = state
        value, gradients = gradient(params, jax.random.fold_in(gate_key, number), x, labels)
        updates, moments = ADAM.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments, number + 1), value

    def run() -> Any:
        state[0], value = compiled_step(state[0], data.x, data.labels)
        return value

    state = [jax.jit(start)(data.x)]
    compiled_step = compiled(step, state[0], data.x, data.labels, donate=(0,))
    operations = routing.flops(gradient, state[0][0], jax.random.key(seed), data.x, data.labels)
    served = serving(label, model, lambda: {"params": state[0][0]}, data)
    return served._replace(flops={"step": operations, **served.flops}, runs={"step": run, **served.runs})


def serving(label: str, model: nn.Module, variables: Callable[[], Any], data: Data) -> Candidate:
    """A network to be served, with the variables that it has by then."""

    def serve(variables: Any, x: jax.Array) -> dict[str, jax.Array]:
        return model.apply(variables, x)[0]

    call, params = compiled(serve, variables(), data.x), count(variables()["params"])
    operations = routing.flops(serve, variables(), data.x)
    return Candidate(label, params, {"serve": operations}, {"serve": lambda: call(variables(), data.x)})


def close_gates(model: routing.SNR, variables: Any, share: float, seed: int) -> Any:
    """Closes a share of the gates at random, so that no task is lost, and draws log alpha of the rest.

    Raises:
        ValueError: a task was lost in each of 100 draws.
    """
    shapes = {name: sizes.shape for name, sizes in routing.connection_sizes(model).items()}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    rng = np.random.default_rng(seed)
    for _ in range(100):
        values = rng.uniform(-1.0, 3.0, sum(sizes)).astype(np.float32)  # z from 0.22 to 1
        values[rng.permutation(len(values))[: round(share * len(values))]] = -10.0
        parts = np.split(values, np.cumsum(sizes)[:-1])
        params = dict(variables["params"])
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            params[name] = {**params[name], "log_alpha": jnp.asarray(part.reshape(shape))}
        if not routing.lost_tasks(model, {"params": params}):
            return {"params": params}
    raise ValueError(f"--closed is {share}, which cut a task off the input in 100 draws, expected less; about 0.5 does")


def pruned(config: Config, data: Data) -> tuple[dict[str, Candidate], Figures]:
    """The network with closed gates in its three forms, found equal, and what is gone of it."""
    gated = snr(config, data, config.width)
    variables = jax.jit(gated.init)(jax.random.key(config.seed), data.x)
    variables = close_gates(gated, variables, config.closed, config.seed)
    small = routing.compact(gated, variables)
    ungated, dense = routing.fold_gates(gated, variables)
    found = {
        "masked": serving("SNR, gates closed", gated, lambda: variables, data),
        "dense": serving("the same, dense", ungated, lambda: dense, data),
        "compact": serving("the same, compact", small.model, lambda: small.variables, data),
    }
    masked = found["masked"].runs["serve"]()
    distances = {}
    for name in ("dense", "compact"):
        apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), masked, found[name].runs["serve"]())
        distances[f"distance_{name}"] = max(apart.values())
        if not distances[f"distance_{name}"] <= 1e-5:
            raise AssertionError(f"the {name} network is {distances[f'distance_{name}']} from the masked one")
    before, after = small.connections
    return found, {"share_closed": config.closed, "share_gone": 1 - after / before, **distances}


def measure(config: Config) -> tuple[dict[str, Candidate], Figures]:
    """Builds everything, times it in turn, and returns it with the figures, whose keys are flat."""
    data = make_data(config)
    with training.bad_input(__file__):
        made = networks(config, data)
        smaller, figures = pruned(config, data)
    found = {name: trained(label, model, data, config.seed) for name, (label, model) in made.items()} | smaller
    for kind, repeats in (("step", config.repeats), ("serve", config.serving_repeats)):
        runs = {f"{name}_{kind}": one.runs[kind] for name, one in found.items() if kind in one.runs}
        for name, seconds in in_turn(runs, repeats).items():
            figures |= {f"seconds_{name}": float(np.median(seconds)), f"min_seconds_{name}": min(seconds)}
    for name, one in found.items():
        figures[f"params_{name}"] = one.params
        for kind, operations in one.flops.items():
            figures[f"flops_{name}_{kind}"] = operations
            figures[f"flops_per_second_{name}_{kind}"] = operations / figures[f"seconds_{name}_{kind}"]
    for name, other, kind in [
        ("snr", "ungated", "step"),
        *((name, "snr", "step") for name in ("snr_aver", "mmoe", "shared_bottom")),
        *((name, "compact", "serve") for name in ("dense", "masked", "mmoe", "shared_bottom")),
        ("dense", "ungated", "serve"),
    ]:
        figures[f"ratio_{name}_over_{other}"] = figures[f"seconds_{name}_{kind}"] / figures[f"seconds_{other}_{kind}"]
    return found, figures


def report(found: Mapping[str, Candidate], figures: Mapping[str, float]) -> None:
    """Prints the table, and what the speeds were asked to be."""
    print(f"{'':20}{'':>12}{'training step':>29}{'serving':>29}")
    print(f"{'':20}{'parameters':>12}" + 2 * f"{'ms':>9}{'MFLOP':>10}{'GFLOP/s':>10}")
    for name, one in found.items():
        shown = ""
        for kind in ("step", "serve"):
            if kind not in one.flops:
                shown += f"{'-':>9}{'-':>10}{'-':>10}"
                continue
            speed = figures[f"flops_per_second_{name}_{kind}"] / 1e9
            shown += f"{1e3 * figures[f'seconds_{name}_{kind}']:9.2f}{one.flops[kind] / 1e6:10,.1f}{speed:10.1f}"
        print(f"{one.label:20}{one.params:12,}{shown}")
    step = figures["ratio_snr_over_ungated"]
    print(f"a training step with gates takes {step:.2f} times as long as one without; asked: at most 1.2")
    gone = f"{100 * figures['share_gone']:.0f} % of the connections gone"
    for name, asked in (("dense", "; asked: at least 1.4 at 40 %"), ("masked", "")):
        print(f"compact, {gone}, is {figures[f'ratio_{name}_over_compact']:.2f} times as fast as {name}{asked}")
    noise = abs(figures["ratio_dense_over_ungated"] - 1)
    print(f"noise: the networks without gates and dense serve by the same program, and differ by {100 * noise:.0f} %")


def check(config: Config) -> None:
    """Raises ValueError for a setting that makes no sense."""
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, int) and value < (name != "seed"):
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, expected a whole number of at least {int(name != 'seed')}"
            )
    if not 0 <= config.closed < 1:
        raise ValueError(f"--closed is {config.closed}, expected a share of at least 0 and below 1")
    if config.json is not None:
        folder = os.path.dirname(os.path.abspath(config.json))
        if os.path.isdir(config.json) or not os.access(folder, os.W_OK):
            raise ValueError(f"--json is {config.json}, which cannot be written; choose a file in a folder that exists")


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status, 2 for bad input."""
    config = training.parse(Config, (), argv, description=__doc__, prog="bench_routing.py")
    with training.bad_input(__file__):
        check(config)
    print(
        f"{config.features} inputs, {config.levels} levels of {config.subnetworks} sub-networks of width "
        f"{config.width}, {config.tasks} tasks, batch {config.batch}; medians of runs in turn, on "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        flush=True,
    )
    found, figures = measure(config)
    report(found, figures)
    if config.json is not None:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
