"""Quality against serving parameters: SNR, dense and sparse, beside shared bottom and MMoE, at several budgets.

    python experiments/sweep_snr.py --preset quick                          # 8x8 digits, under three minutes on a CPU
    python experiments/sweep_snr.py --preset cpu --correlation 0.5          # synthetic regression of the MMoE paper
    python experiments/sweep_snr.py --preset cpu --data census --data-file census-income.test.gz

First every network gets its settings by the same random search, at one budget and by validation: beta, gamma, zeta and
lambda from the ranges of Ma et al., "SNR" (AAAI 2019), the rest from ours; many settings train at once, in one compiled
program. Then all budgets and seeds. Sparse SNR is a network of the budget's size that is steered to a share of its
connections, and serves what is left. The same command again goes on after the last network that was finished.
"""

import dataclasses
import json
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
from routing_models import DATA, MODELS, load
from routing_runs import Figures, Group

from hyperjax import routing, training
from hyperjax.data import TaskData

FREE = ("workdir", "data_file", "test_file")  # a run may resume with other values of these
# SNR-Trans whose gates cost nothing, and the same steered to a share of its connections.
SNR = {"snr_dense": "snr_trans", "snr_sparse": "snr_trans"}
NETWORKS = (*SNR, *(name for name in MODELS if name != "snr_trans"))
L0 = (1e-3, 1e-4, 1e-5)  # the paper's range of lambda


@dataclasses.dataclass(frozen=True)
class Config(training.Devices):
    """Settings of a sweep; --preset and --data choose the defaults of the others."""

    preset: str = "quick"  # quick or cpu
    data: str = "digits"  # synthetic, digits, census or multimnist
    workdir: str | None = None  # where the run is kept; None is runs/sweep_snr-PRESET-DATA-KIND
    data_file: str | None = None  # census: a file of UCI; multimnist: an .npz of MNIST
    test_file: str | None = None  # census: census-income.test, if data_file is census-income.data
    group: str = "income"  # census: income or education, each with never married
    correlation: float = 0.5  # synthetic: cosine of the two tasks' weights
    models: tuple[str, ...] = ("snr_dense", "snr_sparse", "shared_bottom", "mmoe")  # networks to compare
    budgets: tuple[int, ...] = (3_000, 6_000, 12_000, 24_000)  # parameters
    seeds: int = 2  # runs of each; synthetic data is drawn anew for each
    parts: int = 4  # sub-networks or experts in each of two levels
    towers: tuple[int, ...] = (8,)  # hidden widths of the towers
    steps: int = 400  # updates of each run
    batch: int = 128  # rows in a batch
    learning_rates: tuple[float, float] = (1e-3, 1e-2)  # of Adam, to choose from; falls to 0 over the second half
    gate_rate: float = 2e-2  # of Adam for log alpha
    search: int = 6  # settings of each network to try at random
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
        fields |= {"budgets": (3_000, 6_000, 10_000, 16_000), "search_budget": 6_000}
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
    draws = [load(config.data, config.data_file, config.test_file, seed=seed, **options) for seed in seeds]

    def rows(split) -> dict[str, Any]:
        encode, size = jax.jit(draws[0].encode), split.rows
        blocks = [{name: a[at : at + 8192] for name, a in split.features.items()} for at in range(0, size, 8192)]
        return {"x": np.concatenate([np.asarray(encode(block)) for block in blocks]), **split.labels}

    splits = {}
    for name in ("train", "valid", "test"):
        each = [rows(getattr(draw, name)) for draw in draws]
        splits[name] = jax.tree.map(lambda *arrays: np.stack(arrays), *each) if own else each[0]
    return draws[0], splits, own


def make(
    config: Config, name: str, data: TaskData, splits: dict[str, Any], own: bool, budget: int, layout: Any = None
) -> Group:
    """The runs of a network by name, sized to a budget."""
    features, build = splits["train"]["x"].shape[-1], MODELS[SNR.get(name, name)]
    shape = jax.ShapeDtypeStruct((1, features), jnp.float32)
    model = routing.fit_width(
        lambda width: build(data.tasks, config.parts, width, config.towers), budget, shape, tolerance=0.15
    )
    return Group(
        model,
        data.tasks,
        shape,
        steps=config.steps,
        batch=config.batch,
        mesh=None if layout is None else layout.mesh,
        gate_rate=config.gate_rate,
        own_rows=own,
        sparse=name == "snr_sparse",
    )


def draw(config: Config, name: str) -> list[Figures]:
    """The settings of the random search for a network: the same for all, but that dense SNR pays for no gate."""
    drawn = []
    for number in range(config.search):
        rng = np.random.default_rng((config.seed, number, 4))
        low, high = np.log(config.learning_rates)
        values = {"beta": rng.uniform(0.5, 0.9), "gamma": rng.uniform(-1, -0.1), "zeta": rng.uniform(1.1, 2)}
        values |= {"learning_rate": float(np.exp(rng.uniform(low, high))), "l0": float(rng.choice(L0))}
        values |= {"open": rng.uniform(0.5, 0.95), "ramp": rng.uniform(0.05, 0.3), "target": rng.uniform(0.15, 0.5)}
        drawn.append(values | ({"l0": 0.0} if name == "snr_dense" else {}))
    return drawn


def stack(settings: Sequence[Figures]) -> dict[str, Any]:
    """One array for each hyperparameter."""
    return {name: jnp.asarray([one[name] for one in settings], jnp.float32) for name in settings[0]}


def search(
    config: Config, name: str, data: TaskData, splits: dict[str, Any], own: bool, layout: training.Layout | None
) -> tuple[list[Figures], float]:
    """Tries settings at random, many at once; returns a line for each run, and how many there were in a minute."""
    settings, lines = draw(config, name), []
    group = make(config, name, data, splits, False, config.search_budget, layout)
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
    """The setting of a network that was best on validation, in the mean over seeds; none that failed or lost a task."""
    trials: dict[int, list[Figures]] = {}
    for row in rows:
        if row.get("model") == name and "trial" in row:
            trials.setdefault(row["trial"], []).append(row)

    def worth(number: int) -> tuple[bool, bool, float]:
        runs = trials[number]
        sound = not any(run["failed"] for run in runs)
        whole = sound and not any(run["tasks_lost"] for run in runs)
        return sound, whole, float(np.mean([run["valid_quality"] for run in runs])) if sound else 0.0

    best = max(trials, key=worth)
    if not worth(best)[0]:
        raise training.NonFinite(
            f"every setting of {name} put out NaN or infinity in one of its runs; in a new --workdir try lower "
            f"--learning-rates than {config.learning_rates}"
        )
    return draw(config, name)[best]


def check_data(path: Path, data: TaskData) -> None:
    """Writes down what data a sweep began with, or raises ValueError if it was other data."""
    mark = {"data": data.name, "fingerprint": data.fingerprint}
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != mark:
        raise ValueError(f"the data {data.name} has changed since {path.parent} began; choose another --workdir")
    training.write_json(path, mark)


def summarise(config: Config, rows: list[Figures]) -> Figures:
    """Chosen settings; means and standard deviations over seeds, of size and test scores."""
    summary: Figures = {"data": config.data, "steps": config.steps}
    for name in config.models:
        setting = best_of(config, name, rows)
        used = setting if name.startswith("snr") else {"learning_rate": setting["learning_rate"]}
        summary |= {f"{name}_{key}": value for key, value in used.items()}
        for budget in config.budgets:
            found = pick(rows, name, budget)
            for key in ("params", "tasks_lost", *(key for key in found[0] if key.startswith("test_"))):
                values = np.array([row[key] for row in found])
                summary[f"{name}_{budget}_{key}"] = round(float(values.mean()), 6)
                if key.startswith("test_"):
                    deviation = float(values.std(ddof=len(values) > 1))
                    summary[f"{name}_{budget}_{key}_std"] = round(deviation, 6)
    return summary


def pick(rows: list[Figures], name: str, budget: int) -> list[Figures]:
    """The runs of a network at a budget, by seed."""
    found = [row for row in rows if row.get("model") == name and row.get("budget") == budget]
    return sorted(found, key=operator.itemgetter("seed"))


def draw_figures(config: Config, rows: list[Figures], path: Path) -> None:
    """Quality against size; beside it the random search."""
    from hyperjax import plotting

    figure, (left, right) = plotting.subplots(1, 2, (11.5, 4.6))
    label = "test quality (mean of AUC, accuracy or R²)"
    points: dict[str, list[tuple[Any, Any]]] = {}
    for name in config.models:
        for budget in config.budgets:
            found = pick(rows, name, budget)
            points.setdefault(name, []).append(
                tuple([row[key] for row in found] for key in ("params", "test_quality"))  # type: ignore[arg-type]
            )
    plotting.plot_quality(left, points, label=label)
    kind = {"synthetic": f", correlation {config.correlation:g}", "census": f", {config.group}"}.get(config.data, "")
    left.set_title(f"{config.data}{kind}: mean ± standard deviation of {config.seeds} seeds", loc="left", fontsize=11)
    for number, name in enumerate(config.models):
        trials = [row for row in rows if row.get("model") == name and "trial" in row and not row["failed"]]
        x, y = ([row[key] for row in trials] for key in ("params", "valid_quality"))
        right.scatter(x, y, s=22, alpha=0.7, label=name, color=plotting.color(number))
    top = max(row["valid_quality"] for row in rows if "trial" in row and not row["failed"])
    right.set_ylim(top - 0.25, top + 0.01)
    right.set(xlabel="parameters served", ylabel="validation quality")
    right.set_title(f"Random search: {config.search} settings of each", loc="left", fontsize=11)
    right.legend(frameon=False, fontsize=9)
    plotting.plain(right)
    plotting.save(figure, path / "quality.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep. Bad input exits with 2, outputs that are not finite with 1, Ctrl-C with 130."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset", "data"), argv, description=__doc__, prog="sweep_snr.py")
    with training.bad_input(__file__, routing_models.__file__):
        check(config)
        layout = training.lay_out(config)
        kind = {"synthetic": f"-{config.correlation:g}", "census": f"-{config.group}"}.get(config.data, "")
        default = f"runs/sweep_snr-{config.preset}-{config.data}{kind}"
        workdir = training.Workdir(config.workdir or default, config, FREE, layout)
        if workdir.summary is None:
            data, splits, own = read_splits(config)
            for name in config.models:  # sizes that cannot be met are refused before anything is trained
                for budget in (*config.budgets, config.search_budget):
                    make(config, name, data, splits, own, budget)
            workdir.open()
            check_data(workdir.path / "data.json", data)
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
        f"device  {training.device(workdir.layout)}\n"
        + (f"resuming after {done} of {len(groups)} groups of runs" if done else f"starting in {workdir.path}")
    )
    times = workdir.path / "timings.jsonl"
    with training.JsonLines(path, done) as lines, training.JsonLines(times, done) as timings:
        for number, (name, budget) in enumerate(groups[done:], done + 1):
            if budget is None:
                figures, speed = search(config, name, data, splits, own, workdir.layout)
                timings.write(number, trials_per_minute=speed, seconds=time.perf_counter() - started)
                text = f"{name:14} {speed:.0f} trials a minute"
            else:
                setting = best_of(config, name, training.read_lines(path))
                seeds = jnp.arange(config.seed, config.seed + config.seeds)
                group = make(config, name, data, splits, own, budget, workdir.layout)
                with tqdm.tqdm(total=config.steps, unit="step", desc=f"{name} {budget:,}", mininterval=1.0) as bar:
                    found = group.train(splits, stack([setting] * config.seeds), seeds, bar)
                if any(line["failed"] for line in found):
                    raise training.NonFinite(
                        f"{name} of {budget:,} parameters put out NaN or infinity with the setting that was best at "
                        f"{config.search_budget:,}; in a new --workdir try lower --learning-rates"
                    )
                figures = [{"model": name, "budget": budget, "seed": config.seed + i} | f for i, f in enumerate(found)]
                size, test = ([line[key] for line in figures] for key in ("params", "test_quality"))
                deviation = np.std(test, ddof=len(test) > 1)
                text = f"{name:14} {np.mean(size):9,.0f} parameters, test {np.mean(test):.4f} ± {deviation:.4f}"
                timings.write(number, seconds=time.perf_counter() - started)
            started = time.perf_counter()
            for line in figures:
                lines.write(number, **line)
            lines.sync()
            tqdm.tqdm.write(text)
    rows = training.read_lines(path)
    draw_figures(config, rows, workdir.path)
    clock = training.read_lines(times)
    speeds = [row["trials_per_minute"] for row in clock if "trials_per_minute" in row]
    pace = {"trials_per_minute": round(float(np.median(speeds)), 2)} if speeds else {}
    seconds = sum(row["seconds"] for row in clock) + time.perf_counter() - started
    largest = make(config, config.models[0], data, splits, own, max(config.budgets)).shapes()
    return {**summarise(config, rows), **pace, **training.environment(__file__, largest, config.seed, seconds)}


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
