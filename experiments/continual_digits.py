"""Continual learning of digits: tasks come one after another, and one hypernetwork is to know them all in the end.

    python experiments/continual_digits.py --preset quick                   # split 8x8 digits, a minute on a CPU
    python experiments/continual_digits.py --preset quick --tasks permuted  # ten orders of their pixels
    python experiments/continual_digits.py --preset paper                   # split MNIST, as long as in the paper

Two learners start from the same weights and see the same batches: with the output regulariser of von Oswald et al.,
"Continual learning with hypernetworks", ICLR 2020, and without. The task is known at test time (their first scenario):
all weights of the main network, output layer included, come from the task's embedding, and an embedding is all that a
task adds to what is kept. The same command again resumes a run, or prints the summary of a finished one.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax import training
from hyperjax.data import Batches, Images, Split, load_images, permute_pixels, select_classes
from hyperjax.hypernet import Chunked, HyperNetwork, continual

FREE = ("workdir", "data_file", "save_minutes")  # a run may resume with other values of these
LEARNERS = ("regularised", "plain")


@dataclasses.dataclass(frozen=True)
class Config(training.FitConfig):
    """Settings of a run; --preset and --tasks choose the defaults of the others."""

    preset: str = "quick"  # quick, cpu or paper
    tasks: str = "split"  # split: groups of classes; permuted: orders of the pixels
    workdir: str | None = None  # where the run is kept; None is runs/continual_digits-PRESET-TASKS
    data: Literal["digits", "mnist"] = "digits"  # scikit-learn's 8x8 digits, or MNIST
    data_file: str | None = None  # an .npz of train_images, train_labels, test_images, test_labels to read instead
    num_tasks: int = 5  # how many tasks
    hidden: tuple[int, ...] = (64, 64)  # widths of the main network's hidden layers
    embedding_dim: int = 32  # width of a task's embedding
    chunk: int | None = None  # parameters that the generator makes at once; None is the root of their number
    features: int = 128  # width of the generator before its head
    beta: float = 0.3  # weight of the regulariser; 0 trains the learner without it alone
    batch: int = 32  # images in a batch
    steps_per_task: int = 400  # number of updates for each task
    learning_rate: float = 3e-3  # of Adam, which starts anew with each task
    held_out: float = 0.0  # fraction of the training images to test on in place of the test images, to choose settings
    log_every: int = 20  # steps between two lines of metrics
    save_minutes: float = 5.0  # longest time between two checkpoints
    seed: int = 0  # of initialization, batches and pixel orders


def defaults(preset: str = "quick", tasks: str = "split") -> Config:
    """The defaults of a preset and a kind of tasks."""
    _expect(preset in ("quick", "cpu", "paper"), "preset", preset, "one of quick, cpu, paper")
    _expect(tasks in ("split", "permuted"), "tasks", tasks, "one of split, permuted")
    fields: dict[str, Any] = {"num_tasks": 10} if tasks == "permuted" else {}
    if preset != "quick":
        hidden, width = ((400, 400), 96) if tasks == "split" else ((1000, 1000), 24)
        fields |= {"data": "mnist", "batch": 128, "steps_per_task": 200, "hidden": hidden, "embedding_dim": width}
    if preset == "paper" and tasks == "split":
        fields |= {"steps_per_task": 2000, "learning_rate": 1e-3, "beta": 0.01, "chunk": 42_000, "features": 10}
    elif preset == "paper":
        fields |= {"steps_per_task": 5000, "learning_rate": 1e-4, "beta": 0.1, "chunk": 78_000, "features": 25}
    return Config(preset, tasks, **fields)


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    for name in ("hidden", "embedding_dim", "chunk", "features", "batch", "steps_per_task", "log_every"):
        value = getattr(config, name)
        _expect(value is None or np.min(value, initial=1) >= 1, name, value, "nothing below 1")
    _expect(config.num_tasks >= 2, "num_tasks", config.num_tasks, "at least 2")
    for name in ("learning_rate", "save_minutes"):
        _expect(0 < getattr(config, name) < math.inf, name, getattr(config, name), "a positive number")
    _expect(0 <= config.beta < math.inf, "beta", config.beta, "a number of at least 0")
    _expect(0 <= config.held_out < 1, "held_out", config.held_out, "a fraction in [0, 1)")
    _expect(0 <= config.seed < 2**32, "seed", config.seed, "a whole number from 0 to 2**32 - 1")


class Task(NamedTuple):
    """The images of one task, and the order that their pixels are put into (0: as they are)."""

    name: str
    batches: Batches
    test: Split
    order: int

    def prepare(self, images: np.ndarray, peak: float) -> np.ndarray:
        """Returns images as the main network sees them, [N, pixels] float32 from black 0 to white 1."""
        return permute_pixels(images, self.order).reshape(len(images), -1).astype(np.float32) / np.float32(peak)


def make_tasks(config: Config, images: Images) -> list[Task]:
    """Cuts the images into tasks."""
    number, seed = config.num_tasks, config.seed
    train, test = images.train, images.valid if config.held_out else images.test
    if config.tasks == "permuted":
        orders = [seed * number + task if task else 0 for task in range(number)]
        return [Task(str(i + 1), Batches(*train, config.batch, seed), test, order) for i, order in enumerate(orders)]
    size, rest = divmod(images.classes, number)
    _expect(
        not rest and size > 1, "num_tasks", number, f"a divisor of the {images.classes} classes that leaves 2 or more"
    )
    tasks = []
    for classes in (range(start, start + size) for start in range(0, images.classes, size)):
        batches = Batches(*select_classes(train, classes), config.batch, seed)
        tasks.append(Task("/".join(map(str, classes)), batches, select_classes(test, classes), 0))
    return tasks


def make_hyper(config: Config, images: Images) -> HyperNetwork:
    """The hypernetwork of a configuration, for an MLP with ReLU."""
    classes = images.classes // config.num_tasks if config.tasks == "split" else images.classes
    hidden = [layer for width in config.hidden for layer in (nn.Dense(width), nn.relu)]
    return HyperNetwork.from_target(
        nn.Sequential([*hidden, nn.Dense(classes)]),
        np.zeros((1, images.train.images[0].size), np.float32),
        embedding_dim=config.embedding_dim,
        num_embeddings=config.num_tasks,
        generator=Chunked(chunk=config.chunk, features=config.features),
    )


def make_start(config: Config, hyper: HyperNetwork, pixels: int) -> tuple[Any, Callable, Callable]:
    """Returns the optimizer, create(key), and begin(state, task), which comes before the first step of each task.

    Each task starts with a new optimizer, whose momentum would move the embeddings of old tasks, and remembers the
    weights of the old ones. The learners start with the same weights.
    """
    optimizer, slots = optax.adam(config.learning_rate), jnp.arange(config.num_tasks - 1)

    def start(step, learners, rest, task):
        old = jnp.where(slots < task, slots, -1)
        remembered = continual.remember(hyper, {**rest, "params": learners.get("regularised", learners["plain"])}, old)
        carry = {"rest": rest, "task": jnp.int32(task), "old": old, "remembered": remembered}
        return training.TrainState(step, learners, optimizer.init(learners), carry)

    def create(key):
        rest = dict(hyper.init(key, jnp.zeros((1, pixels)), task_id=0))
        params = rest.pop("params")
        learners = {"plain": params} | ({"regularised": jax.tree.map(jnp.copy, params)} if config.beta else {})
        return start(jnp.zeros((), jnp.int32), learners, rest, 0)

    return optimizer, create, jax.jit(lambda state, task: start(state.step, state.params, state.carry["rest"], task))


def make_loss(config: Config, hyper: HyperNetwork) -> training.state.LossFn:
    """The sum of the learners' losses: their gradients do not meet."""

    def loss_fn(params, carry, batch, key):
        losses, total = {}, jnp.zeros(())
        for name, own in params.items():
            variables = {**carry["rest"], "params": own}
            logits = hyper.apply(variables, batch["images"], task_id=carry["task"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
            losses[f"{name}_loss"], total = loss, total + loss
            if name == "regularised":
                held = continual.output_regularizer(hyper, variables, carry["remembered"], carry["old"], config.beta)
                losses["penalty"], total = held, total + held
        return total, (carry, losses)

    return loss_fn


def make_validate(hyper: HyperNetwork, tasks: Sequence[Task], peak: float, per_task: int) -> Callable:
    """Returns validate(state): each learner's accuracy in each task so far, with the weights of that task."""
    most = max(len(task.test.labels) for task in tasks)

    @jax.jit
    def correct(params, rest, images, labels, task):
        logits: Any = hyper.apply({**rest, "params": params}, images, task_id=task)
        return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    def validate(state):
        seen = int(state.step) // per_task
        values: dict[str, float] = {"tasks_left": len(tasks) - seen}  # lower is better: the last state is what counts
        for number, task in enumerate(tasks[:seen]):
            extra = (0, most - len(task.test.labels))  # one size, so that one compilation serves all tasks
            images = np.pad(task.prepare(task.test.images, peak), (extra, (0, 0)))
            labels = np.pad(task.test.labels, extra, constant_values=-1)
            for name, params in state.params.items():
                hits = correct(params, state.carry["rest"], images, labels, number)
                values[f"{name}_task_{number}"] = int(hits) / len(task.test.labels)
        return values

    return validate


def run(config: Config, images: Images, tasks: list[Task], workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains, or goes on training; returns the summary."""
    hyper = make_hyper(config, images)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    optimizer, create, begin = make_start(config, hyper, images.train.images[0].size)
    checkpoints: training.Checkpoints[training.TrainState] = training.Checkpoints(workdir.shared / "checkpoints")
    data = {"data": images.name, "fingerprint": images.fingerprint}
    with training.bad_input(__file__):  # nothing is compiled in here
        if (checkpoints.meta() or data)["fingerprint"] != data["fingerprint"]:
            raise ValueError(f"the images of {images.name} have changed since this run began; choose another --workdir")
        restored = checkpoints.restore(jax.eval_shape(create, init_key))
        resumed = restored[1] if restored else {}
        metrics, timings = training.open_lines(workdir.path, resumed.get("step", 0))
    state = restored[0] if restored else jax.jit(create)(init_key)
    per_task, steps = config.steps_per_task, config.steps_per_task * len(tasks)
    main = sum(spec.size for spec in hyper.targets[0].structure.specs)
    training.say(
        f"model   hypernetwork of {training.count(state.params['plain']):,} parameters for a main network of {main:,}\n"
        f"data    {' '.join(images.notes)}; {config.num_tasks} {config.tasks} tasks\n"
        f"run     each task {config.steps_per_task:,} steps of {config.batch} images; beta {config.beta:g}, and 0\n"
        + "\n".join([f"device  {training.device(workdir.layout)}", *checkpoints.notes])
    )
    print(f"resuming after step {int(state.step):,} of {steps:,}" if restored else f"starting in {workdir.path}")
    step = training.make_step(make_loss(config, hyper), optimizer, workdir.layout, non_finite=config.non_finite)

    def advance(state, batch, key):
        task, within, arrays = batch
        return step(begin(state, task) if within == 0 else state, arrays, key)

    def batch_at(at, rows=slice(None)):
        task, within = divmod(at, per_task)
        batch = tasks[task].batches.batch_at(within, rows)
        return task, within, {**batch, "images": tasks[task].prepare(batch["images"], images.peak)}

    files: dict[str, Any] = {"checkpoints": checkpoints, "metrics": metrics, "timings": timings}
    every: dict[str, Any] = {"eval_every": per_task, "log_every": config.log_every, "save_minutes": config.save_minutes}
    with checkpoints, metrics, timings:
        state = training.fit(
            state,
            advance,
            batch_at,
            train_key,
            **files,
            **every,
            steps=steps,
            validate=make_validate(hyper, tasks, images.peak, per_task),
            best="tasks_left",
            items=config.batch,
            unit="images",
            meta=data,
            resumed=resumed,
            started=started,
            layout=workdir.layout,
            profile=config.profile,
            max_skipped=config.max_skipped,
        )
    names, matrices = [task.name for task in tasks], read_matrices(metrics.path, state.params, len(tasks))
    summary = {"tasks": config.tasks, "data": images.name, "num_tasks": len(tasks), "beta": config.beta}
    for learner, matrix in matrices.items():
        training.say(f"\n{learner}, accuracy in %\n{continual.accuracy_table(matrix, names)}")
        summary |= {f"{learner}_{name}": value for name, value in continual.continual_scores(matrix).items()}
    title = f"Tasks learned in turn ({config.tasks} {images.name}), with the output regulariser and without"
    draw(matrices, names, workdir.path / "accuracy.png", title)
    params, seconds = state.params["plain"], training.seconds(resumed, started)
    return {**summary, "main_params": main, **training.environment(__file__, params, config.seed, seconds)}


def draw(matrices: Mapping[str, np.ndarray], names: Sequence[str], path: Path, title: str) -> None:
    """Draws the accuracies of the learners side by side."""
    from hyperjax import plotting

    low = min(90, 10 * math.floor(10 * min(float(np.nanmin(matrix)) for matrix in matrices.values())))
    side = 1.4 + 0.42 * max(len(names), 7)
    figure, panels = plotting.subplots(1, len(matrices), (side * len(matrices) + 0.8, side + 0.4), title, squeeze=False)
    for axes, (learner, matrix) in zip(panels[0], matrices.items(), strict=True):
        plotting.plot_accuracies(axes, matrix, names, low)
        axes.set_title(f"{learner}\n{axes.get_title(loc='left')}", loc="left", fontsize=10)
    figure.colorbar(axes.images[0], ax=list(panels[0]), label="test accuracy, %", shrink=0.8)
    plotting.save(figure, path)


def read_matrices(path: Path, learners: Iterable[str], number: int) -> dict[str, np.ndarray]:
    """Returns the accuracy [after task, in task] of each learner, NaN in tasks to come, from a run's metrics."""
    rows = [row for row in training.read_lines(path) if "tasks_left" in row]
    return {
        learner: np.array([[row.get(f"{learner}_task_{task}", np.nan) for task in range(number)] for row in rows])
        for learner in LEARNERS
        if learner in learners
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Bad input exits with 2, a loss that is not finite with 1, Ctrl-C with 130."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset", "tasks"), argv, description=__doc__, prog="continual_digits.py")
    with training.bad_input(__file__):
        check(config)
        layout = training.lay_out(config, batch=config.batch, in_place="generators_")
        default = f"runs/continual_digits-{config.preset}-{config.tasks}"
        workdir = training.Workdir(config.workdir or default, config, FREE, layout)
        if workdir.summary is None:
            images = load_images(config.data, config.data_file, config.held_out)
            tasks = make_tasks(config, images)
            workdir.open()
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to train again")
    else:
        with workdir, training.stopping():
            workdir.finish(run(config, images, tasks, workdir, started))
    training.print_summary(workdir.summary or {})
    return 0


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
