"""Exports the network of a run as one file that JAX alone runs, and measures it.

    python experiments/export.py --workdir runs/char_lm-quick --out model.bin

The file is StableHLO with the weights inside, for a batch of any size, on CPU, CUDA and TPU; it needs neither this
library nor Flax:

    run = jax.export.deserialize(bytearray(open("model.bin", "rb").read())).call

Taken out of runs of: char_lm.py, the whole sequence or `--function step`; fewshot_adaptation.py, the network of a
`--task`; hypernet_images.py, with its kernels made; multitask_snr.py, compact; dynamic_pruning.py, a network's folder
in the workdir, compact where its gates are static. The table shows the file against the same function in this library,
and, where it had a hypernetwork or gates, against the network as it was trained: medians, in turn, on this machine.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import export_runs
import jax
import numpy as np

from hyperjax import serving, training
from hyperjax.timing import compiled, in_turn
from hyperjax.training import programs
from hyperjax.training.metrics import write_bytes

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """What to export."""

    workdir: str = ""  # folder of the run
    out: str = ""  # file to write; replaced if it exists
    function: str | None = None  # of a language model: sequence (the default) or step
    task: int | None = None  # of a hypernetwork of tasks: whose network, from 0
    data_dir: str | None = None  # where the run's corpus or data file is, if no longer where it was
    platforms: tuple[str, ...] = serving.PLATFORMS  # what the file runs on: cpu, cuda, rocm, tpu
    batch: int | None = None  # fix the batch size, as networks need whose work is laid out by it
    batches: tuple[int, ...] = (1, 32)  # batch sizes to measure, unless it is fixed
    repeats: int = 20  # rounds of the measurement


def check(config: Config) -> Path:
    """Returns where to write; raises ValueError for a field that makes no sense."""
    for name in ("workdir", "out"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing; give {'the folder of a run' if name == 'workdir' else 'a file'}")
    if not os.path.isdir(os.path.expanduser(config.workdir)):
        raise ValueError(f"--workdir is {config.workdir}, which is no folder; give that of a run")
    out = training.writable(config.out)
    if config.batch is not None and config.batch < 1:
        raise ValueError(f"--batch is {config.batch}, expected a whole number of at least 1, or None for any")
    if not config.batches or min(config.batches) < 1:
        raise ValueError(f"--batches is {config.batches}, expected whole numbers of at least 1")
    if config.repeats < 1:
        raise ValueError(f"--repeats is {config.repeats}, expected a whole number of at least 1")
    return out


def measure(served: export_runs.Served, exported: Any, batch: int, repeats: int) -> dict[str, float]:
    """Operations and milliseconds of a call with a batch, and how far the answers lie apart.

    Args:
        served: the network.
        exported: the same as read from its file.
        batch: samples.
        repeats: rounds.
    """
    arrays = list(served.inputs(batch).values())
    forms: dict[str, Any] = {"exported": (exported, *arrays), "library": (served.run, *arrays)}
    if served.trained is not None:  # with its variables as arguments: the compiler would make constants' weights itself
        forms["trained"] = (served.trained, served.variables, *arrays)
    calls = {name: partial(compiled(function, *given), *given) for name, (function, *given) in forms.items()}
    outputs = {name: jax.tree.leaves(call()) for name, call in calls.items()}
    gap = max(
        float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / max(1.0, float(np.max(np.abs(np.asarray(b))))))
        for a, b in zip(outputs["exported"], outputs["library"], strict=True)
    )
    found: dict[str, float] = {"gap": gap}
    times = in_turn(calls, repeats)
    for name, call in calls.items():
        found[f"{name}_ms"] = 1e3 * float(np.median(times[name]))
        found[f"{name}_flops"] = programs.flops(call.func)
    return found


def table(rows: dict[int, dict[str, float]]) -> str:
    """The measurements as text."""
    forms = [name for name in ("exported", "library", "trained") if f"{name}_ms" in next(iter(rows.values()))]
    titles = {"exported": "exported", "library": "in this library", "trained": "as trained"}
    lines = ["batch" + "".join(f"{titles[name] + ', ms':>24}{'MFLOP':>10}" for name in forms) + f"{'gap':>10}"]
    for batch, found in rows.items():
        cells = [f"{found[f'{name}_ms']:>24.3f}{found[f'{name}_flops'] / 1e6:>10.3f}" for name in forms]
        lines.append(f"{batch:>5}" + "".join(cells) + f"{found['gap']:>10.0e}")
    return "\n".join(lines)


def signature(inputs: dict[str, Any], exported: jax.export.Exported) -> str:
    """The inputs of the file, such as `tokens int32[batch, length]`."""
    shapes = iter(exported.in_avals)

    def one(name: str, tree: Any) -> str:
        avals = [next(shapes) for _ in jax.tree.leaves(tree)]
        shown = [f"{a.dtype}[{', '.join(map(str, a.shape))}]" for a in avals[:2]]
        return f"{name} {', '.join(shown)}" + (f", ... ({len(avals)} arrays)" if len(avals) > 2 else "")

    return "; ".join(one(name, tree) for name, tree in inputs.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Exports; returns the exit status, 2 for bad input."""
    config = training.parse(Config, (), argv, description=__doc__, prog="export.py")
    with training.bad_input(__file__, *export_runs.FILES):
        out = check(config)
        fixed, workdir = config.batch is not None, Path(config.workdir).expanduser()
        served = export_runs.open_run(workdir, config.function, config.task, config.data_dir, fixed)
        examples = served.inputs(config.batch or 2)
        free = () if fixed else served.free
        content = serving.export(served.run, *examples.values(), free=free, platforms=config.platforms)
    try:
        write_bytes(out, content)
    except OSError as error:
        print(f"error: cannot write {out} ({error.strerror}); give another --out", file=sys.stderr)
        return 2
    exported = jax.export.deserialize(bytearray(out.read_bytes()))
    params = training.count(served.params)
    training.say(
        f"network {served.title}; {params:,} parameters\n"
        f"wrote   {out}, {len(content) / MIB:.3f} MiB, for {', '.join(exported.platforms)}\n"
        f"inputs  {signature(examples, exported)}"
    )
    here = {"gpu": ("cuda", "rocm")}.get(jax.default_backend(), (jax.default_backend(),))
    if not set(here) & set(config.platforms):
        print("not measured: this machine is none of its platforms")
        return 0
    batches = config.batches if config.batch is None else (config.batch,)
    print(table({batch: measure(served, exported.call, batch, config.repeats) for batch in batches}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
