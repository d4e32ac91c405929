"""What a precision costs and saves: a network of each wing, trained in float32, bfloat16 and float16.

    python experiments/bench_precision.py --seeds 3                                  # ten minutes on two CPU cores

Parameters, optimizer and outputs stay float32; float16 has its loss scaled. The quality is that after `--steps` steps
on data not trained on, lower is better, over seeds. Times are of a training step, medians in turn, as ratios to
float32; the memory is XLA's for what a step computes besides its state.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import char_lm
import hypernet_images
import jax
import jax.numpy as jnp
import multitask_snr
import numpy as np
import optax
import routing_models
import tqdm
from text_tasks import Characters

from hyperjax import Policy, training
from hyperjax.data import RowBatches, Streams, evaluation_windows, load_corpus
from hyperjax.precision import NAMES
from hyperjax.timing import compiled, in_turn
from hyperjax.transformer import Config as Sizes
from hyperjax.transformer import Decoder


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    networks: tuple[str, ...] = ("hyper_lstm", "hypernetwork", "snr", "transformer")  # one of each wing
    precisions: tuple[str, ...] = NAMES  # float32 first, which the others are compared with
    steps: int = 300  # updates
    seeds: int = 3  # runs of each
    seed: int = 0  # of the first
    repeats: int = 10  # rounds of the measurement of time
    out: str | None = None  # a file for the figures, as JSON


class Case(NamedTuple):
    """A network under a policy: what trains it, and judges it."""

    create: Callable[[jax.Array], training.TrainState]
    loss: training.state.LossFn
    optimizer: optax.GradientTransformation
    batch_at: Callable[[int], Any]
    quality: Callable[[training.TrainState], float]


def hyper_lstm(policy: Policy, steps: int, seed: int) -> Case:
    """ln_hyper_lstm on help texts, bits per character."""
    changed: dict[str, Any] = {"dtype": str(policy.compute_dtype), "steps": steps, "seed": seed}
    config = dataclasses.replace(char_lm.defaults(), **changed)
    corpus = load_corpus(config.corpus)
    model, optimizer = char_lm.make_model(config, len(corpus.symbols)), char_lm.make_optimizer(config, steps)
    bpc, windows = char_lm.make_bpc(model), evaluation_windows(corpus.valid, config.eval_batch, config.length)
    return Case(
        char_lm.make_create(config, model, optimizer),
        char_lm.make_loss(model),
        optimizer,
        Streams(corpus.train, config.batch, config.length).window,
        lambda state: bpc(state.params, windows),
    )


def hypernetwork(policy: Policy, steps: int, seed: int) -> Case:
    """A static hypernetwork's convolutions on 8 x 8 digits, % wrong."""
    config = dataclasses.replace(hypernet_images.defaults(), steps=steps, seed=seed)
    data = hypernet_images.load_images(config.data, config.data_file, config.valid)
    model = policy.on(hypernet_images.make_model(config, data))
    optimizer = policy.optimizer(optax.adam(hypernet_images.make_schedule(config, steps)))
    error = hypernet_images.make_error(config, model, data)
    return Case(
        hypernet_images.make_create(model, optimizer, data),
        hypernet_images.make_loss(config, model, data),
        optimizer,
        hypernet_images.make_batches(config, data).batch_at,
        lambda state: error(state, data.test),
    )


def snr(policy: Policy, steps: int, seed: int) -> Case:
    """SNR-Trans on synthetic regressions, the sum of the tasks' losses."""
    config = dataclasses.replace(multitask_snr.defaults(), steps=steps, seed=seed)
    data = routing_models.load(config.data, None, None, group=config.group, correlation=0.5, seed=seed)
    model = policy.on(multitask_snr.make_model(config, data))
    weighting = routing_models.Weighting("fixed", data.tasks, 1)
    optimizer = policy.optimizer(routing_models.make_optimizer(config.learning_rate, config.gate_rate, steps))
    scores = multitask_snr.make_scores(data, model)

    def create(key):
        params = {"network": model.init(key, jnp.zeros((1, data.width)))["params"], **weighting.params()}
        carry = {"step": jnp.zeros((), jnp.int32), **weighting.carry()}
        return training.TrainState.create(params, optimizer, carry)

    return Case(
        create,
        multitask_snr.make_loss(config, data, model, weighting),
        optimizer,
        RowBatches(data.train, config.batch, seed).batch_at,
        lambda state: scores(state.params["network"], "test")["task_loss"],
    )


def transformer(policy: Policy, steps: int, seed: int) -> Case:
    """A Transformer on help texts, bits per character."""
    task = Characters(load_corpus("pydoc"), 64, 16, 16, seed, 256)
    model = policy.on(Decoder(Sizes(task.vocabulary, layers=2, width=64, heads=4, ffn=256)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(1, steps // 10), steps)
    optimizer = policy.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)))

    def create(key):
        return training.TrainState.create(model.init(key, task.batch_at(0)["tokens"])["params"], optimizer)

    def logits(params, batch):
        return model.apply({"params": params}, batch["tokens"])["logits"]

    figures = jax.jit(lambda params, batch: task.figures(logits(params, batch), batch))

    def quality(state):
        found = [np.asarray(figures(state.params, batch))[:count] for batch, count in task.batches("valid", 64)]
        return float(np.concatenate(found).mean())

    return Case(
        create,
        lambda params, carry, batch, key: (task.loss(logits(params, batch), batch), (carry, {})),
        optimizer,
        task.batch_at,
        quality,
    )


NETWORKS = {"hyper_lstm": hyper_lstm, "hypernetwork": hypernetwork, "snr": snr, "transformer": transformer}


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    for name, known in (("networks", tuple(NETWORKS)), ("precisions", NAMES)):
        unknown = [each for each in getattr(config, name) if each not in known]
        if unknown or not getattr(config, name):
            raise ValueError(f"--{name} is {getattr(config, name)}, expected some of {', '.join(known)}")
    if config.precisions[0] != "float32":
        raise ValueError(f"--precisions is {config.precisions}, expected float32 first, for the others are compared")
    for name in ("steps", "seeds", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} is {getattr(config, name)}, expected a whole number of at least 1")
    if not 0 <= config.seed < 2**32 - config.seeds:
        raise ValueError(f"--seed is {config.seed}, expected a whole number from 0 to 2**32 - 1")
    if config.out is not None:
        training.writable(config.out)


def trained(case: Case, steps: int, seed: int, bar: Any) -> tuple[float, int]:
    """The quality after so many steps, and how many of them overflowed."""
    init_key, train_key = jax.random.split(jax.random.key(seed))
    state, step = jax.jit(case.create)(init_key), training.make_step(case.loss, case.optimizer)
    overflowed = []
    for number in range(steps):
        state, metrics = step(state, case.batch_at(number), train_key)
        overflowed.append(metrics.get("overflowed", 0))
        bar.update()
    return case.quality(state), int(np.sum(np.asarray(overflowed)))


def timed(cases: dict[str, Case], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step and MiB of its temporary memory, by precision."""
    runs, found = {}, {}
    for name, case in cases.items():
        step, key = training.make_step(case.loss, case.optimizer), jax.random.key(0)
        state, batch = jax.jit(case.create)(key), jax.tree.map(jnp.asarray, case.batch_at(0))
        program = compiled(step, state, batch, key)
        found[name] = {"temp_mib": program.memory_analysis().temp_size_in_bytes / 2**20}
        runs[name] = lambda program=program, state=state, batch=batch: program(state, batch, jax.random.key(0))
    for name, seconds in in_turn(runs, repeats).items():
        found[name]["ms"] = 1e3 * float(np.median(seconds))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; returns the exit status, 2 for bad input."""
    started = time.perf_counter()
    config = training.parse(Config, (), argv, description=__doc__, prog="bench_precision.py")
    with training.bad_input(__file__):
        check(config)
    rows = []
    total = len(config.networks) * len(config.precisions) * config.seeds * config.steps
    with tqdm.tqdm(total=total, unit="step", mininterval=2.0) as bar:
        for network in config.networks:
            times = timed(
                {name: NETWORKS[network](Policy.named(name), config.steps, 0) for name in config.precisions},
                config.repeats,
            )
            for name in config.precisions:
                seeds = range(config.seed, config.seed + config.seeds)
                cases = ((NETWORKS[network](Policy.named(name), config.steps, seed), seed) for seed in seeds)
                found = [trained(case, config.steps, seed, bar) for case, seed in cases]
                row = {"network": network, "precision": name, "quality": [quality for quality, _ in found]}
                rows.append(row | {"overflowed": [number for _, number in found], **times[name]})
    print(table(rows))
    print(f"device {training.device()}, {time.perf_counter() - started:.0f} seconds")
    if config.out is not None:
        training.write_json(training.writable(config.out), rows)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as text; differences are by seed."""
    columns = (
        "network",
        "precision",
        "quality",
        "less float32's",
        "step over float32's",
        "temporary MiB",
        "overflowed",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    whole = {row["network"]: row for row in rows if row["precision"] == "float32"}
    for row in rows:
        base = whole[row["network"]]
        about = (NETWORKS[row["network"]].__doc__ or "").strip().rstrip(".")
        apart = np.subtract(row["quality"], base["quality"])
        cells = [about, row["precision"], _spread(row["quality"]), "-" if row is base else _spread(apart)]
        cells += [f"{row['ms'] / base['ms']:.2f}", f"{row['temp_mib']:.1f}", f"{np.mean(row['overflowed']):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Any) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
