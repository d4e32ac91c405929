"""Text from a language model, one symbol at a time.

Shape letters: P symbols of the prime, N symbols drawn, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.recurrent.language_model import LanguageModel

Array = jax.Array


def generate(
    model: LanguageModel, params: Any, prime_ids: Any, length: int, key: Array, temperature: float = 1.0
) -> Array:
    """Continues a text.

    Args:
      model: the language model.
      params: its parameters.
      prime_ids: [P] ids to read first, known when `jit` traces; P = 0 starts from no text at all.
      length: N >= 1, how many symbols to draw.
      key: PRNG key; symbol n draws from fold_in(key, n).
      temperature: divides the logits; 0 takes the most probable symbol.

    Returns:
      [N] int32 ids, without the prime.

    Raises:
      ValueError: a length < 1, a temperature < 0 or not finite, prime ids that are no integers of the vocabulary.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import hyperjax as hj
      >>> model = hj.LanguageModel("lstm", vocabulary=4, units=8)
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
      >>> params["readout"]["bias"] = jnp.array([0.0, 0.0, 99.0, 0.0])  # a text of nothing but symbol 2
      >>> hj.generate(model, params, prime_ids=[0, 1], length=5, key=jax.random.key(1)).tolist()
      [2, 2, 2, 2, 2]
    """
    prime = np.asarray(prime_ids).reshape(-1)
    if length < 1:
        raise ValueError(f"length is {length}; ask for at least 1 symbol")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; give a finite number >= 0 (0 takes the most probable symbol)")
    if prime.size and not np.issubdtype(prime.dtype, np.integer):
        raise ValueError(f"prime ids have type {prime.dtype}; give integers")
    if prime.size and not (prime.min() >= 0 and prime.max() < model.vocabulary):
        raise ValueError(
            f"prime ids span {prime.min()}..{prime.max()}; the vocabulary has ids 0..{model.vocabulary - 1}"
        )
    start = jnp.asarray(np.concatenate([[-1], prime]), jnp.int32)
    return _generate(model, params, start, key, jnp.float32(temperature), length)


@partial(jax.jit, static_argnames=("model", "length"))
def _generate(model, params, start, key, temperature, length):
    out = model.apply({"params": params}, start[None])

    def body(state, n):
        carry, logits = state
        drawn = jax.random.categorical(jax.random.fold_in(key, n), logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
        out = model.apply({"params": params}, token[None, None], carry)
        return (out["carry"], out["logits"][0, -1]), token

    return jax.lax.scan(body, (out["carry"], out["logits"][0, -1]), jnp.arange(length))[1]
