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
# Tasks that agree learn better from shared layers, tasks that fight learn worse. Sub-network routing (Ma et al., AAAI
# 2019) makes it a matter of gates: each connection between the small networks of one level and the next has a gate that
# is open or closed,
#
# $$v_i = \sum_j z_{ij} W_{ij} u_j, \qquad z_{ij} \sim \text{hard concrete}(\log\alpha_{ij}),$$
#
# and $\log\alpha$ is trained with everything else, at the price $\lambda \sum_{ij} P(z_{ij} \neq 0)$.

# %%
import importlib.util

if importlib.util.find_spec("google.colab"):  # nothing to do elsewhere
    # %pip install -q git+https://github.com/hyperjax/hyperjax
    pass

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import HTML, display
from matplotlib.animation import FuncAnimation

from hyperjax import data, routing, training
from hyperjax.plotting import COLORS
from hyperjax.routing.plots import plot_gates, plot_routing

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
print(training.device())

# %% [markdown]
# ## The gates
#
# A hard concrete gate is a stretched and clipped sigmoid of noise: it is exactly 0, or exactly 1, with probabilities
# that $\log\alpha$ sets, and something between them rarely, which is what gives it a gradient.

# %%
gates = routing.HardConcrete()
figure, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained", sharey=True)
for each, location in zip(axes, (-3.0, 0.0, 3.0), strict=True):
    drawn = np.asarray(gates.sample(jax.random.key(0), jnp.full((20_000,), location)))
    each.hist(drawn, bins=41, range=(0, 1), color=COLORS[0], density=True)
    each.set(xlabel="z", title=f"log α = {location:g}: closed {np.mean(drawn == 0):.0%}, open {np.mean(drawn == 1):.0%}")
axes[0].set_ylabel("density")
plt.show()

# %% [markdown]
# ## Tasks that agree, and tasks that fight
#
# Two synthetic regressions whose weights have a cosine of `correlation`: at 1 they are one task, at 0 they have nothing to
# do with one another, at -1 each wants the opposite.


# %%
def learn(correlation, steps=1500, penalty=5e-3, watch=25):
    """Trains SNR on two tasks; returns the model, its parameters, and its gates over time."""
    tables = data.synthetic_regression(correlation=correlation, seed=0)
    model = routing.SNR(levels=((8,) * 4, (8,) * 4), tasks=tables.tasks, towers=(8,))

    def loss_fn(params, carry, batch, key):
        outputs, info = model.apply({"params": params}, tables.encode(batch["features"]), key)
        losses = routing.task_losses(tables.tasks, outputs, batch["labels"])
        return sum(losses.values()) + penalty * info["l0"], (carry, losses)

    start = model.init(jax.random.key(0), jnp.zeros((1, tables.width)))["params"]
    kinds = {"gates": optax.adam(2e-2), "rest": optax.adam(training.schedule(5e-3, steps, 0.5))}
    name = lambda path, _: "gates" if path[-1].key == "log_alpha" else "rest"
    optimizer = optax.partition(kinds, jax.tree_util.tree_map_with_path(name, start))
    step, batches = training.make_step(loss_fn, optimizer), data.RowBatches(tables.train, 256, 0)
    state, history = training.TrainState.create(start, optimizer), []
    for number in range(steps):
        if number % watch == 0:
            history.append(routing.served_gates(model, {"params": state.params}))
        state, _ = step(state, batches.batch_at(number), jax.random.key(1))
    return model, {"params": state.params}, history


found = {correlation: learn(correlation) for correlation in (1.0, 0.0)}

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for each, (correlation, (model, variables, _)) in zip(axes, found.items(), strict=True):
    plot_routing(each, model, variables)
    small = routing.compact(model, variables)
    before, after = small.params
    each.set_title(f"Correlation {correlation:g}: {after:,} of {before:,} parameters are left", fontsize=10)
plt.show()

# %% [markdown]
# ## Gates closing
#
# The same networks while they learn; each frame is 25 steps.

# %%
model, _, history = found[0.0]
names = list(history[0])
figure, axes = plt.subplots(1, len(names), figsize=(6, 2.6), layout="constrained")
images = []
for each, name in zip(axes, names, strict=True):
    images.append(each.imshow(history[0][name], vmin=0, vmax=1, cmap="cividis"))
    each.set(title=name, xlabel="from", ylabel="to", xticks=[], yticks=[])
figure.colorbar(images[-1], ax=axes, label="gate")


def frame(number):
    for image, name in zip(images, names, strict=True):
        image.set_data(history[number][name])
    figure.suptitle(f"step {25 * number}", fontsize=9)
    return images


animation = FuncAnimation(figure, frame, frames=len(history), interval=120)
display(HTML(animation.to_jshtml()))
plt.close(figure)

# %%
figure, axes = plt.subplots(figsize=(6.5, 3), layout="constrained")
over_time = {name: np.array([gates[name] for gates in history]) for name in names}
plot_gates(axes, [25 * n for n in range(len(history))], over_time)
axes.set_title("Every gate over the steps of training, and the share of the open ones", fontsize=10)
plt.show()

# %% [markdown]
# ## Exercises
#
# 1. `correlation=-1`: do the tasks still share anything?
# 2. Halve and double `penalty`. At which is a task lost (`routing.lost_tasks`)?
# 3. Train `routing.MMoE(tasks=..., experts=4, widths=(8,))` on the same tables. Which is better, at how many parameters?
