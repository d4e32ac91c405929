"""Training a network of share_layers.py, from scratch or away from a teacher, and going on after a stop."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sharing_rows import Row, logits_of, replanned
from text_tasks import Characters

from hyperjax import sharing, training
from hyperjax.distillation import distillation
from hyperjax.sharing import Maps
from hyperjax.training.state import LossFn
from hyperjax.transformer import Config, Decoder

Array = jax.Array
SIZE = 32  # windows evaluated together


def make_optimizer(config: Any, rate: float, steps: int, falls: bool = True) -> optax.GradientTransformation:
    """AdamW after a warm-up of a twentieth; the rate then falls to a twentieth along a cosine, or stays."""
    warm, last = max(1, steps // 20), rate / 20 if falls else rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm, max(steps, warm + 1), last)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(schedule, weight_decay=config.weight_decay))


def make_loss(net: Any, task: Characters, config: Any, steps: int, teacher: Any, softly: Maps | None) -> LossFn:
    """Nats of a character; the divergence from a teacher, whose parameters the carry holds; a soft tie that grows."""

    def loss_fn(params: Any, carry: Any, batch: Any, key: Array) -> Any:
        logits = logits_of(net, params, batch["tokens"])
        loss = task.loss(logits, batch)
        metrics = {"task_loss": loss, "train_bpc": task.figures(logits, batch).mean()}
        if teacher is not None:
            taught = logits_of(teacher, carry["teacher"], batch["tokens"])
            loss += config.distill * distillation(logits, taught).mean()
        if softly is not None:
            metrics["apart"] = sharing.soft_tie(params, softly)
            loss += config.soft_weight * carry["step"] / steps * metrics["apart"]
        return loss, ({**carry, "step": carry["step"] + 1}, metrics)

    return loss_fn


def make_evaluate(net: Any, task: Characters) -> Callable[[Any, str], float]:
    """(params, split) -> bits per character."""
    figures = jax.jit(lambda params, batch: task.figures(logits_of(net, params, batch["tokens"]), batch))

    def evaluate(params: Any, split: str) -> float:
        found = [np.asarray(figures(params, batch))[:count] for batch, count in task.batches(split, SIZE)]
        return float(np.concatenate(found).mean())

    return evaluate


def train(
    config: Any,
    net: Any,
    task: Characters,
    workdir: training.Workdir,
    label: str,
    seed: int,
    started: float,
    *,
    steps: int,
    rate: float,
    start: Any = None,
    opt_state: Any = None,
    after: int = 0,
    within: int | None = None,
    teacher: tuple[Any, Any] | None = None,
    softly: Maps | None = None,
) -> training.TrainState:
    """Trains a network for a number of steps, or goes on, or restores it, and returns its last state.

    Args:
        label: the folder within the run's that it is kept in.
        steps: how many.
        rate: the highest learning rate.
        start: parameters to begin with; None draws them.
        opt_state: the optimiser's state to begin with; None is a new one.
        after: number of steps whose batches were seen before.
        within: number of steps that the learning rate is planned for; None is `steps`.
        teacher: network and parameters whose answers are learned too.
        softly: maps whose layers are drawn together.
    """
    folder, layout = workdir.path / label, workdir.layout
    optimizer = make_optimizer(config, rate, within or steps, softly is None)
    init_key, train_key = jax.random.split(jax.random.key(seed))
    example, evaluate = task.batch_at(0), make_evaluate(net, task)
    loss_fn = make_loss(net, task, config, steps, None if teacher is None else teacher[0], softly)

    def create(key: Array) -> training.TrainState:
        params = net.init(key, example["tokens"])["params"] if start is None else start
        carry = {"step": jnp.zeros((), jnp.int32), **({} if teacher is None else {"teacher": teacher[1]})}
        new = optimizer.init(params) if opt_state is None else opt_state
        return training.TrainState(jnp.asarray(after, jnp.int32), params, new, carry)

    folder.mkdir(parents=True, exist_ok=True)
    checkpoints: training.Checkpoints[training.TrainState] = training.Checkpoints(
        workdir.shared / label / "checkpoints", 1
    )
    mark = {"fingerprint": task.fingerprint}
    with training.bad_input(__file__):  # nothing is compiled in here
        if (checkpoints.meta() or mark)["fingerprint"] != mark["fingerprint"]:
            raise ValueError(f"the data {task.name} has changed since {folder} began; choose another --workdir")
        restored = checkpoints.restore(jax.eval_shape(create, init_key))
        resumed = restored[1] if restored else {}
        files = training.open_lines(folder, resumed.get("step", 0))
    state = restored[0] if restored else jax.jit(create)(init_key)
    with checkpoints, files[0], files[1]:
        if restored:
            print(f"{folder.name}: after step {int(state.step):,} of {after + steps:,}")
        if int(state.step) < after + steps:
            state = training.fit(
                state,
                training.make_step(loss_fn, optimizer, layout, non_finite=config.non_finite),
                task.batch_at,
                train_key,
                checkpoints=checkpoints,
                metrics=files[0],
                timings=files[1],
                steps=after + steps,
                log_every=config.log_every,
                eval_every=config.eval_every,
                save_minutes=config.save_minutes,
                validate=lambda state: {"valid_bpc": evaluate(state.params, "valid")},
                best="valid_bpc",
                items=config.batch * config.length,
                meta=mark,
                resumed={**resumed, "seconds": 0.0},  # `started` is moved by them
                started=started,
                layout=layout,
                profile=config.profile,
                max_skipped=config.max_skipped,
            )
    options = {"train": "train_bpc", "valid": "valid_bpc", "label": "bits per character"}
    training.save_curves(files[0].path, folder / "curves.png", title=f"{folder.name} on {task.name}", **options)
    return state


def trained(
    config: Any,
    row: Row,
    sizes: Config,
    task: Characters,
    workdir: training.Workdir,
    seed: int,
    started: float,
    teacher: Any,
) -> tuple[Row, Any]:
    """A row after its training, and its parameters: in one stage, or in several whose networks differ.

    Args:
        sizes: of the unshared network.
        workdir: the run's; each stage has a folder in it.
        teacher: parameters of the unshared network, for rows that begin with them.
    """
    name = f"{row.name}{{}}-seed{seed}"
    go = partial(train, config, task=task, workdir=workdir, seed=seed, started=started)
    if row.replans:
        options: dict[str, Any] = {"rate": config.learning_rate, "within": config.steps}
        start, opt_state = None, None
        for at in range(0, config.steps, config.replan_every):
            label, steps = name.format(f"-{at}"), min(config.replan_every, config.steps - at)
            state = go(row.net, label=label, steps=steps, after=at, start=start, opt_state=opt_state, **options)
            if at + steps < config.steps:
                row, start, opt_state = replanned(row, config, task, state.params, state.opt_state)
        return row, state.params
    if row.transfer is None:
        return row, go(row.net, label=name.format(""), steps=config.steps, rate=config.learning_rate).params
    plain = Decoder(sizes)
    options = {"rate": config.extra_rate, "teacher": (plain, teacher)}
    start, soft = teacher, 0 if row.softly is None else round(config.soft * config.extra)
    if soft:
        label = name.format("-soft")
        start = go(plain, label=label, steps=soft, after=config.steps, start=start, softly=row.softly, **options).params
    rest = {"steps": config.extra - soft, "after": config.steps + soft, "start": row.transfer(start)}
    return row, go(row.net, label=name.format(""), **rest, **options).params


def earlier(folder: Path) -> float:
    """Seconds that earlier processes of a run took, up to their last checkpoint."""
    kept = [training.Checkpoints(path).meta() for path in folder.glob("*/checkpoints")]
    return max([meta["seconds"] for meta in kept if meta], default=0.0)
