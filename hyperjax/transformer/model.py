"""Encoder, decoder, and both together.

B samples, L positions, S positions of the encoder, D width, V outputs.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.transformer.checks import check_cache, check_mask, check_memory, check_tokens
from hyperjax.transformer.config import Config
from hyperjax.transformer.gates import Gates
from hyperjax.transformer.layers import Rotary
from hyperjax.transformer.stack import Cache, Context, Decide, LayerCache, Stack, drop

Array = jax.Array


class _Transformer(nn.Module):
    """Embedding, layers, normalisation and output: what `Encoder` and `Decoder` share."""

    config: Config
    cross: bool = False
    causal = False

    def setup(self) -> None:
        c = self.config
        self.embedding = nn.Embed(c.vocabulary, c.width, dtype=c.dtype)
        if c.positions == "learned":
            self.position = nn.Embed(c.length, c.width, dtype=c.dtype)
        self.stack = Stack(c, self.causal, self.cross)
        self.norm = nn.LayerNorm(use_bias=False, dtype=c.dtype)
        outputs = c.outputs or (c.vocabulary if self.causal else None)
        product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)  # logits are not rounded to `dtype`
        dense = partial(nn.Dense, use_bias=not self.causal, dtype=c.dtype, dot_general=product)
        self.output = None if outputs is None else dense(outputs)

    def embed(
        self, tokens: Array, used: Any = 0, key: Array | None = None, room: int | None = None
    ) -> tuple[Array, Rotary | None]:
        """The state before the first layer [B, L, D], and the angles of rotary positions, or None of learned ones.

        Args:
            tokens: [B, L] int.
            used: number of positions before them.
            key: PRNG key of dropout.
            room: positions in the cache, if there is one.

        Raises:
            ValueError: tokens are no whole numbers [B, L] of the vocabulary, or longer than the table of positions.
        """
        check_tokens(tokens, self.config.vocabulary)
        rotary = None
        x_BLD = self.embedding(tokens)
        if self.config.positions == "learned":
            limit = self.config.length
            if tokens.shape[1] > limit:
                raise ValueError(
                    f"the input has length {tokens.shape[1]}, above the {limit} rows of the position table; cut it, "
                    "raise `length` before training, or use rotary positions"
                )
            x_BLD = x_BLD + self.position(used + jnp.arange(tokens.shape[1])[None])
        else:
            rotary = Rotary.at(used, tokens.shape[1], room, self.config.head_size)
        return drop(key, x_BLD, self.config.dropout), rotary

    def layer(self, number: int, x_BLD: Array, context: Context, gates: Gates, cache: LayerCache | None = None) -> Any:
        """One layer alone, as `Stack.layer`."""
        return self.stack.layer(number, x_BLD, context, gates, cache)

    def read_out(self, x_BLD: Array, mask: Array | None = None) -> dict[str, Array]:
        """`features` [B, L, D], normalised, and `logits`, float32: [B, L, V] of a decoder, [B, V] of an encoder."""
        features = self.norm(x_BLD)
        if self.output is None:
            return {"features": features}
        pooled = features if self.causal else mean_of(features, mask)
        return {"features": features, "logits": self.output(pooled)}


class Encoder(_Transformer):
    """Every position sees every other. With `config.outputs` it classifies the mean of its features.

    Attributes:
        config: sizes.
        cross: of decoders; False.
    """

    def __call__(
        self, tokens: Array, *, mask: Array | None = None, gates: Gates | Decide | None = None, key: Array | None = None
    ) -> dict[str, Any]:
        """Encodes.

        Args:
            tokens: [B, L] int.
            mask: [B, L] bool, False for padding.
            gates: what to leave out: of all layers, with a leading axis of layers; or a function of a layer's number
                and the state before it [B, L, D] that returns the layer's.
            key: PRNG key of dropout; without it nothing is dropped.

        Returns:
            `features` [B, L, D]; `logits` [B, V] if the config has outputs; `embedded` [B, L, D]; `layers`: by layer,
            its `state` and its sub-layers' updates `attention`, `ffn` (and `cross`), each [B, L, D]; of a layer with
            `Chosen` positions the updates are [B, k, D].

        Raises:
            ValueError: tokens are no whole numbers [B, L], longer than the table of positions, or gates do not fit.
        """
        first, rest = (None, None) if key is None else tuple(jax.random.split(key))
        x_BLD, rotary = self.embed(tokens, key=first)
        if mask is not None:
            check_mask("mask", mask, tokens.shape)
        x_out, layers, _ = self.stack(x_BLD, Context(rotary, mask, key=rest), gates)
        return {**self.read_out(x_out, mask), "embedded": x_BLD, "layers": layers}


class Decoder(_Transformer):
    """No position sees a later one; the logits at a position are those of the next token.

    Attributes:
        config: sizes.
        cross: whether it attends to an encoder.
    """

    causal = True

    def __call__(
        self,
        tokens: Array,
        *,
        memory: Array | None = None,
        memory_mask: Array | None = None,
        cache: Cache | None = None,
        gates: Gates | Decide | None = None,
        key: Array | None = None,
    ) -> dict[str, Any]:
        """Predicts the next token at every position.

        Args:
            tokens: [B, L] int; with a cache those that follow what it has read.
            memory: [B, S, D] features of the encoder, if `cross`; with a cache, they are in there.
            memory_mask: [B, S] bool, False for padding.
            cache: as `initialize_cache` makes it; under `jit` the caller keeps to its size.
            gates: as of `Encoder`. Gates that depend on later tokens are the caller's to avoid.
            key: PRNG key of dropout.

        Returns:
            `logits` [B, L, V] float32 and the rest as `Encoder`; `cache` if one was given.

        Raises:
            ValueError: as `Encoder`; or there is an encoder's memory without `cross`, or none with it.
        """
        held = memory is not None or (cache is not None and cache.memory is not None)
        if self.cross != held:
            expected = "expected `memory`, the encoder's features" if self.cross else "expected none: set cross=True"
            raise ValueError(f"cross is {self.cross} and memory is {'given' if held else 'not given'}, {expected}")
        first, rest = (None, None) if key is None else tuple(jax.random.split(key))
        used, room = (None, None) if cache is None else (cache.used, cache.size)
        if cache is not None:
            check_tokens(tokens, self.config.vocabulary)
            check_cache(cache, self.config.layers, *tokens.shape)
        x_BLD, rotary = self.embed(tokens, 0 if used is None else used, first, room)
        if memory is not None or memory_mask is not None:
            check_memory(memory, memory_mask, tokens.shape[0], self.config.width)
        context = Context(rotary, memory=self._memory(memory, memory_mask, cache), key=rest, used=used)
        x_out, layers, kept = self.stack(x_BLD, context, gates, None if cache is None else cache.layers)
        out = {**self.read_out(x_out), "embedded": x_BLD, "layers": layers}
        if cache is not None:
            out["cache"] = Cache(kept, cache.used + tokens.shape[1], cache.memory)
        return out

    def initialize_cache(
        self, batch: int, size: int | None = None, memory: Array | None = None, memory_mask: Array | None = None
    ) -> Cache:
        """An empty cache of `size` positions (the config's length), for `apply(..., cache=cache)`.

        Args:
            batch: B.
            size: positions that it can hold.
            memory: [B, S, D], the encoder's features, if `cross`; call by `model.apply(variables, ..., method=...)`.
            memory_mask: [B, S] bool.

        Raises:
            ValueError: a size below 1 or above the table of positions, or memory without `cross`, or that does not fit.
        """
        c = self.config
        size = c.length if size is None else size
        if batch < 1 or size < 1:
            raise ValueError(f"a cache of {batch} samples and {size} positions, expected 1 or more of both")
        if memory is not None or memory_mask is not None:
            if not self.cross:
                raise ValueError("memory is given and cross is False, expected none: set cross=True")
            check_memory(memory, memory_mask, batch, c.width)
        if c.positions == "learned" and size > c.length:
            raise ValueError(f"the cache has size {size}, above the {c.length} rows of the position table")

        def empty(heads: int) -> LayerCache:
            shape = (batch, size, heads, c.head_size)
            return LayerCache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype), jnp.zeros(shape[:2], bool))

        layers = tuple(empty(heads) if heads else None for heads in c.heads_by_layer)
        return Cache(layers, jnp.zeros((), jnp.int32), self._memory(memory, memory_mask, None))

    def _memory(self, memory: Array | None, mask: Array | None, cache: Cache | None) -> Any:
        if memory is not None:
            return self.stack.memory(memory), mask
        return None if cache is None else cache.memory


class EncoderDecoder(nn.Module):
    """A decoder that attends to an encoder.

    Attributes:
        encoder: sizes of the encoder; without outputs.
        decoder: sizes of the decoder, of equal width.

    Raises:
        ValueError: the widths differ, or the encoder has outputs; when it is called.
    """

    encoder: Config
    decoder: Config

    def setup(self) -> None:
        if self.encoder.width != self.decoder.width or self.encoder.outputs is not None:
            raise ValueError(
                f"the widths are {self.encoder.width} and {self.decoder.width} and the encoder's outputs "
                f"{self.encoder.outputs}, expected equal widths and no outputs"
            )
        self.encode = Encoder(self.encoder)
        self.decode = Decoder(self.decoder, cross=True)

    def __call__(
        self,
        source: Array,
        tokens: Array,
        *,
        mask: Array | None = None,
        encoder_gates: Gates | Decide | None = None,
        gates: Gates | Decide | None = None,
        key: Array | None = None,
    ) -> dict[str, Any]:
        """Reads `source` [B, S], padded where `mask` is False, and predicts each next token after `tokens` [B, L].

        Returns:
            The decoder's results, and under `encoder` the encoder's.

        Raises:
            ValueError: as `Encoder` and `Decoder`.
        """
        first, rest = (None, None) if key is None else tuple(jax.random.split(key))
        encoded = self.encode(source, mask=mask, gates=encoder_gates, key=first)
        out = self.decode(tokens, memory=encoded["features"], memory_mask=mask, gates=gates, key=rest)
        return {**out, "encoder": encoded}


def mean_of(x_BLD: Array, mask: Array | None = None) -> Array:
    """Mean over positions [B, D], of those where the mask [B, L] is True."""
    if mask is None:
        return x_BLD.mean(1)
    there = mask[..., None].astype(jnp.float32)
    return ((x_BLD * there).sum(1) / jnp.maximum(there.sum(1), 1)).astype(x_BLD.dtype)
