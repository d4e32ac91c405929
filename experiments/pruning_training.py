"""Training a network of dynamic_pruning.py: its loss, what steers it to the budget, and going on after a stop.

B samples, L positions.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pruning_methods
import pruning_report
from pruning_methods import RAMP, STEERED, auxiliary, build, make_optimizer, router_share
from text_tasks import Task

from hyperjax import estimators, pruning, training
from hyperjax.transformer import Config as Sizes
from hyperjax.transformer import Gates

NEAR = 0.015  # distance from the budget, as a share of it, at which static gates settle


def sizes(config: Any, task: Task) -> Sizes:
    """The dense network."""
    return Sizes(
        vocabulary=task.vocabulary,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        ffn=config.ffn,
        length=config.length,
        dropout=config.dropout,
        outputs=task.outputs,
    )


def make_loss(config: Any, name: str, model: Any, task: Task, budget: float) -> training.state.LossFn:
    """The task's loss, the routers', what leads to the budget, and the distance from a teacher.

    In the last steps, a share `config.settle` of them, gates are those that are served: the network learns what it will
    be without noise. Static heads stay as they are then, and blocks, which are smaller, once they are near the budget.
    """
    cool = temperature(config.steps)
    dense = sizes(config, task)
    teacher: Any = pruning_methods.Plain(dense, task.causal)

    def loss_fn(params, carry, batch, key):
        step, options = carry["step"], {} if task.causal else {"mask": batch["mask"]}
        settled = step >= (1 - config.settle) * config.steps
        network = params["network"]
        if name == "static":
            near = jnp.abs(static_share(model, network, dense, task) - budget) < NEAR * budget
            there = near | (config.penalty != "lagrangian")
            network = held(held(network, "routers_heads", settled), "routers_blocks", settled & there)
        out = model.apply({"params": network}, batch["tokens"], key, temperature=cool(step), settled=settled, **options)
        loss = task.loss(out["logits"], batch)
        share = served_share(name, model, out, params["network"], batch, task, dense)
        figure = task.figures(out["logits"], batch).mean()
        total, metrics = loss + auxiliary(out), {"task_loss": loss, f"train_{task.unit}": figure, "share": share}
        ramp = jnp.minimum(1.0, step / (RAMP * config.steps))
        if name in STEERED and config.penalty == "lagrangian":
            total += pruning.lagrangian(share, 1 - (1 - budget) * ramp, params["multipliers"])
        elif name in STEERED:
            total += config.penalty_weight * ramp * _open(share, out["gates"], config.penalty)
        if "teacher" in carry:
            taught = teacher.apply({"params": carry["teacher"]}, batch["tokens"], **options)["logits"]
            total += config.distill * pruning.distillation(out["logits"], taught).mean()
        return total, ({**carry, "step": step + 1}, metrics)

    return loss_fn


def static_share(model: Any, network: Any, dense: Sizes, task: Task) -> jax.Array:
    """The share of the dense network's operations that static gates leave as they are served."""
    logits = model.apply({"params": network}, method=lambda gated: {n: gated.routers[n]() for n in gated.prune})
    opened = Gates(**{name: model.choice.open(value) for name, value in logits.items()})
    return pruning.share(pruning.costs(dense, task.usual_length, causal=task.causal), opened)


def held(network: Any, name: str, hold: Any) -> Any:
    """The parameters, of which the static gates of that name get no gradient where `hold` is True."""
    still = jax.tree.map(lambda leaf: jnp.where(hold, jax.lax.stop_gradient(leaf), leaf), network[name])
    return network | {name: still}


def served_share(
    name: str, model: Any, out: dict[str, Any], params: Any, batch: Any, task: Task, dense: Sizes
) -> jax.Array:
    """The batch's share of the dense network's operations as an evaluation counts it, routers and lengths included.

    Its gradient is that of the probabilities to be open.
    """
    if name not in STEERED:
        return jnp.mean(out["share"])
    whole = pruning_report.total(dense, Gates(), batch["mask"], task.causal)
    left = pruning_report.total(dense, out["opened"], batch["mask"], task.causal, name == "token")
    return left.sum() / whole.sum() + router_share(params, dense, task, name)


def train(
    config: Any,
    name: str,
    budget: float,
    seed: int,
    task: Task,
    workdir: training.Workdir,
    label: str,
    teacher: Any,
    started: float,
) -> tuple[Any, Any, pruning_report.Found]:
    """Trains a network, or goes on, or restores it: the network, its parameters, and what the test finds.

    It is kept in the run's folder `label`.
    """
    folder, layout = workdir.path / label, workdir.layout
    dense = sizes(config, task)
    model: Any = build(name, dense, task, budget, seed, config.blocks)
    evaluate = pruning_report.make_evaluate(name, model, task, dense)
    optimizer = make_optimizer(config)
    init_key, train_key = jax.random.split(jax.random.key(seed))
    example = task.batch_at(0)

    def start() -> pruning.Multipliers:
        return pruning.Multipliers(jnp.zeros(()), jnp.asarray(config.multiplier_start, jnp.float32))

    def create(key):
        options = {} if task.causal else {"mask": example["mask"]}
        params = {"network": model.init(key, example["tokens"], **options)["params"]}
        params |= {"multipliers": start()} if name in STEERED else {}
        carry = {"step": jnp.zeros((), jnp.int32), **({} if teacher is None else {"teacher": teacher})}
        return training.TrainState.create(params, optimizer, carry)

    folder.mkdir(parents=True, exist_ok=True)
    checkpoints: training.Checkpoints[training.TrainState] = training.Checkpoints(
        workdir.shared / label / "checkpoints", 1
    )
    mark = {"fingerprint": task.fingerprint}
    with training.bad_input(__file__):  # nothing is compiled in here
        if (checkpoints.meta() or mark)["fingerprint"] != mark["fingerprint"]:
            raise ValueError(f"the data {task.name} has changed since {folder} began; choose another --workdir")
        restored = checkpoints.restore(jax.eval_shape(create, init_key))
        resumed = restored[1] if restored else {}
        files = training.open_lines(folder, resumed.get("step", 0))
    state = restored[0] if restored else jax.jit(create)(init_key)

    def validate(state: training.TrainState) -> dict[str, float]:
        found = evaluate(state.params["network"], "valid")
        return {f"valid_{task.unit}": found.quality, "valid_share": found.share}

    with checkpoints, files[0], files[1]:
        if restored:
            print(f"{folder.name}: after step {int(state.step):,} of {config.steps:,}")
        if int(state.step) < config.steps:
            state = training.fit(
                state,
                training.make_step(
                    make_loss(config, name, model, task, budget), optimizer, layout, non_finite=config.non_finite
                ),
                task.batch_at,
                train_key,
                checkpoints=checkpoints,
                metrics=files[0],
                timings=files[1],
                steps=config.steps,
                log_every=config.log_every,
                eval_every=config.eval_every,
                save_minutes=config.save_minutes,
                validate=validate,
                best=f"valid_{task.unit}",
                items=config.batch * config.length,
                unit="tokens",
                meta=mark,
                resumed={**resumed, "seconds": 0.0},  # `started` is moved by them
                started=started,
                layout=layout,
                profile=config.profile,
                max_skipped=config.max_skipped,
            )
    label = "bits per character" if task.unit == "bpc" else "share of wrong answers"
    options = {"train": f"train_{task.unit}", "valid": f"valid_{task.unit}", "label": label}
    training.save_curves(files[0].path, folder / "curves.png", title=f"{folder.name} on {task.name}", **options)
    network = state.params["network"]
    return model, network, evaluate(network, "test")


def earlier(folder: Path) -> float:
    """Seconds that earlier processes of a run took, up to their last checkpoint."""
    kept = [training.Checkpoints(path).meta() for path in folder.glob("*/checkpoints")]
    return max([meta["seconds"] for meta in kept if meta], default=0.0)


def temperature(steps: int) -> optax.Schedule:
    """From 1 to 0.5 over four fifths of the run."""
    return estimators.exponential_temperature(math.log(2) / (0.8 * steps))


def _open(share: jax.Array, gates: Any, penalty: str) -> jax.Array:
    if penalty == "flops":
        return share
    leaves = jax.tree.leaves(gates)
    power = 1 if penalty == "l1" else 2
    return sum((jnp.mean(gate**power) for gate in leaves), jnp.zeros(())) / len(leaves)
