"""Generators: functions of an embedding that make parameters. `Linear`, `MLP` and `SeparableMLP` have a full head.

E width of z, F features before the head, G groups, n size of a parameter; `...` the batch of z, if there is one.
"""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.initializers import Spread, native_spread, rms_norm
from hyperjax.paramtree import ParamSpec

Array = jax.Array
Leaves = dict[str, Array]
Native = Mapping[str, Array] | None


class Generator(nn.Module, kw_only=True):
    """Base of all generators.

    A subclass defines `__call__(z, task_id, native)`; `HyperNetwork.from_target` clones it with `leaves` and `tasks`
    filled in. z is [..., E], with mean square about 1 (None in a static hypernetwork); `task_id` the index of the task
    among `tasks`, or None. It returns {path: value [..., *shape]}. While parameters are being made, `native` holds the
    target's own values, {path: [*shape]}; later it is None.

    Attributes:
        leaves: what to generate.
        tasks: the task ids that it serves, in order; () where there are no tasks.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> class Gain(hj.Generator):
        ...     @nn.compact
        ...     def __call__(self, z, task_id=None, native=None):  # of one embedding: theta = (1 + z_0) theta_0
        ...         return {spec.path: (1 + z[0]) * self.from_native(spec.name, spec, native) for spec in self.leaves}
        >>> hyper = hj.HyperNetwork.from_target(nn.Dense(3), jnp.ones((1, 2)), embedding_dim=1, generator=Gain())
        >>> variables = jax.jit(hyper.init)(jax.random.key(0), jnp.ones((1, 2)))
        >>> one, two = (hyper.generate(variables, z=jnp.array([z]))["kernel"] for z in (0.0, 1.0))
        >>> (two / one).tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """

    leaves: tuple[ParamSpec, ...] = ()
    tasks: tuple[int, ...] = ()

    needs_z: ClassVar[bool] = True  # whether it cannot do without an embedding

    def __call__(self, z: Array | None, task_id: Array | int | None = None, native: Native = None) -> Leaves:
        """Makes the parameters; a subclass defines it.

        Args:
            z: [..., E], or None in a static hypernetwork.
            task_id: index of the task among `tasks`, or None.
            native: {path: [*shape]} while parameters are being made, later None.

        Returns:
            {path: [..., *shape]}.

        Raises:
            TypeError: the subclass defines none.
        """
        raise TypeError(f"{type(self).__name__} defines no __call__(z, task_id, native)")

    def refuse(self) -> str | None:
        """Returns why it cannot make `leaves`, or None."""
        return None

    def from_native(self, name: str, spec: ParamSpec, native: Native, collection: str = "params") -> Array:
        """A parameter, float32 if real (or another collection's variable), that starts as the native value."""

        def start(key: Array | None = None) -> Array:
            dtype = jnp.float32 if spec.floating else spec.dtype
            return jnp.zeros(spec.shape, dtype) if native is None else jnp.asarray(native[spec.path], dtype)

        if collection == "params":
            return self.param(name, start)
        return self.variable(collection, name, start).value


class Linear(Generator):
    """theta = H z + b: one product for each parameter, which measures faster than one for all of them.

    Like `MLP`, it cannot be differentiated in forward mode (`jax.jvp`).

    Attributes:
        spread: how spread out each parameter starts (`hyperjax.initializers`).
        use_bias: whether kernels have a learned value that all embeddings share, as vectors always do.
        residual: whether kernels start at their native values, plus a tenth of the spread that z makes of them: to
            start from trained parameters (Ortiz et al., ICLR 2024, equation 6). It needs `use_bias`.

    Raises:
        ValueError: `residual` without `use_bias`; from `HyperNetwork.from_target`.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> model, x = nn.Dense(10), jnp.ones((1, 28))
        >>> hyper = hj.HyperNetwork.from_target(model, x, embedding_dim=8, generator=hj.Linear())
        >>> hj.budget.count_parameters(model, x)  # n = 28 * 10 + 10
        290
        >>> hj.budget.count_parameters(hyper, x)  # n E + n, and an embedding of E = 8
        2618
    """

    spread: Spread = native_spread
    use_bias: bool = True
    residual: bool = False

    def refuse(self) -> str | None:
        """Returns why it cannot make `leaves`, or None: `residual` without `use_bias`."""
        return _refuse_residual(self)

    @nn.compact
    def __call__(self, z, task_id=None, native=None):
        """Returns {path: H z + b, [..., *shape]} of z [..., E]."""
        return {spec.path: head(self, spec, z, native) for spec in self.leaves}


class MLP(Generator):
    """theta = H f(z) + b: hidden layers, normalised to mean square 1, before the head.

    Attributes:
        hidden: widths of the hidden layers.
        activation: of the hidden layers.
        spread, use_bias, residual: as in `Linear`.

    Raises:
        ValueError: `residual` without `use_bias`; from `HyperNetwork.from_target`.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> model, x = nn.Dense(10), jnp.ones((1, 28))  # n = 28 * 10 + 10 parameters
        >>> hyper = hj.HyperNetwork.from_target(model, x, embedding_dim=8, generator=hj.MLP(hidden=(16,)))
        >>> hj.budget.count_parameters(hyper, x)  # n F + n, a layer of (8 + 1) 16, an embedding of 8
        5082
    """

    hidden: tuple[int, ...] = (64,)
    activation: Callable[[Array], Array] = nn.gelu
    spread: Spread = native_spread
    use_bias: bool = True
    residual: bool = False

    def refuse(self) -> str | None:
        """Returns why it cannot make `leaves`, or None: `residual` without `use_bias`."""
        return _refuse_residual(self)

    @nn.compact
    def __call__(self, z, task_id=None, native=None):
        """Returns {path: H f(z) + b, [..., *shape]} of z [..., E]."""
        for width in self.hidden:
            z = self.activation(nn.Dense(width)(z))
        z = rms_norm(z)
        return {spec.path: head(self, spec, z, native) for spec in self.leaves}


class SeparableMLP(Generator):
    """A light generator: every layer and the head in groups that do not see each other, channels shuffled between.

    A layer of width F costs F^2 / G weights instead of F^2, and the head n F / G instead of n F.

    Attributes:
        hidden: widths of the hidden layers, multiples of `groups`.
        groups: G.
        activation, spread, use_bias, residual: as in `MLP`.

    Raises:
        ValueError: `residual` without `use_bias`, or a width that `groups` does not divide; from `from_target`.

    Reference: the channel shuffle is that of Zhang et al., "ShuffleNet", CVPR 2018.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> x = jnp.ones((1, 28))
        >>> for generator in (hj.MLP(hidden=(64, 64)), hj.SeparableMLP(hidden=(64, 64), groups=4)):
        ...     hyper = hj.HyperNetwork.from_target(nn.Dense(10), x, embedding_dim=8, generator=generator)
        ...     print(type(generator).__name__, hj.budget.count_parameters(hyper, x))
        MLP 23594
        SeparableMLP 6634
    """

    hidden: tuple[int, ...] = (64, 64)
    groups: int = 4
    activation: Callable[[Array], Array] = nn.gelu
    spread: Spread = native_spread
    use_bias: bool = True
    residual: bool = False

    def refuse(self) -> str | None:
        """Returns why it cannot make `leaves`, or None: as its class says."""
        bad = [width for width in self.hidden if width % self.groups]
        problem = f"hidden has width {bad[0]}, expected a multiple of groups = {self.groups}" if bad else None
        return problem or _refuse_residual(self)

    @nn.compact
    def __call__(self, z, task_id=None, native=None):
        """Returns {path: H f(z) + b, [..., *shape]} of z [..., E]."""
        G = self.groups
        widths = (*self.hidden, *(() if self.hidden else (z.shape[-1],)))
        f = nn.Dense(widths[0], name="lift")(z)
        for i, width in enumerate(widths):
            if i:
                kernel = self.param(
                    f"group_{i}",
                    nn.initializers.lecun_normal(batch_axis=0),
                    (G, f.shape[-1] // G, width // G),
                    jnp.float32,
                )
                f_Gf = f.reshape(*f.shape[:-1], G, -1)
                out = jnp.einsum("...gf,gfh->...gh", f_Gf, kernel)
                f = jnp.swapaxes(out, -1, -2).reshape(*f.shape[:-1], width)  # the shuffle
                f = f + self.param(f"bias_{i}", nn.initializers.zeros, (width,), jnp.float32).reshape(
                    (1,) * (f.ndim - 1) + (-1,)
                )
            f = self.activation(f)
        f_Gf = rms_norm(f.reshape(*f.shape[:-1], G, -1))
        return {spec.path: self._grouped_head(spec, f_Gf, native) for spec in self.leaves}

    def _grouped_head(self, spec: ParamSpec, f_Gf: Array, native: Native) -> Array:
        rows = -(-spec.size // self.groups)
        shape = (self.groups, rows, f_Gf.shape[-1])
        weights = self.param(spec.name, _scaled_normal(self, spec, native, shape))
        made = jnp.einsum("...gf,gnf->...gn", f_Gf, weights).reshape(*f_Gf.shape[:-2], -1)
        made = made[..., : spec.size].reshape(*f_Gf.shape[:-2], *spec.shape)
        return _add_bias(self, spec, made, native)


def head(module: "Linear | MLP | SeparableMLP", spec: ParamSpec, f: Array, native: Native) -> Array:
    """One parameter [..., *shape] from features [..., F]: weights [*shape, F], stored target-major, and a bias."""
    weights = module.param(spec.name, _scaled_normal(module, spec, native, (*spec.shape, f.shape[-1])))
    made = matvec(weights, f) if f.ndim == 1 else jnp.tensordot(f, weights, axes=(-1, -1))
    return _add_bias(module, spec, made, native)


def _add_bias(module: "Linear | MLP | SeparableMLP", spec: ParamSpec, made: Array, native: Native) -> Array:
    if not module.use_bias and len(spec.shape) > 1:
        return made

    def start(key: Array) -> Array:
        if native is None:
            return jnp.zeros(spec.shape, jnp.float32)
        value = jnp.asarray(native[spec.path], jnp.float32)
        if module.residual:
            return value
        centre = jnp.mean(value) if module.spread is native_spread else 0.0
        return jnp.where(module.spread(spec, value) > 0, centre, value)

    bias = module.param(f"{spec.name}.bias", start)
    return made + bias.reshape((1,) * (made.ndim - bias.ndim) + bias.shape)


def _scaled_normal(module: "Linear | MLP | SeparableMLP", spec: ParamSpec, native: Native, shape: tuple[int, ...]):
    """Initializer of head weights [..., F]: features of mean square 1 then make values with the wanted spread."""

    def start(key: Array) -> Array:
        if native is None:
            return jnp.zeros(shape, jnp.float32)
        scale = module.spread(spec, native[spec.path]) * (0.1 if module.residual else 1.0)
        return (jax.random.normal(key, shape, jnp.float32) * scale / math.sqrt(shape[-1])).astype(jnp.float32)

    return start


def _refuse_residual(module: "Linear | MLP | SeparableMLP") -> str | None:
    wrong = module.residual and not module.use_bias
    return "residual=True needs use_bias=True, which holds what the residual is added to" if wrong else None


@jax.custom_vjp
def matvec(weights: Array, f: Array) -> Array:
    """weights [*shape, F] @ f [F] with a reverse mode made for speed; it has no forward mode (`jax.jvp`)."""
    return weights @ f


def _matvec_forward(weights: Array, f: Array):
    return weights @ f, (weights, f)


def _matvec_backward(residuals, g: Array):
    weights, f = residuals
    df = jnp.sum(g.reshape(-1, 1) * weights.reshape(-1, weights.shape[-1]), axis=0)
    # The gradient of the weights depends on df, and is a broadcast: XLA then need not copy the weights, which a
    # donated step overwrites, and fuses the outer product into the optimizer's update (2.4 times faster on CPU).
    g = g + 0.0 * df[0]
    dw = g[..., None] * f.reshape((1,) * g.ndim + f.shape)
    return dw.astype(weights.dtype), df.astype(f.dtype)


matvec.defvjp(_matvec_forward, _matvec_backward)
