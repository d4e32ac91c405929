"""What every experiment shares: the step, the loop, checkpoints, metrics and the command line."""

from hyperjax.training.checkpoint import Checkpoints, NotSaved
from hyperjax.training.configs import read_config
from hyperjax.training.evaluation import Evaluation, make_evaluate
from hyperjax.training.experiment import (
    Workdir,
    bad_input,
    count,
    device,
    environment,
    parse,
    print_summary,
    say,
    writable,
)
from hyperjax.training.interrupts import Interrupted, NonFinite, stopping
from hyperjax.training.loop import fit, seconds
from hyperjax.training.mesh import Devices, FitConfig, Layout, lay_out, make_mesh
from hyperjax.training.metrics import JsonLines, open_lines, read_lines, save_curves, series, write_json
from hyperjax.training.optimizer import average_params, averaged_params, matrices, schedule
from hyperjax.training.profiling import Profile
from hyperjax.training.replay import Examined, examine
from hyperjax.training.state import TrainState, make_step, make_steps
from hyperjax.training.trials import Trials, apply_in_blocks, make_trials

__all__ = [
    "Checkpoints",
    "Devices",
    "Evaluation",
    "Examined",
    "FitConfig",
    "Interrupted",
    "JsonLines",
    "Layout",
    "NonFinite",
    "NotSaved",
    "Profile",
    "TrainState",
    "Trials",
    "Workdir",
    "apply_in_blocks",
    "average_params",
    "averaged_params",
    "bad_input",
    "count",
    "device",
    "environment",
    "examine",
    "fit",
    "lay_out",
    "make_evaluate",
    "make_mesh",
    "make_step",
    "make_steps",
    "make_trials",
    "matrices",
    "open_lines",
    "parse",
    "print_summary",
    "read_config",
    "read_lines",
    "save_curves",
    "say",
    "schedule",
    "seconds",
    "series",
    "stopping",
    "writable",
    "write_json",
]
