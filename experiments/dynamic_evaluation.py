"""Dynamic evaluation of a run of char_lm.py: the model goes on learning from the text that it is tested on.

    python experiments/dynamic_evaluation.py runs/char_lm-quick
    python experiments/dynamic_evaluation.py runs/KEY --rates 1e-6 3e-6 1e-5 --decays 0 1e-3

Rate and decay are chosen on the validation split. Each symbol is predicted before it is learned from, but the figure
is not that of one set of parameters: it goes into dynamic.json, beside summary.json, and into a column of its own.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import char_lm_runs
import numpy as np
import tyro

from hyperjax import training
from hyperjax.data import evaluation_windows
from hyperjax.recurrent import dynamic_evaluate, gradient_rms


@dataclasses.dataclass(frozen=True)
class Config:
    """What to evaluate, and how far its parameters may move."""

    workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")] = (
        tyro.MISSING
    )  # folder of a run of char_lm.py
    rates: tuple[float, ...] = (3e-6, 1e-5, 3e-5)  # of the steps; the best on the validation text is taken
    decays: tuple[float, ...] = (1e-3, 3e-3)  # how strongly the parameters are drawn back to the trained ones
    length: int = 20  # symbols between two steps
    tune: int = 50_000  # symbols of the validation text to choose rate and decay on
    train: int = 1_000_000  # symbols of the training text to measure the gradients' scale on
    data_dir: str | None = None  # folder or archive with the run's corpus, if it is no longer where the run found it


def check(config: Config) -> None:
    """Raises ValueError for a setting that makes no sense."""
    for name in ("length", "tune", "train"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} is {getattr(config, name)}, expected a whole number of at least 1")
    for name in ("rates", "decays"):
        values = getattr(config, name)
        if not values or not all(0 <= value < math.inf for value in values):
            raise ValueError(f"--{name} is {values}, expected one or more finite numbers of at least 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates.

    Args:
        argv: the command line's arguments; by default those of the process.

    Returns:
        The exit status; 2 for bad input.
    """
    config = training.parse(Config, (), argv, description=__doc__, prog="dynamic_evaluation.py")
    with training.bad_input(__file__, char_lm_runs.__file__):
        check(config)
        workdir = config.workdir.expanduser()
        run, corpus, model, restore = char_lm_runs.open_run(workdir, config.data_dir)
        params, step = restore()
    print(f"{run.model} of {workdir}, step {step:,}, {training.count(params):,} parameters, on {corpus.name}")
    rms = gradient_rms(model, params, evaluation_windows(corpus.train[: config.train], run.batch, run.length))

    def bpc(ids: np.ndarray, rate: float, decay: float) -> float:
        windows = evaluation_windows(ids, 1, config.length)
        return dynamic_evaluate(model, params, rms, windows, rate=rate, decay=decay)

    few = corpus.valid[: config.tune]
    tried = {(0.0, 0.0): bpc(few, 0.0, 0.0)}
    print(f"first {len(few):,} symbols of the validation text, static: {tried[0.0, 0.0]:.4f} bpc")
    for rate, decay in itertools.product(config.rates, config.decays):
        tried[rate, decay] = bpc(few, rate, decay)
        print(f"rate {rate:g}, decay {decay:g}: {tried[rate, decay]:.4f} bpc")
    rate, decay = min(tried, key=lambda pair: (not math.isfinite(tried[pair]), tried[pair]))
    found = {"rate": rate, "decay": decay, "length": config.length}
    for split in ("valid", "test"):
        ids = getattr(corpus, split)
        found |= {f"static_{split}_bpc": bpc(ids, 0.0, 0.0), f"{split}_bpc": bpc(ids, rate, decay)}
        print(f"{split}: {found[f'static_{split}_bpc']:.4f} bpc, dynamic {found[f'{split}_bpc']:.4f}")
    training.write_json(workdir / "dynamic.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
