"""The layers of an encoder or decoder, gated, and with the keys and values of earlier calls.

B samples, L positions, S keys, D width, H heads, K width of a head, k chosen positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.transformer.checks import check_gates, check_stacked
from hyperjax.transformer.config import Config
from hyperjax.transformer.gates import Chosen, Gates
from hyperjax.transformer.layers import Attention, FeedForward, Rotary

Array = jax.Array
Decide = Callable[[int, Array], Gates | None]  # number of a layer and the state before it [B, L, D] -> its gates


class LayerCache(NamedTuple):
    """What a layer keeps of earlier positions: keys and values [B, S, H, K], and whether each took part, [B, S].

    Attributes:
        keys: [B, S, H, K].
        values: [B, S, H, K].
        present: [B, S], whether each took part.
    """

    keys: Array
    values: Array
    present: Array

    def resized(self, positions: int, heads: int) -> "LayerCache":
        """With room for so many positions, at least those that it has, and of the first heads alone."""
        more = [(0, 0), (0, positions - self.keys.shape[1])]
        keys, values = (jnp.pad(held[:, :, :heads], [*more, (0, 0), (0, 0)]) for held in (self.keys, self.values))
        return LayerCache(keys, values, jnp.pad(self.present, more))


class Cache(NamedTuple):
    """What a decoder keeps between calls.

    Attributes:
        layers: of each layer; None of one without attention.
        used: number of positions read, scalar int32.
        memory: keys and values of the encoder's output by layer, and its mask; None without an encoder.
    """

    layers: tuple[LayerCache | None, ...]
    used: Array
    memory: Any = None

    @property
    def size(self) -> int | None:
        """Positions that it can hold; None where no layer has attention."""
        return next((held.present.shape[1] for held in self.layers if held is not None), None)


class Context(NamedTuple):
    """What all layers of one call share.

    Attributes:
        rotary: angles of the positions; None of learned ones.
        mask: [B, L], False for padding; None without any.
        memory: keys and values of an encoder's output for each layer, and its mask [B, S]; None without an encoder.
        key: PRNG key of dropout; None drops nothing.
        used: number of positions in the cache; None without a cache.
    """

    rotary: Rotary | None
    mask: Array | None = None
    memory: Any = None
    key: Array | None = None
    used: Array | None = None


class Stack(nn.Module):
    """Pre-norm layers: x + attention(norm(x)), then x + ffn(norm(x)); a decoder attends to its encoder in between.

    Attributes:
        config: sizes and maps.
        causal: whether no position sees a later one.
        cross: whether the layers attend to an encoder.
    """

    config: Config
    causal: bool = False
    cross: bool = False

    def setup(self) -> None:
        c = self.config
        size, dtype, norm = c.head_size, c.dtype, lambda: nn.LayerNorm(use_bias=False, dtype=c.dtype)

        def each(kind: str, sizes: tuple[int, ...], make: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
            wanted = dict(zip(c.weights_of(kind), sizes, strict=True))
            return {str(number): make(n) for number, n in sorted(wanted.items()) if n}

        def attention(causal: bool) -> Callable[[int], nn.Module]:
            return lambda heads: Attention(heads, size, c.width, causal, dtype)

        self.attention = each("attention", c.heads_by_layer, attention(self.causal))
        self.ffn = each("ffn", c.ffn_by_layer, lambda f: FeedForward(f, c.width, c.activation, dtype))
        norms = {str(number): norm for number in c.weights_of("norm")}
        self.attention_norm = {number: make() for number, make in norms.items()}
        self.ffn_norm = {number: make() for number, make in norms.items()}
        if self.cross:
            self.cross_attention = each("attention", c.cross_heads_by_layer, attention(False))
            self.cross_norm = {number: make() for number, make in norms.items()}

    def __call__(
        self, x_BLD: Array, context: Context, gates: Gates | Decide | None = None, cache: tuple | None = None
    ) -> tuple[Array, list[dict[str, Array]], tuple]:
        """Runs all layers: the state [B, L, D], what each layer did, and its cache.

        Raises:
            ValueError: gates of another number of layers, or that do not fit.
        """
        done, kept = [], []
        if gates is not None and not callable(gates):
            check_stacked(gates, self.config.layers)
        for number in range(self.config.layers):
            decided = gates(number, x_BLD) if callable(gates) else gates and gates.of(number)
            decided = Gates() if decided is None else decided
            held = None if cache is None else cache[number]
            x_BLD, info, held = self.layer(number, x_BLD, context, decided, held)
            done.append({**info, "state": x_BLD})
            kept.append(held)
        return x_BLD, done, tuple(kept)

    def layer(
        self, number: int, x_BLD: Array, context: Context, gates: Gates, cache: LayerCache | None = None
    ) -> tuple[Array, dict[str, Array], LayerCache | None]:
        """One layer: the state after it [B, L, D], its sub-layers' updates by name, and its cache.

        Raises:
            ValueError: gates do not fit, or chosen positions stand beside a cache or a plan for blocks.
        """
        c = self.config
        cross = c.cross_heads_by_layer[number] if self.cross else None
        batch, length = x_BLD.shape[:2]
        check_gates(gates, batch, length, c.heads_by_layer[number], cross, c.ffn_by_layer[number])
        if not isinstance(gates.tokens, Chosen):
            return self._layer(number, x_BLD, context, gates, cache)
        if cache is not None:
            raise ValueError("chosen positions cannot fill a cache; give `tokens` as an array")
        index, weight = gates.tokens

        def take(a: Array) -> Array:
            return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), 1)

        def chosen(gate: Any) -> Any:
            return take(gate) if hasattr(gate, "ndim") and gate.ndim == 3 else gate

        if isinstance(gates.blocks, tuple):
            raise ValueError("a plan for blocks numbers all positions; beside chosen positions give blocks as an array")
        inner = Gates(chosen(gates.heads), chosen(gates.blocks), chosen(gates.cross), gates.layer)
        mask = None if context.mask is None else take(context.mask)
        taken = take(x_BLD)
        rotary = context.rotary and Rotary(*(take(jnp.broadcast_to(a, (batch, *a.shape[1:]))) for a in context.rotary))
        context = context._replace(rotary=rotary, mask=mask)
        new, info, _ = self._layer(number, taken, context, inner, None)
        update = weight[..., None].astype(x_BLD.dtype) * (new - taken)
        rows = jnp.arange(index.shape[0])[:, None]
        return x_BLD.at[rows, index].add(update, unique_indices=True, indices_are_sorted=True), info, None

    def memory(self, states_BSD: Array) -> tuple:
        """Keys and values of an encoder's states, for each layer."""
        numbers = self.config.weights_of("attention")
        heads = self.config.cross_heads_by_layer
        return tuple(
            self.cross_attention[str(n)].keys_values(states_BSD) if h else None
            for n, h in zip(numbers, heads, strict=True)
        )

    def _layer(
        self, number: int, x_BLD: Array, context: Context, gates: Gates, cache: LayerCache | None
    ) -> tuple[Array, dict[str, Array], LayerCache | None]:
        c, before, info = self.config, x_BLD, {}
        norm, attention = str(c.weights_of("norm")[number]), str(c.weights_of("attention")[number])
        keys = [None] * 3 if context.key is None else list(jax.random.split(jax.random.fold_in(context.key, number), 3))

        def add(x: Array, update: Array, key: Array | None) -> Array:
            if gates.layer is not None:
                update = update * jnp.reshape(gates.layer, (-1, 1, 1)).astype(update.dtype)
            return x + drop(key, update, c.dropout)

        if c.heads_by_layer[number]:
            h_BLD = self.attention_norm[norm](x_BLD)
            info["attention"], cache = self._attend(self.attention[attention], h_BLD, context, gates, cache)
            x_BLD = add(x_BLD, info["attention"], keys[0])
        if self.cross and c.cross_heads_by_layer[number]:
            by_layer, mask = context.memory
            mask = None if mask is None else mask[:, None, None, :]
            h_BLD = self.cross_norm[norm](x_BLD)
            info["cross"] = self.cross_attention[attention](h_BLD, by_layer[number], mask=mask, gates=gates.cross)
            x_BLD = add(x_BLD, info["cross"], keys[1])
        if c.ffn_by_layer[number]:
            ffn = self.ffn[str(c.weights_of("ffn")[number])]
            info["ffn"] = ffn(self.ffn_norm[norm](x_BLD), gates.blocks)
            x_BLD = add(x_BLD, info["ffn"], keys[2])
        if gates.tokens is not None:
            x_BLD = before + gates.tokens[..., None].astype(x_BLD.dtype) * (x_BLD - before)
        return x_BLD, info, cache

    def _attend(
        self, attention: Any, h_BLD: Array, context: Context, gates: Gates, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        keys, values = attention.keys_values(h_BLD, context.rotary)
        here = context.mask
        if gates.tokens is not None:
            takes_part = gates.tokens != 0
            here = takes_part if here is None else here & takes_part
        if cache is None:
            mask = None if here is None else here[:, None, None, :]
            return attention(h_BLD, (keys, values), context.rotary, mask, gates.heads), None
        at, length = context.used, h_BLD.shape[1]
        if at is None:
            raise ValueError("a cache is given and context.used is None, expected the number of positions in it")
        here = jnp.ones(h_BLD.shape[:2], bool) if here is None else here
        put = jax.lax.dynamic_update_slice_in_dim
        cache = LayerCache(
            put(cache.keys, keys, at, 1), put(cache.values, values, at, 1), put(cache.present, here, at, 1)
        )
        before = jnp.arange(cache.present.shape[1])[None] <= at + jnp.arange(length)[:, None]
        mask = cache.present[:, None, None, :] & before[None, None]
        out = attention(h_BLD, (cache.keys, cache.values), context.rotary, mask, gates.heads, ordered=False)
        return out, cache


def drop(key: Array | None, x: Array, rate: float) -> Array:
    """Dropout: zeroes elements with probability `rate` and scales the others up; nothing without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


__all__ = ["Cache", "Context", "Decide", "LayerCache", "Stack", "drop"]
