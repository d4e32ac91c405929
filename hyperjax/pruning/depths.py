"""Mixture-of-Depths: some layers compute only the tokens that need it.

B samples, L positions, D width, k chosen positions.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from hyperjax.pruning.flops import costs, share
from hyperjax.pruning.routers import Router, mask_options, seeded
from hyperjax.transformer import Chosen, Config, Decoder, Encoder, Gates

Array = jax.Array


class MixtureOfDepths(nn.Module):
    """A Transformer of which every second layer takes in only a share of the positions: x + r f(x).

    With a key, and in an encoder always, the k positions with the largest router score are gathered and computed, and
    nothing else: k is fixed, so that shapes are. **A score among the k largest depends on later tokens: training looks
    ahead.** A decoder without a key decides for each position by itself, through a predictor that learned who would be
    among the k: causal, which is what to report and what decodes. It computes a position whose predictor is above a
    threshold that follows the quantile `1 - keep` of the predictors, so that as many are taken as in training, on
    average; at a fixed probability of a half rare choices would never be predicted. Such masks save nothing in a
    parallel pass; decoding one sequence by `skip_decode` skips what they leave out.

    It pays in training and, in an encoder, in serving. Measured on two CPU cores (width 256, an eighth of the
    positions): a training step takes 0.57 to 0.64 of a dense one; an encoder is 1.5 times as fast as dense at batch 1,
    1.7 at batch 8 and 32.

    Raises:
        ValueError: `keep` or `every` is out of range, or a decoder gets a mask.

    Attributes:
        config: sizes.
        causal: whether it is a decoder.
        keep: share of the positions that such layers compute, in (0, 1].
        every: 2 makes every second layer such a one, the second first; 1 all.
        seed: of scores drawn at random, to compare with; None learns.

    Reference:
        Raposo et al., "Mixture-of-Depths: dynamically allocating compute in transformer-based language models" (2024).
    """

    config: Config
    causal: bool = True
    keep: float = 0.125
    every: int = 2
    seed: int | None = None

    def setup(self) -> None:
        if not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}, expected a share of the positions in (0, 1]")
        if not 1 <= self.every <= self.config.layers:
            raise ValueError(f"every is {self.every}, expected 1 to {self.config.layers}, the number of layers")
        self.model = (Decoder if self.causal else Encoder)(self.config)
        self.routers = {str(l): Router(1, seed=seeded(self.seed, l)) for l in self.routed}
        learns = self.causal and self.seed is None
        rare = math.log(self.keep / (1 - self.keep)) if self.keep < 1 else 4.0
        self.predictors = {str(l): Router(1, start=rare) for l in self.routed} if learns else {}
        start = nn.initializers.constant(rare)
        self.thresholds = {str(l): self.param(f"threshold_{l}", start, ()) for l in self.routed} if learns else {}

    @property
    def routed(self) -> tuple[int, ...]:
        """Numbers of the layers that choose."""
        return tuple(range(self.every - 1, self.config.layers, self.every))

    def chosen(self, length: int) -> int:
        """k, how many of so many positions are chosen."""
        return max(1, math.ceil(round(self.keep * length, 6)))

    def __call__(
        self,
        tokens: Array,
        key: Array | None = None,
        *,
        mask: Array | None = None,
        temperature: Any = 1.0,
        settled: Any = False,
    ) -> dict[str, Any]:
        """Runs the network.

        Args:
            tokens: [B, L] int.
            key: PRNG key of dropout (and of random scores), for training.
            mask: [B, L] bool, False for padding, which is chosen last; of encoders.
            temperature: has no effect.
            settled: has no effect: nothing is drawn.

        Returns:
            What the Transformer returns; `gates`, with `tokens` [layers, B, L], 0 or 1; `share` of the operations that
            they leave, scalar or [B]; `losses`: {"predictor": cross-entropy of the predictors, and quantile
            loss of their thresholds}.

        Raises:
            ValueError: tokens are no whole numbers [B, L], or a mask is given to a decoder or is of another shape.
        """
        first, rest = (None, None) if key is None else tuple(jax.random.split(key))
        found: dict[int, Array] = {}
        losses = []

        def decide(number: int, x_BLD: Array) -> Gates | None:
            if number not in self.routed:
                found[number] = jnp.ones(x_BLD.shape[:2])
                return None
            scores, predicted = self._scores(number, x_BLD, first, mask)
            weight = self.weight(scores)
            if key is None and self.causal:
                found[number] = self.takes_part(number, predicted)
                return Gates(tokens=found[number] * weight)
            _, index = jax.lax.top_k(scores, self.chosen(scores.shape[1]))
            index = jnp.sort(index, -1)
            rows = jnp.arange(index.shape[0])[:, None]
            found[number] = jnp.zeros(scores.shape).at[rows, index].set(1.0, unique_indices=True)
            if predicted is not None and self.seed is None:
                gap = jax.lax.stop_gradient(predicted) - self.thresholds[str(number)]
                quantile = jnp.maximum((1 - self.keep) * gap, -self.keep * gap).mean()
                losses.append(optax.sigmoid_binary_cross_entropy(predicted, found[number]).mean() + quantile)
            return Gates(tokens=Chosen(index, jnp.take_along_axis(weight, index, 1)))

        options = mask_options(mask, self.causal)
        out = self.model(tokens, gates=decide, key=rest, **options)
        gates = Gates(tokens=jnp.stack([found[l] for l in range(self.config.layers)]))
        counted = share(costs(self.config, tokens.shape[1], causal=self.causal), gates, mask)
        total = {"predictor": sum(losses, jnp.zeros(())) / max(1, len(losses))} if self.causal else {}
        return {**out, "gates": gates, "share": counted, "losses": total}

    def decide_one(self, number: int, x_BLD: Array) -> Array | None:
        """What a token is multiplied by in a layer, 0 if it skips it, [B, L]; None in layers that all take."""
        if number not in self.routed:
            return None
        scores, predicted = self._scores(number, x_BLD, None, None)
        return self.takes_part(number, predicted) * self.weight(scores)

    def takes_part(self, number: int, predicted: Array) -> Array:
        """1 where a decoder's own decision is to compute a token, else 0."""
        if self.keep == 1:
            return jnp.ones_like(predicted)
        if self.seed is None:
            return (predicted > self.thresholds[str(number)]).astype(jnp.float32)
        return (jax.nn.sigmoid(predicted) > 1 - self.keep).astype(jnp.float32)

    def weight(self, scores: Array) -> Array:
        """r, what the update of a token with such a score is multiplied by."""
        return jax.nn.sigmoid(scores) if self.seed is None else jnp.ones_like(scores)

    def _scores(self, number: int, x_BLD: Array, key: Array | None, mask: Array | None) -> tuple[Array, Any]:
        """Scores of the positions [B, L], and of a decoder the predictor's logits."""
        key = None if key is None else jax.random.fold_in(key, number)
        scores = self.routers[str(number)](x_BLD, key)[..., 0]
        if not self.causal:
            return (scores if mask is None else jnp.where(mask, scores, -1e9)), None
        if self.seed is not None:
            return scores, scores
        return scores, self.predictors[str(number)](jax.lax.stop_gradient(x_BLD))[..., 0]
