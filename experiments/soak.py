"""Soak: hours of training, few-shot adaptation, a weight cache, evaluation and checkpoints, watched for leaks.

    python experiments/soak.py --minutes 45

A hypernetwork learns sinusoids as in fewshot_adaptation.py, without end. Every epoch ends with an evaluation,
embeddings for new tasks, weights generated into a cache that is too small for all of them, and a checkpoint, which is
read again from time to time. Once a minute `soak.jsonl` gets the resident memory, the live arrays of JAX and the number
of compilations so far. The run fails, with status 1, if memory grew after the first minutes, or if anything was
compiled after the first epoch. A run that was stopped trains on from its checkpoint and measures anew.
"""

import contextlib
import dataclasses
import gc
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from fewshot_tasks import Sinusoids

from hyperjax import training
from hyperjax.hypernet import HyperNetwork, WeightCache, adapt_many

MIB = 2**20
COMPILED = "/jax/core/compile/backend_compile_duration"
FREE = ("workdir", "minutes", "settle_minutes", "every_seconds")  # a run may go on with other values of these


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    workdir: str | None = None  # where the run is kept; None is runs/soak
    minutes: float = 45.0  # how long to train
    settle_minutes: float = 5.0  # memory is compared with what it is after so long
    every_seconds: float = 60.0  # time between two lines of soak.jsonl
    most_mib: float = 20.0  # growth of the resident memory that is allowed, in MiB,
    most_share: float = 0.02  # or as a share of it, whichever is more
    train_tasks: int = 200  # tasks to train the hypernetwork on
    new_tasks: int = 20  # tasks that embeddings are found for, each epoch
    adapt_steps: int = 100  # steps on their embeddings
    cached: int = 8  # sets of weights that the cache has room for
    epoch: int = 30000  # updates in an epoch
    reread: int = 20  # epochs between two readings of the checkpoint
    seed: int = 0  # of tasks, initialization and batches


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if field.type is int and field.name != "seed" and value < 1:
            raise ValueError(f"{name} is {value}, expected a whole number of at least 1")
        if field.type is float and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, expected a positive number")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"--seed is {config.seed}, expected a whole number from 0 to 2**32 - 1")
    if config.settle_minutes >= config.minutes:
        raise ValueError(f"--settle-minutes is {config.settle_minutes}, expected less than --minutes, {config.minutes}")


class Compilations:
    """Counts what XLA compiles in this process from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == COMPILED


def resident_mib() -> float:
    """Memory of this process that is in RAM; where the system does not say, the most that it ever was."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB


def measure(began: float, epoch: int, compilations: Compilations) -> dict[str, float]:
    """What a line of soak.jsonl holds."""
    gc.collect()
    alive = jax.live_arrays()
    return {
        "minutes": (time.perf_counter() - began) / 60,
        "epoch": epoch,
        "rss_mib": resident_mib(),
        "live_arrays": len(alive),
        "live_mib": sum(array.nbytes for array in alive) / MIB,
        "compilations": compilations.count,
    }


class Soak:
    """The model, its data, and what is done with it each epoch."""

    def __init__(self, config: Config):
        self.config = config
        self.family = Sinusoids(np.random.default_rng((config.seed, 0)), config.train_tasks)
        self.hyper = HyperNetwork.from_target(
            self.family.model, self.family.example, embedding_dim=4, num_embeddings=config.train_tasks
        )
        target = jax.eval_shape(self.family.model.init, jax.random.key(0), self.family.example)
        self.cache = WeightCache(self.hyper, max_bytes=4 * training.count(target) * config.cached)
        self.new = self.family.episode(np.random.default_rng((config.seed, 1)), config.new_tasks, tune=False)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
        self.step = training.make_step(self.loss, self.optimizer)
        self.apply = jax.jit(lambda params, x: self.family.model.apply({"params": params}, x))

    def create(self, key: jax.Array) -> training.TrainState:
        """The state that training starts from."""
        return training.TrainState.create(
            self.hyper.init(key, self.family.example, task_id=0)["params"], self.optimizer
        )

    def loss(self, params, carry, batch, key):
        """Mean squared error on training tasks."""
        z = self.hyper.embeddings({"params": params})[batch["ids"]]
        outputs = jax.vmap(lambda z, x: self.hyper.apply({"params": params}, x, z=z))(z, batch["inputs"])
        return self.family.loss(outputs, batch["targets"]).mean(), (carry, {})

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step."""
        rng = np.random.default_rng((self.config.seed, 2, step))
        ids = rng.integers(self.config.train_tasks, size=20).astype(np.int32)
        inputs, targets = self.family.sample(rng, ids, 20)
        return {"ids": ids, "inputs": inputs, "targets": targets}

    def validate(self, state: training.TrainState) -> dict[str, float]:
        """Finds embeddings for new tasks, and answers with weights out of the cache: more of them than it holds."""
        variables, new = {"params": state.params}, self.new
        found = adapt_many(
            self.hyper, variables, new.inputs, new.targets, self.family.loss, steps=self.config.adapt_steps
        )
        errors = []
        for z, x, y in zip(np.asarray(found.z), new.queries, new.answers, strict=True):
            for _ in range(2):  # the second time it is a hit
                outputs = self.apply(self.cache.get(variables, z=z), x)
            errors.append(float(np.square(np.asarray(outputs) - y).mean()))
        return {"new_error": float(np.mean(errors)), "adapt_loss": float(np.asarray(found.losses)[:, -1].mean())}


def run(config: Config, workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains until the time is over; returns the summary."""
    compilations, soak = Compilations(), Soak(config)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    like = jax.eval_shape(soak.create, init_key)
    checkpoints: training.Checkpoints[training.TrainState] = training.Checkpoints(workdir.path / "checkpoints")
    with training.bad_input(__file__):
        restored = checkpoints.restore(like)
        state, resumed = restored or (jax.jit(soak.create)(init_key), {})
        metrics, timings = training.open_lines(workdir.path, resumed.get("step", 0))
        lines = training.JsonLines(workdir.path / "soak.jsonl", 0)
    at = int(state.step)
    params = training.count(state.params)
    training.say(
        f"model   hypernetwork of {params:,} parameters for {config.train_tasks} tasks\n"
        f"run     {config.minutes:g} minutes from step {at:,} on, {config.epoch} steps an epoch\n"
        f"device  {training.device()}"
    )
    began, last, epoch, first, rows = time.perf_counter(), -math.inf, 0, 0, []
    with contextlib.ExitStack() as stack:
        for each in (checkpoints, metrics, timings, lines):
            stack.enter_context(each)
        while (time.perf_counter() - began) < 60 * config.minutes or epoch < 2:
            state = training.fit(
                state,
                soak.step,
                soak.batch_at,
                train_key,
                steps=at + config.epoch,
                checkpoints=checkpoints,
                metrics=metrics,
                timings=timings,
                validate=soak.validate,
                best="new_error",
                eval_every=config.epoch,
                log_every=math.gcd(config.epoch, 100),
                items=400,
                unit="samples",
                resumed=resumed,
                started=started,
            )
            at, epoch, resumed = at + config.epoch, epoch + 1, {}
            if (epoch - 1) % config.reread == 0:
                reread = checkpoints.restore(like)
                assert reread is not None
                state = reread[0]
                del reread
            first = compilations.count if epoch == 1 else first
            if time.perf_counter() - last >= config.every_seconds:
                last = time.perf_counter()
                rows.append(measure(began, epoch, compilations))
                lines.write(at, **rows[-1])
                training.say(" ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()))
    rows.append(measure(began, epoch, compilations))
    draw(rows, config, workdir.path / "soak.png")
    stats = soak.cache.stats()
    return {
        **verdict(rows, config, first),
        "epochs": epoch,
        "steps": at,
        "cache_hits": stats.hits,
        "cache_misses": stats.misses,
        "cache_evictions": stats.evictions,
        "valid_error": checkpoints.best[1] if checkpoints.best else None,
        **training.environment(__file__, state.params, config.seed, time.perf_counter() - began),
    }


def verdict(rows: list[dict[str, float]], config: Config, first: int) -> dict[str, Any]:
    """What grew after the first minutes, and what was compiled after the first epoch.

    Args:
        rows: the lines of soak.jsonl.
        config: of the run.
        first: compilations up to the end of the first epoch.

    Returns:
        Figures; `passed` is whether memory stayed within its bound, live arrays did not grow, nothing was compiled.
    """
    settled = [row for row in rows if row["minutes"] >= config.settle_minutes] or rows[-1:]
    start = settled[0]
    grown = max(row["rss_mib"] for row in settled) - start["rss_mib"]
    arrays = max(row["live_arrays"] for row in settled) - start["live_arrays"]
    again = int(rows[-1]["compilations"]) - first
    allowed = max(config.most_mib, config.most_share * start["rss_mib"])
    return {
        "passed": grown <= allowed and arrays <= 0 and again == 0,
        "minutes": rows[-1]["minutes"],
        "rss_mib_settled": start["rss_mib"],
        "rss_mib_last": settled[-1]["rss_mib"],
        "rss_mib_grown": grown,
        "rss_mib_allowed": allowed,
        "live_arrays_settled": start["live_arrays"],
        "live_arrays_grown": arrays,
        "live_mib": settled[-1]["live_mib"],
        "compilations_first_epoch": first,
        "compilations_after": again,
    }


def draw(rows: list[dict[str, float]], config: Config, path: Path) -> None:
    """Draws the resident memory over time."""
    from hyperjax import plotting

    figure, axes = plotting.subplots(
        size=(7.2, 3.2), title="Resident memory; it is compared with what it is at the dotted line"
    )
    axes.plot([row["minutes"] for row in rows], [row["rss_mib"] for row in rows], "o-", color=plotting.COLORS[0], ms=4)
    axes.axvline(config.settle_minutes, color="0.6", lw=1, ls=":")
    axes.set_ylim(0, 1.2 * max(row["rss_mib"] for row in rows))
    plotting.plain(axes).set(xlabel="minutes", ylabel="resident memory (MiB)")
    plotting.save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status: 2 for bad input, 1 if something grew."""
    started = time.perf_counter()
    config = training.parse(Config, (), argv, description=__doc__, prog="soak.py")
    with training.bad_input(__file__):
        check(config)
        workdir = training.Workdir(config.workdir or "runs/soak", config, FREE)
        if workdir.summary is None:
            workdir.open()
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to run again")
    else:
        with workdir, training.stopping():
            workdir.finish(run(config, workdir, started))
    summary = workdir.summary or {}
    training.print_summary(summary)
    if not summary.get("passed"):
        print("error: memory grew, or something was compiled again: see soak.jsonl in the workdir", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
