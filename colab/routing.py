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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hyperjax/hyperjax/blob/main/colab/routing.ipynb)
#
# # What should tasks share?
#
# Tasks that agree learn well from shared layers; tasks that have nothing in common fight for them. Sub-network routing
# (Ma et al., AAAI 2019) makes it a matter of gates: each connection between the small networks of one level and those of
# the next has a gate that is open or closed,
#
# $$v_i = \sum_j z_{ij} W_{ij} u_j, \qquad z_{ij} \sim \text{hard concrete}(\log\alpha_{ij}),$$
#
# and the locations $\log\alpha$ are trained with everything else, at the price $\lambda \sum_{ij} P(z_{ij} \neq 0)$ of
# what stays open.

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

from hyperjax import plotting, routing, training
from hyperjax.plotting import COLORS, show, subplots

print(training.device())

# %% [markdown]
# ## Tasks that agree, and tasks that fight
#
# The inputs are 20 numbers; each task depends on two directions among them. `wave` and `bump` look at the same two,
# `other` at two of its own. A shared bottom of 8 units feeds a small tower for each task. How well is `wave` learned
# alone, and beside each of the others?

# %%
directions, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))


def rows(number, size=256):
    """A batch; the number is its seed."""
    x = np.random.default_rng(number).normal(size=(size, 20)).astype(np.float32)
    a, b, c, d = (x @ directions[:, :4].astype(np.float32)).T
    return {"x": x, "wave": np.sin(2 * a) + b, "bump": np.cos(2 * a) - b, "other": np.sin(2 * c) + d}


def learn(model, steps=1200, price=0.0, seed=0, watch=40):
    """Trains a network; returns its parameters, its test losses and, of SNR, its gates on the way."""

    def losses_of(params, batch, key=None):
        outputs, info = model.apply({"params": params}, batch["x"], key)
        return routing.task_losses(model.tasks, outputs, batch), info

    def loss_fn(params, carry, batch, key):
        losses, info = losses_of(params, batch, key)
        return sum(losses.values()) + price * info.get("l0", 0.0), (carry, {})

    def kind(path, _):
        return "gates" if path[-1].key == "log_alpha" else "weights"

    params = model.init(jax.random.key(seed), jnp.zeros((1, 20)))["params"]
    rates = {"gates": optax.adam(2e-2), "weights": optax.adam(training.schedule(1e-2, steps, 0.5))}
    optimizer = optax.partition(rates, jax.tree_util.tree_map_with_path(kind, params))
    state, step, history = training.TrainState.create(params, optimizer), training.make_step(loss_fn, optimizer), []
    for number in range(steps):
        if isinstance(model, routing.SNR) and number % watch == 0:
            history.append(routing.served_gates(model, {"params": state.params}))
        state, _ = step(state, rows(number), jax.random.key(seed))
    return state.params, jax.jit(losses_of)(state.params, rows(10**6, 5000))[0], history


together = {"alone": ("wave",), "with bump": ("wave", "bump"), "with other": ("wave", "other")}
found = {}
for name, chosen in together.items():
    net = routing.SharedBottom(tasks={task: routing.Regression() for task in chosen}, bottom=(8,), towers=(16,))
    found[name] = [float(learn(net, seed=seed)[1]["wave"]) for seed in range(3)]

# %%
figure, axes = subplots(size=(6.6, 2.8))
for number, losses in enumerate(found.values()):
    axes.plot([number] * len(losses), losses, "o", color=COLORS[0], alpha=0.5)
    axes.plot([number - 0.2, number + 0.2], [np.mean(losses)] * 2, color=COLORS[1], lw=2)
axes.set(yscale="log", xlim=(-0.5, 2.5), ylabel="test error of wave (squared)")
axes.set_xticks(range(len(found)), found)
means = {name: np.mean(losses) for name, losses in found.items()}
ratios = [means[name] / means["alone"] for name in ("with bump", "with other")]
axes.set_title("Beside bump {:.1f}, beside other {:.1f} times the error (3 seeds)".format(*ratios))
show(plotting.plain(axes).figure)

# %% [markdown]
# ## The gates
#
# A hard concrete gate is a stretched and clipped sigmoid of noise: exactly 0 or exactly 1 with probabilities that
# $\log\alpha$ sets, and something between the two at times, which is what gives it a gradient. Without a key it is
# deterministic.

# %%
gate = routing.HardConcrete()
figure, panels = subplots(1, 3, (9, 2.4), sharey=True)
for axes, location in zip(panels, (-3.0, 0.0, 3.0), strict=True):
    drawn = np.asarray(gate.sample(jax.random.key(0), jnp.full((20_000,), location)))
    axes.hist(drawn, bins=41, range=(0, 1), color=COLORS[0], weights=np.full(len(drawn), 100 / len(drawn)))
    closed, opened = np.mean(drawn == 0), np.mean(drawn == 1)
    axes.set(xlabel="gate z", title=rf"$\log\alpha$ = {location:g}: {closed:.0%} closed, {opened:.0%} open")
panels[0].set_ylabel("% of 20,000 draws")
show(figure)

# %% [markdown]
# ## Let the gates decide
#
# All three tasks at once, two levels of four sub-networks. A price of 0.1 for each open gate.

# %%
tasks = {task: routing.Regression() for task in ("wave", "bump", "other")}
model = routing.SNR(levels=((32,) * 4, (32,) * 4), tasks=tasks, towers=(16,))
params, losses, history = learn(model, steps=2000, price=0.1)
variables = {"params": params}
small = routing.compact(model, variables)
print("test errors:", {task: round(float(loss), 3) for task, loss in losses.items()})

# %%
figure, axes = subplots(size=(7.5, 4.4))
plotting.plot_routing(axes, model, variables)
before, after = small.params
axes.set_title(f"What three tasks keep: {after:,} of {before:,} parameters")
show(figure)

# %% [markdown]
# ## Gates closing
#
# The same network while it learned; each frame is 40 steps.

# %%
names = {"level_1": "into the second level", "towers": "into the towers"}
figure, panels = subplots(1, 2, (6, 2.8))
images = []
for axes, (name, title) in zip(panels, names.items(), strict=True):
    images.append(axes.imshow(history[0][name], vmin=0, vmax=1, cmap="cividis"))
    axes.set(title=title, xlabel="from sub-network", xticks=range(4))
    axes.set_xticklabels(range(1, 5))
    readers = list(tasks) if name == "towers" else range(1, 5)
    axes.set_yticks(range(len(readers)), sorted(readers))
panels[0].set_ylabel("to sub-network")
figure.colorbar(images[-1], ax=panels, label="gate")
heading = figure.suptitle("step 0", fontsize=9)


def frame(number):
    """Draws one frame."""
    for image, name in zip(images, names, strict=True):
        image.set_data(history[number][name])
    heading.set_text(f"step {40 * number}")


plotting.play(figure, frame, len(history))

# %%
figure, axes = subplots(size=(7, 3.4))
over_time = {name: np.array([gates[name] for gates in history]) for name in names}
plotting.plot_gates(axes, [40 * number for number in range(len(history))], over_time)
axes.set_title("Gates close one after another; the bold line is the share that is open")
show(figure)

# %% [markdown]
# ## The compact network
#
# `compact` cuts out what lies behind closed gates and on no path from the input to a task. What is left is a plain
# network that gives the same answers, but for rounding.

# %%
x = jnp.asarray(rows(7, 4096)["x"])
served = routing.compare_serving(model, variables, small, x)
figure, panels = subplots(1, 2, (7, 2.6))
sizes = {"with gates": before, "compact": after}
times = {"with gates": 1e3 * served["seconds_masked"], "compact": 1e3 * served["seconds_compact"]}
for axes, values, label in zip(panels, (sizes, times), ("parameters", "ms for 4,096 rows"), strict=True):
    bars = axes.bar(list(values), list(values.values()), color=[plotting.GREY, COLORS[0]], width=0.5)
    axes.bar_label(bars, fmt="{:,.0f}" if label == "parameters" else "{:.2f}", fontsize=8)
    axes.set_ylabel(label)
panels[0].set_title(f"{before / after:.1f} times as small")
panels[1].set_title(f"{served['ratio_masked_over_compact']:.1f} times as fast")
show(figure)

# %% [markdown]
# ## Exercises
#
# 1. Give the shared bottom 32 units. Does `other` still cost `wave` anything?
# 2. Halve and double the price. Is a task lost (`routing.lost_tasks(model, variables)`)? Which?
# 3. `routing.SNR(..., per="task")` gives each task gates of its own through all levels. What does `plot_routing` show?
#    (Leave the animation out: it draws one matrix a level.)
# 4. Train `routing.MMoE(tasks=tasks, experts=4, widths=(32,), towers=(16,))` with `learn`. Which has the smaller errors, and
#    how many parameters has it?
