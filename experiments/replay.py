"""Replays one step of a run of char_lm.py: the step whose loss or gradient was not finite, or any other.

    python experiments/replay.py --workdir runs/char_lm-quick --step 1234 [--out batch.npz]

The newest checkpoint before the step is restored (without one, the initial state is made again), the steps between are
made again, and the step itself is only computed: its loss, the norm of its gradient in each module, what was not finite
on the way in and on the way out, and the text it read. Nothing in the workdir changes.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import char_lm
import char_lm_runs
import jax
import numpy as np

from hyperjax import training
from hyperjax.data import Streams
from hyperjax.training.replay import Examined, examine

SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """What to replay."""

    workdir: str = ""  # folder of the run
    step: int = 0  # which step, counted from 1 as messages and metrics.jsonl do
    data_dir: str | None = None  # where the run's corpus is, if no longer where it was
    out: str | None = None  # an .npz to write the batch to


def state_before(
    run: char_lm_runs.Run, workdir: Path, streams: Streams, steps: int, step: int
) -> tuple[training.TrainState, int, list[str]]:
    """The state that a step starts from, the checkpoint's step that it comes from, and notes."""
    config = run.config
    optimizer = char_lm.make_optimizer(config, steps)
    create = char_lm.make_create(config, run.model, optimizer)
    init_key, train_key, _ = jax.random.split(jax.random.key(config.seed), 3)
    checkpoints: training.Checkpoints[training.TrainState] = training.Checkpoints(workdir / "checkpoints")
    with training.bad_input(__file__):
        meta = checkpoints.meta()
        if meta and meta.get("fingerprint") != run.corpus.fingerprint:
            raise ValueError(f"the text of {run.corpus.name} has changed since this run began; restore it")
        restored = checkpoints.restore(jax.eval_shape(create, init_key), before=step)
    state = restored[0] if restored else jax.jit(create)(init_key)
    at = first = int(state.step)
    advance, batch_at = char_lm.make_advance(config, char_lm.make_loss(run.model), optimizer, streams)
    each = config.steps_per_call
    while at < step - 1:
        count = min(each - at % each, step - 1 - at)
        state = advance(state, batch_at(at), train_key, *((count,) if each > 1 else ()))[0]
        at += count
    return state, first, checkpoints.notes


def report(found: Examined) -> str:
    """The figures as text."""
    lines = [f"loss       {found.loss:.6g}", f"grad_norm  {found.grad_norm:.6g}"]
    lines += [f"           {norm:12.6g}  {name}" for name, norm in found.norms.items()]
    for name, paths in found.not_finite.items():
        more = f", ... ({len(paths)} in all)" if len(paths) > SHOWN else ""
        lines.append(f"{name + ':':11}" + (f"not finite: {', '.join(paths[:SHOWN])}{more}" if paths else "finite"))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Replays the step; returns the exit status, 2 for bad input."""
    config = training.parse(Config, (), argv, description=__doc__, prog="replay.py")
    with training.bad_input(__file__, char_lm_runs.__file__):
        if not config.workdir:
            raise ValueError("--workdir is missing; give the folder of a run of char_lm.py")
        out = None if config.out is None else training.writable(config.out)
        workdir = Path(config.workdir).expanduser()
        run = char_lm_runs.open_run(workdir, config.data_dir)
        streams = Streams(run.corpus.train, run.config.batch, run.config.length)
        steps = run.config.steps or math.ceil(run.config.epochs * streams.steps_per_epoch)
        if not 1 <= config.step <= steps:
            raise ValueError(f"--step is {config.step}, expected one of the run's, 1 to {steps}")
    state, first, notes = state_before(run, workdir, streams, steps, config.step)
    batch: Any = streams.window(config.step - 1)
    key = jax.random.split(jax.random.key(run.config.seed), 3)[1]
    training.say("\n".join([*notes, f"step {config.step:,}, replayed from step {first:,}"]))
    training.say(report(examine(char_lm.make_loss(run.model), state, batch, key)))
    for number, line in enumerate(np.asarray(batch["inputs"])[:SHOWN]):
        training.say(f"text {number}: {run.corpus.decode(line)!r}")
    if out is not None:
        try:
            with out.open("wb") as file:
                np.savez(file, **{name: np.asarray(value) for name, value in batch.items()})  # type: ignore[arg-type]
        except OSError as error:
            print(f"error: cannot write {out} ({error.strerror})", file=sys.stderr)
            return 2
        print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
