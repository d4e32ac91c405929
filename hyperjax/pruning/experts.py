"""Experts: contiguous blocks of a feed-forward network, of which each token computes a few.

T positions of all samples, L positions of one, B samples, D width, N blocks, k of them for a position, C capacity.
"""

import math
import numbers
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.pruning.choices import TopK
from hyperjax.pruning.flops import costs, share
from hyperjax.pruning.gated import check_sizes
from hyperjax.pruning.routers import Router, mask_options, seeded
from hyperjax.transformer import Config, Decoder, Dispatch, Encoder, Gates

Array = jax.Array


class Experts(nn.Module):
    """A Transformer whose tokens each compute k of N blocks of the feed-forward networks.

    The blocks are those of the plain network, so the parameters are too, beside the routers. `routing="token"`: each
    token takes its k best blocks, weighted by a softmax over them times k; `"expert"`: each block takes its
    best tokens, k L / N of each sequence, which needs no balance but looks at all positions: refused in a decoder.

    Two ways to run it. `capacity=None` computes all blocks and multiplies by gates: exact and causal, no faster than
    the plain network; to evaluate. With a capacity, each block gathers the tokens that chose it, capacity * k T / N at
    most, earlier positions first; the rest is dropped. It pays in training (a quarter or half of the blocks, capacity
    1.25, on two CPU cores: a step takes 0.69 or 0.81 of a dense one) and little in serving (1.3 or 1.2 times as fast at
    4,096 positions). At 128 positions it is **slower than dense**, and so it is with capacity 2 and half the blocks,
    where all places are computed. Where one token is decoded at a time, use a plain network.

    Attributes:
        config: sizes; equal in all layers.
        causal: whether it is a decoder.
        blocks: N.
        keep: k, or a share of the blocks.
        routing: "token" or "expert".
        capacity: places of each block in training, as a multiple of a balanced load; 1.25 is usual.
        seed: of routing that is drawn at random, to compare with; None learns.

    Raises:
        ValueError: a setting is out of range, blocks do not divide the feed-forward networks, or routing by expert in a
            decoder; when it is called.

    Reference:
        Fedus et al., "Switch transformers" (2021), for capacity and balance; Zoph et al., "ST-MoE" (2022), eq. 5, for
        the z-loss; Zhou et al., "Mixture-of-experts with expert choice routing" (2022).
    """

    config: Config
    causal: bool = True
    blocks: int = 8
    keep: int | float = 2
    routing: str = "token"
    capacity: float | None = 1.25
    seed: int | None = None

    def setup(self) -> None:
        check_sizes(self.config, self.blocks)
        if self.routing not in ("token", "expert"):
            raise ValueError(f"routing is {self.routing!r}, expected token or expert")
        if self.causal and self.routing == "expert":
            raise ValueError(
                "routing is 'expert' in a causal model: a block would choose among tokens that decoding does not have "
                "yet; use routing='token'"
            )
        check_capacity(self.capacity)
        TopK(self.keep).number(self.blocks)
        self.model = (Decoder if self.causal else Encoder)(self.config)
        self.routers = [Router(self.blocks, seed=seeded(self.seed, l)) for l in range(self.config.layers)]

    def places(self, shape: tuple[int, ...], capacity: float) -> int:
        """C, for tokens of shape [B, L]; blocks that choose need no more places than they choose tokens."""
        if self.routing == "expert":
            return shape[0] * most_tokens(shape[1], self.chosen, self.blocks)
        return places((*shape, self.blocks), self.chosen, capacity)

    @property
    def chosen(self) -> int:
        """k, how many blocks a token computes."""
        return TopK(self.keep).number(self.blocks)

    def __call__(
        self,
        tokens: Array,
        key: Array | None = None,
        *,
        mask: Array | None = None,
        temperature: Any = 1.0,
        settled: Any = False,
        capacity: Any = "config",
    ) -> dict[str, Any]:
        """Runs the network.

        Args:
            tokens: [B, L] int.
            key: PRNG key of dropout (and of random routing), for training.
            mask: [B, L] bool, False for padding, which takes no places; of encoders.
            temperature: has no effect.
            settled: has no effect: nothing is drawn.
            capacity: places of each block, or None; by default the module's with a key, and None without.

        Returns:
            What the Transformer returns; `gates`, `blocks` [layers, B, L, N], 0 or more; `share` [B] of the operations
            that the chosen blocks leave, or with a capacity all its places; `losses`: {"balance": ..., "z": ...},
            means over layers, to be weighted by about 1e-2 and 1e-3 (balance only of routing by token); `dropped`:
            share of the choices without a place.

        Raises:
            ValueError: tokens are no whole numbers [B, L], a mask is given to a decoder or is of another shape, or a
                capacity is not above 0.
        """
        if capacity == "config":
            capacity = None if key is None else self.capacity
        check_capacity(capacity)
        first, rest = (None, None) if key is None else tuple(jax.random.split(key))
        found: list[tuple[Array, ...]] = []

        def decide(number: int, x_BLD: Array) -> Gates:
            layer_key = None if first is None else jax.random.fold_in(first, number)
            logits = self.routers[number](x_BLD, layer_key)
            choose = choose_blocks if self.routing == "token" else choose_tokens
            gates_BLN = choose(logits, self.chosen, mask)
            balance = balance_loss(logits, gates_BLN, mask)
            if capacity is None:
                found.append((gates_BLN, balance, z_loss(logits, mask), jnp.zeros(())))
                return Gates(blocks=gates_BLN)
            plan, dropped = dispatch(gates_BLN, self.places(tokens.shape, capacity))
            found.append((gates_BLN, balance, z_loss(logits, mask), dropped))
            return Gates(blocks=plan)

        options = mask_options(mask, self.causal)
        out = self.model(tokens, gates=decide, key=rest, **options)
        gates_NBLN, balance, z, dropped = (jnp.stack(each) for each in zip(*found, strict=True))
        if capacity is None:
            opened = (gates_NBLN > 0).astype(jnp.float32)
        else:
            filled = self.places(tokens.shape, capacity) / tokens.size
            opened = jnp.full((self.config.layers, tokens.shape[0], 1), filled)
        counted = share(costs(self.config, tokens.shape[1], causal=self.causal), Gates(blocks=opened), mask)
        losses = {"z": z.mean()} | ({"balance": balance.mean()} if self.routing == "token" else {})
        gates = Gates(blocks=gates_NBLN)
        return {**out, "gates": gates, "share": counted, "losses": losses, "dropped": dropped.mean()}


def choose_blocks(logits_BLN: Array, k: int, mask: Array | None = None) -> Array:
    """Each token's k best blocks: gates [B, L, N], a softmax over them times k, elsewhere 0; 0 for padding."""
    best, index = jax.lax.top_k(logits_BLN, k)
    weight = k * jax.nn.softmax(best, -1)
    gates = (jax.nn.one_hot(index, logits_BLN.shape[-1]) * weight[..., None]).sum(-2)
    return gates if mask is None else gates * mask[..., None]


def choose_tokens(logits_BLN: Array, k: int, mask: Array | None = None) -> Array:
    """Each block's k / N best tokens of each sequence, at least one: gates [B, L, N], N softmax over blocks, else 0.

    Padding is not chosen, nor counted: an answer depends neither on it nor on other sequences.
    """
    _, length, blocks = logits_BLN.shape
    weight = blocks * jax.nn.softmax(logits_BLN, -1)
    if mask is None:
        count = jnp.asarray(most_tokens(length, k, blocks))
    else:
        weight = weight * mask[..., None]
        count = jnp.maximum(1, jnp.round(k * mask.sum(1) / blocks))[:, None, None]
    rank = jnp.argsort(jnp.argsort(-weight, 1), 1)
    return jnp.where(rank < count, weight, 0.0)


def most_tokens(length: int, k: int, blocks: int) -> int:
    """How many tokens a block chooses of so many."""
    return max(1, round(k * length / blocks))


def places(shape: tuple[int, ...], k: int, capacity: float) -> int:
    """C, for gates of shape [B, L, N]: capacity times a balanced load, at least 4, at most all positions."""
    batch, length, blocks = shape
    return min(batch * length, max(4, round(capacity * k * batch * length / blocks)))


def dispatch(gates_BLN: Array, capacity: int) -> tuple[Dispatch, Array]:
    """Gives each block the positions whose gate of it is above 0, earlier ones first, at most `capacity`.

    Earlier means by position and then by sample, so that no later token takes an earlier one's place.

    Args:
        gates_BLN: [B, L, N].
        capacity: C.

    Returns:
        The plan, and the share of the open gates that found no place.
    """
    batch, length, blocks = gates_BLN.shape
    gates_NT = gates_BLN.transpose(2, 1, 0).reshape(blocks, -1)
    wanted = gates_NT > 0
    order = jnp.where(wanted, jnp.arange(length * batch)[None], length * batch)
    place = jnp.sort(order, -1)[:, :capacity]
    weight = jnp.take_along_axis(gates_NT, jnp.minimum(place, length * batch - 1), 1)
    weight = jnp.where(place < length * batch, weight, 0.0)
    index = place % batch * length + place // batch
    index = jnp.where(place < length * batch, index, length * batch)
    dropped = 1 - (weight > 0).sum() / jnp.maximum(wanted.sum(), 1)
    return Dispatch(index, weight), dropped


def balance_loss(logits_BLN: Array, gates_BLN: Array, mask: Array | None = None) -> Array:
    """N mean_n(f_n P_n) N / k: 1 if all blocks are chosen equally often; f share of tokens, P mean probability."""
    there = jnp.ones(logits_BLN.shape[:2]) if mask is None else mask.astype(jnp.float32)
    weight = (there / jnp.maximum(there.sum(), 1))[..., None]
    chosen = (jax.lax.stop_gradient(gates_BLN) > 0).astype(jnp.float32)
    f_N = (chosen * weight).sum((0, 1))
    p_N = (jax.nn.softmax(logits_BLN, -1) * weight).sum((0, 1))
    return logits_BLN.shape[-1] * (f_N / jnp.maximum(f_N.sum(), 1e-9) * p_N).sum()


def z_loss(logits_BLN: Array, mask: Array | None = None) -> Array:
    """Mean square of the log-sum-exp of the logits: keeps them small, and so float32 routing exact."""
    square = jnp.square(jax.nn.logsumexp(logits_BLN, -1))
    return square.mean() if mask is None else (square * mask).sum() / jnp.maximum(mask.sum(), 1)


def check_capacity(capacity: float | None) -> None:
    """Raises ValueError for a capacity of no places."""
    number = isinstance(capacity, numbers.Real) and not isinstance(capacity, bool)
    if capacity is not None and not (number and 0 < capacity < math.inf):
        raise ValueError(f"capacity is {capacity!r}, expected a number above 0, such as 1.25, or None for all")
