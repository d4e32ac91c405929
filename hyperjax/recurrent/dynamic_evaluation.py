"""Dynamic evaluation: a language model that goes on learning from the text it is tested on, after predicting it.

Every symbol is still predicted before it is learned from, but the figure is no longer that of one set of parameters:
keep it in a column of its own.

Shape letters: n windows, B streams, T symbols of a window.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax.recurrent.language_model import LanguageModel

Array = jax.Array


def gradient_rms(model: LanguageModel, params: Any, windows: Mapping[str, Any]) -> Any:
    """The root mean square of every parameter's gradient over a text: the scale of its steps in `dynamic_evaluate`.

    Args:
      model: the language model.
      params: its parameters.
      windows: `inputs`, `targets` and `mask`, each [n, B, T], of the training text; the state is carried over. A
        gradient is that of a window's mean loss.

    Returns:
      A pytree like `params`.

    Raises:
      ValueError: windows of another kind.

    Reference: Krause, Kahembwe, Murray, Renals, "Dynamic Evaluation of Neural Sequence Models", arXiv 1709.07432,
      section 3.
    """
    return _gradient_rms(model, params, _checked(windows))


def dynamic_evaluate(
    model: LanguageModel,
    params: Any,
    rms: Any,
    windows: Mapping[str, Any],
    *,
    rate: float,
    decay: float = 0.0,
    epsilon: float = 1e-5,
) -> float:
    """Reads a text window by window; after predicting a window, takes a step on its loss.

    p <- p - rate g / (rms + epsilon) + min(decay rms / mean(rms), 1) (p_0 - p), with p_0 the parameters given and the
    mean taken over all of them.

    Args:
      model: the language model.
      params: p_0.
      rms: of `gradient_rms`, taken over the training text.
      windows: `inputs`, `targets` and `mask`, each [n, 1, T], as `hyperjax.data.evaluation_windows(ids, 1, T)` cuts
        them: one stream, for the parameters follow the text.
      rate: of the steps; 0 is the static evaluation.
      decay: how strongly the parameters are drawn back to p_0.
      epsilon: see the equation.

    Returns:
      Bits per symbol, over all windows.

    Raises:
      ValueError: more than one stream, windows of another kind, a rate, decay or epsilon below 0 or not finite.

    Reference: as for `gradient_rms`, section 4 (RMS dynamic evaluation with an RMS global prior).
    """
    for name, value in (("rate", rate), ("decay", decay), ("epsilon", epsilon)):
        if not (0 <= value < np.inf):
            raise ValueError(f"{name} is {value}, expected a finite number of at least 0")
    checked = _checked(windows)
    if checked["inputs"].shape[1] != 1:
        raise ValueError(f"the windows have {checked['inputs'].shape[1]} streams; cut them with a batch of 1")
    nats = _dynamic_nats(model, params, rms, checked, rate, decay, epsilon)
    return float(np.asarray(nats, np.float64).sum() / np.sum(checked["mask"]) / np.log(2))


def _checked(windows: Mapping[str, Any]) -> dict[str, Array]:
    names = ("inputs", "targets", "mask")
    shapes = {name: np.shape(windows.get(name, 0)) for name in names}
    if len(set(shapes.values())) != 1 or len(shapes["inputs"]) != 3 or 0 in shapes["inputs"]:
        raise ValueError(f"windows hold {shapes}; give {', '.join(names)} as evaluation_windows cuts them")
    return {name: jnp.asarray(windows[name]) for name in names}


def _nats(model: LanguageModel, window: dict[str, Array], carry: Any, params: Any) -> tuple[Array, tuple[Array, Any]]:
    """Mean cross entropy of a window's symbols; beside it, their sum and the new state."""
    out: Any = model.apply({"params": params}, window["inputs"], carry)
    each = optax.softmax_cross_entropy_with_integer_labels(out["logits"], window["targets"])
    total = jnp.sum(each * window["mask"])
    return total / jnp.maximum(jnp.sum(window["mask"]), 1), (total, out["carry"])


@partial(jax.jit, static_argnums=0)
def _gradient_rms(model: LanguageModel, params: Any, windows: dict[str, Array]) -> Any:
    def add(state, window):
        carry, squares = state
        gradient, (_, carry) = jax.grad(partial(_nats, model, window, carry), has_aux=True)(params)
        return (carry, jax.tree.map(lambda s, g: s + jnp.square(g), squares, gradient)), None

    count, batch, _ = windows["inputs"].shape
    start = (model.initialize_carry(batch), jax.tree.map(jnp.zeros_like, params))
    (_, squares), _ = jax.lax.scan(add, start, windows)
    return jax.tree.map(lambda s: jnp.sqrt(s / count), squares)


@partial(jax.jit, static_argnums=0)
def _dynamic_nats(model, params, rms, windows, rate, decay, epsilon) -> Array:
    everything = jax.tree.leaves(rms)
    mean = sum(jnp.sum(r) for r in everything) / sum(r.size for r in everything)
    pull = jax.tree.map(lambda r: jnp.minimum(decay * r / mean, 1.0), rms)

    def read(state, window):
        carry, now = state
        gradient, (nats, carry) = jax.grad(partial(_nats, model, window, carry), has_aux=True)(now)
        now = jax.tree.map(
            lambda p, g, r, k, p_0: p - rate * g / (r + epsilon) + k * (p_0 - p), now, gradient, rms, pull, params
        )
        return (carry, now), nats

    return jax.lax.scan(read, (model.initialize_carry(1), params), windows)[1]
