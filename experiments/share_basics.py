"""Classic ties of parameters, each beside the same network without them.

    python experiments/share_basics.py --preset quick                                    # all six, two minutes
    python experiments/share_basics.py --cases graph --data-file cora.content            # any citation graph

Cases: `conv`, one convolution at three depths; `lstm`, one cell across time and three layers; `embedding`, input and
output embeddings of a language model; `tasks`, two tasks on one embedding with heads of different sizes; `student`,
half of whose channels are its teacher's; `graph`, a graph convolution whose weights know no number of nodes.
Shared and private parameters have learning rates of their own. The same command again goes on after the last network
that was finished.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import basics_graphs
import jax
import numpy as np
import optax
import tqdm
from basics_cases import CASES, Case
from basics_graphs import Graph, read_graph

from hyperjax import sharing, training
from hyperjax.sharing import Tied
from hyperjax.timing import in_turn

FREE = ("workdir", "repeats")  # a run may resume with other values of these


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; --preset chooses the defaults of the others."""

    preset: str = "quick"  # quick or cpu
    cases: tuple[str, ...] = tuple(CASES)  # what to run
    workdir: str | None = None  # where the run is kept; None is runs/share_basics-PRESET
    data_file: str | None = (
        None  # graph for the case `graph`: an .npz, or a .content with its .cites; None: karate club
    )
    seeds: int = 1  # runs of each
    seed: int = 0  # of the first run; the others follow
    batch: int = 32  # samples of a step
    steps: int = 300  # updates of each network
    shared_rate: float = 3e-3  # Adam's rate for parameters with several uses
    private_rate: float = 3e-3  # for the others
    repeats: int = 10  # rounds of the measurement of time


def defaults(preset: str = "quick") -> Config:
    """The defaults of a preset."""
    _expect(preset in ("quick", "cpu"), "preset", preset, "quick or cpu")
    return Config(preset, seeds=3, steps=600) if preset == "cpu" else Config()


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    unknown = [name for name in config.cases if name not in CASES]
    _expect(not unknown and bool(config.cases), "cases", config.cases, f"some of {', '.join(CASES)}")
    _expect(len(set(config.cases)) == len(config.cases), "cases", config.cases, "each once")
    for name in ("seeds", "batch", "steps", "repeats"):
        _expect(getattr(config, name) >= 1, name, getattr(config, name), "1 or more")
    for name in ("shared_rate", "private_rate"):
        _expect(0 < getattr(config, name) < math.inf, name, getattr(config, name), "a positive number")
    last = 2**31 - config.seeds
    _expect(0 <= config.seed <= last, "seed", config.seed, f"a whole number from 0 to {last}, for {config.seeds} seeds")
    graph = config.data_file is None or "graph" in config.cases
    _expect(graph, "data_file", config.data_file, "none without the case graph")


def make_step(config: Config, net: Tied, params: Any, loss: Callable) -> tuple[Callable, Any]:
    """A training step(params, opt_state, batch) -> (params, opt_state, loss), and the first state."""
    groups = {"shared": optax.adam(config.shared_rate), "private": optax.adam(config.private_rate)}
    optimizer = optax.partition(groups, net.labels(params))

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(lambda p: loss(partial(net.apply, {"params": p}), batch))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step, optimizer.init(params)


def fit(config: Config, case: Case, variant: str, seed: int, label: str) -> tuple[Tied, Any]:
    """Trains a network from its seed: the network and its parameters."""
    plain = sharing.tie(case.module, [], case.example)
    net, params = plain, jax.jit(plain.init)(jax.random.key(seed), case.example)["params"]
    stages: list[Any] = [(plain, case.first)] if case.first else []  # a stage: network and loss
    stages.append((sharing.tie(case.module, case.ties[variant], case.example), case.loss))
    with tqdm.tqdm(total=config.steps * len(stages), unit="step", desc=label, mininterval=1.0, leave=False) as bar:
        for net, loss in stages:
            params = net.fit(params, pick=lambda source, parts: next(iter(parts.values())))  # the source's own value
            step, opt_state = make_step(config, net, params, loss)
            step = jax.jit(step, donate_argnums=(0, 1))
            for number in range(config.steps):
                params, opt_state, value = step(params, opt_state, case.batch_at(number))
                bar.update()
            if not np.isfinite(value):
                raise training.NonFinite(f"the loss of {label} is {value} after step {config.steps}; lower the rates")
    return net, params


def cosine(case: Case, net: Tied, params: Any) -> float | None:
    """The mean cosine between the gradients of a shared parameter's uses, on a batch; None where nothing is shared."""
    batch = case.batch_at(0)

    def loss(full: Any) -> jax.Array:
        return case.loss(partial(net.module.apply, {"params": full}), batch)

    found = []
    for gradients in sharing.use_gradients(net, params, loss).values():
        matrix = sharing.cosines(gradients)
        found += matrix[np.triu_indices(len(matrix), 1)].tolist()
    return float(np.mean(found)) if found else None


def measure(config: Config, case: Case) -> dict[str, dict[str, float]]:
    """By variant: parameters, bytes and milliseconds of a training step, timed in turn."""
    runs, found = {}, {}
    for variant, ties in case.ties.items():
        net = sharing.tie(case.module, ties, case.example)
        params = jax.jit(net.init)(jax.random.key(config.seed), case.example)["params"]
        step, opt_state = make_step(config, net, params, case.loss)
        batch = case.batch_at(0)
        memory = sharing.memory(jax.jit(step, donate_argnums=(0, 1)), params, opt_state, batch)
        found[variant] = {"params_unique": float(training.count(params))}
        found[variant] |= {f"{name}_bytes": float(value) for name, value in memory._asdict().items()}
        runs[variant] = partial(jax.jit(step), params, opt_state, batch)
    for variant, seconds in in_turn(runs, config.repeats).items():
        found[variant]["ms_per_step"] = 1e3 * float(np.median(seconds))
    return found


def run(config: Config, graph: Graph | None, workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains and measures everything that is not yet in `metrics.jsonl`, and returns the summary."""
    path = workdir.path / "metrics.jsonl"
    before = training.read_lines(path) if path.exists() else []
    training.say(
        f"run     {', '.join(config.cases)}, each tied and untied; {config.seeds} seeds, {config.steps:,} steps of "
        f"{config.batch}\ndevice  {training.device()}\n"
        + (f"resuming after {len(before)} networks" if before else f"starting in {workdir.path}")
    )
    wanted = [
        (name, v, config.seed + n) for name in config.cases for v in ("tied", "untied") for n in range(config.seeds)
    ]
    summary: dict[str, Any] = {"seeds": config.seeds, "steps": config.steps, "batch": config.batch}
    with training.JsonLines(path, len(before)) as lines:
        for number, (name, variant, seed) in enumerate(wanted[len(before) :], len(before) + 1):
            label = f"{name} {variant} seed {seed}"
            case = CASES[name](config.batch, seed, graph)
            net, params = fit(config, case, variant, seed, label)
            apply = jax.jit(net.apply)
            judge = partial(apply, {"params": params})
            row = {case.unit: case.quality(judge), **{key: value(judge) for key, value in case.more.items()}}
            between = cosine(case, net, params)
            row |= {} if between is None else {"cosine": between}
            lines.write(number, case=name, variant=variant, seed=seed, **row)
            training.say(f"{label}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items()))
    rows = training.read_lines(path)
    for name in config.cases:
        measured = measure(config, CASES[name](config.batch, config.seed, graph))
        for variant, figures in measured.items():
            mine = [row for row in rows if (row["case"], row["variant"]) == (name, variant)]
            for key in mine[0].keys() - {"case", "variant", "seed", "step"}:
                values = [row[key] for row in mine]
                summary[f"{name}_{variant}_{key}_mean"] = float(np.mean(values))
                summary |= {f"{name}_{variant}_{key}_std": float(np.std(values, ddof=1))} if len(values) > 1 else {}
            summary |= {f"{name}_{variant}_{key}": value for key, value in figures.items()}
    report(config, summary)
    draw(config, summary, workdir.path / "basics.png")
    counted = {name: np.zeros(int(summary[f"{name}_tied_params_unique"])) for name in config.cases}
    return {**summary, **training.environment(__file__, counted, config.seed, time.perf_counter() - started)}


def unit_of(summary: dict[str, Any], name: str) -> str:
    return "bpc" if f"{name}_tied_bpc_mean" in summary else "accuracy"


def report(config: Config, summary: dict[str, Any]) -> None:
    """Prints the table."""
    columns = ("parameters", "Adam, KB", "peak, KB", "ms a step", "quality", "cosine")
    lines = [" " * 18 + "".join(f"{column:>12}" for column in columns[:4]) + f"{columns[4]:>26}{columns[5]:>8}"]
    for name in config.cases:
        unit = unit_of(summary, name)
        for variant in ("tied", "untied"):
            own = {
                k.removeprefix(f"{name}_{variant}_"): v
                for k, v in summary.items()
                if k.startswith(f"{name}_{variant}_")
            }
            spread = f" ± {own[f'{unit}_std']:.4f}" if f"{unit}_std" in own else ""
            between = f"{own['cosine_mean']:8.2f}" if "cosine_mean" in own else f"{'-':>8}"
            lines.append(
                f"{name:10}{variant:8}{own['params_unique']:12,.0f}{own['optimizer_bytes'] / 1e3:12.1f}"
                f"{own['peak_bytes'] / 1e3:12.1f}{own['ms_per_step']:12.2f}"
                f"{f'{unit} ' + format(own[f'{unit}_mean'], '.4f') + spread:>26}{between}"
            )
            if "teacher_accuracy_mean" in own and variant == "tied":
                lines[-1] += f"  teacher {own['teacher_accuracy_mean']:.4f}"
    lines.append("a step: median, in turn; cosine: mean between the gradients of a shared parameter's uses")
    training.say("\n".join(lines))


def draw(config: Config, summary: dict[str, Any], path: Path) -> None:
    """Writes the picture of quality, tied beside untied."""
    from matplotlib.figure import Figure

    from hyperjax.plotting import COLORS, save

    figure = Figure(figsize=(1.6 * len(config.cases) + 1.2, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(config.cases), squeeze=False)[0], config.cases, strict=True):
        unit = unit_of(summary, name)
        for x, (variant, color) in enumerate(zip(("tied", "untied"), COLORS, strict=False)):
            key = f"{name}_{variant}"
            share = summary[f"{key}_params_unique"] / summary[f"{name}_untied_params_unique"]
            error = summary.get(f"{key}_{unit}_std")
            axes.bar(x, summary[f"{key}_{unit}_mean"], yerr=error, color=color, capsize=3, width=0.7)
            axes.text(x, 0, f"{share:.0%}", ha="center", va="bottom", fontsize=8, color="white")
        axes.set_xticks([0, 1], ["tied", "untied"])
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("bits per character" if unit == "bpc" else unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Quality of tied and untied networks; in the bars, their share of the parameters", fontsize=10)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Bad input exits with 2, a loss that is not finite with 1, a signal with 128 + its number."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset",), argv, description=__doc__, prog="share_basics.py")
    with training.bad_input(__file__), training.bad_input(basics_graphs.__file__):
        check(config)
        workdir = training.Workdir(config.workdir or f"runs/share_basics-{config.preset}", config, FREE)
        if workdir.summary is None:
            graph = None if config.data_file is None else read_graph(config.data_file)
            workdir.open()
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to train again")
    else:
        with workdir, training.stopping():
            workdir.finish(run(config, graph, workdir, started))
    training.print_summary(workdir.summary or {})
    return 0


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
