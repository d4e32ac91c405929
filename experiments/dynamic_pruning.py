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
from typing import Any

import jax
import numpy as np
import pruning_methods
import pruning_pictures
import pruning_report
import text_tasks
from pruning_methods import METHODS, build
from pruning_report import Trained
from pruning_training import earlier, sizes, train
from text_tasks import DATA, Task, load

from hyperjax import pruning, training

FREE = ("workdir", "data_dir", "save_minutes", "repeats")  # a run may resume with other values of these
DENSE = ("dense",)  # has no budget


@dataclasses.dataclass(frozen=True)
class Config(training.FitConfig):
    """Settings; --preset and --data choose the defaults of the others."""

    preset: str = "quick"  # quick or cpu
    data: str = "pydoc"  # pydoc or ptb (characters); topic, shuffled or corpus (classes of passages)
    workdir: str | None = None  # where the runs are kept; None is runs/dynamic_pruning-PRESET-DATA
    data_dir: str | None = None  # Penn Treebank: the folder or archive with its three files
    methods: tuple[str, ...] = ("dense", "small", "static", "mod", "experts", "random_experts")  # what to compare
    budgets: tuple[float, ...] = (0.6,)  # shares of the dense network's operations
    seeds: int = 1  # runs of each
    seed: int = 0  # of the first run; the others follow
    layers: int = 2  # of the dense network
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
    gate_rate: float = 0.15  # of Adam for static gates
    settle: float = 0.7  # share of the steps, the last ones, with gates as they are served; static ones move no more
    multiplier_rate: float = 1.0  # of ascent for the Lagrangian's multipliers, once its target has come down
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
        fields |= {"methods": methods, "seeds": 3, "layers": 4, "width": 96}
        fields |= {"ffn": 384, "length": 128, "prompt": 32, "batch": 8, "steps": 800, "learning_rate": 2e-3}
        fields |= {"gate_rate": 5e-2, "log_every": 50, "eval_every": 400, "eval_windows": 500, "repeats": 20}
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
    _expect(0 <= config.settle < 1, "settle", config.settle, "a number in [0, 1)")
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
        f"device  {training.device(workdir.layout)}\nstarting in {workdir.path}"
    )
    trained: list[Trained] = []
    for number, task in enumerate(tasks):
        seed, teacher = config.seed + number, None
        for name in config.methods:
            for budget in (1.0,) if name in DENSE else config.budgets:
                label = name if name in DENSE else f"{name}_{100 * budget:g}"
                folder = f"{label}-seed{seed}"
                taught: Any = teacher if config.distill else None
                model, params, found = train(config, name, budget, seed, task, workdir, folder, taught, started)
                if name == "dense":
                    teacher = jax.tree.map(np.asarray, params)
                training.say(f"{folder}: test {task.unit} {found.quality:.4f} at {found.share:.3f} of the operations")
                trained.append(Trained(label, name, seed, model, params, found))
    times = pruning_report.measure(trained, tasks[0], config.repeats)
    report(trained, times, tasks[0])
    pruning_pictures.draw(trained, times, tasks[0], dense, workdir.path)
    summary: dict[str, Any] = {"data": tasks[0].name, "seeds": config.seeds, "steps": config.steps}
    for label, measured in times.items():
        mine = [each for each in trained if each.label == label]
        opened = [kind.max(0) for kind in mine[0].found.openness.values()]
        flops = np.concatenate([each.found.flops for each in mine])
        figures = {tasks[0].unit: [each.found.quality for each in mine], "share": [each.found.share for each in mine]}
        for key, values in {**figures, **measured}.items():
            summary[f"{label}_{key}_mean"] = float(np.mean(values))
            summary |= {f"{label}_{key}_std": float(np.std(values, ddof=1))} if len(values) > 1 else {}
        summary |= {f"{label}_dead_units": int(sum((part == 0).sum() for part in opened))} if opened else {}
        summary[f"{label}_flops_per_token_mean"] = float(flops.mean())
        summary |= {f"{label}_flops_per_token_p{p}": float(np.percentile(flops, p)) for p in (5, 50, 95)}
        summary[f"{label}_params"] = training.count(mine[0].params)
    return {**summary, **training.environment(__file__, trained[0].params, config.seed, time.perf_counter() - started)}


def report(trained: Sequence[Trained], times: dict[str, dict[str, list[float]]], task: Task) -> None:
    """Prints the table."""
    columns = {task.unit: 16, "share": 16, "kFLOP/token p5 p50 p95": 26, "batch 1": 14, "batch 32": 14, "decode": 14}
    lines = [" " * 22 + "".join(f"{name:>{width}}" for name, width in columns.items())]
    for label, measured in times.items():
        found = [each.found for each in trained if each.label == label]
        flops = " ".join(f"{np.percentile(found[0].flops, p) / 1e3:.0f}" for p in (5, 50, 95))
        quality, share = ([getattr(one, name) for one in found] for name in ("quality", "share"))
        shown = [f"{_spread(quality, 4):>16}{_spread(share, 3):>16}{flops:>26}"]
        shown += [f"{_spread(measured.get(key, []), 2):>14}" for key in ("ms_b1", "ms_b32", "decode_ms")]
        lines.append(f"{label:22}{''.join(shown)}")
    lines.append(
        "means ± deviations over seeds; times in ms, medians in turn: a sample, 32 samples, a token decoded; -: only "
        "multiplies, or not measured"
    )
    training.say("\n".join(lines))


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Bad input exits with 2, a loss that is not finite with 1, Ctrl-C with 130."""
    started = time.perf_counter()
    config = training.parse(defaults, ("preset", "data"), argv, description=__doc__, prog="dynamic_pruning.py")
    with training.bad_input(__file__, pruning_methods.__file__, text_tasks.__file__):
        check(config)
        layout = training.lay_out(config, batch=config.batch)
        workdir = training.Workdir(
            config.workdir or f"runs/dynamic_pruning-{config.preset}-{config.data}", config, FREE, layout
        )
        if workdir.summary is None:
            tasks = [load(config, config.seed + number) for number in range(config.seeds)]
            for name in config.methods:
                for budget in config.budgets:  # refuses what no network can be made for
                    model = build(name, sizes(config, tasks[0]), tasks[0], budget, config.seed, config.blocks)
                    jax.eval_shape(model.init, jax.random.key(0), tasks[0].batch_at(0)["tokens"])
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
