"""Transformers whose layers share weights, from scratch and by conversion, beside unshared and shallower ones.

    python experiments/share_layers.py --preset quick                         # characters of help texts, 3 minutes
    python experiments/share_layers.py --preset cpu --data-dir DIR            # Penn Treebank, three seeds, two hours

Rows from scratch: `unshared`; `shallow`, as many layers as there are sets of weights, and `wide`, the same at the
unshared network's operations; `groups`, `cycle`, `cycle_reverse`, `middle_cycle` and `random` maps of `--sets` sets;
`all`, `attention`, `ffn`: one set of these; `mixture`, sets mixed by input; `replanned`, a map chosen anew in training.
Rows `to_X` begin as the unshared network after `--steps` steps, and are trained for `--extra` more, with its answers:
`to_unshared` unchanged; `to_shallow` with layers dropped; `to_stepwise`, a cycle of layers taken at equal steps; others
by a map, that is given or found by a search (`cka`, `weights`, `aligned`, `loss`, `greedy`), drawn together by a soft
tie first; `lora`, one set and a residual for each layer, as large as the others; `scale`, the map of `loss` and factors
for each layer. Sharing saves parameters, not operations. The same command again goes on where it stopped.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import sharing_pictures
import sharing_rows
import text_tasks
from sharing_rows import ROWS, Row, converted, scratch, unique
from sharing_training import earlier, make_evaluate, make_loss, make_optimizer, trained
from text_tasks import Characters, load

from hyperjax import sharing, training
from hyperjax.pruning import costs
from hyperjax.timing import in_turn
from hyperjax.training import TrainState
from hyperjax.transformer import Config as Sizes

FREE = ("workdir", "data_dir", "save_minutes", "repeats")  # a run may resume with other values of these


@dataclasses.dataclass(frozen=True)
class Config(training.FitConfig):
    """Settings; --preset and --data choose the defaults of the others."""

    preset: str = "quick"  # quick or cpu
    data: str = "pydoc"  # pydoc or ptb
    workdir: str | None = None  # where the runs are kept; None is runs/share_layers-PRESET-DATA
    data_dir: str | None = None  # Penn Treebank: the folder or archive with its three files
    rows: tuple[str, ...] = (
        "unshared",
        "shallow",
        "groups",
        "cycle",
        "random",
        "to_unshared",
        "to_loss",
        "to_random",
    )  # what to compare
    sets: int = 2  # of layers' weights
    budget: float | None = None  # share of the unshared parameters; gives the most --sets that keep to it
    seeds: int = 1  # runs of each; random maps differ too
    seed: int = 0  # of the first run; the others follow
    layers: int = 4  # of the unshared network
    width: int = 64  # of its state
    heads: int = 4  # of each layer
    ffn: int = 256  # hidden units of each layer
    length: int = 64  # positions of a sample
    prompt: int = 16  # characters that are not judged, for any row; `mixture` is decided by them
    batch: int = 16  # samples of a step
    steps: int = 150  # updates from scratch
    extra: int = 100  # updates after conversion
    learning_rate: float = 3e-3  # of AdamW, after a warm-up, falling to a twentieth along a cosine
    extra_rate: float = 4e-3  # the same after conversion
    weight_decay: float = 0.01  # of AdamW
    clip: float = 1.0  # norm to which gradients are clipped
    transfer: str = "mean"  # what shared weights become: mean, first, last or stepwise
    distill: float = 1.0  # weight of the divergence from the teacher
    soft: float = 0.15  # share of the extra steps in which layers are only drawn together
    soft_weight: float = 300.0  # of what is left between them, at its end
    replan_every: int = 250  # steps after which `replanned` chooses a new map
    log_every: int = 20  # steps between two lines of metrics
    eval_every: int = 100  # steps between two validations
    eval_windows: int = 256  # windows of a split to evaluate, at most
    save_minutes: float = 5.0  # longest time between two checkpoints
    repeats: int = 5  # rounds of the measurement of time


def defaults(preset: str = "quick", data: str | None = None) -> Config:
    """The defaults of a preset and data."""
    _expect(preset in ("quick", "cpu"), "preset", preset, "quick or cpu")
    data = data or ("pydoc" if preset == "quick" else "ptb")
    _expect(data in ("pydoc", "ptb"), "data", data, "pydoc or ptb")
    fields: dict[str, Any] = {}
    if preset == "cpu":
        fields = {"rows": tuple(row for row in ROWS if row != "to_scale"), "seeds": 3, "length": 128, "prompt": 32}
        fields |= {"layers": 6, "sets": 3, "batch": 8, "steps": 1000, "extra": 500, "log_every": 50, "eval_every": 500}
        fields |= {"eval_windows": 500, "repeats": 10}
    return Config(preset, data, **fields)


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    unknown = [name for name in config.rows if name not in ROWS]
    _expect(not unknown and bool(config.rows), "rows", config.rows, f"some of {', '.join(ROWS)}")
    _expect(len(set(config.rows)) == len(config.rows), "rows", config.rows, "each once")
    teacher = config.rows[0] == "unshared" or not any(name.startswith("to_") for name in config.rows)
    _expect(teacher, "rows", config.rows, "unshared first, the teacher of the rows to_X")
    counts = (
        "sets",
        "seeds",
        "layers",
        "width",
        "heads",
        "ffn",
        "length",
        "batch",
        "steps",
        "extra",
        "replan_every",
    )
    for name in (*counts, "log_every", "eval_every", "eval_windows", "repeats"):
        _expect(getattr(config, name) >= 1, name, getattr(config, name), "1 or more")
    _expect(config.budget is None or 0 < config.budget <= 1, "budget", config.budget, "a share in (0, 1]")
    _expect(config.sets <= config.layers, "sets", config.sets, f"at most --layers, {config.layers}")
    for name in ("learning_rate", "extra_rate", "clip", "save_minutes"):
        _expect(0 < getattr(config, name) < math.inf, name, getattr(config, name), "a positive number")
    for name in ("weight_decay", "distill", "soft_weight"):
        _expect(0 <= getattr(config, name) < math.inf, name, getattr(config, name), "a number of at least 0")
    _expect(0 <= config.soft < 1, "soft", config.soft, "a number in [0, 1)")
    _expect(1 <= config.prompt < config.length, "prompt", config.prompt, f"1 to {config.length - 1}")
    transfers = ("mean", "first", "last", "stepwise")
    _expect(config.transfer in transfers, "transfer", config.transfer, f"one of {', '.join(transfers)}")
    even = config.width % (2 * config.heads) == 0
    _expect(even, "heads", config.heads, f"a divisor of half of --width, {config.width}: rotary positions need pairs")
    last = 2**31 - config.seeds
    _expect(0 <= config.seed <= last, "seed", config.seed, f"a whole number from 0 to {last}, for {config.seeds} seeds")
    for name in config.rows:  # refuses maps that do not fit
        kind = name.removeprefix("to_").replace("stepwise", "cycle")
        if kind in sharing_rows.MAPS:
            sharing_rows.maps_of(kind, config.layers, config.sets, config.seed)


def within_budget(config: Config) -> Config:
    """The config with as many sets as its budget allows."""
    if config.budget is None:
        return config
    task: Any = load(config, config.seed)
    whole, example = sizes(config, task), task.batch_at(0)["tokens"]

    def count(sets: int) -> int:
        maps = sharing.Maps.same(sharing.groups(config.layers, sets))
        return unique(sharing_rows.Decoder(maps.on(whole)), example)

    budget = round(config.budget * count(config.layers))
    config = dataclasses.replace(config, sets=sharing.most_sets(count, config.layers, budget))
    check(config)
    return config


def sizes(config: Config, task: Characters) -> Sizes:
    """The unshared network."""
    return Sizes(
        vocabulary=task.vocabulary,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        ffn=config.ffn,
        length=config.length,
    )


def run(config: Config, tasks: Sequence[Characters], workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains all networks, judges and times them, and returns the summary."""
    whole = sizes(config, tasks[0])
    training.say(
        f"model   {whole.layers} layers of width {whole.width}, {config.heads} heads, {config.ffn} hidden units; "
        f"{config.sets} sets of weights\n"
        f"data    {tasks[0].name}: {'; '.join(tasks[0].notes)}\n"
        f"run     {', '.join(config.rows)}; {config.seeds} seeds, {config.steps:,} steps of {config.batch} x "
        f"{config.length}, {config.extra:,} more after conversion\n"
        f"device  {training.device(workdir.layout)}\nstarting in {workdir.path}"
    )
    found: dict[str, list[tuple[Row, Any, float]]] = {name: [] for name in config.rows}
    teachers: list[Any] = []
    for number, task in enumerate(tasks):
        seed, example = config.seed + number, tasks[0].batch_at(0)["tokens"]
        for name in config.rows:
            if name.startswith("to_"):
                row = converted(name, config, whole, seed, task, teachers[number], example)
            else:
                row = scratch(name, config, whole, seed)
            teacher = teachers[-1] if len(teachers) > number else None
            row, params = trained(config, row, sizes(config, task), task, workdir, seed, started, teacher)
            if name == "unshared":
                teachers.append(jax.tree.map(np.asarray, params))
            quality = make_evaluate(row.net, task)(params, "test")
            maps = "" if row.layer_map is None else f", layers {' '.join(map(str, row.layer_map))}"
            training.say(f"{name}-seed{seed}: test bpc {quality:.4f}{maps}")
            found[name].append((row, jax.tree.map(np.asarray, params), quality))
    measured = measure(config, {name: rows[0] for name, rows in found.items()}, tasks[0])
    summary = summarize(config, found, measured, tasks[0])
    report(config, summary)
    sharing_pictures.draw(found, summary, tasks[0], teachers, whole, workdir.path)
    first = found[config.rows[0]][0][1]
    return {**summary, **training.environment(__file__, first, config.seed, time.perf_counter() - started)}


def measure(config: Config, rows: dict[str, tuple[Row, Any, float]], task: Characters) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step, in turn, and the bytes that it needs."""
    batch, key, runs, found = task.batch_at(0), jax.random.key(0), {}, {}
    for name, (row, params, _) in rows.items():
        optimizer = make_optimizer(config, config.learning_rate, config.steps)
        step = training.make_step(make_loss(row.net, task, config, config.steps, None, None), optimizer)
        state = TrainState.create(params, optimizer, {"step": jax.numpy.zeros((), int)})

        def bare(params: Any, opt_state: Any, rest: TrainState, step: Any = step) -> Any:
            return step(TrainState(rest.step, params, opt_state, rest.carry), batch, key)

        used = sharing.memory(jax.jit(bare, donate_argnums=(0, 1)), state.params, state.opt_state, state)
        found[name] = used._asdict()
        program = jax.jit(bare).lower(state.params, state.opt_state, state).compile()
        runs[name] = partial(program, state.params, state.opt_state, state)
    for name, seconds in in_turn(runs, config.repeats).items():
        found[name]["ms"] = 1e3 * float(np.median(seconds))
    return found


def summarize(config: Config, found: Any, measured: Any, task: Characters) -> dict[str, Any]:
    """Flat figures of all rows."""
    summary: dict[str, Any] = {"data": task.name, "seeds": config.seeds, "steps": config.steps, "extra": config.extra}
    example = task.batch_at(0)["tokens"]
    for name, rows in found.items():
        row, values = rows[0][0], [quality for *_, quality in rows]
        summary[f"{name}_bpc_mean"] = float(np.mean(values))
        summary |= {f"{name}_bpc_std": float(np.std(values, ddof=1))} if len(values) > 1 else {}
        summary[f"{name}_params_unique"] = unique(row.net, example)
        summary[f"{name}_flops_per_token"] = costs(row.sized, config.length).total / config.length
        summary[f"{name}_ms_per_step"] = measured[name]["ms"]
        summary[f"{name}_peak_bytes"] = measured[name]["peak"]
        summary[f"{name}_optimizer_bytes"] = measured[name]["optimizer"]
        maps = [rows[n][0].layer_map for n in range(len(rows))]
        summary |= {} if maps[0] is None else {f"{name}_maps": "; ".join(" ".join(map(str, m)) for m in maps)}
    return summary


def report(config: Config, summary: dict[str, Any]) -> None:
    """Prints the table."""
    lines = [f"{'':14}{'unique':>10}{'kFLOP/token':>13}{'bpc':>18}{'ms/step':>9}{'peak MB':>9}  layers use"]
    for name in config.rows:
        spread = summary.get(f"{name}_bpc_std")
        bpc = f"{summary[f'{name}_bpc_mean']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
        lines.append(
            f"{name:14}{summary[f'{name}_params_unique']:10,}{summary[f'{name}_flops_per_token'] / 1e3:13.0f}{bpc:>18}"
            f"{summary[f'{name}_ms_per_step']:9.1f}{summary[f'{name}_peak_bytes'] / 1e6:9.1f}"
            f"  {summary.get(f'{name}_maps', '-')}"
        )
    lines.append(
        "unique: parameters that exist; bpc: of the test, mean ± deviation over seeds; a step: median, in turn"
    )
    training.say("\n".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Bad input exits with 2, a loss that is not finite with 1, Ctrl-C with 130."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset", "data"), argv, description=__doc__, prog="share_layers.py")
    with training.bad_input(__file__, text_tasks.__file__, sharing_rows.__file__):
        check(config)
        layout = training.lay_out(config, batch=config.batch)
        config = within_budget(config)
        workdir = training.Workdir(
            config.workdir or f"runs/share_layers-{config.preset}-{config.data}", config, FREE, layout
        )
        if workdir.summary is None:
            tasks: list[Any] = [load(config, config.seed + number) for number in range(config.seeds)]
            started -= earlier(workdir.open().shared)
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to train again")
    else:
        with workdir, training.stopping():
            workdir.finish(run(config, tasks, workdir, started))
    training.print_summary(workdir.summary or {})
    return 0


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
