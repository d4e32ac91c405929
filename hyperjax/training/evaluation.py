"""Exact evaluation of a recurrent model: every character once, the same number at any batch size.

n windows, B streams, T characters a window.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array
TOLERANCE = 1e-6


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
        bpc: mean cross entropy, bits per character.
        characters: number of characters, each counted once.
        passes: how often the split was read.
    """

    bpc: float
    characters: int
    passes: int


def make_evaluate(
    predict: Callable[[Any, Array, Any], tuple[Array, Any]],
) -> Callable[[Any, Any, Mapping[str, Any]], Evaluation]:
    """Builds an evaluator that reads a split as one sequence although it is cut into B streams.

    All streams start from the given state and are read in parallel. The next pass starts stream b from the state in
    which the last one left stream b - 1. After k passes the context of every character reaches back through k - 1
    streams, after B passes through all, so the limit does not depend on B. As a recurrent network forgets, two or
    three passes reach it: they end when the bpc, or every state handed on, changes by less than 1e-6. (A network
    with chaotic dynamics, which weights far from any trained ones can have, blows rounding up, and two batch sizes
    round differently.)

    Args:
        predict: (params, inputs [B, T], carry) -> (logits [B, T, V], new carry), without dropout.

    Returns:
        evaluate(params, carry, windows) -> Evaluation. The leaves of `carry` are [B, ...] and hold the state that
        the split starts from; `windows` holds `inputs`, `targets` and `mask`, each [n, B, T], where stream b goes on
        where stream b - 1 ends.

    Raises:
        ValueError: from evaluate: padding stands anywhere but at the end of the split, or windows and carry disagree
            about B.
    """

    @jax.jit
    def one_pass(params, carry, windows):
        def window(carry, w):
            logits, carry = predict(params, w["inputs"], carry)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), w["targets"])
            return carry, jnp.sum(nats * w["mask"], -1)

        return jax.lax.scan(window, carry, windows)

    @jax.jit
    def hand_on(first, last):
        return jax.tree.map(lambda c_1, c_n: jnp.concatenate([c_1[:1], c_n[:-1]]), first, last)

    @jax.jit
    def change(old, new):
        gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), old, new)
        return jnp.max(jnp.stack(jax.tree.leaves(gaps)))

    def evaluate(params, carry, windows) -> Evaluation:
        mask = np.asarray(windows["mask"])
        batch, count = mask.shape[1], int(mask.sum())
        flat = mask.transpose(1, 0, 2).reshape(-1)
        if count == 0 or not flat[:count].all():
            raise ValueError(
                f"mask has {count} characters, expected one or more and all padding after the last of them"
            )
        if any(c.shape[:1] != (batch,) for c in jax.tree.leaves(carry)):
            shapes = sorted({c.shape for c in jax.tree.leaves(carry)})
            raise ValueError(f"carry has leaves {shapes}, but the windows have {batch} streams; give [{batch}, ...]")
        windows = {name: windows[name] for name in ("inputs", "targets", "mask")}
        start, previous, passes = carry, np.inf, 0
        while passes < batch:
            last, nats = one_pass(params, start, windows)
            passes += 1
            bpc = float(np.asarray(nats, np.float64).sum() / count / np.log(2))
            following = hand_on(carry, last)
            if not np.isfinite(bpc) or abs(bpc - previous) < TOLERANCE or change(start, following) < TOLERANCE:
                break
            start, previous = following, bpc
        return Evaluation(bpc, count, passes)

    return evaluate
