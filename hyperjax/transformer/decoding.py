"""Text from a decoder, one token at a time.

B samples, P tokens of the prompt, N drawn, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hyperjax.transformer.checks import check_stacked, check_tokens
from hyperjax.transformer.gates import Gates
from hyperjax.transformer.model import Decoder

Array = jax.Array


def generate(
    model: Decoder,
    variables: Any,
    prompt: Array,
    length: int,
    key: Array,
    temperature: float = 1.0,
    gates: Gates | None = None,
) -> Array:
    """Continues texts, with a cache.

    Args:
        model: the decoder, without an encoder.
        variables: its variables.
        prompt: [B, P] int, P of 1 or more.
        length: N, how many tokens to draw.
        key: PRNG key; token n draws from fold_in(key, n).
        temperature: divides the logits; 0 takes the most probable token.
        gates: of all layers, for the prompt and for what follows; arrays without an axis of positions.

    Returns:
        [B, N] int32.

    Raises:
        ValueError: a model with an encoder, no prompt or symbols that are not in the vocabulary, a length below 1, a
            temperature below 0, more positions than the table has, or gates that are a function or by position.
    """
    if not isinstance(model, Decoder) or model.cross:
        raise ValueError(f"the model is {type(model).__name__}, expected a Decoder without an encoder")
    check_tokens(prompt, model.config.vocabulary)
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length is {length}, expected 1 or more tokens")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, expected a number of at least 0 (0: the most probable token)")
    if gates is not None:
        if callable(gates):
            raise ValueError("gates are a function, expected Gates of all layers; call the model with a cache instead")
        check_stacked(gates, model.config.layers)
        by_plan = isinstance(gates.blocks, tuple)
        if (
            by_plan
            or gates.tokens is not None
            or any(jnp.ndim(g) > 3 for g in (gates.heads, gates.blocks) if hasattr(g, "ndim"))
        ):
            raise ValueError("gates by position are given, expected none: what is drawn has no gates of its own")
    model.initialize_cache(1, prompt.shape[1] + length)  # refuses what the table of positions has no room for
    return _generate(model, variables, prompt, length, key, jnp.float32(temperature), gates)


@partial(jax.jit, static_argnames=("model", "length"))
def _generate(model, variables, prompt, length, key, temperature, gates):
    cache = model.initialize_cache(prompt.shape[0], prompt.shape[1] + length)
    out = model.apply(variables, prompt, cache=cache, gates=gates)

    def body(state, n):
        cache, logits = state
        drawn = jax.random.categorical(jax.random.fold_in(key, n), logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)
        out = model.apply(variables, token[:, None], cache=cache, gates=gates)
        return (out["cache"], out["logits"][:, -1]), token

    start = (out["cache"], out["logits"][:, -1])
    return jax.lax.scan(body, start, jnp.arange(length))[1].T
