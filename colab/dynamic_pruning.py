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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hyperjax/hyperjax/blob/main/colab/dynamic_pruning.ipynb)
#
# # A Transformer that computes what it needs
#
# Heads and blocks of the feed-forward networks get gates $g \in \{0, 1\}$,
#
# $$x \leftarrow x + \sum_h g_h\, \mathrm{head}_h(x), \qquad x \leftarrow x + \sum_b g_b\, \mathrm{ffn}_b(x),$$
#
# which depend on nothing, on the sequence, or on each token. The share $s$ of the operations that open gates leave is led
# to a budget $s^*$ by a Lagrangian that is added to the loss,
#
# $$\mathcal L + \lambda_1 (s - s^*) + \lambda_2 (s - s^*)^2.$$
#
# Multiplying by a gate saves nothing. So first: what do gates choose, if they may look at the input? Then: cut out what
# is closed, from 100 % of the operations to 25 %, and measure.

# %%
import importlib.util
import os
import shutil

if importlib.util.find_spec("google.colab"):  # nothing to do elsewhere
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if os.path.exists("/dev/accel0") else ""
    # %pip install -q "hyperjax{extra} @ git+https://github.com/hyperjax/hyperjax"

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax import data, plotting, pruning, timing, training, transformer
from hyperjax.plotting import COLORS, show, subplots

print(training.device())

# %% [markdown]
# ## Text, and a small decoder
#
# The help texts of this Python, in windows of 64 characters. Gates learn at a rate of their own; the target is part of
# the batch, so that it may change while the compiled step stays the same.

# %%
corpus = data.load_corpus("pydoc")
streams = data.Streams(corpus.train, 16, 64)
config = transformer.Config(len(corpus.symbols), layers=3, width=64, heads=4, ffn=256)
multipliers = pruning.Multipliers(jnp.float32(0.0), jnp.float32(30.0))


def train(model, targets):
    """Trains with a target for each step; yields (target, parameters) whenever it is about to change, and at the end."""

    def loss_fn(params, carry, batch, key):
        out = model.apply({"params": params}, batch["inputs"], key)
        loss = optax.softmax_cross_entropy_with_integer_labels(out["logits"], batch["targets"]).mean()
        share = jnp.mean(out["share"])
        return loss + pruning.lagrangian(share, batch["share"], multipliers), (carry, {})

    def kind(path, _):
        return "gates" if "routers" in path[0].key else "weights"

    params = model.init(jax.random.key(0), jnp.zeros((1, 64), jnp.int32))["params"]
    rates = {"gates": optax.adam(2e-2), "weights": optax.adam(training.schedule(4e-3, len(targets), 0.5))}
    labels = jax.tree_util.tree_map_with_path(kind, params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(rates, labels))
    state, step = training.TrainState.create(params, optimizer), training.make_step(loss_fn, optimizer)
    for number, target in enumerate(targets):
        batch = {**streams.window(number), "share": np.float32(target)}
        state, _ = step(state, batch, jax.random.key(1))
        if number + 1 == len(targets) or targets[number + 1] != target:
            yield target, jax.tree.map(jnp.copy, state.params)


# %% [markdown]
# ## Which heads open for which input
#
# Gates for each token, made by a small router from the token's state, at half of the operations.

# %%
chooser = pruning.Gated(config, per="token", choice=pruning.GumbelSigmoid(start=0.8), blocks=4)
((_, params),) = train(chooser, [0.5] * 300)
apply = jax.jit(lambda params, tokens: chooser.apply({"params": params}, tokens))
tokens = jnp.asarray(corpus.valid[: 64 * 64]).reshape(64, 64)
gates = apply(params, tokens)["gates"]

# %%
text = corpus.decode(np.asarray(tokens).ravel())
kinds = {
    "small letter": str.islower,
    "capital": str.isupper,
    "digit": str.isdigit,
    "space": lambda c: c == " ",
    "line end": lambda c: c == "\n",
    "other": lambda c: not (c.isalnum() or c.isspace()),
}
where = {kind: np.array([test(character) for character in text]) for kind, test in kinds.items()}
figure, panels = subplots(1, 2, (10, 2.6))
for axes, values, name in zip(panels, (gates.heads, gates.blocks), ("head", "block"), strict=True):
    layers, _, _, units = values.shape
    flat = np.asarray(values).transpose(1, 2, 0, 3).reshape(len(text), layers * units)
    openness = np.array([flat[chosen].mean(0) for chosen in where.values()])
    low, high = openness.mean(1).min(), openness.mean(1).max()
    plotting.plot_utilisation(axes, openness, list(where), [f"{n % units + 1}" for n in range(layers * units)])
    for layer in range(1, layers):
        axes.axvline(layer * units - 0.5, color="white", lw=2)
    axes.set(
        xlabel=f"{name} of layer 1, of layer 2, of layer 3",
        title=f"{name.capitalize()}s open: {low:.0%} to {high:.0%}, by the character read",
    )
figure.colorbar(panels[0].images[0], ax=panels, label="share of characters")
show(figure)

# %% [markdown]
# And along a text: the share of the decoder's heads and blocks that each character gets.

# %%
spent = np.asarray((gates.heads.mean((0, 3)) + gates.blocks.mean((0, 3))) / 2).ravel()
words, spent = text[:500].replace("\n", " "), spent[:500]
width, height = plotting.text_size(words, 100)
figure, axes = subplots(size=(width + 1, height + 0.5))
plotting.plot_text(axes, words, spent, columns=100)
figure.colorbar(axes.images[0], ax=axes, label="share of units", aspect=8)
axes.set_title("How much is computed for each character (line ends are shown as spaces)")
show(figure)

# %% [markdown]
# ## From 100 % to 25 %
#
# Now gates that are the same for all inputs. One network, trained with all of its parts, then with a target of 75 %, of
# 50 % and of 25 %; at each of them `compact` cuts out what is closed. The cut networks are plain decoders, timed in turn.

# %%
gated = pruning.Gated(config, choice=pruning.HardConcrete(start=0.95))
plan = [1.0] * 200 + [0.75] * 120 + [0.5] * 120 + [0.25] * 120
stages = [(target, params, pruning.compact(gated, {"params": params})) for target, params in train(gated, plan)]
runs = {}
for target, _, small in stages:
    forward = timing.compiled(lambda v, x, net=small.model: net.apply(v, x)["logits"], small.variables, tokens)
    runs[target] = functools.partial(forward, small.variables, tokens)
seconds = {target: np.median(times) for target, times in timing.in_turn(runs, 15).items()}
wanted = jnp.asarray(corpus.valid[1 : 64 * 64 + 1]).reshape(64, 64)
bits = {
    target: float(optax.softmax_cross_entropy_with_integer_labels(run(), wanted).mean() / np.log(2))
    for target, run in runs.items()
}
whole = pruning.costs(config, 64).total
left = {target: pruning.costs(small.model.config, 64).total / whole for target, _, small in stages}


# %%
def draw(panels, number):
    """What is open at a stage, and what it costs."""
    target, params, _ = stages[number]
    open_now = gated.apply({"params": params}, tokens[:1])["gates"]
    for axes, values, name in zip(panels, (open_now.heads, open_now.blocks), ("head", "block"), strict=True):
        values = np.asarray(values)
        axes.clear()
        image = axes.imshow(np.where(values > 0, values, np.nan), vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set_facecolor("0.9")
        axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        axes.set_yticks(range(config.layers), range(1, config.layers + 1))
        axes.set(xlabel=name, ylabel="layer")
    return image, f"{left[target]:.0%} of the operations, {1e3 * seconds[target]:.1f} ms, {bits[target]:.2f} bits"


figure, grid = subplots(2, len(stages), (10, 4))
for number in range(len(stages)):
    image, title = draw(grid[:, number], number)
    grid[0, number].set_title(title.replace(" ms, ", " ms,\n"), fontsize=8)
figure.colorbar(image, ax=grid, label="gate; grey is cut out")
show(figure)

# %% [markdown]
# The same with a slider: move it from 100 % to 25 %.

# %%
slider, panels = subplots(1, 2, (7, 2.6))
heading = slider.suptitle("", fontsize=9)


def frame(number):
    """One budget."""
    heading.set_text(draw(panels, number)[1])


plotting.play(slider, frame, len(stages), interval=1500)

# %%
figure, (one, two) = subplots(1, 2, (8, 2.8))
x = [100 * left[target] for target in seconds]
one.plot(x, [seconds[1.0] / seconds[target] for target in seconds], "o-", color=COLORS[0], label="measured")
one.plot(x, [1 / left[target] for target in seconds], ":", color=plotting.GREY, label="if only operations counted")
one.set(
    xlabel="% of the operations",
    ylabel="times as fast",
    title=f"At {x[-1]:.0f} % of the operations {seconds[1.0] / seconds[0.25]:.1f} times as fast",
)
one.legend(frameon=False)
two.plot(x, [bits[target] for target in seconds], "s-", color=COLORS[1])
two.set(xlabel="% of the operations", ylabel="bits per character", title="What it costs (and training gains)")
for axes in (one, two):
    plotting.plain(axes).invert_xaxis()
show(figure)

# %% [markdown]
# The stages differ in training, too: the later ones have seen more text. `experiments/dynamic_pruning.py` compares at equal
# training, beside dense networks of equal cost and gates drawn at random, with seeds.
#
# ## Exercises
#
# 1. Ask the first network for 25 %. Which characters keep their heads?
# 2. How many of the operations are the heads'? (`pruning.costs(config, 64)`.) What would be left if all of them closed?
# 3. Train a dense `transformer.Decoder` of half the operations, `width=48, ffn=128`, for 560 steps, with a loss without
#    the share. Is it better than the network that was cut to half?
# 4. `pruning.Buckets` chooses one of several widths for each sequence, and `pruning.BucketServer` runs that one alone. Which
#    sequences get the narrow one?
