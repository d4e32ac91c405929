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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hyperjax/hyperjax/blob/main/colab/layer_sharing.ipynb)
#
# # Which layers could use the same weights?
#
# A Transformer whose layers share weights has fewer parameters; it computes as much as before. Whether two layers tell the
# same story can be measured by how alike their features $X$ and $Y$ are on the same tokens, centred,
#
# $$\mathrm{CKA}(X, Y) = \frac{\lVert X^\top Y \rVert_F^2}{\lVert X^\top X \rVert_F\, \lVert Y^\top Y \rVert_F}$$
#
# (Kornblith et al., 2019): 1 for features that differ by a rotation and a factor, near 0 for unrelated ones. From that, a
# search finds the groups; `convert` makes the smaller network out of the trained one; and what it costs is measured in bits
# per character.

# %%
import importlib.util
import os
import shutil

if importlib.util.find_spec("google.colab"):  # nothing to do elsewhere
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if os.path.exists("/dev/accel0") else ""
    # %pip install -q "hyperjax{extra} @ git+https://github.com/hyperjax/hyperjax"

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax import data, plotting, sharing, training, transformer
from hyperjax.plotting import COLORS, GREY, show, subplots

print(training.device())

# %% [markdown]
# ## Train one in which nothing is shared

# %%
corpus = data.load_corpus("pydoc")
streams = data.Streams(corpus.train, 16, 48)
LAYERS = 6


def decoder(layers):
    return transformer.Decoder(transformer.Config(len(corpus.symbols), layers=layers, width=48, heads=4, ffn=128))


def train(net, params, steps, first=0):
    """Returns trained parameters; step n reads window `first + n`. Steps take the memory of their state: it gets a copy."""

    def loss_fn(params, carry, batch, key):
        logits = net.apply({"params": params}, batch["inputs"])["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean(), (carry, {})

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(training.schedule(5e-3, steps, 0.5)))
    state, step = (
        training.TrainState.create(jax.tree.map(jnp.copy, params), optimizer),
        training.make_step(loss_fn, optimizer),
    )
    for number in range(steps):
        state, _ = step(state, streams.window(first + number), jax.random.key(0))
    return state.params


held_out = jnp.asarray(corpus.valid[: 128 * 48 + 1])
tokens, following = held_out[:-1].reshape(128, 48), held_out[1:].reshape(128, 48)


def bits(net, params):
    """Bits per character of the validation text."""
    logits = jax.jit(lambda params: net.apply({"params": params}, tokens)["logits"])(params)
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, following).mean() / np.log(2))


plain = decoder(LAYERS)
start = jax.jit(plain.init)(jax.random.key(0), tokens[:1])["params"]
trained = train(plain, start, 220)
print(f"{training.count(trained):,} parameters, {bits(plain, trained):.2f} bits per character")

# %% [markdown]
# ## How alike the layers are
#
# `layer_features` is what each layer leaves in the stream. Neighbours are alike from the start, for a layer only adds to
# what it reads; how alike distant ones are, training decides.

# %%
features = jax.jit(lambda params: sharing.layer_features(plain.apply({"params": params}, tokens[:64])))
matrices = {name: np.asarray(sharing.cka_matrix(features(p))) for name, p in (("Before", start), ("After", trained))}
figure, panels = subplots(1, 2, (8.4, 4))
lowest = float(np.floor(10 * min(matrix.min() for matrix in matrices.values())) / 10)
for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
    image = axes.imshow(matrix, vmin=lowest, vmax=1, cmap="cividis")
    for (i, j), value in np.ndenumerate(matrix):
        ink = "black" if value > (lowest + 1) / 2 else "white"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(LAYERS), range(1, LAYERS + 1))
    axes.set_yticks(range(LAYERS), range(1, LAYERS + 1))
    axes.set(xlabel="layer", ylabel="layer", title=f"{name} training: least {matrix.min():.2f}")
figure.colorbar(image, ax=panels, label="CKA")
show(figure)

# %% [markdown]
# ## The groups that the search finds
#
# Of neighbouring layers the best groups are found exactly, by dynamic programming: `contiguous` takes the cost of every
# possible group, here `medoid(1 - CKA)`. Beside it maps that need no search.

# %%
alike = matrices["After"]
maps = {
    "searched": sharing.contiguous(sharing.medoid(1 - alike), layers=LAYERS, groups=3),
    "pairs": sharing.groups(LAYERS, 3),
    "in a cycle": sharing.cycle(LAYERS, 2),
}
figure, panels = subplots(1, 3, (9, 3.2))
for axes, (name, layer_map) in zip(panels, maps.items(), strict=True):
    plotting.plot_groups(axes, alike, layer_map)
    axes.set_title(f"{name}: sets {' '.join(str(n + 1) for n in layer_map)}")
figure.colorbar(panels[0].images[0], ax=panels, label="CKA; squares share", shrink=0.8)
show(figure)

# %% [markdown]
# ## The price
#
# Each map converts the trained network: a set starts from one of its layers, and is trained on for 100 steps. So is the
# network as it is. Beside them stands one with only three layers, which is what half of the parameters could be spent on
# instead: trained from scratch, for as many steps in all.

# %%
unshared = train(plain, trained, 100, first=220)
results = {"unshared": (training.count(unshared), bits(plain, unshared), None)}
converted = {}
for name, layer_map in maps.items():
    net, params = sharing.convert(plain, trained, sharing.Maps.same(layer_map), tokens[:1])
    before = bits(net, params)
    params = train(net, params, 100, first=220)
    converted[name] = net, params
    results[name] = (training.count(params), bits(net, params), before)
shallow = decoder(3)
params = train(shallow, jax.jit(shallow.init)(jax.random.key(0), tokens[:1])["params"], 320)
results["3 layers"] = (training.count(params), bits(shallow, params), None)

# %%
figure, (left, right) = subplots(1, 2, (9, 3))
names = list(results)
colors = [GREY, *COLORS[:3], COLORS[4]]
for number, (size, after, before) in enumerate(results.values()):
    left.bar(number, size / 1e3, color=colors[number], width=0.6)
    right.plot(number, after, "o", color=colors[number], ms=8)
    if before is not None:
        right.annotate(
            "", (number, after + 0.03), (number, before), arrowprops={"arrowstyle": "->", "color": colors[number]}
        )
        right.plot(number, before, "_", color=colors[number], ms=12)
for axes in (left, right):
    axes.set_xticks(range(len(names)), names, rotation=20)
    plotting.plain(axes)
left.set(
    ylabel="parameters (thousands)", title=f"With sharing {results['pairs'][0] / results['unshared'][0]:.0%} are stored"
)
right.set(ylabel="bits per character", title="Just converted (line), and 100 steps later (dot)")
show(figure)

# %% [markdown]
# ## How alike are layers that share?
#
# Sharing weights is not sharing features: the same function is applied to what it made before, and moves on.

# %%
net, params = converted["in a cycle"]
inside = np.asarray(sharing.cka_matrix(sharing.layer_features(net.apply({"params": params}, tokens[:64]))))
figure, axes = subplots(size=(5, 3.7))
plotting.plot_groups(axes, inside, maps["in a cycle"])
same = np.mean([inside[i, i + 3] for i in range(3)])
axes.set_title(f"Layers of one set: CKA {same:.2f} on average")
figure.colorbar(axes.images[0], ax=axes, label="CKA", shrink=0.9)
show(figure)

# %% [markdown]
# One run and little training: small differences are noise here. Two things are not: conversion alone costs bits, which
# training wins back; and **a shorter network is a strong competitor**, with half of the parameters and half of the operations. On Penn
# Treebank, with three seeds and 1,500 steps after conversion, half of the layers' weights cost 2 % of the bits.
# `experiments/share_layers.py` measures all of it, also with searches by the loss itself instead of CKA.
#
# ## Exercises
#
# 1. Search for two groups, and for four. Where does the price rise?
# 2. Instead of CKA, search by the distance of weights: `sharing.medoid(sharing.weight_distances(
#    sharing.layers_of(trained, "ffn")))`. Are the groups the same?
# 3. Share attention but not the feed-forward networks: `sharing.Maps(attention=..., ffn=...)`.
# 4. Leave out the conversion, and train a shared network from scratch for 320 steps. Does the map still matter?
