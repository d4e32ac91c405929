"""Mixed precision: one policy for any module, and the scaling of losses that float16 needs.

    policy = hyperjax.Policy.named("bfloat16")
    model = policy.on(LanguageModel("ln_hyper_lstm", 50, units=1000))
    optimizer = policy.optimizer(optax.adam(1e-3))

Reference: Micikevicius et al., "Mixed Precision Training", ICLR 2018.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hyperjax.hypernet.network import HyperNetwork
from hyperjax.loss_scale import scale_loss
from hyperjax.sharing.tie import Tied

NAMES = ("float32", "bfloat16", "float16")
WHOLE = ("log_alpha",)  # parameters that decide something by small differences


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a network is kept in and computed in.

    Attributes:
        param_dtype: of the parameters, and with them of the optimizer's state.
        compute_dtype: of matrix products, convolutions and what lies between them.
        output_dtype: of the outputs, and so of the loss.

    Raises:
        ValueError: a dtype that is not floating.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> model = hj.Policy.named("bfloat16").on(nn.Sequential([nn.Dense(8), nn.Dense(2)]))
        >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4)))
        >>> sorted({str(leaf.dtype) for leaf in jax.tree.leaves(variables)})  # parameters, and what an optimizer keeps
        ['float32']
        >>> str(model.module.apply(model.policy.cast_to_compute(variables), jnp.ones((1, 4), jnp.bfloat16)).dtype)
        'bfloat16'
        >>> str(model.apply(variables, jnp.ones((1, 4))).dtype)  # computed in bfloat16, put out for the loss
        'float32'
    """

    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    output_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            try:
                dtype = None if value is None else jnp.dtype(value)
            except TypeError:
                dtype = None
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"{name} is {value!r}, expected a floating dtype, such as jnp.bfloat16")
            if jax.dtypes.canonicalize_dtype(dtype) != dtype:
                raise ValueError(f"{name} is {dtype}, which JAX computes in only with jax_enable_x64")
            object.__setattr__(self, name, dtype)

    @classmethod
    def named(cls, name: str) -> "Policy":
        """The policy that computes in `float32`, `bfloat16` or `float16`; parameters and outputs stay float32.

        Raises:
            ValueError: another name.
        """
        if name not in NAMES:
            raise ValueError(f"precision is {name!r}, expected one of {', '.join(NAMES)}")
        return cls(compute_dtype=jnp.dtype(name))

    def on(self, module: Any) -> Any:
        """Returns the module that computes by this policy.

        Modules of this library that keep some of it in float32 (layer norms, states, softmax, logits) are given the
        dtype, and put out their features in it; of a `HyperNetwork`, the generated network follows the policy and its
        generators compute in the parameters' dtype; of a `Tied` network, the module in it. Any other module, as those
        of Flax, has its parameters, but for gates' `log_alpha`, and its inputs cast, and its outputs cast back.
        Statistics of normalisation keep their dtype.

        Args:
            module: a Linen module, a `HyperNetwork` or a `Tied` network.
        """
        if isinstance(module, Tied):
            return module.replace(self.on(module.module))
        ours = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
        if isinstance(module, HyperNetwork):
            if self == Policy() and module.dtype is None:
                return module
            return Mixed(module.clone(dtype=self.compute_dtype), self, cast_params=False)
        config = getattr(module, "config", None)
        if ours and dataclasses.is_dataclass(config) and hasattr(config, "dtype"):
            changed: Any = dataclasses.replace(config, dtype=self.compute_dtype)  # type: ignore[type-var]
            return self._kept(module.clone(config=changed))
        if ours and "dtype" in {field.name for field in dataclasses.fields(module)}:
            return self._kept(module.clone(dtype=self.compute_dtype))
        return module if self == Policy() else Mixed(module, self)

    def optimizer(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns the optimizer that a training step needs: with a scaled loss, if gradients may be float16."""
        return scale_loss(optimizer) if jnp.float16 in (self.param_dtype, self.compute_dtype) else optimizer

    def cast_to_param(self, tree: Any) -> Any:
        """Casts the floating arrays of a pytree to `param_dtype`."""
        return cast(tree, self.param_dtype)

    def cast_to_compute(self, tree: Any) -> Any:
        """Casts the floating arrays of a pytree to `compute_dtype`."""
        return cast(tree, self.compute_dtype)

    def cast_to_output(self, tree: Any) -> Any:
        """Casts the floating arrays of a pytree to `output_dtype`."""
        return cast(tree, self.output_dtype)

    def _kept(self, module: Any) -> Any:
        plain = self.param_dtype == self.output_dtype == jnp.float32
        return module if plain else Mixed(module, self, cast_params=False, cast_inputs=False)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A module whose parameters, inputs and outputs are cast around it; `Policy.on` makes one.

    Attributes:
        module: what computes.
        policy: the dtypes.
        cast_params: whether the module gets parameters in `compute_dtype`.
        cast_inputs: likewise its inputs.
    """

    module: Any
    policy: Policy
    cast_params: bool = True
    cast_inputs: bool = True

    def init(self, key: Any, *inputs: Any, **keywords: Any) -> dict[str, Any]:
        """As `module.init`, with parameters in `param_dtype`."""
        variables = dict(self.module.init(key, *inputs, **keywords))
        return {**variables, "params": self.policy.cast_to_param(variables.get("params", {}))}

    def apply(self, variables: Mapping[str, Any], *inputs: Any, **keywords: Any) -> Any:
        """As `module.apply`, with outputs in `output_dtype`."""
        params = variables.get("params", {})
        if self.cast_params:
            params = jax.tree_util.tree_map_with_path(self._cast_param, params)
        if self.cast_inputs:
            inputs, keywords = self.policy.cast_to_compute((inputs, keywords))
        answer = self.module.apply({**variables, "params": params}, *inputs, **keywords)
        if keywords.get("mutable", False) is not False:  # a pair, with what has changed of the variables
            return self.policy.cast_to_output(answer[0]), answer[1]
        return self.policy.cast_to_output(answer)

    def clone(self, **changes: Any) -> "Mixed":
        """As `module.clone`, by the same policy."""
        return dataclasses.replace(self, module=self.module.clone(**changes))

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "module"), name)

    def _cast_param(self, path: Any, leaf: Any) -> Any:
        kept = str(getattr(path[-1], "key", "")) in WHOLE
        return leaf if kept else self.policy.cast_to_compute(leaf)


def cast(tree: Any, dtype: Any) -> Any:
    """Casts the floating arrays of a pytree; other leaves stay as they are."""

    def one(leaf: Any) -> Any:
        is_array = hasattr(leaf, "dtype") and hasattr(leaf, "astype")
        return leaf.astype(dtype) if is_array and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)
