# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hyperjax/hyperjax/blob/main/colab/hypernetworks.ipynb)
#
# # Hypernetworks
#
# A hypernetwork $g$ makes the weights of a target network $f$ from an embedding $z$:
#
# $$y = f(x;\, \theta), \qquad \theta = g(z;\, \varphi).$$
#
# Here: a generator for any target, a walk through the space of embeddings, weights for each sample of a batch, and new
# tasks that are learned by finding four numbers.

# %%
import importlib.util
import os
import shutil

if importlib.util.find_spec("google.colab"):  # nothing to do elsewhere
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if os.path.exists("/dev/accel0") else ""
    # %pip install -q "hyperjax{extra} @ git+https://github.com/hyperjax/hyperjax"

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hyperjax as hj
from hyperjax import hypernet, plotting, training
from hyperjax.plotting import COLORS, shade, show, subplots

print(training.device())

# %% [markdown]
# ## Any target
#
# `from_target` looks at the target's parameters, and at nothing else: a Linen module, an nnx module, or a function of
# `(params, x)`. Each parameter gets a generator. `Linear` is $\theta = W z + b$; others share more between parameters
# or start from trained weights, and rules choose them by the parameter's path.


# %%
def quadratic(params, x):
    return params["a"] * x**2 + params["b"] * x


x = jnp.linspace(-1, 1, 5)
hyper = hj.HyperNetwork.from_target(
    quadratic, x, params={"a": jnp.ones(()), "b": jnp.ones(())}, embedding_dim=3, num_embeddings=2
)
variables = hyper.init(jax.random.key(0), x, task_id=0)
print(jax.tree.map(float, hyper.generate(variables, task_id=1)))

# %%
net = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(1)])
one = jnp.zeros((1, 1))
generators = {
    "Linear": hj.Linear(),
    "MLP": hj.MLP(hidden=(8,)),
    "Chunked": hj.Chunked(),
    "LowRank, rank 2": hj.LowRank(rank=2),
    "Scale": hj.Scale(),
}
target = training.count(jax.eval_shape(net.init, jax.random.key(0), one))
print(f"the target has {target:,} parameters; its hypernetwork, with embeddings of 4 numbers for 50 tasks:")
for name, generator in generators.items():
    planned = hj.HyperNetwork.from_target(net, one, embedding_dim=4, num_embeddings=50, generator=generator)
    shapes = jax.eval_shape(lambda key, planned=planned: planned.init(key, one, task_id=0), jax.random.key(0))
    print(f"  {name:16} {training.count(shapes['params']):>8,}")

# %% [markdown]
# ## A family of tasks
#
# Each task is a sine $y = a \sin(x - p)$ with an amplitude $a$ of 0.5 to 3 and a phase $p$ of its own: two numbers, of
# which the hypernetwork is told nothing. It gets a table of embeddings, one of four numbers for each of 100 tasks, and
# learns the table and its own weights together. The table starts near 0, where all tasks have the same network, and
# $z$ gets a little noise in training: neighbours of an embedding then have to fit its task, too, and similar tasks
# find themselves side by side.

# %%
TASKS, E = 100, 4
rng = np.random.default_rng(0)
settings = rng.uniform((0.5, 0.0), (3.0, np.pi), (TASKS, 2)).astype(np.float32)


def sine(setting, x):
    return setting[..., :1, None] * np.sin(x - setting[..., 1:, None])


net = nn.Sequential([nn.Dense(40), nn.relu, nn.Dense(40), nn.relu, nn.Dense(1)])
hyper = hj.HyperNetwork.from_target(net, one, embedding_dim=E, num_embeddings=TASKS)


def batch_at(number):
    rng = np.random.default_rng(number)
    ids = rng.integers(0, TASKS, 20)
    x = rng.uniform(-5, 5, (20, 20, 1)).astype(np.float32)
    return {"ids": ids, "x": x, "y": sine(settings[ids], x)}


def loss_fn(params, carry, batch, key):
    z = hyper.embeddings({"params": params})[batch["ids"]]
    z += 0.05 * jax.random.normal(key, z.shape)
    answer = jax.vmap(lambda z, x: hyper.apply({"params": params}, x, z=z))(z, batch["x"])
    return jnp.mean(jnp.square(answer - batch["y"])), (carry, {})


steps = 3000
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(training.schedule(3e-3, steps, 0.8)))
step = training.make_step(loss_fn, optimizer)
start = hyper.init(jax.random.key(0), one, task_id=0)["params"]
state = training.TrainState.create({**start, "embedding": 0.1 * start["embedding"]}, optimizer)
losses = []
for number in range(steps):
    state, metrics = step(state, batch_at(number), jax.random.key(1))
    losses.append(metrics["loss"])
variables, losses = {"params": state.params}, np.array(losses)

# %%
figure, axes = subplots(size=(6, 2.6))
plotting.plot_losses(axes, {"": losses}, window=50)
axes.set(yscale="log", ylabel="mean squared error")
axes.set_title(f"100 sines from one network that makes networks: error {losses[-50:].mean():.3f}")
show(figure)

# %% [markdown]
# ## A walk through the space of embeddings
#
# Between two tasks' embeddings, $z = (1 - s)\, z_1 + s\, z_2$, lie networks that were never trained. The weights move
# along a line, for the generator is linear; what the networks compute does not.

# %%
table = hyper.embeddings(variables)
order = np.argsort(settings[:, 1])
low, high = order[5], order[-5]
shares = np.linspace(0, 1, 7)
walk = jnp.stack([(1 - s) * table[low] + s * table[high] for s in shares])
grid = jnp.linspace(-5, 5, 200)[:, None]
kernels = [hyper.generate(variables, z=z)["layers_2"]["kernel"] for z in walk]

figure, (left, right) = subplots(1, 2, (9.5, 3.2), width_ratios=(1.4, 1))
for s, z in zip(shares, walk, strict=True):
    left.plot(grid, hyper.apply(variables, grid, z=z), color=shade(s), lw=1.6)
for task, name in ((low, "first task"), (high, "second task")):
    left.plot(grid, sine(settings[task], np.asarray(grid)), color=COLORS[1], lw=1, ls=":", label=f"{name}, true")
left.set(xlabel="x", ylabel="y", title="The sine turns over along the way (dark to light)")
left.legend(fontsize=7, frameon=False)
difference = np.asarray(kernels[-1] - kernels[0])
bound = np.abs(difference).max()
image = right.imshow(difference, cmap="PuOr", vmin=-bound, vmax=bound)
right.set(
    xlabel="unit of the second layer",
    ylabel="unit of the first",
    title="What that changes in one kernel: some rows most",
)
right.spines[:].set_visible(False)
figure.colorbar(image, ax=right, shrink=0.8, label="change of the weight")
show(figure)

# %% [markdown]
# What the table has learned: amplitudes and phases, which nobody told it, lie in order. The two directions below are those
# in which the embeddings vary most.

# %%
centred = np.asarray(table - table.mean(0))
_, spread, directions = np.linalg.svd(centred, full_matrices=False)
flat = centred @ directions[:2].T
figure, axes = subplots(1, 2, (8.5, 3.2))
for each, column, name in zip(axes, (0, 1), ("amplitude", "phase"), strict=True):
    points = each.scatter(*flat.T, c=settings[:, column], cmap="cividis", s=24)
    each.set(xlabel="first direction", ylabel="second direction", title=f"Embeddings, by {name}")
    figure.colorbar(points, ax=each, label=name)
show(figure)
print(f"shares of the variance: {np.round(spread**2 / (spread**2).sum(), 3)}")

# %% [markdown]
# ## A set of weights for every sample
#
# `z` may have a batch axis: each sample of `x` then goes through a network of its own, computed together. Below, 2,000
# samples, each with its own embedding and so its own sine. (`x` has one sample for each `z`.)

# %%
ids = np.random.default_rng(1).integers(0, TASKS, 2000)
x = np.random.default_rng(2).uniform(-5, 5, (2000, 1)).astype(np.float32)
apart = jax.jit(lambda z, x: hyper.apply(variables, x, z=z))(table[ids], x)
wanted = sine(settings[ids], x[:, None])[:, 0]
figure, axes = subplots(size=(4.4, 3.4))
axes.plot(wanted, apart, ".", ms=2, color=COLORS[0])
axes.plot([-3, 3], [-3, 3], color="0.6", lw=1, ls=":")
axes.set(xlabel="the task's own sine", ylabel="answer", title="2,000 samples, each by its own network")
show(figure)

# %% [markdown]
# ## A new task: four numbers to find
#
# For a sine that was not among the hundred, all weights $\varphi$ stay as they are, and only $z$ is fitted to a few
# points, by gradient descent from the mean of the table:
#
# $$z^* = \arg\min_z \sum_i \ell\big(f(x_i;\, g(z)),\, y_i\big).$$

# %%
setting = np.array([2.2, 1.3], np.float32)
shots = np.random.default_rng(3).uniform(-5, 5, (5, 1)).astype(np.float32)
found = hypernet.adapt(
    hyper, variables, shots, sine(setting, shots), lambda y, t: jnp.square(y - t), start="mean", steps=200
)
figure, (left, right) = subplots(1, 2, (9, 3))
for number, color, label in ((0, COLORS[4], "mean of the table"), (-1, COLORS[0], "adapted")):
    left.plot(grid, hyper.apply(variables, grid, z=found.trajectory[number]), lw=1.8, color=color, label=label)
left.plot(grid, sine(setting, np.asarray(grid)), color="0.5", lw=1, ls=":", label="true")
left.plot(shots, sine(setting, shots), "o", color=COLORS[1], label="five points")
left.set(xlabel="x", ylabel="y", title="A new sine from five points")
left.legend(fontsize=7, frameon=False)
right.semilogy(found.losses, color=COLORS[0])
weights = training.count(hyper.generate(variables, task_id=0))
right.set(xlabel="step", ylabel="error on the points", title=f"{E} numbers to find instead of {weights:,}")
show(figure)

# %% [markdown]
# Against fitting all weights of the target from their best start, the embedding needs fewer points: it can only become
# one of the family's networks. `experiments/fewshot_adaptation.py` measures it on new tasks.
#
# ## Exercises
#
# 1. Fit the new sine with 2 and with 20 points. What happens outside of the points' range?
# 2. Choose `setting = np.array([6.0, 1.3])`, an amplitude beyond all that were trained. How far does $z$ get?
# 3. Leave the noise out, and the factor 0.1. What becomes of the walk, and of the order among the embeddings?
# 4. `hypernet.WeightCache(hyper, max_bytes=1_000_000)` keeps the weights that were made: time `cache.get(variables,
#    task_id=3)` the first and the second time.
