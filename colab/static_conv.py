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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hyperjax/hyperjax/blob/main/colab/static_conv.ipynb)
#
# # Kernels that a hypernetwork draws
#
# Most weights of a convolutional network are in its kernels, and the kernels are alike. A static hypernetwork (Ha, Dai,
# Le, 2016, section 3.1) keeps an embedding $e$ of a few numbers for each kernel, and two small matrices that they all
# share draw the kernel from it, one input channel $i$ after the other:
#
# $$a_i = W_i\, e + B_i, \qquad K_i = \langle W_{out},\, a_i \rangle + B_{out}.$$
#
# Nothing depends on the input: once trained, the kernels are made once and the network is an ordinary one. What is saved
# are weights to train, to store and to send.

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

import hyperjax as hj
from hyperjax import data, plotting, training
from hyperjax.hypernet.image_models import ConvNet
from hyperjax.plotting import COLORS, GREY, show, subplots

print(training.device())

# %% [markdown]
# ## The network, and what draws its second kernel
#
# Scanned digits of 8 x 8 pixels, two convolutions of 5 x 5 and 16 channels. The kernel of the second has
# $5 \cdot 5 \cdot 16 \cdot 16 = 6{,}400$ weights. `ConvTiles` cuts it into 16 tiles of 4 x 4 channels, each with an
# embedding of its own; a rule names the parameter that it makes, all others are `Learned` as they are.

# %%
images = data.load_images("digits")
example = jnp.zeros((1, *images.train.images.shape[1:]))
net = ConvNet(classes=10, features=16, kernel=5)


def drawn_by(tiles):
    """The network whose second kernel a generator makes."""
    return hj.HyperNetwork.from_target(
        net,
        example,
        embedding_dim=tiles.embedding,
        num_embeddings=0,
        generator=hj.Learned(),
        rules=[("conv2/kernel", tiles)],
    )


small = hj.ConvTiles(tile=4, embedding=4, hidden=4)
variables = drawn_by(small).init(jax.random.key(0), example)
whole = training.count(jax.eval_shape(net.init, jax.random.key(0), example))
trained = training.count(variables["params"])
print(
    f"{whole:,} weights in the network; {trained:,} to train when 6,400 of them are drawn from {trained - whole + 6400}"
)

# %% [markdown]
# ## Training
#
# The hypernetwork is trained through the kernels that it draws, by the gradient of the network's loss.


# %%
def prepare(pixels):
    return (jnp.asarray(pixels, jnp.float32) / images.peak - 0.3) / 0.4


def trainer(model, steps=300):
    """Returns a function of a seed, which trains: (parameters, test error in percent)."""

    def loss_fn(params, carry, batch, key):
        logits = model.apply({"params": params}, prepare(batch["images"]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean(), (carry, {})

    optimizer = optax.adam(training.schedule(5e-3, steps, 0.7))
    step = training.make_step(loss_fn, optimizer)
    answer = jax.jit(lambda params, pixels: model.apply({"params": params}, prepare(pixels)).argmax(-1))

    def run(seed):
        batches = data.Batches(images.train.images, images.train.labels, 64, seed)
        state = training.TrainState.create(model.init(jax.random.key(seed), example)["params"], optimizer)
        for number in range(steps):
            state, _ = step(state, batches.batch_at(number), jax.random.key(seed))
        return state.params, 100 * float(np.mean(answer(state.params, images.test.images) != images.test.labels))

    return run


hyper = drawn_by(small)
learned, error = trainer(net)(0)
drawn, drawn_error = trainer(hyper)(0)
kernels = {
    f"Learned: {error:.1f} % wrong": learned["conv2"]["kernel"],
    f"Drawn from {trained - whole + 6400} weights: {drawn_error:.1f} % wrong": hyper.generate({"params": drawn})[
        "conv2"
    ]["kernel"],
}

# %%
figure, panels = subplots(1, 2, (10, 5))
for axes, (title, kernel) in zip(panels, kernels.items(), strict=True):
    plotting.plot_kernel(axes, kernel)
    axes.set_title(title)
    figure.colorbar(axes.images[0], ax=axes, shrink=0.7, label="weight", extend="both")
show(figure)

# %% [markdown]
# ## How a drawn kernel differs
#
# Each slice $K_i$ of a tile is a fixed kernel plus a mixture of `hidden` others, so all 64 slices together vary in no
# more than 4 directions. Those of the learned kernel vary in all of theirs, though not equally in each.

# %%
figure, axes = subplots(size=(6, 2.8))
for (title, kernel), color in zip(kernels.items(), (GREY, COLORS[0]), strict=True):
    tiles = np.asarray(kernel).reshape(5, 5, 4, 4, 4, 4).transpose(2, 4, 3, 0, 1, 5)  # row, column, i; h, w, out
    slices = tiles.reshape(64, 100)
    spread = np.linalg.svd(slices - slices.mean(0), compute_uv=False) ** 2
    axes.plot(np.arange(1, 65), 100 * np.cumsum(spread) / spread.sum(), color=color, lw=2, label=title.split(":")[0])
axes.set(xlabel="directions", ylabel="% of the slices' variance", xscale="log", ylim=(0, 103))
axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
axes.legend(frameon=False)
axes.set_title("Four directions hold all of the drawn kernel")
show(plotting.plain(axes).figure)

# %% [markdown]
# ## A walk between two tiles
#
# Between the embeddings of two tiles lie kernels that are in no network. All 16 tiles along a straight line from the first
# tile's embedding to the last one's:

# %%
table = drawn["generators_1"]["theta.conv2.kernel.tiles"]
shares = np.linspace(0, 1, 16, dtype=np.float32)[:, None]
walk = {**drawn["generators_1"], "theta.conv2.kernel.tiles": (1 - shares) * table[0] + shares * table[-1]}
kernel = hyper.generate({"params": {**drawn, "generators_1": walk}})["conv2"]["kernel"]
tiles = np.asarray(kernel).reshape(5, 5, 4, 4, 4, 4).transpose(0, 1, 3, 5, 2, 4).reshape(5, 5, 4, 4, 16)
figure, axes = subplots(size=(9, 2.9))
plotting.plot_kernel(axes, tiles[:, :, 0])
axes.set(xlabel="embedding, as % of the way from the first tile's to the last one's", ylabel="output channel")
axes.set_xticklabels([f"{100 * share:.0f}" for share in shares[:, 0]])
axes.set_title("Kernels change along the way without a jump (input channel 1)")
figure.colorbar(axes.images[0], ax=axes, label="weight", extend="both", shrink=0.8)
show(figure)

# %% [markdown]
# ## Compression against error
#
# More hidden units, more directions, more weights. Beside them the plain way to have few weights: fewer channels.

# %%
SEEDS = 2
found = {"drawn kernel": [], "fewer channels": []}
for embedding, hidden in ((2, 1), (4, 4), (8, 16)):
    run = trainer(drawn_by(hj.ConvTiles(tile=4, embedding=embedding, hidden=hidden)))
    results = [run(seed) for seed in range(SEEDS)]
    found["drawn kernel"].append((training.count(results[0][0]), [wrong for _, wrong in results]))
for features in (4, 6, 8, 16):
    run = trainer(ConvNet(classes=10, features=features, kernel=5))
    results = [run(seed) for seed in range(SEEDS)]
    found["fewer channels"].append((training.count(results[0][0]), [wrong for _, wrong in results]))

# %%
figure, axes = subplots(size=(6.5, 3.2))
for (name, points), color, marker in zip(found.items(), (COLORS[0], COLORS[1]), "os", strict=True):
    sizes = [size for size, _ in points]
    axes.plot(sizes, [np.mean(errors) for _, errors in points], color=color, marker=marker, label=name)
    for size, errors in points:
        axes.plot([size] * len(errors), errors, "_", color=color, ms=9)
ticks = [600, 1200, 2400, 4800, 7482]
axes.set(xlabel="weights that are trained", ylabel="test error (%)", xscale="log", ylim=(0, None))
axes.minorticks_off()
axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
axes.legend(frameon=False)
axes.set_title("With few weights the error rises, whichever way they are saved")
show(plotting.plain(axes).figure)

# %% [markdown]
# On images this small, a narrow network is as good as a wide one whose kernel is drawn. Drawing pays where the width is
# wanted and the weights are not: the wide network's activations stay, and so does what they cost in time. In the paper, a
# Wide ResNet 40-2 of 2.2 million weights becomes one of 148 thousand, for 1.6 points of error on CIFAR-10.
#
# `python experiments/hypernet_images.py` trains the same networks with checkpoints, on MNIST and CIFAR-10, too.
#
# ## Exercises
#
# 1. Draw both kernels: `("conv./kernel", tiles)` as the rule. What is cropped of the tiles of the first, which has one input
#    channel?
# 2. Give `hj.ConvTiles` `tile=8`: fewer embeddings, larger tiles. How many weights, and what error?
# 3. Leave out the decay of the learning rate (`0.7`). Which suffers more, the learned or the drawn kernel?
