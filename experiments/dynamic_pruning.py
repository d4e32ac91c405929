"""Transformers that compute only a share of themselves, beside dense ones of the same cost and random gates.

    python experiments/dynamic_pruning.py --preset quick                                 # characters, under 3 minutes
    python experiments/dynamic_pruning.py --preset quick --data topic                    # topics of passages
    python experiments/dynamic_pruning.py --preset cpu --data-dir DIR            # Penn Treebank, three seeds, an hour

Every method of `--methods` is trained for every budget (a share of the dense network's operations) and seed, and judged
as it is served: gates without randomness, and in a decoder without a look ahead. Methods: `dense`; `small` and `thin`,
dense networks of the budget's cost; `static` gates, which compaction cuts out; `sequence`, a width for each prompt;
`layers` and `mod` (Mixture-of-Depths), layers that tokens skip; `experts`, blocks that each token chooses;
`expert_choice`, of passages only; `token`, a gate for each head, block and token, which trains but saves no time;
and `random_static`, `random_sequence`, `random_mod`, `random_experts`, the same by lot.
The same command again goes on where it stopped.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pruning_methods
import pruning_pictures
import pruning_report
import pruning_tasks
from pruning_methods import METHODS, STEERED, auxiliary, build, make_optimizer, temperature
from pruning_tasks import DATA, Task, load

from hyperjax import pruning, training
from hyperjax.transformer import Config as Sizes

FREE = ("workdir", "data_dir", "save_minutes", "repeats")  # a run may resume with other values of these
DENSE = ("dense",)  # has no budget


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; --preset and --data choose the defaults of the others."""

    preset: str = "quick"  # quick or cpu
    data: str = "pydoc"  # pydoc or ptb (characters); topic, shuffled or corpus (classes of passages)
    workdir: str | None = None  # where the runs are kept; None is runs/dynamic_pruning-PRESET-DATA
    data_dir: str | None = None  # Penn Treebank: the folder or archive with its three files
    methods: tuple[str, ...] = ("dense", "small", "static", "mod", "experts", "random_experts")  # what to compare
    budgets: tuple[float, ...] = (0.6,)  # shares of the dense network's operations
    seeds: int = 1  # runs of each
    seed: int = 0  # of the first run; the others follow
    layers: int = 3  # of the dense network
    width: int = 64  # of its state
    heads: int = 4  # of each layer
    ffn: int = 256  # hidden units of each layer
    blocks: int = 16  # into which they are divided
    length: int = 64  # positions of a sample; the longest passage
    prompt: int = 16  # characters that a decoder's decision for a sequence is made from; not judged, for any method
    dropout: float = 0.0  # share of updates dropped
    batch: int = 16  # samples of a step
    steps: int = 200  # updates of each run
    learning_rate: float = 3e-3  # of AdamW, after a warm-up, falling to a twentieth along a cosine
    weight_decay: float = 0.01  # of AdamW
    clip: float = 1.0  # norm to which gradients are clipped
    gate_rate: float = 5e-2  # of Adam for static gates
    multiplier_rate: float = 0.1  # of ascent for the Lagrangian's multipliers
    multiplier_start: float = 30.0  # of the quadratic one: at 0 it overshoots
    penalty: str = "lagrangian"  # how steered methods get to the budget; or flops, l1, l2: a weight on what is open
    penalty_weight: float = 0.3  # that weight
    distill: float = 0.0  # weight of the divergence from the dense network of the same seed, trained first
    log_every: int = 20  # steps between two lines of metrics
    eval_every: int = 100  # steps between two validations
    eval_windows: int = 256  # samples of a split to evaluate, at most
    save_minutes: float = 5.0  # longest time between two checkpoints
    repeats: int = 10  # rounds of the measurement of time


def defaults(preset: str = "quick", data: str | None = None) -> Config:
    """The defaults of a preset and data."""
    _expect(preset in ("quick", "cpu"), "preset", preset, "quick or cpu")
    data = data or ("pydoc" if preset == "quick" else "ptb")
    _expect(data in DATA, "data", data, f"one of {', '.join(DATA)}")
    fields: dict[str, Any] = {}
    if data not in ("pydoc", "ptb"):
        fields = {"methods": ("dense", "small", "sequence", "expert_choice", "mod"), "length": 128}
    if preset == "cpu":
        methods = ("dense", "small", "thin", "static", "sequence", "mod", "experts", "random_experts", "random_mod")
        fields |= {"methods": methods, "seeds": 3, "layers": 3, "width": 96}
        fields |= {"ffn": 384, "length": 128, "prompt": 32, "batch": 8, "steps": 800, "learning_rate": 2e-3}
        fields |= {"gate_rate": 2e-2, "log_every": 50, "eval_every": 400, "eval_windows": 500, "repeats": 20}
    if preset == "cpu" and data not in ("pydoc", "ptb"):
        fields |= {"methods": (*fields["methods"], "expert_choice"), "batch": 32, "steps": 500}
        fields |= {"layers": 3, "width": 64, "ffn": 256, "eval_every": 250, "eval_windows": 1000}
    return Config(preset, data, **fields)


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    unknown = [name for name in config.methods if name not in METHODS]
    _expect(not unknown and bool(config.methods), "methods", config.methods, f"some of {', '.join(METHODS)}")
    _expect(all(0 < b <= 1 for b in config.budgets) and bool(config.budgets), "budgets", config.budgets, "in (0, 1]")
    for name in ("methods", "budgets"):
        values = getattr(config, name)
        _expect(len(set(values)) == len(values), name, values, "each once")
    counts = ("seeds", "layers", "width", "heads", "ffn", "blocks", "length", "batch", "steps")
    for name in (*counts, "log_every", "eval_every", "eval_windows", "repeats"):
        _expect(getattr(config, name) >= 1, name, getattr(config, name), "1 or more")
    for name in ("learning_rate", "gate_rate", "multiplier_rate", "clip", "save_minutes"):
        _expect(0 < getattr(config, name) < math.inf, name, getattr(config, name), "a positive number")
    for name in ("weight_decay", "penalty_weight", "distill", "multiplier_start"):
        _expect(0 <= getattr(config, name) < math.inf, name, getattr(config, name), "a number of at least 0")
    _expect(config.ffn % config.blocks == 0, "blocks", config.blocks, f"a divisor of --ffn, {config.ffn}")
    characters = config.data in ("pydoc", "ptb")
    _expect(1 <= config.prompt < config.length or not characters, "prompt", config.prompt, f"1 to {config.length - 1}")
    if characters and "expert_choice" in config.methods:
        raise ValueError(
            "--methods has expert_choice, but data of characters need a causal model: a block's choice of tokens would "
            "look at later ones; use experts, or --data topic"
        )
    even = config.width % (2 * config.heads) == 0
    _expect(even, "heads", config.heads, f"a divisor of half of --width, {config.width}: rotary positions need pairs")
    for name in ("random_sequence", "sequence", "layers", "random_mod", "mod"):
        _expect(config.layers > 1 or name not in config.methods, "layers", config.layers, f"2 or more for {name}")
    _expect(
        config.penalty in ("lagrangian", "flops", "l1", "l2"), "penalty", config.penalty, "lagrangian, flops, l1, l2"
    )
    teacher = config.distill == 0 or config.methods[0] == "dense"
    _expect(teacher, "methods", config.methods, "dense first, the teacher of --distill")
    last = 2**31 - config.seeds
    _expect(0 <= config.seed <= last, "seed", config.seed, f"a whole number from 0 to {last}, for {config.seeds} seeds")


def sizes(config: Config, task: Task) -> Sizes:
    """The dense network."""
    return Sizes(
        vocabulary=task.vocabulary,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        ffn=config.ffn,
        length=config.length,
        dropout=config.dropout,
        outputs=task.outputs,
    )


def make_loss(config: Config, name: str, model: Any, task: Task, budget: float) -> training.state.LossFn:
    """The task's loss, the routers', what leads to the budget, and the distance from a teacher."""
    cool = temperature(config.steps)
    teacher: Any = pruning_methods.Plain(sizes(config, task), task.causal)

    def loss_fn(params, carry, batch, key):
        step, options = carry["step"], {} if task.causal else {"mask": batch["mask"]}
        out = model.apply({"params": params["network"]}, batch["tokens"], key, temperature=cool(step), **options)
        loss = task.loss(out["logits"], batch)
        share = jnp.mean(out["share"])
        figure = task.figures(out["logits"], batch).mean()
        total, metrics = loss + auxiliary(out), {"task_loss": loss, f"train_{task.unit}": figure, "share": share}
        ramp = jnp.minimum(1.0, step / (0.3 * config.steps))
        if name in STEERED and config.penalty == "lagrangian":
            total += pruning.lagrangian(share, 1 - (1 - budget) * ramp, params["multipliers"])
        elif name in STEERED:
            total += config.penalty_weight * ramp * _open(out, config.penalty)
        if "teacher" in carry:
            taught = teacher.apply({"params": carry["teacher"]}, batch["tokens"], **options)["logits"]
            total += config.distill * pruning.distillation(out["logits"], taught).mean()
        return total, ({**carry, "step": step + 1}, metrics)

    return loss_fn


def train(
    config: Config, name: str, budget: float, seed: int, task: Task, folder: Path, teacher: Any, started: float
) -> tuple[Any, Any, pruning_report.Found]:
    """Trains a network, or goes on, or restores it: the network, its parameters, and what the test finds."""
    dense = sizes(config, task)
    model: Any = build(name, dense, task, budget, seed, config.blocks)
    evaluate = pruning_report.make_evaluate(name, model, task, dense)
    optimizer = make_optimizer(config)
    init_key, train_key = jax.random.split(jax.random.key(seed))
    example = task.batch_at(0)

    def start() -> pruning.Multipliers:
        return pruning.Multipliers(jnp.zeros(()), jnp.asarray(config.multiplier_start, jnp.float32))

    def create(key):
        options = {} if task.causal else {"mask": example["mask"]}
        params = {"network": model.init(key, example["tokens"], **options)["params"]}
        params |= {"multipliers": start()} if name in STEERED else {}
        carry = {"step": jnp.zeros((), jnp.int32), **({} if teacher is None else {"teacher": teacher})}
        return training.TrainState.create(params, optimizer, carry)

    folder.mkdir(parents=True, exist_ok=True)
    checkpoints: training.Checkpoints[training.TrainState] = training.Checkpoints(folder / "checkpoints", 1)
    mark = {"fingerprint": task.fingerprint}
    with training.bad_input(__file__):  # nothing is compiled in here
        if (checkpoints.meta() or mark)["fingerprint"] != mark["fingerprint"]:
            raise ValueError(f"the data {task.name} has changed since {folder} began; choose another --workdir")
        restored = checkpoints.restore(jax.eval_shape(create, init_key))
        resumed = restored[1] if restored else {}
        files = [training.JsonLines(folder / f"{n}.jsonl", resumed.get("step", 0)) for n in ("metrics", "timings")]
    state = restored[0] if restored else jax.jit(create)(init_key)

    def validate(state: training.TrainState) -> dict[str, float]:
        found = evaluate(state.params["network"], "valid")
        return {f"valid_{task.unit}": found.quality, "valid_share": found.share}

    with checkpoints, files[0], files[1]:
        if restored:
            print(f"{folder.name}: after step {int(state.step):,} of {config.steps:,}")
        if int(state.step) < config.steps:
            state = training.fit(
                state,
                training.make_step(make_loss(config, name, model, task, budget), optimizer),
                task.batch_at,
                train_key,
                checkpoints=checkpoints,
                metrics=files[0],
                timings=files[1],
                steps=config.steps,
                log_every=config.log_every,
                eval_every=config.eval_every,
                save_minutes=config.save_minutes,
                validate=validate,
                best=f"valid_{task.unit}",
                items=config.batch * config.length,
                unit="tokens",
                meta=mark,
                resumed={**resumed, "seconds": 0.0},  # `started` is moved by them
                started=started,
            )
    label = "bits per character" if task.unit == "bpc" else "share of wrong answers"
    options = {"train": f"train_{task.unit}", "valid": f"valid_{task.unit}", "label": label}
    training.plot_curves(files[0].path, folder / "curves.png", title=f"{folder.name} on {task.name}", **options)
    network = state.params["network"]
    return model, network, evaluate(network, "test")


def earlier(folder: Path) -> float:
    """Seconds that earlier processes of a run took, up to their last checkpoint."""
    kept = [training.Checkpoints(path).meta() for path in folder.glob("*/checkpoints")]
    return max([meta["seconds"] for meta in kept if meta], default=0.0)


def run(config: Config, tasks: Sequence[Task], workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains all networks, judges and times them, and returns the summary."""
    dense = sizes(config, tasks[0])
    whole = pruning.costs(dense, config.length, causal=tasks[0].causal).total
    training.say(
        f"model   {dense.layers} layers of width {dense.width}, {dense.heads} heads, {config.ffn} hidden units; "
        f"{whole / config.length:,.0f} operations a token\n"
        f"data    {tasks[0].name}: {'; '.join(tasks[0].notes)}\n"
        f"run     {', '.join(config.methods)} at {', '.join(f'{b:g}' for b in config.budgets)}, {config.seeds} seeds, "
        f"{config.steps:,} steps of {config.batch} x {config.length}\n"
        f"device  {training.device()}\nstarting in {workdir.path}"
    )
    rows: list[dict[str, Any]] = []
    networks: dict[str, tuple[str, Any, Any]] = {}
    kept: dict[str, pruning_report.Found] = {}
    for number, task in enumerate(tasks):
        seed, teacher = config.seed + number, None
        for name in config.methods:
            for budget in (1.0,) if name in DENSE else config.budgets:
                label = name if name in DENSE else f"{name}_{100 * budget:g}"
                folder = workdir.path / f"{label}-seed{seed}"
                taught: Any = teacher if config.distill else None
                model, params, found = train(config, name, budget, seed, task, folder, taught, started)
                if name == "dense":
                    teacher = jax.tree.map(np.asarray, params)
                training.say(
                    f"{folder.name}: test {task.unit} {found.quality:.4f} at {found.share:.3f} of the operations"
                )
                size = training.count(params)
                rows.append(
                    {"label": label, "name": name, "budget": budget, "seed": seed, "params": size, "found": found}
                )
                if number == 0:
                    networks[label], kept[label] = (name, model, params), found
    times = pruning_report.measure(networks, tasks[0], config.repeats)
    report(rows, times, tasks[0])
    pruning_pictures.draw(rows, times, networks, kept, tasks[0], dense, workdir.path)
    unit, summary = tasks[0].unit, {"data": tasks[0].name, "seeds": config.seeds, "steps": config.steps}
    for label in networks:
        mine = [row for row in rows if row["label"] == label]
        for key, values in (
            (unit, [row["found"].quality for row in mine]),
            ("share", [row["found"].share for row in mine]),
        ):
            summary[f"{label}_{key}_mean"] = float(np.mean(values))
            if len(values) > 1:
                summary[f"{label}_{key}_std"] = float(np.std(values, ddof=1))
        flops = np.concatenate([row["found"].flops for row in mine])
        summary[f"{label}_flops_per_token_mean"] = float(flops.mean())
        opened = [kind.max(0) for kind in kept[label].openness.values()]
        summary |= {f"{label}_dead_units": int(sum((part == 0).sum() for part in opened))} if opened else {}
        summary |= {f"{label}_flops_per_token_p{p}": float(np.percentile(flops, p)) for p in (5, 50, 95)}
        summary[f"{label}_params"] = mine[0]["params"]
        summary |= {f"{label}_{key}": value for key, value in times[label].items()}
    params = networks[next(iter(networks))][2]
    return {**summary, **training.environment(__file__, params, config.seed, time.perf_counter() - started)}


def report(rows: list[dict[str, Any]], times: dict[str, dict[str, float]], task: Task) -> None:
    """Prints the table."""
    lines = [
        f"{'':22}{task.unit:>16}{'share':>8}{'kFLOP/token p5 p50 p95':>26}{'batch 1':>10}{'batch 32':>10}{'decode':>9}"
    ]
    for label, measured in times.items():
        mine = [row["found"] for row in rows if row["label"] == label]
        quality = [found.quality for found in mine]
        spread = f" ± {np.std(quality, ddof=1):.4f}" if len(quality) > 1 else ""
        flops = " ".join(f"{np.percentile(mine[0].flops, p) / 1e3:.0f}" for p in (5, 50, 95))
        shown = [f"{measured[key]:.2f}" if key in measured else "-" for key in ("ms_b1", "ms_b32", "decode_ms")]
        share = np.mean([found.share for found in mine])
        lines.append(
            f"{label:22}{np.mean(quality):.4f}{spread:>10}{share:8.3f}{flops:>26}{shown[0]:>10}{shown[1]:>10}{shown[2]:>9}"
        )
    lines.append(
        "times in ms, medians in turn: a sample, 32 samples, a token decoded; -: only multiplies, or not measured"
    )
    training.say("\n".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Bad input exits with 2, a loss that is not finite with 1, a signal with 128 + its number."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset", "data"), argv, description=__doc__, prog="dynamic_pruning.py")
    with (
        training.bad_input(__file__),
        training.bad_input(pruning_methods.__file__),
        training.bad_input(pruning_tasks.__file__),
    ):
        check(config)
        workdir = training.Workdir(
            config.workdir or f"runs/dynamic_pruning-{config.preset}-{config.data}", config, FREE
        )
        if workdir.summary is None:
            tasks = [load(config, config.seed + number) for number in range(config.seeds)]
            for name in config.methods:
                for budget in config.budgets:  # refuses what no network can be made for
                    model = build(name, sizes(config, tasks[0]), tasks[0], budget, config.seed, config.blocks)
                    jax.eval_shape(model.init, jax.random.key(0), tasks[0].batch_at(0)["tokens"])
            started -= earlier(workdir.open().path)
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to train again")
    else:
        with workdir, training.stopping():
            workdir.finish(run(config, tasks, workdir, started))
    training.print_summary(workdir.summary or {})
    return 0


def _open(out: dict[str, Any], penalty: str) -> jax.Array:
    if penalty == "flops":
        return jnp.mean(out["share"])
    gates = jax.tree.leaves(out["gates"])
    power = 1 if penalty == "l1" else 2
    return sum((jnp.mean(gate**power) for gate in gates), jnp.zeros(())) / len(gates)


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
