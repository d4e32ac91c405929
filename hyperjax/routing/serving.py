"""What compaction saves: the same trained SNR network with gates, without them, and compact, counted and timed.

B samples.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.budget import flops
from hyperjax.routing.compact import Compacted
from hyperjax.routing.gates import scale_blocks
from hyperjax.routing.snr import SNR, normalise, reader_widths, served_gates
from hyperjax.timing import compiled, in_turn

Array = jax.Array


def fold_gates(model: SNR, variables: Mapping[str, Any]) -> tuple[SNR, dict[str, Any]]:
    """Multiplies the gates into the weights, and cuts out nothing: the dense network that computes the same.

    Args:
        model: an SNR-Trans network with gates per connection.
        variables: its variables.

    Returns:
        The network without gates, and its variables.

    Raises:
        ValueError: the network averages, or its gates are not per connection: then they have no weights of their own.
    """
    if model.connection != "trans" or model.per != "connection":
        raise ValueError(
            f"the network is {model.connection!r} with gates per {model.per}, expected 'trans' per connection: only "
            "there does each gate have weights of its own to be multiplied into"
        )
    params, gates = dict(variables["params"]), served_gates(model, variables)
    below = [[widths[-1] for widths in level] for level in normalise(model.levels)]
    for (name, columns), rows in zip(reader_widths(model).items(), below, strict=True):
        kernel = scale_blocks(params[name]["kernel"], jnp.asarray(gates[name]), rows, columns)
        params[name] = {"kernel": kernel, "bias": params[name]["bias"]}
    return model.clone(gates=None), {"params": params}


def compare_serving(
    model: SNR, variables: Mapping[str, Any], small: Compacted, x: Array, repeats: int = 20
) -> dict[str, float]:
    """Counts and times a network before and after compaction, in turn in one process.

    Args:
        model: the network.
        variables: its variables.
        small: what `compact` made of them.
        x: inputs to serve, [B, features].
        repeats: rounds; the median of twice as many runs of each counts.

    Returns:
        `connections_before`, `connections`, and likewise `subnetworks` and `params`; `flops_FORM` and `seconds_FORM` of
        serving x, for the forms `masked` (gates and all), `dense` (gates multiplied into the weights, where that is
        possible) and `compact`; `ratio_FORM_over_compact` of seconds; and `gap`, the largest difference of an output
        of compact and masked, relative to the largest output of the task.
    """
    forms: dict[str, tuple[Any, Any]] = {"masked": (model, variables)}
    if model.connection == "trans" and model.per == "connection":
        forms["dense"] = fold_gates(model, variables)
    forms["compact"] = (small.model, small.variables)
    figures: dict[str, float] = {}
    for name, (before, after) in zip(("connections", "subnetworks", "params"), small[2:], strict=True):
        figures |= {f"{name}_before": before, name: after}
    runs, outputs = {}, {}
    for name, (net, weights) in forms.items():
        weights = jax.tree.map(jnp.asarray, dict(weights))
        apply = partial(_answers, net)
        figures[f"flops_{name}"] = flops(apply, weights, x)
        runs[name] = partial(compiled(apply, weights, x), weights, x)
        outputs[name] = jax.tree.map(np.asarray, runs[name]())
    gaps = [np.abs(y - outputs["compact"][task]).max() / np.abs(y).max() for task, y in outputs["masked"].items()]
    figures["gap"] = float(max(gaps))
    figures |= {f"seconds_{name}": float(np.median(times)) for name, times in in_turn(runs, repeats).items()}
    for name in forms:
        if name != "compact":
            figures[f"ratio_{name}_over_compact"] = figures[f"seconds_{name}"] / figures["seconds_compact"]
    return figures


def _answers(net: Any, weights: Any, x: Array) -> dict[str, Array]:
    return net.apply(weights, x)[0]
