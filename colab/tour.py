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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hyperjax/hyperjax/blob/main/colab/tour.ipynb)
#
# # A tour of hyperjax
#
# A layer usually *has* weights: $y = f(x;\, \theta)$, and training changes $\theta$. In this library something else
# *makes* them,
#
# $$y = f(x;\, \theta), \qquad \theta = g(z;\, \varphi),$$
#
# and training changes $\varphi$, and perhaps $z$. What $g$ is gives the library its five wings:
#
# | wing | what makes the weights | what it is good for |
# |---|---|---|
# | `hypernet` | a network that reads an embedding $z$ of the task | many tasks from one set of weights, new ones from four numbers |
# | `recurrent` | a small LSTM that rescales the large one's weights at every step | text |
# | `routing` | gates that open and close connections | what several tasks should share |
# | `pruning` | gates that read the input | Transformers that compute only what is needed |
# | `sharing` | one set of weights, used in several places | smaller networks |
#
# One cell for each, a few seconds of training in most. Everything is a pure function of parameters, inputs and PRNG
# keys, compiled by XLA for whatever device there is.

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
from hyperjax import data, plotting, pruning, routing, sharing, training, transformer
from hyperjax.plotting import COLORS, shade, show, subplots
from hyperjax.recurrent.dynamics import scale_changes

print(training.device())


# %% [markdown]
# All networks below are trained by the same few lines. `make_step` compiles one step of any loss
# `(params, carry, batch, key) -> (loss, (carry, metrics))`; the step folds its own number into the key.


# %%
def train(loss_fn, params, batch_at, steps, rate=3e-3, gate_rate=3e-2):
    """Returns trained parameters, and the loss of every step; gates learn at a rate of their own."""
    kinds = {"gates": optax.adam(gate_rate), "rest": optax.adam(training.schedule(rate, steps, 0.5))}
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "gates" if path[-1].key in ("log_alpha", "logits") else "rest", params
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(kinds, labels))
    step = training.make_step(loss_fn, optimizer)
    state, losses = training.TrainState.create(jax.tree.map(jnp.copy, params), optimizer), []
    for number in range(steps):
        state, metrics = step(state, batch_at(number), jax.random.key(0))
        losses.append(metrics["loss"])
    return state.params, np.array(losses)


# %% [markdown]
# ## 1. Hypernetworks: an embedding makes a network
#
# Fifty tasks, each a sine of its own amplitude and phase. One generator makes the weights of a small network from a
# task's embedding $z$ of two numbers, $\theta = W z + b$. Nothing is trained but $W$, $b$ and the embeddings, which
# start near 0 and get a little noise, so that similar tasks find themselves side by side. Between the embeddings of two
# tasks lie networks that nobody trained.

# %%
rng = np.random.default_rng(0)
amplitude, phase = rng.uniform(0.5, 2.0, 50).astype(np.float32), rng.uniform(0, np.pi, 50).astype(np.float32)
net = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(32), nn.tanh, nn.Dense(1)])
hyper = hj.HyperNetwork.from_target(net, jnp.zeros((1, 1)), embedding_dim=2, num_embeddings=50)


def sines(number):
    x = np.random.default_rng(number).uniform(-3, 3, (50, 16, 1)).astype(np.float32)
    return {"x": x, "y": amplitude[:, None, None] * np.sin(x + phase[:, None, None])}


def sine_loss(params, carry, batch, key):
    z = hyper.embeddings({"params": params})
    z += 0.05 * jax.random.normal(key, z.shape)
    answer = jax.vmap(lambda z, x: hyper.apply({"params": params}, x, z=z))(z, batch["x"])
    return jnp.mean(jnp.square(answer - batch["y"])), (carry, {})


start = hyper.init(jax.random.key(0), jnp.zeros((1, 1)), task_id=0)["params"]
start = {**start, "embedding": 0.1 * start["embedding"]}
trained, losses = train(sine_loss, start, sines, steps=1200, rate=5e-3)
made = training.count(hyper.generate({"params": trained}, task_id=0))
print(f"{made:,} weights made from 2 numbers; mean squared error {losses[:10].mean():.3f} -> {losses[-10:].mean():.3f}")

# %%
z = hyper.embeddings({"params": trained})
first, last = int(np.argmin(phase)), int(np.argmax(phase))
x = jnp.linspace(-3, 3, 200)[:, None]
figure, (left, right) = subplots(1, 2, (9, 3.2))
left.scatter(*np.asarray(z).T, c=phase, cmap="cividis", s=30)
left.plot(*np.asarray(z)[[first, last]].T, color=COLORS[1], lw=1)
left.set(xlabel="$z_1$", ylabel="$z_2$", title="Embeddings, by the phase of their task")
for share in np.linspace(0, 1, 6):
    y = hyper.apply({"params": trained}, x, z=(1 - share) * z[first] + share * z[last])
    right.plot(x, y, color=shade(share), lw=1.6, label=f"{share:.1f}")
right.set(xlabel="x", ylabel="answer", title="Networks along the line: the sine moves over")
right.legend(
    title="share of\nthe way", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False
)
show(figure)

# %% [markdown]
# ## 2. HyperLSTM: a small network rewrites a large one at every character
#
# A small LSTM reads along and generates, at each step and for each gate $y$, a vector $d_y$ that scales the rows of the
# large one's recurrent weights (Ha, Dai, Le, 2016, eq. 12):
#
# $$\hat y_t = d_y(\hat h_t) \odot (W_{hy} h_{t-1}) + \dots$$
#
# After a few hundred steps on this Python's own help texts it already matters *where* in a word the network is.

# %%
corpus = data.load_corpus("pydoc")
model = hj.LanguageModel("ln_hyper_lstm", len(corpus.symbols), units=96, hyper_units=24, embedding=4)
streams = data.Streams(corpus.train, 32, 48)


def text_loss(params, carry, batch, key):
    logits = model.apply({"params": params}, batch["inputs"])["logits"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean(), (carry, {})


start = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
reader, losses = train(text_loss, start, streams.window, steps=200, rate=1e-2)
print(f"{losses[:5].mean() / np.log(2):.2f} -> {losses[-5:].mean() / np.log(2):.2f} bits per character")

# %%
text = " ".join(corpus.decode(corpus.valid[300:900]).split())[:400]
changes = scale_changes(model, reader, corpus.encode(text))["layer_0"]
width, height = plotting.text_size(text, 100)
figure, axes = subplots(size=(width + 1, height + 0.5))
plotting.plot_text(axes, text, changes["f"], columns=100)
axes.set_title("How far each character moved the generated scales of the forget gate")
figure.colorbar(axes.images[0], ax=axes, label="change of $d_f$", aspect=8)
show(figure)

# %% [markdown]
# ## 3. Sub-network routing: gates that learn what tasks share
#
# Two tasks: the tanh of the sum of six inputs, and of the product of two others; they have nothing in common. Every connection
# $W_{ij}$ between small networks of one level and the next has a gate
# $z_{ij} \in [0, 1]$ that is exactly 0 or 1 with a probability that is learned (hard concrete; Ma et al., 2019):
#
# $$v_i = \sum_j z_{ij}\, W_{ij}\, u_j.$$
#
# What open gates cost is added to the loss, and their locations are trained faster than the weights, so connections
# that no task needs close, and `compact` cuts them out.

# %%
tasks = {"product": routing.Regression(), "sum": routing.Regression()}
router = routing.SNR(levels=((8,) * 4, (8,) * 4), tasks=tasks, towers=(8,))


def rows(number):
    x = np.random.default_rng(number).normal(size=(256, 12)).astype(np.float32)
    return {"x": x, "sum": np.tanh(x[:, :6].sum(-1)), "product": np.tanh(x[:, 6] * x[:, 7])}


def routed_loss(params, carry, batch, key):
    outputs, info = router.apply({"params": params}, batch["x"], key)
    return sum(routing.task_losses(tasks, outputs, batch).values()) + 1e-2 * info["l0"], (carry, {})


start = router.init(jax.random.key(0), jnp.zeros((1, 12)))["params"]
routed, losses = train(routed_loss, start, rows, steps=1500, rate=5e-3, gate_rate=3e-2)
small = routing.compact(router, {"params": routed})
print(f"loss {losses[:10].mean():.2f} -> {losses[-10:].mean():.2f}")

# %%
figure, axes = subplots(size=(7, 4))
plotting.plot_routing(axes, router, {"params": routed})
before, after = small.params
axes.set_title(f"What is left: {after:,} of {before:,} parameters")
show(figure)

# %% [markdown]
# ## 4. Pruning: a Transformer within a budget
#
# The same gates on the heads and feed-forward blocks of a Transformer, led by a Lagrangian to a share of the operations,
#
# $$\mathcal L + \lambda_1 (s - s^*) + \lambda_2 (s - s^*)^2,$$
#
# of the share $s$ and its target $s^*$ (here with fixed multipliers; `pruning.ascend` lets them climb). What is closed in
# the end is cut out: a plain, smaller Transformer, that really is faster.

# %%
config = transformer.Config(len(corpus.symbols), layers=3, width=48, heads=4, ffn=96)
gated = pruning.Gated(config, prune=("heads", "blocks"), choice=pruning.HardConcrete(start=0.9), blocks=8)
multipliers = pruning.Multipliers(jnp.float32(0.0), jnp.float32(30.0))


def pruned_loss(params, carry, batch, key):
    out = gated.apply({"params": params}, batch["inputs"], key)
    loss = optax.softmax_cross_entropy_with_integer_labels(out["logits"], batch["targets"]).mean()
    return loss + pruning.lagrangian(out["share"], 0.6, multipliers), (carry, {"share": out["share"]})


start = gated.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
cut, losses = train(pruned_loss, start, streams.window, steps=300, rate=5e-3, gate_rate=5e-2)
gates = gated.apply({"params": cut}, jnp.zeros((1, 8), jnp.int32))["gates"]
compacted = pruning.compact(gated, {"params": cut})

# %%
figure, axes = subplots(1, 2, (9, 2.6))
for each, name, values in zip(axes, ("heads", "blocks"), (gates.heads, gates.blocks), strict=True):
    values = np.asarray(values)
    image = each.imshow(np.where(values > 0, values, np.nan), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    each.set_facecolor("0.92")
    number = values.shape[1]
    each.set(xlabel=name.removesuffix("s"), ylabel="layer", xticks=range(number), yticks=range(config.layers))
    each.set_xticklabels(range(1, number + 1))
    each.set_yticklabels(range(1, config.layers + 1))
    each.set_title(f"{(values > 0).sum()} of {values.size} {name} stay, grey ones are cut out", fontsize=10)
    each.spines[:].set_visible(False)
figure.colorbar(image, ax=axes, label="gate")
show(figure)
print(hj.summarize(compacted.model, jnp.zeros((1, 48), jnp.int32)))

# %% [markdown]
# ## 5. Sharing: which layers could use the same weights?
#
# Features of two layers that tell the same story have a high CKA,
#
# $$\mathrm{CKA}(X, Y) = \frac{\lVert X^\top Y \rVert_F^2}{\lVert X^\top X \rVert_F\, \lVert Y^\top Y \rVert_F},$$
#
# and may share. The best groups of neighbours are found exactly; `convert` makes the smaller network out of the
# trained one.

# %%
plain = transformer.Decoder(transformer.Config(len(corpus.symbols), layers=6, width=48, heads=4, ffn=96))


def plain_loss(params, carry, batch, key):
    logits = plain.apply({"params": params}, batch["inputs"])["logits"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean(), (carry, {})


start = plain.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
whole, losses = train(plain_loss, start, streams.window, steps=150, rate=3e-3)
tokens = streams.window(10_000)["inputs"]
alike = sharing.cka_matrix(sharing.layer_features(plain.apply({"params": whole}, tokens)))
layer_map = sharing.contiguous(sharing.medoid(1 - alike), layers=6, groups=3)
net, params = sharing.convert(plain, whole, sharing.Maps.same(layer_map), tokens)

# %%
figure, axes = subplots(size=(3.8, 3.4))
plotting.plot_groups(axes, alike, layer_map)
axes.set_title(
    f"3 sets for 6 layers: {training.count(params) / training.count(whole):.0%} of the parameters", fontsize=10
)
figure.colorbar(axes.images[0], ax=axes, shrink=0.8, label="CKA of the layers' features")
show(figure)

# %% [markdown]
# ## Exercises
#
# 1. In the first wing, give `from_target` `generator=hj.MLP(hidden=(8,))` or `hj.LowRank()`. How many parameters does
#    the hypernetwork have (`training.count(trained)`), and does it still fit all fifty sines?
# 2. In the third, raise the `1e-2` that open gates cost, until a task is lost. Which goes first?
# 3. In the fourth, ask for 40 % instead of 60 %. Do heads go first, or blocks?
# 4. Train the shared network of the fifth on for 150 steps, with a loss that calls `net` where `plain_loss` calls `plain`,
#    and compare it with `whole`.
#
# Each wing has a notebook of its own beside this one.
