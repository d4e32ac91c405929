"""Light networks that look at a state and give logits for what to compute; float32.

B samples, L positions, D width, U units to choose among.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
PER = ("static", "batch", "sequence", "token")
INIT = nn.initializers.normal(0.02)  # Fedus et al., "Switch transformers" (2021), start small as well


class Router(nn.Module):
    """Logits of U units from a state, scaled by the state's root mean square, which costs less than a normalisation.

    Attributes:
        units: U.
        hidden: width of a tanh layer in between; None has none. For pooled states; for each position it is not light.
        start: the logits to start with.
        seed: of logits that are drawn and look at nothing, to compare with; None learns.
    """

    units: int
    hidden: int | None = None
    start: float = 0.0
    seed: int | None = None

    @nn.compact
    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Returns logits [..., U] of a state [..., D]; the key draws random ones anew, without it they are fixed."""
        if self.seed is not None:
            key = jax.random.key(self.seed) if key is None else key
            return jax.random.logistic(key, (*x.shape[:-1], self.units))
        x = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        if self.hidden is not None:
            x, scale = jnp.tanh(nn.Dense(self.hidden)(x * scale)), jnp.ones(())
        kernel = self.param("kernel", INIT, (x.shape[-1], self.units))
        bias = self.param("bias", nn.initializers.constant(self.start), (self.units,))
        return (x @ kernel) * scale + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class Static(nn.Module):
    """Logits [layers, U] that no input moves.

    Attributes:
        layers: number of layers.
        units: U.
        start: mean of the logits to start with.
        spread: their standard deviation; where all start alike, all pass the threshold in one moment.
        seed: as of `Router`.
    """

    layers: int
    units: int
    start: float = 0.0
    spread: float = 1.0
    seed: int | None = None

    @nn.compact
    def __call__(self) -> Array:
        shape = (self.layers, self.units)
        if self.seed is not None:
            return jax.random.logistic(jax.random.key(self.seed), shape)
        return self.param("logits", lambda key: self.start + self.spread * jax.random.normal(key, shape))


def pool(x_BLD: Array, per: str, mask: Array | None = None, prompt: int | None = None) -> Array:
    """The mean state that decides: [1, D] for a batch, [B, D] for each sequence; of a prompt's positions, if given."""
    x_BLD = x_BLD.astype(jnp.float32)
    if prompt is not None:
        x_BLD, mask = x_BLD[:, :prompt], None if mask is None else mask[:, :prompt]
    there = jnp.ones(x_BLD.shape[:2]) if mask is None else mask.astype(jnp.float32)
    axes = (0, 1) if per == "batch" else (1,)
    total = (x_BLD * there[..., None]).sum(axes) / jnp.maximum(there.sum(axes), 1)[..., None]
    return total[None] if per == "batch" else total


def check_per(per: str, causal: bool, after: int, layers: int, prompt: int) -> None:
    """Raises ValueError for what makes no decision, or one that would look ahead."""
    if per not in PER:
        raise ValueError(f"per is {per!r}, expected one of {', '.join(PER)}")
    if per in ("batch", "sequence"):
        if not 0 <= after < layers:
            raise ValueError(f"after is {after}, expected a layer of 0 to {layers - 1}: it decides for those behind it")
        if causal and prompt < 1:
            raise ValueError(f"prompt is {prompt}, expected 1 or more: a decoder decides from the tokens of its prompt")


def after_prompt(gate: Any, length: int, prompt: int) -> Array:
    """Gates [B, U] of what follows a prompt, as [B, L, U]; the prompt itself, which they were read from, has them open.

    Raises:
        ValueError: nothing follows.
    """
    check_prompt(length, prompt)
    later = (jnp.arange(length) >= prompt)[None, :, None]
    return jnp.where(later, gate[:, None], jnp.ones((), gate.dtype))


def check_prompt(length: int, prompt: int) -> None:
    """Raises ValueError for an input of which nothing follows the prompt."""
    if length <= prompt:
        raise ValueError(f"the input has length {length}, and the first {prompt} tokens decide; give more tokens")


def mask_options(mask: Any, causal: bool) -> dict[str, Any]:
    """What of a mask to pass on to a Transformer.

    Raises:
        ValueError: of a decoder, which takes none.
    """
    if mask is not None and causal:
        raise ValueError(
            f"a mask of shape {mask.shape} is given to a decoder, expected none: no position sees padding behind it"
        )
    return {} if mask is None else {"mask": mask}


def seeded(seed: int | None, number: int) -> int | None:
    """The seed of one of several routers whose choices are drawn at random."""
    return None if seed is None else seed + number
