"""A few widths of one Transformer, of which a prompt, sequence or batch chooses one.

B samples, L positions, D width, J buckets, H heads, N blocks, P tokens of a prompt.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import estimators
from hyperjax.pruning.flops import costs
from hyperjax.pruning.gated import check_sizes
from hyperjax.pruning.routers import Router, after_prompt, check_per, mask_options, pool
from hyperjax.transformer import Config, Decoder, Encoder, Gates

Array = jax.Array
HIDDEN = 32  # width inside of the router


class Buckets(nn.Module):
    """A decoder or encoder that computes one of a few widths: nested shares of its heads and hidden units.

    Bucket j keeps the first heads and blocks of every layer behind the first ones, `shares[j]` of them, so that what a
    narrow one computes is part of what the wide ones do. In training a bucket is drawn by Gumbel-softmax,
    straight-through, for each sequence or batch; served, the likeliest one is computed by `BucketServer`, and nothing
    else. A decoder decides from its prompt, which is computed whole, for what follows it.

    Attributes:
        config: sizes; equal in all layers.
        causal: whether it is a decoder.
        shares: of heads and blocks that each bucket keeps, rising, in (0, 1]; rounded up to whole ones.
        per: what has a width of its own: "sequence" or "batch".
        blocks: number of blocks of each feed-forward network.
        after: number of layers, computed whole, whose state decides for the others.
        prompt: of a decoder: number of tokens that decide.
        seed: of buckets that are drawn at random, to compare with, so that costs are `budget` on average.
        budget: share of all operations of random buckets; None else.

    Raises:
        ValueError: a setting is out of range, shares do not rise, or seed comes without budget; when it is called.

    Reference:
        Yu et al., "Slimmable neural networks" (2019), for nested widths.
    """

    config: Config
    causal: bool = True
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    per: str = "sequence"
    blocks: int = 8
    after: int = 1
    prompt: int = 32
    seed: int | None = None
    budget: float | None = None

    def setup(self) -> None:
        check_per(self.per, self.causal, self.after, self.config.layers, self.prompt)
        if self.per not in ("sequence", "batch"):
            raise ValueError(f"per is {self.per!r}, expected sequence or batch")
        check_sizes(self.config, self.blocks)
        rising = all(a < b for a, b in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or not rising or not 0 < self.shares[0] <= self.shares[-1] <= 1:
            raise ValueError(f"shares are {self.shares}, expected rising numbers in (0, 1]")
        if (self.seed is None) != (self.budget is None):
            raise ValueError(
                f"seed is {self.seed} and budget {self.budget}, expected both, for random buckets, or none"
            )
        self.model = (Decoder if self.causal else Encoder)(self.config)
        self.router = Router(len(self.shares), HIDDEN)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads of each bucket."""
        return tuple(int(np.ceil(round(share * self.config.heads_by_layer[0], 6))) for share in self.shares)

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Number of blocks of each bucket."""
        return tuple(int(np.ceil(round(share * self.blocks, 6))) for share in self.shares)

    def __call__(
        self,
        tokens: Array,
        key: Array | None = None,
        *,
        mask: Array | None = None,
        temperature: Any = 1.0,
        settled: Any = False,
    ) -> dict[str, Any]:
        """Runs the whole network, multiplied by the gates of the bucket chosen: to train and to evaluate.

        Args:
            tokens: [B, L] int; of a decoder longer than the prompt.
            key: PRNG key of choice and dropout, for training; without it the likeliest bucket is taken.
            mask: [B, L] bool, False for padding; of encoders.
            temperature: of the Gumbel-softmax.
            settled: whether the likeliest bucket is taken although there is a key; may be traced. For the last steps
                of training.

        Returns:
            What the Transformer returns; `gates`, of all layers; `opened`, those of the likeliest bucket, with the
            gradient of the probabilities; `bucket` [B, J], one-hot; `share` [B] of the operations that the likeliest
            bucket leaves, with the same gradient; `losses`: empty.

        Raises:
            ValueError: tokens are no whole numbers [B, L], a mask is given to a decoder or is of another shape, or a
                decoder's input is no longer than its prompt.
        """
        first, rest = (None, None) if key is None else tuple(jax.random.split(key))
        found: dict[str, Any] = {}

        def decide(number: int, x_BLD: Array) -> Gates | None:
            if number < self.after:
                return None
            if number == self.after:
                found["logits"] = self.decide(x_BLD, mask, first)
                bucket_BJ = self._draw(found["logits"], first, temperature, settled)
                found["bucket"] = jnp.broadcast_to(bucket_BJ, (len(tokens), len(self.shares)))
                found["gates"] = self.gates(found["bucket"], tokens.shape[1])
            return found["gates"]

        options = mask_options(mask, self.causal)
        out = self.model(tokens, gates=decide, key=rest, **options)
        likeliest_BJ = jnp.broadcast_to(estimators.top_k_mask(found["logits"], 1), found["bucket"].shape)
        opened = self._of_all(self.gates(likeliest_BJ, tokens.shape[1]))
        return {
            **out,
            "gates": self._of_all(found["gates"]),
            "opened": opened,
            "bucket": found["bucket"],
            "share": (likeliest_BJ * jnp.asarray(self.costs(tokens.shape[1]))[None]).sum(-1),
            "losses": {},
        }

    def decide(self, x_BLD: Array, mask: Array | None = None, key: Array | None = None) -> Array:
        """Logits of the buckets, [B, J], or [1, J] for a batch, from the state before layer number `after`."""
        pooled = pool(x_BLD, self.per, mask, self.prompt if self.causal else None)
        if self.seed is None:
            return self.router(pooled)
        key = jax.random.key(self.seed) if key is None else jax.random.fold_in(key, 1)
        drawn = jax.random.gumbel(key, (len(pooled), len(self.shares)))  # the largest sum is a draw of the distribution
        return drawn + jnp.asarray(self._random_bias(x_BLD.shape[1]))[None]

    def gates(self, bucket_BJ: Array, length: int) -> Gates:
        """Gates of a layer behind the first ones, from one-hot buckets."""

        def masks(kept: tuple[int, ...], units: int) -> Array:
            gate = bucket_BJ @ jnp.asarray([[float(u < k) for u in range(units)] for k in kept])
            return after_prompt(gate, length, self.prompt) if self.causal else gate

        return Gates(
            heads=masks(self.heads, self.config.heads_by_layer[0]), blocks=masks(self.kept_blocks, self.blocks)
        )

    def costs(self, length: int) -> np.ndarray:
        """Share of the operations that each bucket leaves, [J], at a length."""
        whole = costs(self.config, length, causal=self.causal)
        later = (length - self.prompt) / length if self.causal else 1.0
        found = []
        for heads, blocks in zip(self.heads, self.kept_blocks, strict=True):
            saved = 0.0
            for l in range(self.after, self.config.layers):
                saved += (whole.heads[l] - heads) * (whole.attention[l] + whole.scores[l])
                saved += (1 - blocks / self.blocks) * whole.units[l] * whole.unit[l]
            found.append(1 - later * saved / whole.total)
        return np.asarray(found, np.float32)

    def _of_all(self, gates: Gates) -> Gates:
        """Gates of all layers, of those of a layer behind the first ones, which are whole."""

        def stacked(gate: Array) -> Array:
            return jnp.stack([jnp.ones_like(gate)] * self.after + [gate] * (self.config.layers - self.after))

        return jax.tree.map(stacked, gates)

    def _draw(self, logits: Array, key: Array | None, temperature: Any, settled: Any) -> Array:
        likeliest = estimators.top_k_mask(logits, 1)
        if key is None or self.seed is not None:
            return likeliest
        drawn = estimators.gumbel_softmax(jax.random.fold_in(key, 2), logits, temperature, hard=True)
        return drawn if settled is False else jnp.where(settled, likeliest, drawn)

    def _random_bias(self, length: int) -> np.ndarray:
        """Logits of a distribution over buckets whose mean cost is the budget: exponential in the cost."""
        cost, low, high = self.costs(length), -200.0, 200.0
        if not cost[0] <= self.budget <= cost[-1]:
            raise ValueError(
                f"budget is {self.budget}, expected {cost[0]:.3f} to {cost[-1]:.3f}, what the buckets cost"
            )
        for _ in range(60):
            middle = (low + high) / 2
            p = np.exp(middle * (cost - cost.max() * (middle > 0) - cost.min() * (middle <= 0)))
            low, high = (middle, high) if (p * cost).sum() / p.sum() < self.budget else (low, middle)
        return np.asarray(middle * (cost - cost.mean()), np.float32)
