"""Collects runs of char_lm.py on Penn Treebank into one file, and prints them beside the paper's Table 3.

    python experiments/table3.py runs/reduced-*                 # adds them to experiments/results/ptb.json
    python experiments/table3.py --preset paper                 # prints what the file holds of the paper's size
    python experiments/table3.py --preset levers                # or of what goes beyond it; so does beyond

A run is known by its configuration: collected twice, it stands there once.
"""

import dataclasses
import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import char_lm_presets
import tyro
from char_lm_presets import FREE, LEVERS, defaults

from hyperjax import training

# Test and validation bpc of Table 3 (Ha, Dai, Le, arXiv 1609.09106).
PUBLISHED = {
    "lstm": (1.312, 1.347),
    "lstm_1250": (1.306, 1.340),
    "lstm_2x1000": (1.281, 1.312),
    "ln_lstm": (1.267, 1.300),
    "hyper_lstm": (1.265, 1.296),
    "ln_hyper_lstm": (1.250, 1.281),
    "ln_hyper_lstm_large": (1.233, 1.263),
    "ln_hyper_lstm_2x": (1.219, 1.245),
}
EPOCH = 5_017_482  # characters of the training split
PRESETS = ("reduced", "paper", "levers", "beyond")
RESULTS = Path(__file__).parent / "results" / "ptb.json"
RUN = ("seed", "device", "jax_version", "git_commit", "steps", "best_step", "seconds", "chars_per_second")
TAKEN = (*RUN, "params", "valid_bpc", "test_bpc")  # of a run's summary


@dataclasses.dataclass(frozen=True)
class Config:
    """What to collect, and which part of it to print."""

    workdirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")] = ()  # finished runs
    results: Path = RESULTS  # the file to add them to
    preset: str = "reduced"  # the runs to print: reduced, paper, levers or beyond


def read_run(workdir: Path) -> dict[str, Any] | None:
    """What the results file holds of a run.

    Args:
        workdir: its folder.

    Returns:
        Its command, config and figures; None if the run has not finished.

    Raises:
        ValueError: the folder holds no run of char_lm.py on Penn Treebank of one of these presets, or a damaged one.
    """
    fix = f"give the workdir of char_lm.py --preset {' or '.join(PRESETS)}"
    if not (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} holds no config.json; {fix}")
    config = _read(workdir / "config.json")
    if config.get("corpus") != "ptb" or config.get("preset") not in PRESETS:
        raise ValueError(f"{workdir} is a run of {config.get('preset')!r} on {config.get('corpus')!r}; {fix}")
    if not (workdir / "summary.json").is_file():
        return None
    summary = _read(workdir / "summary.json")
    missing = [name for name in TAKEN if name not in summary]
    if missing:
        raise ValueError(f"{workdir / 'summary.json'} lacks {', '.join(missing)}; {fix}")
    config = {name: value for name, value in config.items() if name not in FREE}
    dynamic = workdir / "dynamic.json"
    more = {"dynamic_evaluation": _read(dynamic)} if dynamic.is_file() else {}
    return {"command": command(config), "config": config, **{name: summary[name] for name in TAKEN}, **more}


def command(config: dict[str, Any]) -> str:
    """The command line of a configuration: its preset, its model and what differs from their defaults."""
    usual = dataclasses.asdict(defaults(config["preset"], config["model"]))
    given = {name: value for name, value in config.items() if name in usual and value != usual[name]}
    given = {"preset": config["preset"], "model": config["model"], **given}
    flags = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(["python", "experiments/char_lm.py", *flags])


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both lists, a newer run in place of an older one of the same command, ordered as Table 3 or the levers are."""
    runs = {run["command"]: run for run in [*old, *new]}
    order = [*PUBLISHED, *LEVERS]
    return sorted(runs.values(), key=lambda run: (order.index(run["config"]["model"]), run["command"]))


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table, a line for each configuration: mean and standard deviation over its seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(command({**run["config"], "seed": 0}), []).append(run)
    published = any(run["config"]["preset"] in ("reduced", "paper") for run in runs)
    paper = " in the paper: valid | test |" if published else ""
    moving = " test bpc, dynamic evaluation |" if any("dynamic_evaluation" in run for run in runs) else ""
    lines = [f"| command | parameters | seeds | valid bpc | test bpc |{moving}{paper} minutes an epoch | hardware |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for text, same in groups.items():
        first = same[0]
        test, valid = PUBLISHED.get(first["config"]["model"], (math.nan, math.nan))
        text = text.removeprefix("python experiments/char_lm.py ")
        speeds = [run["chars_per_second"] for run in same if run["chars_per_second"]]
        minutes = f"{EPOCH / statistics.median(speeds) / 60:.3g}" if speeds else "-"
        devices = ", ".join(dict.fromkeys(run["device"] for run in same))
        measured = " | ".join(_spread([run[f"{split}_bpc"] for run in same]) for split in ("valid", "test"))
        dynamic = [run["dynamic_evaluation"]["test_bpc"] for run in same if "dynamic_evaluation" in run]
        lines.append(
            f"| `{text}` | {first['params']:,} | {len(same)} | {measured} "
            f"{moving and f'| {_spread(dynamic) if dynamic else chr(45)} '}"
            f"|{paper and f' {valid:.3f} | {test:.3f} |'} {minutes} | {devices} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, expected JSON; restore it") from error


def main(argv: list[str] | None = None) -> int:
    """Collects and prints; returns the exit status, 2 for bad input."""
    config = training.parse(Config, (), argv, description=__doc__, prog="table3.py")
    with training.bad_input(__file__, char_lm_presets.__file__):
        if config.preset not in PRESETS:
            raise ValueError(f"--preset is {config.preset}, expected {' or '.join(PRESETS)}")
        found = {workdir: read_run(workdir) for workdir in config.workdirs}
        runs = merged(_read(config.results) if config.results.exists() else [], [run for run in found.values() if run])
        if not runs:
            raise ValueError(
                f"{config.results} holds no run, and no finished one was given; give workdirs of char_lm.py"
            )
        if config.workdirs:
            config.results.parent.mkdir(parents=True, exist_ok=True)
            training.write_json(config.results, runs)
    for workdir, run in found.items():
        if run is None:
            print(f"{workdir} has not finished: left out", file=sys.stderr)
    training.say(table([run for run in runs if run["config"]["preset"] == config.preset]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
