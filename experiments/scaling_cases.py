"""Four trainings to lay out over devices: a language model, a hypernetwork, sub-network routing, a Transformer."""

import dataclasses
from collections.abc import Callable
from typing import Any

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

SYMBOLS = 50
IN_PLACE = "generators_"  # the heads of the hypernetwork: much larger than what they make


@dataclasses.dataclass(frozen=True)
class Case:
    """A training problem.

    Attributes:
        init: () -> parameters, to be given to `jax.eval_shape`.
        loss_fn: as `make_step` takes it.
        batch_at: (step, rows) -> batch.
        carry: what flows from batch to batch.
    """

    init: Callable[[], Any]
    loss_fn: training.state.LossFn
    batch_at: Callable[..., Any]
    carry: Any = ()

    def state(self, optimizer: optax.GradientTransformation) -> training.TrainState:
        """A first state, from NumPy: compiling a network's own draws takes longer than a few steps of it."""
        rng = np.random.default_rng(0)
        draw = lambda s: (0.2 * rng.standard_normal(s.shape)).astype(s.dtype)  # noqa: E731
        return training.TrainState.create(jax.tree.map(draw, jax.eval_shape(self.init)), optimizer, self.carry)


def language_model(batch: int, width: int, length: int) -> Case:
    """A layer-norm HyperLSTM with dropout, whose state is carried from window to window."""
    sizes: dict[str, Any] = {"units": width, "hyper_units": width // 4, "keep": 0.8, "batch": batch, "length": length}
    model = char_lm.make_model(dataclasses.replace(defaults(), **sizes), SYMBOLS)
    example = jnp.zeros((1, 1), jnp.int32)
    init = lambda: dict(model.init(jax.random.key(0), example))["params"]  # noqa: E731
    return Case(init, char_lm.make_loss(model), text(batch, length), model.initialize_carry(batch))


def hypernetwork(batch: int, width: int, length: int) -> Case:
    """Weights for each of `batch` tasks, from heads of which each device computes its part."""
    model, rng = nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(8)]), np.random.default_rng(0)
    x, y = (rng.standard_normal((5, batch, n)).astype(np.float32) for n in (width // 2, 8))
    hyper = hj.HyperNetwork.from_target(model, x[0], embedding_dim=4, num_embeddings=batch, generator=hj.Linear())

    def loss_fn(params, carry, batch, key):
        out = hyper.apply({"params": params}, batch["x"], task_id=batch["task"])
        return jnp.mean((out - batch["y"]) ** 2), (carry, {})

    def batch_at(step, rows=slice(None)):
        return {"x": x[step % 5][rows], "y": y[step % 5][rows], "task": np.arange(batch, dtype=np.int32)[rows]}

    return Case(lambda: hyper.init(jax.random.key(0), x[0], task_id=0)["params"], loss_fn, batch_at)


def snr(batch: int, width: int, length: int) -> Case:
    """Sub-network routing with gates drawn at random, and their L0."""
    tasks: dict[str, Any] = {"a": routing.Regression(), "b": routing.Binary()}
    model, rng = routing.SNR(((width,) * 4, (width,) * 4), tasks, (16,), "trans"), np.random.default_rng(0)
    x = rng.standard_normal((8 * batch, 16)).astype(np.float32)
    labels = (rng.random((2, len(x))) < 0.5).astype(np.float32)
    batches = RowBatches(TaskSplit({"x": x}, dict(zip(tasks, labels, strict=True))), batch)

    def loss_fn(params, carry, batch, key):
        outputs, info = model.apply({"params": params}, batch["features"]["x"], key)
        losses = routing.task_losses(tasks, outputs, batch["labels"])
        return sum(losses.values(), jnp.zeros(())) + 1e-3 * info["l0"], (carry, {})

    return Case(lambda: model.init(jax.random.key(0), x[:1])["params"], loss_fn, batches.batch_at)


def transformer(batch: int, width: int, length: int) -> Case:
    """A decoder with dropout."""
    model = Decoder(Config(SYMBOLS, layers=2, width=width, heads=4, ffn=4 * width, length=length, dropout=0.1))

    def loss_fn(params, carry, batch, key):
        out: Any = model.apply({"params": params}, batch["inputs"], key=key)
        return optax.softmax_cross_entropy_with_integer_labels(out["logits"], batch["targets"]).mean(), (carry, {})

    example = jnp.zeros((1, length), jnp.int32)
    return Case(lambda: model.init(jax.random.key(0), example)["params"], loss_fn, text(batch, length))


def text(batch: int, length: int) -> Callable[..., Any]:
    """Windows of characters drawn at random."""
    ids = np.random.default_rng(0).integers(0, SYMBOLS, batch * (4 * length + 1) + 1)
    return Streams(ids, batch, length).window


CASES: dict[str, Callable[[int, int, int], Case]] = {
    "language_model": language_model,
    "hypernetwork": hypernetwork,
    "snr": snr,
    "transformer": transformer,
}
