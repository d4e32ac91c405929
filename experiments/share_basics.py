"""Classic ties of parameters, each beside the same network without them.

    python experiments/share_basics.py --preset quick                                    # all six, two minutes
    python experiments/share_basics.py --cases graph --data-file cora.content            # any citation graph

Cases: `conv`, one convolution at three depths; `lstm`, one cell across time and three layers; `embedding`, input and
output embeddings of a language model; `tasks`, two tasks on one embedding with heads of different sizes, where shared
and private parameters have learning rates of their own; `student`, half of whose channels are borrowed from its
teacher, beside one with channels of its own; `graph`, a graph convolution whose weights know no number of nodes.
The same command again goes on after the last network that was finished.
"""

import dataclasses
import math
import re
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
from basics_cases import CASES, VARIANTS, Case
from basics_graphs import Graph, read_graph
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperjax import sharing, training
from hyperjax.sharing import Tied
from hyperjax.timing import in_turn

FREE = ("workdir", "repeats")  # a run may resume with other values of these
NOTES = """
parameters: that exist and are trained, each once; a borrowing student's do not count what its teacher lends
peak: memory of a compiled training step, by XLA's plan; a step: median, in turn; test: higher accuracy and lower bpc
are better; cosine: mean between the gradients of a shared parameter's uses, at the end; below 0 they fight"""


@dataclasses.dataclass(frozen=True)
class Config(training.Devices):
    """Settings; --preset chooses the defaults of the others."""

    preset: str = "quick"  # quick or cpu
    cases: tuple[str, ...] = tuple(CASES)  # what to run
    workdir: str | None = None  # where the run is kept; None is runs/share_basics-PRESET
    data_file: str | None = None  # graph of the case `graph`: .npz, or .content with its .cites; None: karate club
    seeds: int = 1  # runs of each
    seed: int = 0  # of the first run; the others follow
    batch: int = 32  # samples of a step
    steps: int = 300  # updates of each network
    learning_rate: float = 3e-3  # of Adam, in all cases but `tasks`
    shared_rate: float = 1e-3  # in `tasks`, of what both tasks share, and of its counterparts where it is untied
    private_rate: float = 1e-2  # in `tasks`, of each task's head
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
    for name in ("learning_rate", "shared_rate", "private_rate"):
        _expect(0 < getattr(config, name) < math.inf, name, getattr(config, name), "a positive number")
    last = 2**31 - config.seeds
    _expect(0 <= config.seed <= last, "seed", config.seed, f"a whole number from 0 to {last}, for {config.seeds} seeds")
    graph = config.data_file is None or "graph" in config.cases
    _expect(graph, "data_file", config.data_file, "none without the case graph")


def groups(case: Case, variant: str, net: Tied, params: Any) -> Any:
    """Labels each parameter "fixed", "all", or, in cases with two rates, "shared" or "private"."""
    labels = flatten_dict(net.labels(params), sep="/")
    if case.two_rates:  # untied copies move as fast as what they are copies of
        tied = sharing.tie(case.module, case.variants["tied"].ties, case.example)
        copies = {path for uses in tied.uses.values() for path in uses}
        labels |= {path: "shared" for path in labels if path in copies}
    else:
        labels = dict.fromkeys(labels, "all")
    still = {path: "fixed" for path in labels if not re.match(case.variants[variant].trained, path)}
    return unflatten_dict(labels | still, sep="/")


def make_step(config: Config, case: Case, variant: str, net: Tied, params: Any) -> tuple[Callable, Any]:
    """A training step(params, opt_state, batch) -> (params, opt_state, loss), and the first state."""
    rates = {"all": config.learning_rate, "shared": config.shared_rate, "private": config.private_rate}
    rules = {name: optax.adam(rate) for name, rate in rates.items()} | {"fixed": optax.set_to_zero()}
    labels, loss = groups(case, variant, net, params), case.variants[variant].loss
    optimizer = optax.partition({name: rules[name] for name in set(jax.tree.leaves(labels))}, labels)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(lambda p: loss(partial(net.apply, {"params": p}), batch))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1)), optimizer.init(params)


def start(case: Case, seed: int) -> Any:
    """The untied network's first parameters; without `jit`, for compiling the draws takes longer than the draws."""
    return case.module.init(jax.random.key(seed), case.example)["params"]


def fit(
    config: Config, case: Case, variant: str, seed: int, name: str, layout: training.Layout | None = None
) -> tuple[Tied, Any]:
    """Trains a network from its seed, and the one before it if there is one: the network and its parameters."""
    before, label = case.variants[variant].after, f"{name} {variant} seed {seed}"
    full = start(case, seed)
    if before:
        net, params = fit(config, case, before, seed, name, layout)
        full = net.expand(params)
    net = sharing.tie(case.module, case.variants[variant].ties, case.example)
    params = net.fit(full, pick=lambda source, parts: next(iter(parts.values())))  # the source's own value
    step, opt_state = make_step(config, case, variant, net, params)
    put = layout.put if layout else lambda tree: tree
    params, opt_state = put((params, opt_state))
    value: Any = 0.0
    with tqdm.tqdm(total=config.steps, unit="step", desc=label, mininterval=1.0, leave=False) as bar:
        for number in range(config.steps):
            params, opt_state, value = step(params, opt_state, put(case.batch_at(number)))
            bar.update()
            if number % 50 == 0:
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
    if not np.isfinite(value):
        raise training.NonFinite(f"the loss of {label} is {value} after step {config.steps}; lower the rates")
    return net, layout.local(params) if layout else params


def cosine(case: Case, variant: str, net: Tied, params: Any) -> float | None:
    """The mean cosine between the gradients of a shared parameter's uses, on a batch; None where nothing is shared.

    Uses without a gradient, as that of channels that are only lent, count for nothing.
    """
    if not net.uses:
        return None
    batch = case.batch_at(0)

    @jax.jit
    def loss(full: Any) -> jax.Array:
        return case.variants[variant].loss(partial(net.module.apply, {"params": full}), batch)

    found = []
    for gradients in sharing.use_gradients(net, params, loss).values():
        felt = {use: gradient for use, gradient in gradients.items() if np.any(gradient)}
        if len(felt) > 1:
            found += sharing.cosines(felt)[np.triu_indices(len(felt), 1)].tolist()
    return float(np.mean(found)) if found else None


def measure(config: Config, case: Case) -> dict[str, dict[str, float]]:
    """By variant: parameters that it trains, bytes, and milliseconds of a training step, timed in turn."""
    runs, found, batch = {}, {}, case.batch_at(0)
    for variant, each in case.variants.items():
        net = sharing.tie(case.module, each.ties, case.example)
        params = net.fit(start(case, config.seed), pick=lambda source, parts: next(iter(parts.values())))
        step, opt_state = make_step(config, case, variant, net, params)
        memory = sharing.memory(step, params, opt_state, batch)
        flat = flatten_dict(params, sep="/")
        trained = [leaf for path, leaf in flat.items() if re.match(each.trained, path)]
        found[variant] = {
            "params_unique": training.count(trained),
            "params_bytes": sum(leaf.nbytes for leaf in trained),
        }
        found[variant] |= {"optimizer_bytes": memory.optimizer, "peak_bytes": memory.peak}
        state = [params, opt_state, None]

        def turn(step: Callable = step, state: list[Any] = state) -> list[Any]:
            state[:] = step(*state[:2], batch)
            return state

        runs[variant] = turn
    for variant, seconds in in_turn(runs, config.repeats).items():
        found[variant]["ms_per_step"] = 1e3 * float(np.median(seconds))
    return found


def run(config: Config, graph: Graph | None, workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains and measures everything that is not yet in `metrics.jsonl`, and returns the summary."""
    path = workdir.path / "metrics.jsonl"
    with training.bad_input(__file__):
        before = training.read_lines(path) if path.exists() else []
    about = [f"{name:10}{(CASES[name].__doc__ or '').splitlines()[0]}" for name in config.cases]
    graph_name = config.data_file or "the karate club, of which two members of each faction are told"
    about += [f"          Its graph is {graph_name}."] if "graph" in config.cases else []
    training.say(
        "\n".join(about) + f"\nrun       {config.seeds} {'seed' if config.seeds == 1 else 'seeds'} of each network, "
        f"{config.steps:,} steps of {config.batch} samples (graph: of the whole graph)\n"
        f"device    {training.device(workdir.layout)}\n"
        + (f"resuming after {len(before)} networks" if before else f"starting in {workdir.path}")
    )
    wanted = [(name, v, config.seed + n) for name in config.cases for v in VARIANTS[name] for n in range(config.seeds)]
    summary: dict[str, Any] = {"seeds": config.seeds, "steps": config.steps, "batch": config.batch}
    with training.JsonLines(path, len(before)) as lines:
        for number, (name, variant, seed) in enumerate(wanted[len(before) :], len(before) + 1):
            case = CASES[name](config.batch, seed, graph)
            net, params = fit(config, case, variant, seed, name, workdir.layout)
            row = {case.unit: case.variants[variant].quality(partial(jax.jit(net.apply), {"params": params}))}
            between = cosine(case, variant, net, params)
            row |= {} if between is None else {"cosine": between}
            lines.write(number, case=name, variant=variant, seed=seed, **row)
            training.say(f"{name} {variant} seed {seed}: " + ", ".join(f"{key} {v:.4f}" for key, v in row.items()))
    rows = training.read_lines(path)
    for name in config.cases:
        measured = measure(config, CASES[name](config.batch, config.seed, graph))
        for variant, figures in measured.items():
            mine = [row for row in rows if (row["case"], row["variant"]) == (name, variant)]
            for key in (key for key in mine[0] if key not in ("case", "variant", "seed", "step")):
                values = [row[key] for row in mine if key in row]
                summary[f"{name}_{variant}_{key}_mean"] = float(np.mean(values))
                summary |= {f"{name}_{variant}_{key}_std": float(np.std(values, ddof=1))} if len(values) > 1 else {}
            summary |= {f"{name}_{variant}_{key}": value for key, value in figures.items()}
    report(config, summary)
    draw(config, summary, workdir.path / "basics.png")
    counted = [np.zeros(summary[f"{name}_{v}_params_unique"]) for name in config.cases for v in VARIANTS[name]]
    return {**summary, **training.environment(__file__, counted, config.seed, time.perf_counter() - started)}


def unit_of(summary: dict[str, Any], name: str) -> str:
    """In what a case is judged."""
    return "bpc" if f"{name}_{VARIANTS[name][0]}_bpc_mean" in summary else "accuracy"


def report(config: Config, summary: dict[str, Any]) -> None:
    """Prints the table."""
    columns = ("parameters", "their KB", "Adam's KB", "peak KB", "ms a step")
    lines = [" " * 20 + "".join(f"{column:>12}" for column in columns) + f"{'test':>26}{'cosine':>8}"]
    for name in config.cases:
        unit = unit_of(summary, name)
        for variant in VARIANTS[name]:
            start = f"{name}_{variant}_"
            own = {key.removeprefix(start): value for key, value in summary.items() if key.startswith(start)}
            quality = f"{unit} {own[f'{unit}_mean']:.4f}"
            quality += f" ± {own[f'{unit}_std']:.4f}" if f"{unit}_std" in own else ""
            kilobytes = "".join(f"{own[f'{what}_bytes'] / 1e3:12,.1f}" for what in ("params", "optimizer", "peak"))
            lines.append(
                f"{name:10}{variant:10}{own['params_unique']:12,}{kilobytes}{own['ms_per_step']:12.2f}"
                f"{quality:>26}" + (f"{own['cosine_mean']:+8.2f}" if "cosine_mean" in own else f"{'-':>8}")
            )
    training.say("\n".join(lines) + NOTES)


def draw(config: Config, summary: dict[str, Any], path: Path) -> None:
    """Writes the picture of quality, tied beside untied."""
    from hyperjax import plotting

    first = plotting.COLORS[:2]
    widths = [1 + len(VARIANTS[name]) for name in config.cases]
    size = (max(7.0, 0.65 * sum(widths)), 3.6)
    figure, panels = plotting.subplots(1, len(config.cases), size, squeeze=False, width_ratios=widths)
    for axes, name in zip(panels[0], config.cases, strict=True):
        unit, names = unit_of(summary, name), VARIANTS[name]
        colors = first if len(names) == 2 else (plotting.GREY, *first)  # a teacher is grey
        whole = summary[f"{name}_{names[-1]}_params_unique"]
        means = [summary[f"{name}_{v}_{unit}_mean"] for v in names]
        errors = [summary.get(f"{name}_{v}_{unit}_std", 0.0) for v in names]
        for x, (mean, error, color) in enumerate(zip(means, errors, colors, strict=True)):
            axes.errorbar(x, mean, error or None, color=color, fmt="o", ms=8, capsize=4, lw=1.6)
            axes.annotate(f"{mean:.3f}", (x, mean + error), (0, 8), textcoords="offset points", ha="center", fontsize=8)
        low = min(m - e for m, e in zip(means, errors, strict=True))
        high = max(m + e for m, e in zip(means, errors, strict=True))
        room = max(0.6 * (high - low), 0.02)  # small differences stay small
        axes.set_ylim(low - room, high + room)
        axes.set_yticks([tick for tick in axes.get_yticks() if unit == "bpc" or tick <= 1])
        axes.set_ylim(low - room, high + room)  # ticks widen it
        axes.set_xlim(-0.6, len(names) - 0.4)
        shares = [f"{v}\n{summary[f'{name}_{v}_params_unique'] / whole:.0%}" for v in names]
        axes.set_xticks(range(len(names)), shares)
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("bits per character" if unit == "bpc" else unit, fontsize=8)
        axes.tick_params(labelsize=8)
        plotting.plain(axes)
    spread = f"mean and deviation of {config.seeds} seeds" if config.seeds > 1 else "one seed"
    title = f"The test of networks with and without ties, {spread}; % of the untied network's parameters"
    figure.suptitle(title, fontsize=10)
    plotting.save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Bad input exits with 2, a loss that is not finite with 1, Ctrl-C with 130."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset",), argv, description=__doc__, prog="share_basics.py")
    with training.bad_input(__file__, basics_graphs.__file__):
        check(config)
        layout = training.lay_out(config, batch=config.batch)
        workdir = training.Workdir(config.workdir or f"runs/share_basics-{config.preset}", config, FREE, layout)
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
