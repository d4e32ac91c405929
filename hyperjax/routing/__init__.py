"""Sub-network routing: multi-task networks that learn which of their parts each task shares, and its baselines.

tasks = {"income": Binary(), "job": MultiClass(20)}
model = SNR(levels=((64,) * 4, (64,) * 4), tasks=tasks)
variables = model.init(key, x)
outputs, info = model.apply(variables, x, key)  # training: gates are sampled with the key
loss = sum(task_losses(tasks, outputs, labels).values()) + 1e-3 * info["l0"]
outputs, info = model.apply(variables, x)  # evaluation: gates are deterministic
small = compact(model, variables)  # what is left to serve: small.model.apply(small.variables, x)
"""

from hyperjax.budget import Multipliers, ascend, count_parameters, fit_width, flops, lagrangian
from hyperjax.routing.baselines import PLE, CrossStitch, MMoE, MultiLevelMMoE, SharedBottom, SingleTask
from hyperjax.routing.compact import Compacted, compact, lost_tasks
from hyperjax.routing.gates import HardConcrete
from hyperjax.routing.serving import compare_serving, fold_gates
from hyperjax.routing.snr import SNR, connection_sizes, served_gates, steerable_share
from hyperjax.routing.tasks import (
    Binary,
    MultiClass,
    MultiLabel,
    Regression,
    Task,
    check_labels,
    task_losses,
    task_scores,
)
from hyperjax.routing.weighting import (
    dynamic_average,
    fixed,
    gradnorm,
    task_gradient_norms,
    uncertainty,
)

__all__ = [
    "PLE",
    "SNR",
    "Binary",
    "Compacted",
    "CrossStitch",
    "HardConcrete",
    "MMoE",
    "MultiClass",
    "MultiLabel",
    "MultiLevelMMoE",
    "Multipliers",
    "Regression",
    "SharedBottom",
    "SingleTask",
    "Task",
    "ascend",
    "check_labels",
    "compact",
    "compare_serving",
    "connection_sizes",
    "count_parameters",
    "dynamic_average",
    "fit_width",
    "fixed",
    "flops",
    "fold_gates",
    "gradnorm",
    "lagrangian",
    "lost_tasks",
    "served_gates",
    "steerable_share",
    "task_gradient_norms",
    "task_losses",
    "task_scores",
    "uncertainty",
]
