"""Many runs of one multi-task network side by side: what a sweep trains, evaluates, and counts."""

import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from routing_models import Tasks, make_optimizer, quality, ramp

from hyperjax import routing, training

Figures = dict[str, Any]


class Group:
    """The runs of one network, trained and evaluated together.

    A run's hyperparameters are `learning_rate`, and for SNR `beta`, `gamma`, `zeta`, `open`, `l0`, `ramp` and `target`.

    Args:
        model: the network.
        tasks: kinds by name.
        shape: of its input.
        steps: updates of a run.
        batch: rows in a batch.
        gate_rate: learning rate of log alpha.
        own_rows: whether each run has rows of its own.
        sparse: whether SNR is steered to `target`, a share of its connections.
        mesh: devices to spread the runs over; None is one.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Tasks,
        shape: jax.ShapeDtypeStruct,
        *,
        steps: int,
        batch: int,
        gate_rate: float,
        own_rows: bool,
        sparse: bool,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.model, self.tasks, self.shape, self.steps = model, tasks, shape, steps
        self.gate_rate, self.own_rows, self.sparse, self.mesh = gate_rate, own_rows, sparse, mesh
        self.gated = isinstance(model, routing.SNR) and model.gates is not None
        self.trials = training.make_trials(self.init, self.loss, self.optimizer, batch, own_rows=own_rows)

    def shapes(self) -> Any:
        """Shapes of the network's parameters."""
        return jax.eval_shape(lambda: self.model.init(jax.random.key(0), jnp.zeros(self.shape.shape)))["params"]

    def network(self, hyper) -> Any:
        if not self.gated:
            return self.model
        gates = {name: hyper[name] for name in ("beta", "gamma", "zeta", "open")}
        return self.model.clone(gates=routing.HardConcrete(**gates))

    def init(self, key, hyper):
        params = {"network": self.network(hyper).init(key, jnp.zeros(self.shape.shape))["params"]}
        return params | ({"multipliers": routing.Multipliers.zeros()} if self.sparse else {})

    def optimizer(self, hyper):
        return make_optimizer(hyper["learning_rate"], self.gate_rate, self.steps)

    def loss(self, params, hyper, batch, key, step):
        outputs, info = self.network(hyper).apply({"params": params["network"]}, batch["x"], key)
        losses = routing.task_losses(self.tasks, outputs, batch)
        total = sum(losses.values(), jnp.zeros(()))
        if self.gated:
            rise = ramp(step, self.steps, hyper["ramp"])
            total += hyper["l0"] * rise * info["l0"]
            if self.sparse:
                target = 1 - (1 - hyper["target"]) * rise
                total += routing.lagrangian(routing.steerable_share(info), target, params["multipliers"])
        return total, losses

    def evaluate(self, run, x):
        params, hyper = run
        return self.network(hyper).apply({"params": params["network"]}, x)[0]

    def train(self, splits: dict[str, Any], hyper: dict[str, Any], seeds: Any, bar: Any) -> list[Figures]:
        """Trains the runs.

        Args:
            splits: `x` and labels by task, by split.
            hyper: hyperparameters by name, [R].
            seeds: [R].
            bar: a tqdm bar over the steps.

        Returns:
            The figures of each run; of one that put out NaN or infinity only `failed`, 1.
        """
        train, number = jax.tree.map(jnp.asarray, splits["train"]), len(seeds)
        put = local = lambda tree: tree
        if self.mesh is not None:
            each = -(-number // self.mesh.size)  # on every device; the last run again where they do not come out even
            layout = training.Layout(self.mesh, each * self.mesh.size)
            put, local, index = layout.put, layout.local, np.minimum(np.arange(layout.batch), number - 1)
            hyper, seeds = jax.tree.map(lambda a: jnp.asarray(a)[index], (hyper, seeds))
            train = jax.tree.map(lambda a: a[index], train) if self.own_rows else train
        states, hyper, seeds, train = put((self.trials.start(seeds, hyper), hyper, seeds, train))
        for at in range(0, self.steps, 100):
            some = min(100, self.steps - at)
            states, losses = self.trials.advance(states, hyper, seeds, train, some)
            losses = local(losses)
            bar.set_postfix_str(", ".join(f"{name} {float(loss[:, -1].mean()):.3f}" for name, loss in losses.items()))
            bar.update(some)
        runs = jax.tree.map(lambda a: np.asarray(a)[:number], local((states.params, hyper)))
        outputs = {
            name: training.apply_in_blocks(self.evaluate, runs, splits[name]["x"], own_rows=self.own_rows)
            for name in ("valid", "test")
        }
        figures = []
        for run in range(number):
            own = jax.tree.map(operator.itemgetter(run), outputs)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own)):
                figures.append({"failed": 1})
                continue
            line: Figures = {"failed": 0}
            for name, split in own.items():
                labels = {task: splits[name][task][run] if self.own_rows else splits[name][task] for task in self.tasks}
                scores = routing.task_scores(self.tasks, split, labels)
                line |= {f"{name}_quality": quality(scores, self.tasks)}
                line |= {f"{name}_{score}": value for score, value in scores.items()}
            params, settings = jax.tree.map(operator.itemgetter(run), runs)
            figures.append(line | self.served(params["network"], settings))
        return figures

    def served(self, params: Any, hyper: dict[str, Any]) -> Figures:
        """What is left to serve of a run."""
        if not self.gated:
            return {"params": training.count(params), "connections_open": 1.0, "tasks_lost": 0}
        model, variables = self.network(jax.tree.map(float, hyper)), {"params": params}
        gates = routing.served_gates(model, variables)
        share = sum(int((z > 0).sum()) for z in gates.values()) / sum(z.size for z in gates.values())
        lost = routing.lost_tasks(model, variables)
        # A lost task is served by a constant: it makes the network useless, but not small.
        size = training.count(params) if lost else routing.compact(model, variables).params[1]
        return {"params": size, "connections_open": share, "tasks_lost": len(lost)}
