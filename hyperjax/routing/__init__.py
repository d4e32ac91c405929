"""Sub-network routing: multi-task networks that learn which of their parts each task shares, and its baselines.

tasks = {"income": Binary(), "job": MultiClass(20)}
model = SNR(levels=((64,) * 4, (64,) * 4), tasks=tasks)
variables = model.init(key, x)
outputs, info = model.apply(variables, x, key)  # training: gates are sampled with the key
loss = sum(task_losses(tasks, outputs, labels).values()) + 1e-3 * info["l0"]
outputs, info = model.apply(variables, x)  # evaluation: gates are deterministic
small = compact(model, variables)  # what is left to serve: small.model.apply(small.variables, x)

Example:
    >>> import jax, jax.numpy as jnp
    >>> from hyperjax.routing import SNR, Binary, compact, task_losses
    >>> tasks, x = {"income": Binary(), "married": Binary()}, jnp.ones((4, 10))
    >>> model = SNR(levels=((8, 8), (8, 8)), tasks=tasks)
    >>> variables = jax.jit(model.init)(jax.random.key(0), x)
    >>> outputs, info = jax.jit(model.apply)(variables, x, jax.random.key(1))
    >>> losses = task_losses(tasks, outputs, {name: jnp.array([0, 1, 0, 1]) for name in tasks})
    >>> sorted(losses), compact(model, variables).connections  # all gates are still open
    (['income', 'married'], (8, 8))
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
