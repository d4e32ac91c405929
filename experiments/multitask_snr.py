"""Several tasks at once: sub-network routing (SNR), or one of its baselines, and what is left of it to serve.

    python experiments/multitask_snr.py --preset quick                       # synthetic regression, a minute on a CPU
    python experiments/multitask_snr.py --preset quick --data digits --target 0.5
    python experiments/multitask_snr.py --preset cpu --data census --data-file census-income.test.gz --model mmoe
    python experiments/multitask_snr.py --preset cpu --data multimnist --data-file mnist.npz

SNR (Ma et al., AAAI 2019) joins two levels of sub-networks by connections with hard concrete gates: sampled in
training, deterministic for validation, and what is behind closed ones cut out for serving. `--l0` makes open gates
cost, `--target` steers to a share of the connections' weights. The same command again resumes a run, or prints the
summary of a finished one.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import routing_models
from routing_models import DATA, MODELS, WEIGHTINGS, Weighting, load, make_optimizer, quality, ramp

from hyperjax import routing, training
from hyperjax.data import RowBatches, TaskData

FREE = ("workdir", "data_file", "test_file", "save_minutes")  # a run may resume with other values of these


@dataclasses.dataclass(frozen=True)
class Config(training.FitConfig):
    """Settings of a run; --preset, --data and --model choose the defaults of the others."""

    preset: str = "quick"  # quick or cpu
    data: str = "synthetic"  # synthetic, digits, census or multimnist
    model: str = "snr_trans"  # a network of routing_models.py: snr_trans, snr_aver, shared_bottom, mmoe, ple, ...
    workdir: str | None = None  # where the run is kept; None is runs/multitask_snr-PRESET-DATA-MODEL
    data_file: str | None = None  # census: a file of UCI; multimnist: an .npz of MNIST
    test_file: str | None = None  # census: census-income.test, if data_file is census-income.data
    group: str = "income"  # census: income or education, each with never married
    correlation: float = 0.5  # synthetic: cosine of the two tasks' weights
    parts: int = 4  # sub-networks or experts in each of the two levels
    budget: int = 16_000  # parameters, all gates open; the networks' width follows from it
    towers: tuple[int, ...] = (8,)  # hidden widths of the towers
    beta: float = 0.6  # temperature of the gates
    gamma: float = -0.5  # lower end of their stretch, below 0
    zeta: float = 1.5  # upper end of their stretch, at least 1
    open: float = 0.5  # probability that a gate is open at first
    per: str = "connection"  # what has gates of its own: connection, task or sample
    l0: float = 1e-3  # lambda, weight of the expected number of open gates; sets in over the first tenth of the run
    target: float | None = None  # share of the connections' weights to steer to; None steers nowhere
    weighting: str = "fixed"  # of the tasks' losses: fixed, uncertainty, gradnorm or dynamic_average
    batch: int = 256  # rows in a batch
    steps: int = 2000  # number of updates
    learning_rate: float = 5e-3  # of Adam, falling to 0 along a cosine over the second half
    gate_rate: float = 2e-2  # of Adam for log alpha
    log_every: int = 50  # steps between two lines of metrics
    eval_every: int = 200  # steps between two validations
    save_minutes: float = 5.0  # longest time between two checkpoints
    seed: int = 0  # of initialization, batches, gates, and of data that is made or split


def defaults(preset: str = "quick", data: str = "synthetic", model: str = "snr_trans") -> Config:
    """The defaults of a preset, data and model."""
    _expect(preset in ("quick", "cpu"), "preset", preset, "quick or cpu")
    _expect(data in DATA, "data", data, f"one of {', '.join(DATA)}")
    _expect(model in MODELS, "model", model, f"one of {', '.join(MODELS)}")
    fields: dict[str, Any] = {"digits": {"batch": 128, "steps": 1000}}.get(data, {})
    if preset == "cpu":
        sizes = {"census": (48_000, 1500), "multimnist": (300_000, 4000)}
        budget, steps = sizes.get(data, (16_000, 4000))
        fields = {"batch": 512 if data == "census" else 256, "steps": steps, "budget": budget}
    if data == "multimnist":
        fields |= {"learning_rate": 1e-3, "budget": 300_000}
    return Config(preset, data, model, **fields)


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    _expect(config.weighting in WEIGHTINGS, "weighting", config.weighting, f"one of {', '.join(WEIGHTINGS)}")
    for name in ("parts", "budget", "batch", "steps", "log_every", "eval_every"):
        _expect(getattr(config, name) >= 1, name, getattr(config, name), "1 or more")
    for name in ("learning_rate", "gate_rate", "save_minutes"):
        _expect(0 < getattr(config, name) < math.inf, name, getattr(config, name), "a positive number")
    _expect(0 <= config.l0 < math.inf, "l0", config.l0, "a number of at least 0")
    target = config.target
    _expect(target is None or 0 < target < 1, "target", target, "a share inside of (0, 1), or none")
    snr = config.model.startswith("snr")
    _expect(target is None or snr, "target", target, f"none: {config.model} has no gates to steer")
    _expect(config.per == "connection" or snr, "per", config.per, f"connection: {config.model} has no such gates")
    _expect(0 <= config.seed < 2**31, "seed", config.seed, "a whole number from 0 to 2**31 - 1")


def make_model(config: Config, data: TaskData) -> nn.Module:
    """The network of a configuration, as wide as the budget allows."""
    gates = routing.HardConcrete(config.beta, config.gamma, config.zeta, config.open)

    def sized(width: int) -> nn.Module:
        model = MODELS[config.model](data.tasks, config.parts, width, config.towers)
        gated = isinstance(model, routing.SNR) and model.gates is not None
        return model.clone(gates=gates, per=config.per) if gated else model

    return routing.fit_width(sized, config.budget, jax.ShapeDtypeStruct((1, data.width), jnp.float32), tolerance=0.25)


def make_loss(config: Config, data: TaskData, model: nn.Module, weighting: Weighting) -> training.state.LossFn:
    """The weighted losses, and what open gates cost."""

    def loss_fn(params, carry, batch, key):
        x = data.encode(batch["features"])

        def losses_of(network):
            outputs, info = model.apply({"params": network}, x, key)
            return routing.task_losses(data.tasks, outputs, batch["labels"]), info

        losses, info = losses_of(params["network"])
        total, carry = weighting.total(params, carry, losses, lambda network: losses_of(network)[0])
        metrics = {f"{name}_loss": value for name, value in losses.items()}
        metrics["task_loss"] = sum(losses.values(), jnp.zeros(()))
        if "l0" in info:
            total += config.l0 * ramp(carry["step"], config.steps) * info["l0"]
            metrics |= {name: info[name] for name in ("expected_share", "served_share")}
        if config.target is not None:
            target = 1 - (1 - config.target) * ramp(carry["step"], config.steps)
            total += routing.lagrangian(routing.steerable_share(info), target, params["multipliers"])
        return total, ({**carry, "step": carry["step"] + 1}, metrics)

    return loss_fn


def make_scores(data: TaskData, model: nn.Module) -> Callable[[Any, str], dict[str, float]]:
    """Returns scores(network, split): those of all tasks, their mean `quality`, and the sum of the tasks' losses."""
    apply = jax.jit(lambda network, features: model.apply({"params": network}, data.encode(features))[0])
    block = 2048

    def scores(network, name):
        split = getattr(data, name)
        parts = []
        for at in range(0, split.rows, block):
            part = {key: array[at : at + block] for key, array in split.features.items()}
            short = block - len(next(iter(part.values())))  # one size, so that one compilation serves all
            part = {key: np.pad(array, ((0, short), *((0, 0),) * (array.ndim - 1))) for key, array in part.items()}
            parts.append(jax.tree.map(np.asarray, apply(network, part)))
        outputs = {task: np.concatenate([part[task] for part in parts])[: split.rows] for task in data.tasks}
        found = routing.task_scores(data.tasks, outputs, split.labels)
        loss = sum(routing.task_losses(data.tasks, outputs, split.labels).values(), jnp.zeros(()))
        return {"quality": quality(found, data.tasks), "task_loss": float(loss), **found}

    return scores


def run(config: Config, data: TaskData, model: nn.Module, workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains, or goes on training; returns the summary."""
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    weighting = Weighting(config.weighting, data.tasks, max(1, data.train.rows // config.batch))
    optimizer = make_optimizer(config.learning_rate, config.gate_rate, config.steps)

    def create(key):
        params = {"network": model.init(key, jnp.zeros((1, data.width)))["params"], **weighting.params()}
        params |= {"multipliers": routing.Multipliers.zeros()} if config.target is not None else {}
        carry = {"step": jnp.zeros((), jnp.int32), **weighting.carry()}
        return training.TrainState.create(params, optimizer, carry)

    checkpoints: training.Checkpoints[training.TrainState] = training.Checkpoints(workdir.shared / "checkpoints")
    mark = {"fingerprint": data.fingerprint}
    with training.bad_input(__file__):  # nothing is compiled in here
        if (checkpoints.meta() or mark)["fingerprint"] != mark["fingerprint"]:
            raise ValueError(f"the data {data.name} has changed since this run began; choose another --workdir")
        restored = checkpoints.restore(jax.eval_shape(create, init_key))
        resumed = restored[1] if restored else {}
        names = ("metrics", "timings", "gates")
        files = dict(zip(names, training.open_lines(workdir.path, resumed.get("step", 0), *names), strict=True))
    state = restored[0] if restored else jax.jit(create)(init_key)
    snr = model if isinstance(model, routing.SNR) and model.gates is not None else None
    training.say(
        f"model   {config.model}, {training.count(state.params['network']):,} parameters\n"
        f"data    {' '.join(data.notes)}\n"
        f"run     {config.steps:,} steps of {config.batch} rows; losses weighted by {config.weighting}"
        + (f", lambda {config.l0:g}, target {config.target}" if snr else "")
        + "\n"
        + "\n".join([f"device  {training.device(workdir.layout)}", *checkpoints.notes])
    )
    print(f"resuming after step {int(state.step):,} of {config.steps:,}" if restored else f"starting in {workdir.path}")
    batches, scores = RowBatches(data.train, config.batch, config.seed), make_scores(data, model)

    def validate(state):
        found = scores(state.params["network"], "valid")
        if snr is not None and snr.per != "sample":
            gates = routing.served_gates(snr, {"params": state.params["network"]})
            files["gates"].write(int(state.step), **{name: z.tolist() for name, z in gates.items()})
            files["gates"].sync()
        return {"valid_error": 1 - found.pop("quality"), "valid_task_loss": found.pop("task_loss"), **found}

    with checkpoints, files["metrics"], files["timings"], files["gates"]:
        state = training.fit(
            state,
            training.make_step(
                make_loss(config, data, model, weighting), optimizer, workdir.layout, non_finite=config.non_finite
            ),
            batches.batch_at,
            train_key,
            checkpoints=checkpoints,
            metrics=files["metrics"],
            timings=files["timings"],
            steps=config.steps,
            log_every=config.log_every,
            eval_every=config.eval_every,
            save_minutes=config.save_minutes,
            validate=validate,
            best="valid_error",
            items=config.batch,
            unit="rows",
            meta=mark,
            resumed=resumed,
            started=started,
            layout=workdir.layout,
            profile=config.profile,
            max_skipped=config.max_skipped,
        )
    network = jax.tree.map(np.asarray, state.params["network"])
    found = {f"{split}_{name}": value for split in ("valid", "test") for name, value in scores(network, split).items()}
    summary = {"model": config.model, "data": data.name, "weighting": config.weighting, **found}
    if snr is not None:
        summary |= serve(snr, network, data, workdir)
    label, title = "sum of the tasks' losses", f"{config.model} on {data.name}"
    options = {"train": "task_loss", "valid": "valid_task_loss", "label": label, "title": title}
    training.save_curves(files["metrics"].path, workdir.path / "curves.png", **options)
    seconds = training.seconds(resumed, started)
    return {**summary, **training.environment(__file__, network, config.seed, seconds)}


def serve(model: routing.SNR, network: Any, data: TaskData, workdir: training.Workdir) -> dict[str, Any]:
    """Compacts the network and measures what that saves; draws its routing and its gates over time."""
    from hyperjax import plotting

    if model.per == "sample":
        training.say("gates of this network depend on the sample: nothing can be cut out, and no routing be drawn")
        return {}
    variables = {"params": network}
    figure, axes = plotting.subplots(size=(7.5, 5.0), title=f"Routing learned on {data.name}")
    plotting.plot_routing(axes, model, variables)
    plotting.save(figure, workdir.path / "routing.png")
    rows = training.read_lines(workdir.path / "gates.jsonl")
    figure, axes = plotting.subplots(size=(7.5, 4.2), title=f"Gates of {data.name} while it learns")
    history = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "step"}
    plotting.plot_gates(axes, [row["step"] for row in rows], history)
    plotting.save(figure, workdir.path / "gates.png")
    lost = routing.lost_tasks(model, variables)
    if lost:
        training.say(f"no path is left to {', '.join(lost)}: not compacted; lower --l0, or raise --target or --open")
        return {"tasks_lost": len(lost)}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((512, data.width)), jnp.float32)
    found = routing.compare_serving(model, variables, routing.compact(model, variables), x)
    form = "dense" if "seconds_dense" in found else "masked"
    training.say(
        f"compact {found['connections']} of {found['connections_before']} connections, {found['subnetworks']} of "
        f"{found['subnetworks_before']} sub-networks, {found['params']:,} of {found['params_before']:,} parameters; "
        f"outputs differ by {found['gap']:.1e} of the largest; 512 rows in {1e3 * found['seconds_compact']:.2f} ms, "
        f"{form} in {1e3 * found[f'seconds_{form}']:.2f} ms: {found[f'ratio_{form}_over_compact']:.2f} times as long"
    )
    return {"tasks_lost": 0} | {f"serving_{name}": value for name, value in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Bad input exits with 2, a loss that is not finite with 1, Ctrl-C with 130."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset", "data", "model"), argv, description=__doc__, prog="multitask_snr.py")
    with training.bad_input(__file__, routing_models.__file__):
        check(config)
        layout = training.lay_out(config, batch=config.batch)
        default = f"runs/multitask_snr-{config.preset}-{config.data}-{config.model}"
        workdir = training.Workdir(config.workdir or default, config, FREE, layout)
        if workdir.summary is None:
            options: dict[str, Any] = {"group": config.group, "correlation": config.correlation, "seed": config.seed}
            data = load(config.data, config.data_file, config.test_file, **options)
            model = make_model(config, data)
            RowBatches(data.train, config.batch, config.seed)  # refuses a batch larger than the data
            workdir.open()
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to train again")
    else:
        with workdir, training.stopping():
            workdir.finish(run(config, data, model, workdir, started))
    training.print_summary(workdir.summary or {})
    return 0


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
