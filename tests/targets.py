"""Every kind of target, small; shared by the tests of the hypernet wing."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

KEY = jax.random.key(0)


class Mlp(nn.Module):
    """Dense layers with LayerNorm; `extra` is a second input, `scale` a keyword one."""

    widths: tuple[int, ...] = (16, 12)
    classes: int = 4

    @nn.compact
    def __call__(self, x, extra=None, *, scale=1.0):
        for width in self.widths:
            x = nn.gelu(nn.LayerNorm()(nn.Dense(width)(x)))
        if extra is not None:
            x = x + extra
        return nn.Dense(self.classes, name="head")(x) * scale


class ConvNet(nn.Module):
    """Convolutions with BatchNorm and Dropout."""

    channels: tuple[int, ...] = (8, 8)
    classes: int = 4

    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate(self.channels):
            x = nn.Conv(width, (3, 3), strides=1 + i)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.classes, name="head")(x)


class Block(nn.Module):
    """A pre-norm Transformer block."""

    width: int = 16
    heads: int = 2

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
        y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(y))


class NnxNet(nnx.Module):
    """An nnx module with BatchNorm and Dropout."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(6, 10, rngs=rngs), nnx.Linear(10, 4, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(10, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


def function(params, x, *, gain=1.0):
    """A pure function: nested tuples, a scalar, bfloat16 and an integer."""
    (w, b), rest = params["layers"]
    y = jnp.tanh(x @ w + b[None]) @ rest["w"].astype(jnp.float32) * params["temperature"] * gain
    return jnp.roll(y, params["shift"], axis=-1)


def function_params():
    """Its parameters."""
    keys = jax.random.split(KEY, 3)
    w, v = jax.random.normal(keys[0], (6, 10)), jax.random.normal(keys[1], (10, 4), jnp.bfloat16)
    return {"layers": ((w, jnp.zeros(10)), {"w": v}), "temperature": jnp.float32(0.5), "shift": jnp.int32(1)}


def x(*shape):
    """Inputs."""
    return jax.random.normal(jax.random.key(1), shape)


@functools.cache
def all_targets():
    """{name: (what from_target takes, inputs, keyword inputs, arguments of from_target)}."""
    frozen = nnx.view(NnxNet(nnx.Rngs(0, dropout=1)), deterministic=True, use_running_average=True)
    return {
        "mlp": (Mlp(), (x(3, 6), x(3, 12)), {"scale": 2.0}, {}),
        "conv": (ConvNet(), (x(3, 6, 6, 2),), {}, {}),
        "block": (Block(), (x(3, 5, 16),), {}, {}),
        "nnx": (frozen, (x(3, 6),), {}, {}),
        "function": (function, (x(3, 6),), {"gain": 3.0}, {"params": function_params()}),
    }


def plain(name, hyper, variables, inputs, keywords, **which):
    """The target alone, on what `generate` and `materialize` make."""
    model = all_targets()[name][0]
    whole, params = hyper.materialize(variables, **which), hyper.generate(variables, **which)
    if name == "nnx":
        return whole(*inputs, **keywords)
    if name == "function":
        return model(params, *inputs, **keywords)
    return model.apply({**whole, "params": params}, *inputs, **keywords)


def random_variables(hyper, *inputs, **keywords):
    """Variables as `init` would shape them, with other values: initializers take long to compile."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.ones(leaf.shape, leaf.dtype)
        value = 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(0.5 + abs(value) if "var" in jax.tree_util.keystr(path) else value, leaf.dtype)

    shapes = jax.eval_shape(lambda key: hyper.init(key, *inputs, **keywords), KEY)
    return jax.tree_util.tree_map_with_path(fill, shapes)
