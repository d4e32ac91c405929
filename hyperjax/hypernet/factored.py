"""Layers of a Linen target whose weights differ from sample to sample by a factor or a sum of low rank.

B samples, r rank.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.hypernet.maker import Maker
from hyperjax.hypernet.modulated import Factors, LowRankSum, Scaled
from hyperjax.hypernet.target import Call, State

Array = jax.Array
KERNELS = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.Embed)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm)


class Unfactored(Exception):
    """The target does something with its parameters that factors cannot express."""


def apply_factored(
    maker: Maker, factors: Factors, state: State, call: Call, batch: int, cut: bool = False
) -> tuple[Any, State]:
    """Applies the target with W_0, and each sample's part of its weights after each layer.

    Args:
        maker, factors, state, call, batch: as in `per_sample.apply`.
        cut: let those layers return zeros, which shows whether W_0 reaches the outputs in any other way.

    Raises:
        Unfactored: a layer of another kind has parameters that differ from sample to sample.
    """
    ndim = {spec.path: len(spec.shape) for spec in maker.target.structure.specs}
    differing: dict[str, dict[str, Any]] = {layer: {} for layer in differing_layers(maker, factors)}
    base = {}
    for path, value in factors.items():
        layer, _, name = path.rpartition("/")
        plain = value if isinstance(value, jax.Array) else value.base
        if layer in differing:
            differing[layer][name] = value
            if name == "bias":
                plain = jnp.zeros(plain.shape[plain.ndim - ndim[path] :], plain.dtype)
            elif name == "scale":
                plain = jnp.ones(plain.shape[plain.ndim - ndim[path] :], plain.dtype)
        base[path] = plain
    handled: set[str] = set()
    inside = False

    def intercept(next_fun, args, kwargs, context):
        nonlocal inside
        layer = "/".join(context.module.path)
        own = differing.get(layer)
        if own is None or inside or context.method_name == "setup":
            return next_fun(*args, **kwargs)
        if context.method_name != "__call__" or not args:
            raise Unfactored
        y = next_fun(*args, **kwargs)
        inside = True
        try:
            out = _finish(context.module, own, args[0], y, batch)
            if cut:
                out = jnp.zeros(out.shape, out.dtype)
        finally:
            inside = False
        handled.add(layer)
        return out

    with nn.intercept_methods(intercept):
        out = maker.target.apply(maker.tree(maker.cast(base)), state, call)
    if handled != differing.keys():
        raise Unfactored
    return out


def differing_layers(maker: Maker, factors: Factors) -> set[str]:
    """Returns the layers whose parameters differ from sample to sample."""
    ndim = {spec.path: len(spec.shape) for spec in maker.target.structure.specs}
    values: dict[str, Any] = dict(factors)  # of factors, arrays or shapes
    return {p.rpartition("/")[0] for p, v in values.items() if not hasattr(v, "shape") or v.ndim > ndim[p]}


def _finish(module: nn.Module, own: dict[str, Any], x: Array, y: Array, batch: int) -> Array:
    """The layer's output y, for each sample's own kernel, scale and bias."""
    kernel = own.get("kernel", own.get("embedding"))
    params = module.variables["params"]
    fits = all(params[name].shape == _base_shape(value, params[name].ndim) for name, value in own.items())
    known = type(module) in KERNELS if kernel is not None else type(module) in NORMS and _features_last(module, y.ndim)
    known = known and "map_variables(" not in "/".join(
        getattr(module.scope, "debug_path", ())
    )  # which changes them on the way
    if not known or not fits or jnp.shape(y)[:1] != (batch,) or jnp.shape(x)[:1] != (batch,):
        raise Unfactored
    if isinstance(kernel, Scaled):
        if kernel.full and kernel.base.ndim > 1:
            raise Unfactored
        y = y * _spread(kernel.scale, y)
    elif isinstance(kernel, LowRankSum):
        y = y + _low_rank(module, kernel, x).astype(y.dtype)
    elif kernel is not None and kernel.ndim > params["kernel" if "kernel" in own else "embedding"].ndim:
        raise Unfactored
    for name in ("scale", "bias"):
        if name in own:
            value = own[name] if isinstance(own[name], jax.Array) else own[name].dense()
            batched = value.ndim > params[name].ndim
            value = _spread(value, y) if batched else value.reshape((1,) * (y.ndim - value.ndim) + value.shape)
            y = y * value.astype(y.dtype) if name == "scale" else y + value.astype(y.dtype)
    return y


def _features_last(module: nn.Module, ndim: int) -> bool:
    axes = getattr(module, "axis", getattr(module, "feature_axes", -1))
    axes = axes if isinstance(axes, (tuple, list)) else (axes,)
    return sorted(axis % ndim for axis in axes) == list(range(ndim - len(axes), ndim))


def _low_rank(module: nn.Module, kernel: LowRankSum, x: Array) -> Array:
    """(x A) B for each sample; x in the module's own dtype."""
    dtype = module.dtype or jnp.result_type(x, kernel.a)
    x, a, b = (v.astype(dtype) for v in (x, kernel.a, kernel.b))
    if type(module) is nn.Conv:
        if module.feature_group_count != 1 or module.mask is not None or x.ndim != kernel.base.ndim:
            raise Unfactored
        narrow = module.clone(parent=None, name=None, features=a.shape[-1], use_bias=False)
        return jax.vmap(lambda x, a, b: narrow.apply({"params": {"kernel": a}}, x[None])[0] @ b)(x, a, b)
    if type(module) is nn.Dense:
        axes: tuple[int, ...] = (-1,)
    elif type(module) is nn.DenseGeneral and not module.batch_dims:
        given = module.axis if isinstance(module.axis, tuple) else (module.axis,)
        axes = tuple(axis - x.ndim if axis >= 0 else axis for axis in given)
    else:
        raise Unfactored
    return jax.vmap(lambda x, a, b: jnp.tensordot(x, a, axes=(axes, tuple(range(len(axes))))) @ b)(x, a, b)


def _spread(value: Array, y: Array) -> Array:
    """[B, *tail] -> [B, 1, ..., *tail], with as many axes as y."""
    middle = (1,) * (y.ndim - value.ndim)
    return value.reshape(value.shape[0], *middle, *value.shape[1:]).astype(y.dtype)


def _base_shape(value: Any, ndim: int) -> tuple[int, ...]:
    return value.shape[value.ndim - ndim :] if isinstance(value, jax.Array) else value.base.shape
