"""What the scripts on sub-network routing share: data and networks by name, sizes to a budget, loss and optimizer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax import routing, training
from hyperjax.data import TaskData, digit_tasks, load_census, multi_mnist, synthetic_regression

DATA = ("synthetic", "digits", "census", "multimnist")
WEIGHTINGS = ("fixed", "uncertainty", "gradnorm", "dynamic_average")
Tasks = Mapping[str, routing.Task]
# Networks of two levels, all of one width, of `parts` sub-networks or experts where they have such.
MODELS: dict[str, Callable[[Tasks, int, int, tuple[int, ...]], nn.Module]] = {
    "snr_trans": lambda tasks, n, w, towers: routing.SNR(((w,) * n, (w,) * n), tasks, towers, "trans"),
    "snr_aver": lambda tasks, n, w, towers: routing.SNR(((w,) * n, (w,) * n), tasks, towers, "aver"),
    "ungated": lambda tasks, n, w, towers: routing.SNR(((w,) * n, (w,) * n), tasks, towers, gates=None),
    "single_task": lambda tasks, n, w, towers: routing.SingleTask((w, w), tasks=tasks, towers=towers),
    "shared_bottom": lambda tasks, n, w, towers: routing.SharedBottom((w, w), tasks=tasks, towers=towers),
    "cross_stitch": lambda tasks, n, w, towers: routing.CrossStitch((w, w), tasks=tasks, towers=towers),
    "mmoe": lambda tasks, n, w, towers: routing.MMoE(n, (w, w), tasks=tasks, towers=towers),
    "ml_mmoe": lambda tasks, n, w, towers: routing.MultiLevelMMoE(((n, w), (n, w)), tasks=tasks, towers=towers),
    "ple": lambda tasks, n, w, towers: routing.PLE(
        ((max(1, n - len(tasks)), 1, w), (max(1, n - len(tasks)), 1, w)), tasks=tasks, towers=towers
    ),
}


def load(
    name: str, data_file: str | None, test_file: str | None, *, group: str, correlation: float, seed: int
) -> TaskData:
    """Loads data by name; `group` is for census, `correlation` for synthetic, `seed` for both and multimnist."""
    if name not in DATA:
        raise ValueError(f"--data is {name!r}, expected one of {', '.join(DATA)}")
    for field, path, readers in (("data", data_file, ("census", "multimnist")), ("test", test_file, ("census",))):
        if path is not None and name not in readers:
            raise ValueError(f"--{field}-file is {path}, but --data {name} reads no such file; leave it out")
    if name == "census":
        if data_file is None:
            raise ValueError("--data census needs --data-file with census-income.data or census-income.test of UCI")
        data = load_census(data_file, test_file=test_file, group=group, seed=seed)
    elif name == "multimnist":
        data = multi_mnist(data_file, seed=seed)
    elif name == "digits":
        data = digit_tasks()
    else:
        data = standardise(synthetic_regression(correlation, rows=(10_000, 2_000, 10_000), seed=seed))
    for split in (data.valid, data.test):  # a split that cannot be scored is refused now, not after the training
        nothing = {task: np.zeros((split.rows, *kind.shape), np.float32) for task, kind in data.tasks.items()}
        routing.task_scores(data.tasks, nothing, split.labels)
    return data


def standardise(data: TaskData) -> TaskData:
    """Brings regression labels to mean 0 and variance 1 of the training split: lambda then means the same for all."""
    splits = {name: getattr(data, name) for name in ("train", "valid", "test")}
    for task, kind in data.tasks.items():
        if isinstance(kind, routing.Regression):
            mean, deviation = data.train.labels[task].mean(0), data.train.labels[task].std(0)
            splits = {
                name: split._replace(labels={**split.labels, task: (split.labels[task] - mean) / deviation})
                for name, split in splits.items()
            }
    return dataclasses.replace(data, **splits)


def make_optimizer(learning_rate: Any, gate_rate: Any, steps: int, multiplier_rate: Any = 0.2) -> Any:
    """Adam for the network; faster for the gates; ascent for multipliers. The first two end in half a cosine."""

    def label(path, _):
        names = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        return "multipliers" if names.startswith("multipliers") else "gates" if "log_alpha" in names else "network"

    return optax.partition(
        {
            "network": optax.adam(training.schedule(learning_rate, steps, 0.5)),
            "gates": optax.adam(training.schedule(gate_rate, steps, 0.5)),
            "multipliers": routing.ascend(optax.sgd(multiplier_rate)),
        },
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def ramp(step: Any, steps: int, share: Any = 0.1) -> Any:
    """From 0 to 1, linearly over the first `share` of the run: how lambda and the target set in.

    Gates that cost something from the first step on close before the network has learned what they are good for.
    """
    return jnp.minimum(1.0, step / (share * steps))


def quality(scores: Mapping[str, float], tasks: Tasks) -> float:
    """The mean over tasks of the score that is better when higher: AUC, accuracy or R²."""
    best = [
        next(scores[f"{name}_{score}"] for score in ("auc", "accuracy", "r2") if f"{name}_{score}" in scores)
        for name in tasks
    ]
    return float(np.mean(best))


class Weighting:
    """How the tasks' losses become one: a way of `hyperjax.routing`, with the numbers that it learns or remembers.

    Args:
        kind: one of `WEIGHTINGS`.
        tasks: kinds by name.
        epoch: updates over which `dynamic_average` averages the losses.
    """

    def __init__(self, kind: str, tasks: Tasks, epoch: int):
        self.kind, self.tasks, self.epoch = kind, dict(sorted(tasks.items())), epoch

    def params(self) -> dict[str, Any]:
        """What is trained along with the network."""
        if self.kind == "uncertainty":
            return {"weighting": {name: jnp.zeros(()) for name in self.tasks}}
        return {"weighting": jnp.zeros(len(self.tasks))} if self.kind == "gradnorm" else {}

    def carry(self) -> dict[str, Any]:
        """What goes from step to step: losses, in the order of the tasks' names."""
        ones = jnp.ones(len(self.tasks))
        if self.kind == "gradnorm":
            return {"initial": ones}
        return {"recent": ones, "earlier": ones, "sum": 0 * ones} if self.kind == "dynamic_average" else {}

    def total(self, params: Any, carry: dict[str, Any], losses: Mapping[str, Any], losses_of: Callable) -> Any:
        """Returns the loss to minimise and the new carry.

        Args:
            params: the parameters, `network` among them.
            carry: holds `step`, the number of updates so far, beside the weighting's own.
            losses: by task.
            losses_of: network -> losses by task, for the norms of their gradients.
        """
        if self.kind == "fixed":
            return routing.fixed(losses, dict.fromkeys(losses, 1.0)), carry
        if self.kind == "uncertainty":
            return routing.uncertainty(losses, params["weighting"], self.tasks), carry
        vector = jnp.stack([losses[name] for name in self.tasks])
        now = jax.lax.stop_gradient(vector)
        if self.kind == "gradnorm":  # its paper takes the last shared layer; here everything but the towers
            initial = jnp.where(carry["step"] == 0, now, carry["initial"])
            shared = {name: leaves for name, leaves in params["network"].items() if not name.startswith("tower")}

            def shared_losses(some):
                found = losses_of({**params["network"], **some})
                return jnp.stack([found[name] for name in self.tasks])

            norms = routing.task_gradient_norms(shared_losses, shared)
            weights, balance = routing.gradnorm(params["weighting"], norms, vector, initial, 1.5)
            return weights @ vector + balance, {**carry, "initial": initial}
        ends = (carry["step"] + 1) % self.epoch == 0
        summed = carry["sum"] + now
        weights = routing.dynamic_average(carry["recent"], carry["earlier"])
        # Before two epochs are over there is no ratio: both averages are then the same.
        first = carry["step"] < self.epoch
        recent = jnp.where(ends, summed / self.epoch, carry["recent"])
        earlier = jnp.where(ends, jnp.where(first, recent, carry["recent"]), carry["earlier"])
        new = {"recent": recent, "earlier": earlier, "sum": jnp.where(ends, 0.0, summed)}
        return weights @ vector, {**carry, **new}
