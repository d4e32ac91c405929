"""How alike layers are: by what they compute, and by their weights.

N samples (positions), D width, L layers, H heads, K width of a head, F hidden units.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def linear_cka(x_ND: Array, y_NE: Array) -> Array:
    """Linear centred kernel alignment: |Y'X|^2 / (|X'X| |Y'Y|), columns centred.

    It is 1 for features that differ by a rotation and a scale, near 0 for unrelated ones, given many more samples than
    features. So layers of equal features may still have weights that do not average well.

    Args:
        x_ND, y_NE: features of the same N samples.

    Returns:
        A scalar in [0, 1]; 0 where one of them is constant.

    Raises:
        ValueError: they are no matrices of equally many rows.

    Reference: Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019), equation 5.
    """
    if x_ND.ndim != 2 or y_NE.ndim != 2 or len(x_ND) != len(y_NE):
        raise ValueError(f"features have shapes {x_ND.shape} and {y_NE.shape}, expected two of [samples, width]")
    x, y = (f.astype(jnp.float32) - f.astype(jnp.float32).mean(0, keepdims=True) for f in (x_ND, y_NE))
    cross, xx, yy = (jnp.square(a.T @ b).sum() for a, b in ((y, x), (x, x), (y, y)))
    norm = jnp.sqrt(xx) * jnp.sqrt(yy)
    return jnp.where(norm > 0, cross / jnp.where(norm > 0, norm, 1), 0.0)


def cka_matrix(features: Sequence[Array]) -> np.ndarray:
    """`linear_cka` of all pairs, [L, L]; features [..., D] of equally many samples each.

    Raises:
        ValueError: there are no features.
    """
    if not features:
        raise ValueError("there are no features, expected those of one layer or more")
    return np.asarray(_cka_matrix([jnp.reshape(f, (-1, f.shape[-1])) for f in features]))


@jax.jit
def _cka_matrix(features: list[Array]) -> Array:
    centred = [f.astype(jnp.float32) - f.astype(jnp.float32).mean(0, keepdims=True) for f in features]
    scaled = [f / jnp.maximum(jnp.sqrt(jnp.linalg.norm(f.T @ f)), 1e-30) for f in centred]
    return jnp.stack([jnp.stack([jnp.square(a.T @ b).sum() for b in scaled]) for a in scaled])


def layer_features(out: Mapping[str, Any], kind: str = "state") -> list[Array]:
    """What each layer of one pass of a Transformer made, from its results.

    Args:
        out: what `model.apply` returned.
        kind: "state" after the layer, or its sub-layer's update, "attention" or "ffn".

    Returns:
        By layer, [B, L, D].

    Raises:
        ValueError: a layer has none of that kind.
    """
    lacking = [l for l, layer in enumerate(out["layers"]) if kind not in layer]
    if lacking:
        raise ValueError(f"layer {lacking[0]} has no {kind!r}, expected one of {', '.join(out['layers'][lacking[0]])}")
    return [layer[kind] for layer in out["layers"]]


def layers_of(params: Any, kind: str, prefix: str = "stack") -> list[Any]:
    """The weights of each layer, in order, from a Transformer's parameters; `kind` is "attention" or "ffn".

    Raises:
        ValueError: there are none of that kind under the prefix.
    """
    stack = params
    for name in filter(None, prefix.split("/")):
        stack = stack.get(name, {})
    found = [stack[f"{kind}_{l}"] for l in range(len(stack)) if f"{kind}_{l}" in stack]
    if not found:
        raise ValueError(
            f"there are no {kind}_0, {kind}_1 ... under {prefix!r} of the parameters, which have {[*stack]}"
        )
    return found


def align(layer: Any, to: Any) -> Any:
    """The same layer, its heads or hidden units in the order that brings its weights nearest to another layer's.

    What it computes does not change: heads of attention and hidden units may be permuted. By the Hungarian method.

    Args:
        layer: weights of an `Attention` or a `FeedForward`.
        to: of the other, of equal sizes.

    Returns:
        As `layer`.

    Raises:
        ValueError: weights of another kind, or sizes that differ.

    Reference: Ainsworth et al., "Git Re-Basin" (2023), section 3.2, for one layer.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    axes = _axes(layer)
    gain: Any = 0.0
    for name, axis in axes.items():
        a, b = (np.moveaxis(np.asarray(w[name], np.float64), axis, 0) for w in (layer, to))
        if a.shape != b.shape:
            raise ValueError(f"{name} has shapes {layer[name].shape} and {to[name].shape}, expected equal ones")
        gain = gain + b.reshape(len(b), -1) @ a.reshape(len(a), -1).T
    order = linear_sum_assignment(gain, maximize=True)[1]
    return {name: jnp.take(w, order, axes[name]) if name in axes else w for name, w in layer.items()}


def weight_distances(layers: Sequence[Any], aligned: bool = False) -> np.ndarray:
    """|W_i - W_j| / sqrt(|W_i| |W_j|) of all pairs of layers, [L, L]; about 1.4 for unrelated weights of equal size.

    Args:
        layers: weights of each, as `layers_of` finds them, of equal shapes.
        aligned: after `align`.

    Raises:
        ValueError: layers have different sizes.
    """
    flat = [_flat(layer) for layer in layers]
    norms = [float(np.linalg.norm(f)) for f in flat]
    found = np.zeros((len(layers), len(layers)))
    for i in range(len(layers)):
        for j in range(i):
            other = _flat(align(layers[j], layers[i])) if aligned else flat[j]
            if other.shape != flat[i].shape:
                raise ValueError(
                    f"layers {j} and {i} have {other.size} and {flat[i].size} weights, expected equal ones"
                )
            scale = max((norms[i] * norms[j]) ** 0.5, 1e-30)
            found[i, j] = found[j, i] = float(np.linalg.norm(flat[i] - other)) / scale
    return found


def _axes(layer: Any) -> dict[str, int]:
    """The axis of each parameter that runs over heads or hidden units."""
    if "query" in layer:
        biases = {f"{name}_bias": 0 for name in ("query", "key", "value") if f"{name}_bias" in layer}
        return {"query": 1, "key": 1, "value": 1, "out": 0} | biases
    if "up" in layer:
        biases = {"up_bias": 0} if "up_bias" in layer else {}
        return {name: 1 for name in ("up", "gate") if name in layer} | {"down": 0} | biases
    raise ValueError(
        f"the layer has {', '.join(layer)}, expected the weights of attention (query) or of a network (up)"
    )


def _flat(layer: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(layer)])
