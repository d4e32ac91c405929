"""What test_mesh.py runs in processes of its own: four small trainings, laid out as the arguments say.

    python tests/mesh_worker.py FOLDER STEPS --mesh data=4,model=2

Metrics and checkpoints go to FOLDER/NAME; what is there goes on. Prints nothing.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import char_lm
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from char_lm_presets import defaults

import hyperjax as hj
from hyperjax import routing, training
from hyperjax.data import Streams
from hyperjax.data.multitask import RowBatches, TaskSplit
from hyperjax.transformer import Config, Decoder

B, L = 8, 12


def drawn(model, *inputs, **keywords):
    """Parameters from NumPy: compiling a network's own draws takes longer than training it here."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **keywords))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(s.dtype), shapes)


def language_model():
    """A layer-norm HyperLSTM with dropout, whose state is carried from window to window."""
    sizes = {"units": 64, "hyper_units": 16, "keep": 0.8, "batch": B, "length": L}
    config = dataclasses.replace(defaults(), **sizes)
    model = char_lm.make_model(config, 20)
    streams = Streams(np.random.default_rng(0).integers(0, 20, 2000), B, L)
    params = drawn(model, jnp.zeros((1, 1), jnp.int32))
    return char_lm.make_loss(model), params, streams.window, model.initialize_carry(B)


def hypernetwork():
    """A set of weights for each sample, from heads that stay where they are."""
    model, rng = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(8)]), np.random.default_rng(0)
    x, y = rng.standard_normal((5, B, 32)).astype(np.float32), rng.standard_normal((5, B, 8)).astype(np.float32)
    hyper = hj.HyperNetwork.from_target(model, x[0], embedding_dim=4, num_embeddings=B, generator=hj.Linear())
    params = drawn(hyper, x[0], task_id=0)

    def loss_fn(params, carry, batch, key):
        out = hyper.apply({"params": params}, batch["x"], task_id=batch["task"])
        return jnp.mean((out - batch["y"]) ** 2), (carry, {})

    def batch_at(step, rows=slice(None)):
        return {"x": x[step % 5][rows], "y": y[step % 5][rows], "task": np.arange(B, dtype=np.int32)[rows]}

    return loss_fn, params, batch_at, ()


def snr():
    """Sub-network routing with gates drawn at random and their L0."""
    tasks = {"a": routing.Regression(), "b": routing.Binary()}
    model, rng = routing.SNR(((32,) * 4, (32,) * 4), tasks, (16,), "trans"), np.random.default_rng(0)
    x, labels = rng.standard_normal((64, 16)).astype(np.float32), (rng.random((2, 64)) < 0.5).astype(np.float32)
    batches = RowBatches(TaskSplit({"x": x}, dict(zip(tasks, labels, strict=True))), B)
    params = drawn(model, x[:B])

    def loss_fn(params, carry, batch, key):
        outputs, info = model.apply({"params": params}, batch["features"]["x"], key)
        return sum(routing.task_losses(tasks, outputs, batch["labels"]).values()) + 1e-3 * info["l0"], (carry, {})

    return loss_fn, params, batches.batch_at, ()


def transformer():
    """A decoder with dropout."""
    model = Decoder(Config(20, layers=2, width=32, heads=4, ffn=64, length=L, dropout=0.1))
    streams = Streams(np.random.default_rng(0).integers(0, 20, 2000), B, L)
    params = drawn(model, jnp.zeros((1, L), jnp.int32))

    def loss_fn(params, carry, batch, key):
        logits = model.apply({"params": params}, batch["inputs"], key=key)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean(), (carry, {})

    return loss_fn, params, streams.window, ()


CASES = {case.__name__: case for case in (language_model, hypernetwork, snr, transformer)}


def main():
    folder, steps, *options = sys.argv[1:]
    names = [option.removeprefix("--").replace("-", "_") for option in options[::2]]
    given = dict(zip(names, options[1::2], strict=True))
    devices = training.Devices(**{n: v if n in ("mesh", "coordinator") else int(v) for n, v in given.items()})
    layout = training.lay_out(devices, batch=B, in_place="generators_")
    for name, case in CASES.items():
        workdir = training.Workdir(Path(folder) / name, devices, layout=layout).open()
        loss_fn, params, batch_at, carry = case()
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
        state = training.TrainState.create(params, optimizer, carry)
        checkpoints = training.Checkpoints(workdir.shared / "checkpoints")
        state, resumed = checkpoints.restore(state) or (state, {})
        files = [
            training.JsonLines(workdir.path / f"{n}.jsonl", resumed.get("step", 0)) for n in ("metrics", "timings")
        ]
        with workdir, checkpoints, files[0], files[1]:
            training.fit(
                state,
                training.make_step(loss_fn, optimizer, layout),
                batch_at,
                jax.random.key(1),
                steps=int(steps),
                checkpoints=checkpoints,
                metrics=files[0],
                timings=files[1],
                validate=lambda state: {"size": sum(float(np.abs(p).sum()) for p in jax.tree.leaves(state.params))},
                best="size",
                eval_every=3,
                log_every=1,
                items=B,
                resumed=resumed,
                layout=layout,
            )


main()
