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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hyperjax/hyperjax/blob/main/colab/hyperlstm.ipynb)
#
# # HyperLSTM: weights that change along a sentence
#
# An LSTM uses the same weights at every step. In a HyperLSTM (Ha, Dai, Le, "HyperNetworks", 2016) a small LSTM reads
# along, with the large one's state as part of its input, and generates three vectors for each gate
# $y \in \{i, g, f, o\}$: two that scale the rows of the large one's weights, and a bias,
#
# $$y_t = \mathrm{LN}\big(d^y_h(\hat h_t) \odot W^y_h h_{t-1} + d^y_x(\hat h_t) \odot W^y_x x_t + b^y(\hat h_t)\big).$$
#
# So the weights at a step are $\mathrm{diag}(d_h)\, W_h$: a different matrix at every character, for the price
# of the small LSTM: at the size below a third more parameters, so the LSTM beside it gets more units.

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
from hyperjax import data, plotting, recurrent, training
from hyperjax.plotting import show, subplots
from hyperjax.recurrent.dynamics import generated_scales, scale_changes

print(training.device())

# %% [markdown]
# ## Train one on text, and an LSTM beside it
#
# The help texts of this Python: nothing to download. Both networks have about as many parameters, the same recipe and
# the same batches; `streams.window(n)` is a function of the step's number.

# %%
corpus = data.load_corpus("pydoc")
streams = data.Streams(corpus.train, batch=32, length=48)
models = {
    "LSTM": hj.LanguageModel("ln_lstm", len(corpus.symbols), units=118),
    "HyperLSTM": hj.LanguageModel("ln_hyper_lstm", len(corpus.symbols), units=96, hyper_units=24, embedding=4),
}


def learn(model, steps=300):
    def loss_fn(params, carry, batch, key):
        out = model.apply({"params": params}, batch["inputs"], carry)
        loss = optax.softmax_cross_entropy_with_integer_labels(out["logits"], batch["targets"]).mean()
        return loss, (out["carry"], {})

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(training.schedule(5e-3, steps, 0.6)))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    state = training.TrainState.create(params, optimizer, model.initialize_carry(32))
    step, losses = training.make_step(loss_fn, optimizer), []
    for number in range(steps):
        state, metrics = step(state, streams.window(number), jax.random.key(0))
        losses.append(metrics["loss"])
    return state.params, np.array(losses) / np.log(2)


trained = {name: learn(model) for name, model in models.items()}

# %%
figure, axes = subplots(size=(6, 2.8))
curves = {f"{name}, {training.count(params):,} parameters": bits for name, (params, bits) in trained.items()}
plotting.plot_losses(axes, curves, window=15)
axes.set(ylabel="bits per character", ylim=(1.5, 5))
axes.set_title(
    "In the end: " + ", ".join(f"{name} {bits[-50:].mean():.2f} bits" for name, (_, bits) in trained.items())
)
show(figure)

# %% [markdown]
# ## Watch the weights change

# %%
model, params = models["HyperLSTM"], trained["HyperLSTM"][0]
text = " ".join(corpus.decode(corpus.valid[300:900]).split())[:400]
changes = scale_changes(model, params, corpus.encode(text))["layer_0"]
width, height = plotting.text_size(text, 100)
figure, axes = subplots(size=(width + 1, height + 0.5))
plotting.plot_text(axes, text, changes["i"], columns=100, limits=(0, float(np.percentile(changes["i"], 98))))
axes.set_title("How far each character moved the input gate's weights")
figure.colorbar(axes.images[0], ax=axes, label="change of $d_i$", aspect=8, extend="max")
show(figure)

# %%
line = text[80:160]
scales = generated_scales(model, params, corpus.encode(line))["layer_0"]
bound = max(float(np.abs(scales[f"h{gate}"]).max()) for gate in "igfo")
figure, axes = subplots(4, 1, (9, 5), sharex=True)
for each, gate in zip(axes, "igfo", strict=True):
    values = np.asarray(scales[f"h{gate}"]).T
    order = np.argsort(values.mean(-1))
    image = each.imshow(values[order], cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto")
    each.set(ylabel=f"gate {gate}", yticks=[])
axes[-1].set_xticks(
    range(len(line)), ["·" if c == " " else "¶" if c == "\n" else c for c in line], fontsize=7, family="monospace"
)
figure.colorbar(image, ax=axes, label="scale of a row of the recurrent weights")
moves = {gate: float(np.std(np.asarray(scales[f"h{gate}"]), axis=0).mean()) for gate in "igfo"}
axes[0].set_title(f"Every scale at every character (each row is a unit): gate {max(moves, key=moves.get)} moves most")
show(figure)

# %% [markdown]
# ## Sample at several temperatures
#
# The logits are divided by the temperature before a character is drawn. Each character lies on the colour of what it
# costs the network, $-\log_2 p$: at a low temperature the text runs in ruts, at a high one it surprises its own author.


# %%
@jax.jit
def bits_of(params, ids):
    logits = model.apply({"params": params}, ids[None, :-1])["logits"][0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[1:]) / np.log(2)


prime = corpus.encode("The function ")
width, height = plotting.text_size("x" * 240, 100)
figure, panels = subplots(3, 1, (width + 1, 3 * (height + 0.3)))
for axes, temperature in zip(panels, (0.3, 0.7, 1.2), strict=True):
    drawn = recurrent.generate(model, params, prime, 220, jax.random.key(1), temperature)
    ids = np.concatenate([[-1], prime, np.asarray(drawn)])  # -1: no symbol, before the text
    sample, bits = corpus.decode(ids[1:]).replace("\n", " "), bits_of(params, ids)
    plotting.plot_text(axes, sample, bits, columns=100, limits=(0, 8), given=len(prime))
    axes.set_title(f"Temperature {temperature}: {np.mean(bits[len(prime) :]):.1f} bits a character", loc="left")
figure.colorbar(panels[0].images[0], ax=panels, label="bits", extend="max", shrink=0.6)
show(figure)

# %% [markdown]
# ## Penn Treebank, and the size of the paper
#
# `data.load_corpus("ptb")` fetches Penn Treebank, or reads `ptb.train.txt`, `ptb.valid.txt` and `ptb.test.txt` from
# `data_dir`, as characters; the rest of this notebook stays as it is. The rows of the paper's Table 3 are
# `recurrent.PAPER_MODELS`, and one command trains one of them on an accelerator:
#
#     python experiments/char_lm.py --preset paper --model ln_hyper_lstm --data-dir DIR --workdir runs/paper
#
# ## Exercises
#
# 1. Give the HyperLSTM `hyper_units=8`. How much is lost?
# 2. `hj.LanguageModel("hyper_lstm", ...)` has no layer norm. Which of the two matters more?
# 3. Colour the text by gate `f` instead of `i`. Do they move at the same characters?
# 4. Train on a text of your own: `data.load_corpus("my.txt")`.
