"""Few-shot learning with a hypernetwork: a new task is 4 numbers to find instead of a network to train.

    python experiments/fewshot_adaptation.py --tasks sinusoids    # or digits; a minute or two on a CPU

A hypernetwork learns many related tasks, an embedding z for each in a table. On tasks it has not seen, from 1 to 20
shots, three ways are compared: gradient steps on z alone (`hyperjax.hypernet.adapt`), on all weights of the network
that the mean embedding generates, and on all weights of a network started from scratch.

sinusoids  y = a sin(x - p), a in [0.1, 5], p in [0, pi], x in [-5, 5] (Finn et al., "Model-agnostic meta-learning",
           ICML 2017, section 5.1), with its network. A shot is a point. The error is the mean squared error on a grid.
digits     scikit-learn's 8x8 digits, turned by an angle, and with the classes in one of a few orders, which exchange
           the labels. A new task is a new angle with one of these orders, on images that no training task had.
           A shot is an image of each of the 10 classes. The error is the percentage of wrong answers.

For each number of shots, each way gets the learning rate of Adam and the number of steps with the lowest mean error on
tasks kept for tuning, out of 6 or 7 rates, a factor of about 3 apart, and 4 numbers of steps. "At start" is the error
without a step: of the table's best z for the shots, of the mean embedding's network, and of random weights.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import tqdm
from fewshot_tasks import RATES, SHOTS, WAYS, Digits, Episode, Learners, Sinusoids

from hyperjax import training
from hyperjax.hypernet import HyperNetwork

FREE = ("workdir", "save_minutes", "keep_checkpoints")  # a run may resume with other values of these


@dataclasses.dataclass(frozen=True)
class Config(training.FitConfig):
    """Settings of a run; --preset and --tasks choose the defaults of the others."""

    preset: str = "quick"  # quick or cpu
    tasks: str = "sinusoids"  # sinusoids or digits
    workdir: str | None = None  # where the run is kept; None is runs/fewshot-TASKS-PRESET
    embedding_dim: int = 4  # E, width of z
    start: str = "nearest"  # where z starts on a new task: mean, zeros or nearest (of the table, by loss)
    degrees: float = 60.0  # largest angle that digits are turned by, to either side
    permutations: int = 4  # orders of the classes of digits
    train_tasks: int = 200  # tasks to train the hypernetwork on
    tune_tasks: int = 30  # tasks to choose learning rates and numbers of steps on
    new_tasks: int = 30  # tasks that the reported errors are of
    adapt_steps: int = 1000  # most steps on a new task; the others tried are a third, a tenth and a thirtieth of it
    steps: int = 6000  # updates of the hypernetwork
    batch: int = 20  # tasks in a batch
    samples: int = 20  # samples of each task in a batch
    learning_rate: float = 3e-3  # of Adam
    clip: float = 1.0  # largest global norm of the gradient
    decay: float = 0.8  # final fraction of the training over which the learning rate falls to 0 along a cosine
    noise: float = 0.0  # standard deviation of noise on z in training, which makes neighbours of a z fit its task, too
    eval_every: int = 500  # steps between two validations, each followed by a checkpoint
    log_every: int = 100  # steps between two lines of metrics
    save_minutes: float = 5.0  # longest time between two checkpoints
    keep_checkpoints: int = 2  # how many of the newest checkpoints to keep, beside the best
    seed: int = 0  # of tasks, initialization and batches


def defaults(preset: str = "quick", tasks: str = "sinusoids") -> Config:
    """The defaults of a preset and a family of tasks."""
    for name, value, known in (("preset", preset, ("quick", "cpu")), ("tasks", tasks, ("sinusoids", "digits"))):
        if value not in known:
            raise ValueError(f"--{name} is {value!r}, expected {' or '.join(known)}")
    config = Config(preset, tasks)
    if tasks == "digits":
        sizes: dict[str, Any] = {"train_tasks": 100, "steps": 2000, "samples": 50, "adapt_steps": 600}
        config = dataclasses.replace(config, **sizes, learning_rate=5e-3, noise=0.2)
    if preset == "cpu":
        config = dataclasses.replace(config, steps=5 * config.steps, train_tasks=400, new_tasks=200, adapt_steps=1000)
    return config


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if field.type is int and field.name not in ("seed", "profile", "max_skipped") and value < 1:
            raise ValueError(f"{name} is {value}, expected a whole number of at least 1")
        if field.type is float and field.name not in ("decay", "noise") and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, expected a positive number")
    if config.start not in ("mean", "zeros", "nearest"):
        raise ValueError(f"--start is {config.start!r}, expected mean, zeros or nearest")
    if not 0 <= config.noise < math.inf:
        raise ValueError(f"--noise is {config.noise}, expected a standard deviation of at least 0")
    if not 0 <= config.decay <= 1:
        raise ValueError(f"--decay is {config.decay}, expected a fraction in [0, 1]; 0 is no decay")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"--seed is {config.seed}, expected a whole number from 0 to 2**32 - 1")


def make_family(config: Config) -> Any:
    """The family of tasks of a configuration."""
    rng = np.random.default_rng((config.seed, 0))
    if config.tasks == "sinusoids":
        return Sinusoids(rng, config.train_tasks)
    return Digits(rng, config.train_tasks, config.degrees, config.permutations)


def make_hyper(config: Config, family: Any) -> HyperNetwork:
    """The hypernetwork, with an embedding for each task that it is trained on."""
    return HyperNetwork.from_target(
        family.model,
        family.example,
        embedding_dim=config.embedding_dim,
        num_embeddings=config.train_tasks,
        generator=family.generator,
    )


def initial(config: Config, family: Any, hyper: HyperNetwork) -> dict[str, Any]:
    """The variables that training starts from, those included that it leaves alone."""
    key, _ = jax.random.split(jax.random.key(config.seed))
    return dict(jax.jit(lambda key: hyper.init(key, family.example, task_id=0))(key))


def train(config: Config, workdir: training.Workdir, family: Any, hyper: HyperNetwork, started: float):
    """Trains the hypernetwork, or goes on training; returns its best variables, their error, and seconds so far."""
    _, train_key = jax.random.split(jax.random.key(config.seed))
    variables = initial(config, family, hyper)
    rate = training.schedule(config.learning_rate, config.steps, config.decay)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate))
    state = training.TrainState.create(variables.pop("params"), optimizer)

    def predict(params, batch, noise):
        z = hyper.embeddings({"params": params})[batch["ids"]] + noise
        return jax.vmap(lambda z, x: hyper.apply({"params": params, **variables}, x, z=z))(z, batch["inputs"])

    def loss_fn(params, carry, batch, key):
        shape = (len(batch["ids"]), config.embedding_dim)
        outputs = predict(params, batch, config.noise * jax.random.normal(key, shape))
        error = family.error(outputs, batch["targets"]).mean()
        return family.loss(outputs, batch["targets"]).mean(), (carry, {"error": error})

    def batch_at(step, rows=slice(None), valid=False):
        rng = np.random.default_rng((config.seed, 3, step, valid))
        ids = rng.permutation(config.train_tasks)[: None if valid else config.batch].astype(np.int32)
        inputs, targets = family.sample(rng, ids, config.samples, valid)
        return {"ids": ids[rows], "inputs": inputs[rows], "targets": targets[rows]}

    checkpoints: training.Checkpoints[training.TrainState] = training.Checkpoints(
        workdir.shared / "checkpoints", config.keep_checkpoints
    )
    with training.bad_input(__file__):
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
        state, resumed = restored or (state, {})
        metrics, timings = training.open_lines(workdir.path, resumed.get("step", 0))
    training.say("\n".join([*describe(config, family, state.params, workdir.layout), *checkpoints.notes]))
    print(f"resuming after step {int(state.step):,}" if restored else f"starting in {workdir.path}")
    held = batch_at(0, valid=True)
    measure = jax.jit(lambda params, batch: family.error(predict(params, batch, 0.0), batch["targets"]).mean())
    with contextlib.ExitStack() as stack:
        for each in (checkpoints, metrics, timings):
            stack.enter_context(each)
        state = training.fit(
            state,
            training.make_step(loss_fn, optimizer, workdir.layout, non_finite=config.non_finite),
            batch_at,
            train_key,
            steps=config.steps,
            checkpoints=checkpoints,
            metrics=metrics,
            timings=timings,
            validate=lambda state: {"valid_error": float(measure(state.params, held))},
            best="valid_error",
            eval_every=config.eval_every,
            log_every=config.log_every,
            items=config.batch * config.samples,
            unit="samples",
            resumed=resumed,
            started=started,
            save_minutes=config.save_minutes,
            layout=workdir.layout,
            profile=config.profile,
            max_skipped=config.max_skipped,
        )
    best = checkpoints.restore_best(state)
    valid_error = checkpoints.best[1] if checkpoints.best else math.nan
    return {"params": best.params, **variables}, valid_error, training.seconds(resumed, started)


def describe(config: Config, family: Any, params: Any, layout: training.Layout | None) -> list[str]:
    """What the run is about to do."""
    layers = " - ".join(map(str, (family.example.shape[1], *family.model.widths, family.model.outputs)))
    generator = f"{type(family.generator).__name__} hypernetwork of {training.count(params):,}"
    tasks = f"{config.train_tasks} tasks to train, {config.tune_tasks} to tune, {config.new_tasks} new"
    return [
        f"model   MLP {layers}, {target_size(family):,} parameters; {generator}, z of {config.embedding_dim}",
        f"data    {config.tasks}: {tasks}",
        f"run     {config.steps:,} steps of {config.batch} tasks x {config.samples} samples",
        f"device  {training.device(layout)}",
    ]


def target_size(family: Any) -> int:
    """Number of parameters of the target network."""
    return training.count(jax.eval_shape(family.model.init, jax.random.key(0), family.example))


def compare(config: Config, family: Any, learners: Learners) -> list[dict[str, Any]]:
    """Tunes each way for each number of shots, and judges it on new tasks: a row for each."""
    tune = family.episode(np.random.default_rng((config.seed, 1)), config.tune_tasks, tune=True)
    new = family.episode(np.random.default_rng((config.seed, 2)), config.new_tasks, tune=False)
    tune_key, new_key = jax.random.split(jax.random.key(config.seed))
    stops = np.array([0, *sorted({math.ceil(config.adapt_steps / part) for part in (1, 3, 10, 30)})])
    rows = []
    for shots, way in tqdm.tqdm([(shots, way) for shots in SHOTS for way in WAYS], "new tasks"):
        few, judged = (
            Episode(part.inputs[:, : shots * family.per_shot], part.targets[:, : shots * family.per_shot], *part[2:])
            for part in (tune, new)
        )
        tried = np.array([learners.errors(way, few, rate, stops, tune_key).mean(0) for rate in RATES[way]])
        best = np.unravel_index(np.nanargmin(tried[:, 1:]), tried[:, 1:].shape)
        rate, stop = RATES[way][best[0]], best[1] + 1
        errors = learners.errors(way, judged, rate, stops, new_key)
        spent = learners.milliseconds(way, judged, rate, int(stops[stop]), new_key)
        row = {"way": way, "shots": shots, "errors": errors[:, stop], "error_start": float(errors[:, 0].mean())}
        rows.append({**row, "rate": rate, "steps": int(stops[stop]), "milliseconds": spent})
    return rows


def report(rows: list[dict[str, Any]], label: str, touched: dict[str, int]) -> dict[str, Any]:
    """Prints the table; returns its figures by flat keys."""
    whole = max(touched.values())
    figures: dict[str, Any] = {}
    lines = [f"\n{'':32}{label}\nshots{'':27}at start   mean ±    std  steps    rate  milliseconds  parameters touched"]
    for row in rows:
        way, shots, mean, std = row["way"], row["shots"], float(row["errors"].mean()), float(row["errors"].std())
        figures |= {f"error_{way}_{shots}": mean, f"error_std_{way}_{shots}": std}
        figures |= {f"{name}_{way}_{shots}": row[name] for name in ("error_start", "steps", "rate", "milliseconds")}
        share = f"{touched[way]:,} ({touched[way] / whole:.2%})"
        lines.append(
            f"{shots if way == 'z' else '':>5}  {WAYS[way]:25}{row['error_start']:8.3f}{mean:8.3f} ± {std:6.3f}"
            f"{row['steps']:7}{row['rate']:8g}{row['milliseconds']:14.1f}{share:>20}"
        )
    training.say("\n".join(lines))
    for way, count in touched.items():
        figures |= {f"touched_{way}": count, f"share_touched_{way}": count / whole}
    return figures


def draw(rows: list[dict[str, Any]], family: Any, title: str, path: Any) -> None:
    """Draws the error of each way over the number of shots: a dot for each new task, and their mean."""
    from hyperjax import plotting

    figure, axes = plotting.subplots(size=(7.2, 4.4), title=title)
    colors = (plotting.COLORS[1], plotting.COLORS[0], plotting.GREY)
    styles = zip(WAYS.items(), colors, (0.94, 1.0, 1.06), strict=True)
    for (way, label), color, shift in styles:
        own = [row for row in rows if row["way"] == way]
        for row in own:
            x = np.full(len(row["errors"]), row["shots"] * shift)
            axes.plot(x, row["errors"], ".", color=color, alpha=0.3, ms=5, mew=0)
        means = [row["errors"].mean() for row in own]
        axes.plot([row["shots"] * shift for row in own], means, "o-", color=color, lw=2, ms=6, mec="white", label=label)
    axes.set_xscale("log")
    axes.set_yscale(family.scale)
    axes.set_xticks(SHOTS, [str(shots) for shots in SHOTS])
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel(f"shots ({family.shot})")
    axes.set_ylabel(f"{family.label} on new tasks")
    axes.legend(frameon=False)
    plotting.plain(axes)
    plotting.save(figure, path)


def run(config: Config, workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains and compares; returns the summary."""
    family = make_family(config)
    hyper = make_hyper(config, family)
    variables, valid_error, seconds = train(config, workdir, family, hyper, started)
    began, size = time.perf_counter(), target_size(family)
    rows = compare(config, family, Learners(family, hyper, variables, config.start))
    figures = report(rows, family.label, {"z": config.embedding_dim, "finetune": size, "scratch": size})
    title = f"New tasks ({config.tasks}): {config.embedding_dim} numbers to find, or {size:,} weights"
    draw(rows, family, title, workdir.path / "fewshot.png")
    seconds += time.perf_counter() - began
    environment = training.environment(__file__, variables["params"], config.seed, seconds)
    return {"tasks": config.tasks, "valid_error": valid_error, "params_target": size, **figures, **environment}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status, 2 for bad input."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset", "tasks"), argv, description=__doc__, prog="fewshot_adaptation.py")
    with training.bad_input(__file__):
        check(config)
        layout = training.lay_out(config, batch=config.batch, in_place="generators_")
        workdir = training.Workdir(
            config.workdir or f"runs/fewshot-{config.tasks}-{config.preset}", config, FREE, layout
        )
        if workdir.summary is None:
            workdir.open()
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to train again")
        training.print_summary(workdir.summary)
        return 0
    with workdir, training.stopping():
        workdir.finish(run(config, workdir, started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
