"""Quality against serving parameters: SNR, dense and sparse, beside shared bottom and MMoE, at several budgets.

    python experiments/sweep_snr.py --preset quick                          # 8x8 digits, under three minutes on a CPU
    python experiments/sweep_snr.py --preset cpu --correlation 0.5          # synthetic regression of the MMoE paper
    python experiments/sweep_snr.py --preset cpu --data census --data-file census-income.test.gz

First every network gets its settings by the same random search, over the ranges of Ma et al., "SNR" (AAAI 2019), at one
budget and by validation; many settings train at once, in one compiled program. Then all budgets and seeds. Sparse SNR
is a network of the budget's size that pays for open gates, and serves what is left. The same command again goes on
after the last network that was finished.
"""

import dataclasses
import math
import operator
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import routing_models
import tqdm
from routing_models import DATA, MODELS, load, make_optimizer, quality, ramp

from hyperjax import routing, training
from hyperjax.data import TaskData

FREE = ("workdir", "data_file")  # a run may resume with other values of these
# SNR-Trans that does not pay for open gates, and the same that does.
SNR = {"snr_dense": "snr_trans", "snr_sparse": "snr_trans"}
NETWORKS = (*SNR, *(name for name in MODELS if name != "snr_trans"))
L0 = (3e-2, 1e-2, 1e-3, 1e-4, 1e-5)  # the paper's range, and more for losses larger than its own
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a sweep; --preset and --data choose the defaults of the others."""

    preset: str = "quick"  # quick or cpu
    data: str = "digits"  # synthetic, digits, census or multimnist
    workdir: str | None = None  # where the run is kept; None is runs/sweep_snr-PRESET-DATA
    data_file: str | None = None  # census: the file of UCI; multimnist: an .npz of MNIST
    group: str = "income"  # census: income or education, each with never married
    correlation: float = 0.5  # synthetic: cosine of the two tasks' weights
    models: tuple[str, ...] = ("snr_dense", "snr_sparse", "shared_bottom", "mmoe")  # networks to compare
    budgets: tuple[int, ...] = (3_000, 6_000, 12_000, 24_000)  # parameters
    seeds: int = 2  # runs of each; synthetic data is drawn anew for each
    parts: int = 4  # sub-networks or experts in each of two levels
    towers: tuple[int, ...] = (8,)  # hidden widths of the towers
    steps: int = 600  # updates of each run
    batch: int = 128  # rows in a batch
    learning_rates: tuple[float, float] = (1e-3, 1e-2)  # of Adam, to choose from; falls to 0 over the second half
    gate_rate: float = 2e-2  # of Adam for log alpha
    search: int = 8  # settings of each network to try at random
    search_seeds: int = 1  # runs of each setting
    search_budget: int = 12_000  # parameters of the networks to search with
    at_once: int = 16  # settings that train together
    seed: int = 0  # of the first run; the others follow


def defaults(preset: str = "quick", data: str | None = None) -> Config:
    """The defaults of a preset and of the data."""
    _expect(preset in ("quick", "cpu"), "preset", preset, "quick or cpu")
    data = data or ("digits" if preset == "quick" else "synthetic")
    _expect(data in DATA, "data", data, f"one of {', '.join(DATA)}")
    fields: dict[str, Any] = {}
    if preset == "cpu":
        models = ("snr_dense", "snr_sparse", "snr_aver", "shared_bottom", "mmoe")
        fields = {"models": models, "seeds": 5, "search": 16, "search_seeds": 2, "steps": 3000, "batch": 256}
        fields |= {"budgets": (6_000, 10_000, 16_000, 24_000), "search_budget": 16_000}
    if preset == "cpu" and data == "census":
        budgets = (12_000, 24_000, 48_000, 96_000)
        fields |= {
            "seeds": 3,
            "search": 8,
            "search_seeds": 1,
            "steps": 1500,
            "batch": 512,
            "budgets": budgets,
            "search_budget": 48_000,
        }
    return Config(preset, data, **fields)


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    unknown = [name for name in config.models if name not in NETWORKS]
    _expect(not unknown and bool(config.models), "models", config.models, f"some of {', '.join(NETWORKS)}")
    for name in ("seeds", "parts", "steps", "batch", "search", "search_seeds", "search_budget", "at_once"):
        _expect(getattr(config, name) >= 1, name, getattr(config, name), "1 or more")
    _expect(min(config.budgets, default=0) >= 1, "budgets", config.budgets, "one or more, none below 1")
    for name in ("models", "budgets"):
        values = getattr(config, name)
        _expect(len(set(values)) == len(values), name, values, "each once")
    _expect(min(config.towers, default=1) >= 1, "towers", config.towers, "nothing below 1")
    _expect(config.search_seeds <= config.seeds, "search_seeds", config.search_seeds, f"at most {config.seeds} seeds")
    _expect(0 < config.gate_rate < math.inf, "gate_rate", config.gate_rate, "a positive number")
    low, high = config.learning_rates
    _expect(0 < low <= high < math.inf, "learning_rates", config.learning_rates, "two positive numbers in rising order")
    last = 2**31 - config.seeds
    _expect(0 <= config.seed <= last, "seed", config.seed, f"a whole number from 0 to {last}, for {config.seeds} seeds")


def read_splits(config: Config) -> tuple[TaskData, dict[str, Any], bool]:
    """Loads the data; returns it, its splits as the networks see them, and whether each run has rows of its own."""
    own = config.data == "synthetic"
    options: dict[str, Any] = {"group": config.group, "correlation": config.correlation}
    seeds = range(config.seed, config.seed + config.seeds) if own else [config.seed]
    draws = [load(config.data, config.data_file, seed=seed, **options) for seed in seeds]

    def rows(split) -> dict[str, Any]:
        encode, size = jax.jit(draws[0].encode), split.rows
        blocks = [{name: a[at : at + 8192] for name, a in split.features.items()} for at in range(0, size, 8192)]
        return {"x": np.concatenate([np.asarray(encode(block)) for block in blocks]), **split.labels}

    splits = {}
    for name in ("train", "valid", "test"):
        each = [rows(getattr(draw, name)) for draw in draws]
        splits[name] = jax.tree.map(lambda *arrays: np.stack(arrays), *each) if own else each[0]
    return draws[0], splits, own


class Group:
    """The runs of one network, trained and evaluated together."""

    def __init__(self, config: Config, data: TaskData, own: bool, model: Any, width: int):
        self.config, self.tasks, self.own, self.model = config, data.tasks, own, model
        self.gated = isinstance(model, routing.SNR) and model.gates is not None

        def init(key, hyper):
            return self.network(hyper).init(key, jnp.zeros((1, width)))["params"]

        self.trials = training.make_trials(init, self.loss, self.optimizer, config.batch, own_rows=own)
        self.evaluate = jax.jit(lambda p, x: self.network(p[1]).apply({"params": p[0]}, x)[0])

    def network(self, hyper) -> Any:
        if not self.gated:
            return self.model
        gates = {name: hyper[name] for name in ("beta", "gamma", "zeta", "open")}
        return self.model.clone(gates=routing.HardConcrete(**gates))

    def optimizer(self, hyper):
        return make_optimizer(hyper["learning_rate"], self.config.gate_rate, self.config.steps)

    def loss(self, params, hyper, batch, key, step):
        outputs, info = self.network(hyper).apply({"params": params}, batch["x"], key)
        losses = routing.task_losses(self.tasks, outputs, batch)
        cost = hyper["l0"] * ramp(step, self.config.steps) * info["l0"] if self.gated else jnp.zeros(())
        return sum(losses.values(), cost), losses

    def train(self, splits: dict[str, Any], hyper: dict[str, Any], seeds: Any, bar: Any) -> list[Figures]:
        """Trains the runs, and returns the figures of each."""
        steps, train = self.config.steps, jax.tree.map(jnp.asarray, splits["train"])
        states = self.trials.start(seeds, hyper)
        for at in range(0, steps, 100):
            some = min(100, steps - at)
            states, losses = self.trials.advance(states, hyper, seeds, train, some)
            bar.set_postfix_str(", ".join(f"{name} {float(loss[:, -1].mean()):.3f}" for name, loss in losses.items()))
            bar.update(some)
        params = jax.tree.map(np.asarray, states.params)
        figures: list[Figures] = [{} for _ in seeds]
        for name in ("valid", "test"):
            split = splits[name]
            outputs = training.apply_in_blocks(self.evaluate, (params, hyper), split["x"], own_rows=self.own)
            broken = [
                run for run in range(len(figures)) if not all(np.isfinite(o[run]).all() for o in outputs.values())
            ]
            if broken:
                raise training.NonFinite(
                    f"{len(broken)} of {len(figures)} runs put out NaN or infinity; in a new --workdir try lower "
                    f"--learning-rates than {self.config.learning_rates}"
                )
            for run, line in enumerate(figures):
                labels = {task: split[task][run] if self.own else split[task] for task in self.tasks}
                scores = routing.task_scores(self.tasks, {t: o[run] for t, o in outputs.items()}, labels)
                line |= {f"{name}_quality": quality(scores, self.tasks)}
                line |= {f"{name}_{score}": value for score, value in scores.items()}
        for run, line in enumerate(figures):
            line |= self.served(*jax.tree.map(operator.itemgetter(run), (params, hyper)))
        return figures

    def served(self, params: Any, hyper: dict[str, Any]) -> Figures:
        """What is left to serve of a run."""
        if not self.gated:
            return {"params": training.count(params), "connections_open": 1.0, "tasks_lost": 0}
        model, variables = self.network(jax.tree.map(float, hyper)), {"params": params}
        gates = routing.served_gates(model, variables)
        share = sum(int((z > 0).sum()) for z in gates.values()) / sum(z.size for z in gates.values())
        lost = routing.lost_tasks(model, variables)
        # A lost task is served by a constant: it makes the network useless, but not small.
        size = training.count(params) if lost else routing.compact(model, variables).params[1]
        return {"params": size, "connections_open": share, "tasks_lost": len(lost)}


def make(config: Config, name: str, data: TaskData, splits: dict[str, Any], own: bool, budget: int) -> Group:
    """The group of a network by name, sized to a budget."""
    features = splits["train"]["x"].shape[-1]
    build = MODELS[SNR.get(name, name)]
    shape = jax.ShapeDtypeStruct((1, features), jnp.float32)
    model = routing.fit_width(
        lambda w: build(data.tasks, config.parts, w, config.towers), budget, shape, tolerance=0.25
    )
    return Group(config, data, own, model, features)


def draw(config: Config, name: str) -> list[Figures]:
    """The settings of the random search for a network: the same for all, but that dense SNR pays for no gate."""
    drawn = []
    for number in range(config.search):
        rng = np.random.default_rng((config.seed, number, 4))
        low, high = np.log(config.learning_rates)
        values = {"beta": rng.uniform(0.5, 0.9), "gamma": rng.uniform(-1, -0.1), "zeta": rng.uniform(1.1, 2)}
        values |= {"open": rng.uniform(0.5, 0.95), "l0": float(rng.choice(L0))}
        values |= {"learning_rate": float(np.exp(rng.uniform(low, high)))}
        drawn.append(values | ({"l0": 0.0} if name == "snr_dense" else {}))
    return drawn


def stack(settings: Sequence[Figures]) -> dict[str, Any]:
    """One array for each hyperparameter."""
    return {name: jnp.asarray([one[name] for one in settings], jnp.float32) for name in settings[0]}


def search(config: Config, name: str, data: TaskData, splits: dict[str, Any], own: bool) -> tuple[list[Figures], float]:
    """Tries settings at random, many at once; returns a line for each run, and how many there were in a minute."""
    settings, lines = draw(config, name), []
    group = make(config, name, data, splits, False, config.search_budget)
    started = time.perf_counter()
    for index in range(config.search_seeds):
        rows = jax.tree.map(operator.itemgetter(index), splits) if own else splits
        for first in range(0, config.search, config.at_once):
            some = settings[first : first + config.at_once]
            seeds = jnp.full(len(some), config.seed + index)
            with tqdm.tqdm(total=config.steps, unit="step", desc=f"search {name}", mininterval=1.0) as bar:
                figures = group.train(rows, stack(some), seeds, bar)
            for number, line in enumerate(figures):
                lines.append(
                    {"model": name, "trial": first + number, "seed": config.seed + index, **some[number]} | line
                )
    return lines, len(lines) / (time.perf_counter() - started) * 60


def best_of(config: Config, name: str, rows: list[Figures]) -> Figures:
    """The setting of a network that was best on validation, in the mean over seeds, without a task lost."""
    trials: dict[int, list[Figures]] = {}
    for row in rows:
        if row.get("model") == name and "trial" in row:
            trials.setdefault(row["trial"], []).append(row)

    def worth(number: int) -> tuple[bool, float]:
        runs = trials[number]
        return not any(run["tasks_lost"] for run in runs), float(np.mean([run["valid_quality"] for run in runs]))

    return draw(config, name)[max(trials, key=worth)]


def summarise(config: Config, rows: list[Figures]) -> Figures:
    """Chosen settings; means and standard deviations over seeds, of size and test scores."""
    summary: Figures = {"data": config.data, "steps": config.steps}
    for name in config.models:
        summary |= {f"{name}_{key}": value for key, value in best_of(config, name, rows).items()}
        for budget in config.budgets:
            found = pick(rows, name, budget)
            for key in ("params", "tasks_lost", *(key for key in found[0] if key.startswith("test_"))):
                values = np.array([row[key] for row in found])
                summary[f"{name}_{budget}_{key}"] = round(float(values.mean()), 6)
                if key.startswith("test_"):
                    deviation = float(values.std(ddof=min(1, len(values) - 1)))
                    summary[f"{name}_{budget}_{key}_std"] = round(deviation, 6)
    return summary


def pick(rows: list[Figures], name: str, budget: int) -> list[Figures]:
    """The runs of a network at a budget, by seed."""
    found = [row for row in rows if row.get("model") == name and row.get("budget") == budget]
    return sorted(found, key=operator.itemgetter("seed"))


def draw_figures(config: Config, rows: list[Figures], path: Path) -> None:
    """Quality against size; beside it the random search."""
    from matplotlib.figure import Figure

    from hyperjax.routing.plots import COLORS, plot_quality, save

    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    label = "test quality (mean of AUC, accuracy or R²)"
    points: dict[str, list[tuple[Any, Any]]] = {}
    for name in config.models:
        for budget in config.budgets:
            found = pick(rows, name, budget)
            points.setdefault(name, []).append(
                tuple([row[key] for row in found] for key in ("params", "test_quality"))  # type: ignore[arg-type]
            )
    plot_quality(left, points, label=label)
    left.set_title(f"{config.data}: mean ± standard deviation of {config.seeds} seeds", loc="left", fontsize=11)
    for number, name in enumerate(config.models):
        trials = [row for row in rows if row.get("model") == name and "trial" in row]
        x, y = ([row[key] for row in trials] for key in ("params", "valid_quality"))
        right.scatter(x, y, s=22, alpha=0.7, label=name, color=COLORS[number % len(COLORS)])
    top = max(row["valid_quality"] for row in rows if "trial" in row)
    right.set_ylim(top - 0.25, top + 0.01)
    right.set(xlabel="parameters served", ylabel="validation quality")
    right.set_title(f"Random search: {config.search} settings of each", loc="left", fontsize=11)
    right.legend(frameon=False, fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    save(figure, path / "quality.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep. Bad input exits with 2, outputs that are not finite with 1, a signal with 128 + its number."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset", "data"), argv, description=__doc__, prog="sweep_snr.py")
    with training.bad_input(__file__), training.bad_input(routing_models.__file__):
        check(config)
        workdir = training.Workdir(config.workdir or f"runs/sweep_snr-{config.preset}-{config.data}", config, FREE)
        if workdir.summary is None:
            data, splits, own = read_splits(config)
            for name in config.models:  # sizes that cannot be met are refused before anything is trained
                for budget in (*config.budgets, config.search_budget):
                    make(config, name, data, splits, own, budget)
            workdir.open()
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to run it again")
    else:
        with workdir, training.stopping():
            workdir.finish(run(config, data, splits, own, workdir, started))
    training.print_summary(workdir.summary or {})
    return 0


def run(config: Config, data: TaskData, splits, own: bool, workdir: training.Workdir, started: float) -> Figures:
    """Searches, sweeps, draws; returns the summary."""
    path = workdir.path / "metrics.jsonl"
    groups = [(name, budget) for name in config.models for budget in (None, *config.budgets)]
    with training.bad_input(__file__):
        counts = Counter(row["step"] for row in training.read_lines(path)) if path.exists() else Counter()
    needed = [config.search * config.search_seeds if budget is None else config.seeds for _, budget in groups]
    done = next((i for i, lines in enumerate(needed) if counts[i + 1] < lines), len(groups))
    training.say(
        f"models  {', '.join(config.models)} of {', '.join(f'{b:,}' for b in config.budgets)} parameters\n"
        f"data    {' '.join(data.notes)}\n"
        f"run     {config.search} settings of each, then {config.seeds} seeds; {config.steps:,} steps a run of "
        f"{config.batch} rows\n"
        f"device  {training.device()}\n"
        + (f"resuming after {done} of {len(groups)} groups of runs" if done else f"starting in {workdir.path}")
    )
    speeds = []
    with training.JsonLines(path, done) as lines:
        for number, (name, budget) in enumerate(groups[done:], done + 1):
            if budget is None:
                figures, speed = search(config, name, data, splits, own)
                speeds.append(speed)
                text = f"{name:14} {speed:.0f} trials a minute"
            else:
                setting = best_of(config, name, training.read_lines(path))
                seeds = jnp.arange(config.seed, config.seed + config.seeds)
                group = make(config, name, data, splits, own, budget)
                with tqdm.tqdm(total=config.steps, unit="step", desc=f"{name} {budget:,}", mininterval=1.0) as bar:
                    found = group.train(splits, stack([setting] * config.seeds), seeds, bar)
                figures = [{"model": name, "budget": budget, "seed": config.seed + i} | f for i, f in enumerate(found)]
                size, test = ([line[key] for line in figures] for key in ("params", "test_quality"))
                text = f"{name:14} {np.mean(size):9,.0f} parameters, test {np.mean(test):.4f} ± {np.std(test):.4f}"
            for line in figures:
                lines.write(number, **line)
            lines.sync()
            tqdm.tqdm.write(text)
    rows = training.read_lines(path)
    draw_figures(config, rows, workdir.path)
    pace = {"trials_per_minute": round(float(np.median(speeds)), 2)} if speeds else {}
    seconds = time.perf_counter() - started
    return {**summarise(config, rows), **pace, **training.environment(__file__, {}, config.seed, seconds)}


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
