"""Families of related tasks, and the three ways to learn a new one that fewshot_adaptation.py compares.

N tasks, B of them in a batch, n samples of a task, S numbers of steps.
"""

import functools
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax.data import Split, load_images, permute_labels, rotate
from hyperjax.hypernet import HyperNetwork, Linear
from hyperjax.hypernet.adaptation import adapt, adapt_many

SHOTS = (1, 2, 5, 10, 20)
WAYS = {"z": "adapting z", "finetune": "fine-tuning all weights", "scratch": "training from scratch"}
RATES = {  # of Adam, to try
    "z": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "finetune": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "scratch": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
}


class Net(nn.Module):
    """The target network: dense layers with ReLU."""

    widths: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.Dense(width, name=f"layer_{i}")(x))
        return nn.Dense(self.outputs, name="output")(x)


class Episode(NamedTuple):
    """N new tasks: 20 shots of each to learn from, of which the first are fewer shots, and data to be judged by."""

    inputs: np.ndarray
    targets: np.ndarray
    queries: np.ndarray
    answers: np.ndarray


class Sinusoids:
    """y = a sin(x - p).

    Args:
        rng: draws the training tasks.
        count: how many of them.
    """

    model, generator = Net((40, 40), 1), Linear()
    shot, per_shot, label, scale = "points", 1, "mean squared error", "log"
    example = np.zeros((1, 1), np.float32)

    def __init__(self, rng: np.random.Generator, count: int):
        self._trained = self._tasks(rng, count)

    def sample(self, rng: np.random.Generator, ids: np.ndarray, count: int, valid: bool = False):
        """Returns inputs [B, n, 1] and targets [B, n, 1] of training tasks."""
        return self._points(self._trained[ids], rng.uniform(-5, 5, (len(ids), count)))

    def episode(self, rng: np.random.Generator, count: int, tune: bool) -> Episode:
        """Draws new tasks."""
        tasks = self._tasks(rng, count)
        x, grid = rng.uniform(-5, 5, (count, max(SHOTS))), np.tile(np.linspace(-5, 5, 101), (count, 1))
        return Episode(*self._points(tasks, x), *self._points(tasks, grid))

    def _tasks(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.uniform((0.1, 0.0), (5.0, np.pi), (count, 2))

    def _points(self, tasks: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y = tasks[:, :1] * np.sin(x - tasks[:, 1:])
        return x[..., None].astype(np.float32), y[..., None].astype(np.float32)

    @staticmethod
    def loss(outputs, targets):
        """Squared error of each sample."""
        return jnp.square(outputs - targets)

    error = loss


class Digits:
    """Digits turned by an angle, with their classes in another order.

    Args:
        rng, count: as of `Sinusoids`.
        degrees: largest angle, to either side.
        permutations: number of orders of the classes.
    """

    model, generator = Net((64,), 10), Linear()
    shot, per_shot, label, scale = "images of each class", 10, "error (%)", "linear"
    example = np.zeros((1, 64), np.float32)

    def __init__(self, rng: np.random.Generator, count: int, degrees: float, permutations: int):
        self._images, self._degrees, self._permutations = load_images("digits", valid=0.25), degrees, permutations
        tasks = self._tasks(rng, count)
        self._made = {
            valid: [np.stack(part) for part in zip(*(self._make(split, *task) for task in tasks), strict=True)]
            for valid, split in ((False, self._images.train), (True, self._images.valid))
        }

    def sample(self, rng: np.random.Generator, ids: np.ndarray, count: int, valid: bool = False):
        """Returns inputs [B, n, 64] and labels [B, n] of training tasks, of training or of validation images."""
        images, labels = self._made[valid]
        chosen = ids[:, None], rng.integers(images.shape[1], size=(len(ids), count))
        return images[chosen], labels[chosen]

    def episode(self, rng: np.random.Generator, count: int, tune: bool) -> Episode:
        """Draws new tasks: of validation images for tuning, of test images otherwise."""
        split, cut, tasks = self._images.valid if tune else self._images.test, 10 * max(SHOTS), []
        for angle, order in self._tasks(rng, count):
            shuffled = rng.permutation(len(split.labels))
            ranks = np.zeros(len(shuffled), int)  # of an image among those of its class
            for label in range(10):
                own = shuffled[split.labels[shuffled] == label]
                ranks[own] = np.arange(len(own))
            by_rank = np.argsort(ranks, kind="stable")  # one image of each class, again one of each class, ...
            x, y = (part[by_rank] for part in self._make(split, angle, order))
            tasks.append((x[:cut], y[:cut], x[cut:], y[cut:]))
        return Episode(*(np.stack(part) for part in zip(*tasks, strict=True)))

    def _tasks(self, rng: np.random.Generator, count: int) -> list[tuple[float, int]]:
        angles = rng.uniform(-self._degrees, self._degrees, count)
        return list(zip(angles, rng.integers(self._permutations, size=count), strict=True))

    def _make(self, split: Split, angle: float, order: int) -> tuple[np.ndarray, np.ndarray]:
        images = rotate(self._images.floats(split), angle)
        return images.reshape(len(images), 64), permute_labels(split.labels, 10, order)

    @staticmethod
    def loss(outputs, targets):
        """Cross entropy of each sample."""
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)

    @staticmethod
    def error(outputs, targets):
        """100 where the answer is wrong, else 0."""
        return 100.0 * (outputs.argmax(-1) != targets)


@functools.partial(jax.jit, static_argnames="family")
def fit_weights(family, params, episode, rate, stops):
    """Takes steps of Adam on all weights of N networks at once, each on its own task.

    Args:
        family: of the tasks.
        params: where to start, with the leading axis N.
        episode: the tasks.
        rate: learning rate.
        stops: numbers of steps, ascending [S].

    Returns:
        Errors on the queries after each number of steps [N, S].
    """
    optimizer = optax.adam(rate)

    def predict(params, x):
        return family.model.apply({"params": params}, x)

    def one(params, task):
        def step(_, carry):
            params, state = carry
            gradient = jax.grad(lambda params: family.loss(predict(params, task.inputs), task.targets).mean())(params)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(params, updates), state

        def to_stop(carry, more):
            carry = jax.lax.fori_loop(0, more, step, carry)
            return carry, family.error(predict(carry[0], task.queries), task.answers).mean()

        return jax.lax.scan(to_stop, (params, optimizer.init(params)), jnp.diff(stops, prepend=0))[1]

    return jax.vmap(one)(params, episode)


class Learners:
    """The three ways to learn a new task.

    Args:
        family: of the tasks.
        hyper, variables: the trained hypernetwork.
        start: where z starts, as of `adapt`.
    """

    def __init__(self, family: Any, hyper: HyperNetwork, variables: Any, start: str):
        self.family, self.hyper, self.variables, self.start = family, hyper, variables, start
        self._mean = jax.jit(lambda v: hyper.generate(v, z=hyper.embeddings(v).mean(0)[None]))(variables)
        self._fresh = jax.jit(jax.vmap(lambda key: family.model.init(key, family.example)["params"]))
        error = lambda v, z, x, y: family.error(hyper.apply(v, x, z=z), y).mean()  # noqa: E731
        self._errors = jax.jit(jax.vmap(jax.vmap(error, (None, 0, None, None)), (None, 0, 0, 0)))

    def errors(self, way: str, episode: Episode, rate: float, stops: np.ndarray, key: jax.Array) -> np.ndarray:
        """Errors on each of N tasks after each number of steps [N, S]; `key` draws the weights to start from."""
        if way != "z":
            return np.asarray(fit_weights(self.family, self._starts(way, len(episode[0]), key), episode, rate, stops))
        found = self._adapt(adapt_many, episode.inputs, episode.targets, rate, stops[-1])
        return np.asarray(self._errors(self.variables, found.trajectory[:, stops], episode.queries, episode.answers))

    def milliseconds(self, way: str, episode: Episode, rate: float, steps: int, key: jax.Array) -> float:
        """How long the first task takes to learn, compilation not included; the fastest of 8 times."""
        x, y = episode.inputs[:1], episode.targets[:1]
        unjudged = Episode(x, y, x[:, :1], y[:, :1])
        starts, seconds = jax.block_until_ready(self._starts(way, 1, key)), []
        for _ in range(8):
            if way == "z":
                seconds.append(self._adapt(adapt, x[0], y[0], rate, steps).seconds)
            else:
                began = time.perf_counter()
                fit_weights(self.family, starts, unjudged, rate, np.array([steps])).block_until_ready()
                seconds.append(time.perf_counter() - began)
        return 1000 * min(seconds)

    def _starts(self, way: str, count: int, key: jax.Array) -> Any:
        if way == "scratch":
            return self._fresh(jax.random.split(key, count))
        return jax.tree.map(lambda v: np.repeat(v, count, 0), self._mean)

    def _adapt(self, function: Any, x: np.ndarray, y: np.ndarray, rate: float, steps: int) -> Any:
        options = {"start": self.start, "steps": steps, "optimizer": rate}
        return function(self.hyper, self.variables, x, y, self.family.loss, **options)
