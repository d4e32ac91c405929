"""Serving what was decided, and only that: a width for each prompt, or layers skipped token by token.

B samples, L positions, J buckets, P tokens of a prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hyperjax.pruning.buckets import Buckets
from hyperjax.pruning.compact import cut
from hyperjax.pruning.depths import MixtureOfDepths
from hyperjax.pruning.gated import Gated
from hyperjax.pruning.routers import check_prompt, mask_options
from hyperjax.transformer import Cache, Context, Decoder, Encoder, Gates
from hyperjax.transformer.checks import check_cache, check_mask, check_tokens

Array = jax.Array


class BucketServer:
    """The networks of all buckets, of which each call runs one, by `lax.switch`.

    Each bucket has weights of its own, cut out once: slicing them in every call would take as long as a part of the
    products. With shares of a quarter, half, three quarters and one, that is 2.5 times the memory of the layers,
    beside the whole network that decides.

    It pays for one decision a call. Measured on two CPU cores (width 256, 128 positions, the bucket of a half): an
    encoder is 1.3 times as fast as dense at batch 1 and 1.4 to 1.7 at 8 and 32; a decoder, whose prompt of 32 is
    computed whole, 1.4 at batch 8 and 1.7 at 32, but **slower than dense** at batch 1, where two passes cost more than
    the width saves (at 512 positions 1.4 at batch 1). Under `vmap` a switch becomes a selection that runs every branch:
    give sequences that decide for themselves one by one (`each` does, by `lax.map`), or sort them by bucket.

    Attributes:
        model: the buckets.
        variables: `{"whole": ..., "widths": (...)}`, to pass to `__call__`; they are data, so that `jit` need not bake
            them in.

    Raises:
        ValueError: the buckets are random ones, or an encoder has no outputs.
    """

    def __init__(self, model: Buckets, variables: Any):
        if model.seed is not None:
            raise ValueError(f"seed is {model.seed}: random buckets are to compare with; expected seed=None to serve")
        if not model.causal and model.config.outputs is None:
            raise ValueError("config.outputs is None, expected the number of classes of the encoder's logits")
        params, c = variables["params"], model.config
        self.model, widths, configs = model, [], []
        for heads, blocks in zip(model.heads, model.kept_blocks, strict=True):
            behind = jnp.arange(c.layers)[:, None] < model.after
            gates = Gates(
                heads=(behind | (jnp.arange(c.heads_by_layer[0])[None] < heads)).astype(jnp.float32),
                blocks=(behind | (jnp.arange(model.blocks)[None] < blocks)).astype(jnp.float32),
            )
            config, cut_params = cut(c, params["model"], gates)
            configs.append(config)
            widths.append({"params": cut_params})
        self._models: list[Any] = [(Decoder if model.causal else Encoder)(config) for config in configs]
        self.variables = {"whole": variables, "widths": tuple(widths)}

    def __call__(self, variables: Any, tokens: Array, mask: Array | None = None) -> dict[str, Array]:
        """Runs one bucket for all sequences given: one sequence, or a batch of `per="batch"`.

        Args:
            variables: those of the server.
            tokens: [B, L] int; of a decoder longer than the prompt.
            mask: [B, L] bool, False for padding; of encoders.

        Returns:
            `logits`, [B, L, V] of a decoder and [B, V] of an encoder; `bucket`, the number of the bucket.

        Raises:
            ValueError: several sequences that decide for themselves, a mask of a decoder or another shape, or an input
                no longer than the prompt.
        """
        self._check(tokens, mask)
        if self.model.per == "sequence" and tokens.shape[0] != 1:
            raise ValueError(f"{tokens.shape[0]} sequences with a width each, expected one; use `each`, or per='batch'")
        return self._decoder(variables, tokens) if self.model.causal else self._encoder(variables, tokens, mask)

    def each(self, variables: Any, tokens: Array, mask: Array | None = None) -> dict[str, Array]:
        """Runs sequences one after another, each at its own width.

        Args:
            variables: those of the server.
            tokens: [B, L] int.
            mask: [B, L] bool, False for padding; of encoders.

        Returns:
            As a call; `bucket` is [B].

        Raises:
            ValueError: as a call.
        """
        self._check(tokens, mask)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        run = self._decoder if self.model.causal else self._encoder
        out = jax.lax.map(lambda one: run(variables, *(a[None] for a in one)), (tokens, mask))
        return {"logits": out["logits"][:, 0], "bucket": out["bucket"]}

    def _check(self, tokens: Array, mask: Array | None) -> None:
        mask_options(mask, self.model.causal)
        check_tokens(tokens, self.model.config.vocabulary)
        if mask is not None:
            check_mask("mask", mask, tokens.shape)
        if self.model.causal:
            check_prompt(tokens.shape[1], self.model.prompt)

    def _decoder(self, variables: Any, tokens: Array, mask: Array | None = None) -> dict[str, Array]:
        model: Any = self.model
        whole: Any = Decoder(model.config)
        batch, length = tokens.shape
        inner = {"params": variables["whole"]["params"]["model"]}
        cache = whole.initialize_cache(batch, model.prompt)  # no larger: all branches take it in
        out = whole.apply(inner, tokens[:, : model.prompt], cache=cache)
        state = out["layers"][model.after - 1]["state"] if model.after else out["embedded"]
        bucket = jnp.argmax(model.apply(variables["whole"], state, method="decide")[0])

        def run(j: int) -> Any:
            def branch() -> Array:
                heads = self._models[j].config.heads_by_layer
                kept = tuple(held.resized(length, n) for held, n in zip(out["cache"].layers, heads, strict=True))
                cache = Cache(kept, out["cache"].used)
                return self._models[j].apply(variables["widths"][j], tokens[:, model.prompt :], cache=cache)["logits"]

            return branch

        rest = jax.lax.switch(bucket, [run(j) for j in range(len(self._models))])
        return {"logits": jnp.concatenate([out["logits"], rest], 1), "bucket": bucket}

    def _encoder(self, variables: Any, tokens: Array, mask: Array | None = None) -> dict[str, Array]:
        model: Any = self.model
        whole: Any = Encoder(model.config)
        inner = {"params": variables["whole"]["params"]["model"]}
        x_BLD, rotary = whole.apply(inner, tokens, method="embed")
        context = Context(rotary, mask)
        for l in range(model.after):
            x_BLD = whole.apply(inner, l, x_BLD, context, Gates(), method="layer")[0]
        bucket = jnp.argmax(model.apply(variables["whole"], x_BLD, mask, method="decide")[0])

        def run(j: int) -> Any:
            def branch() -> Array:
                x, one, weights = x_BLD, self._models[j], variables["widths"][j]
                for l in range(model.after, model.config.layers):
                    x = one.apply(weights, l, x, context, Gates(), method="layer")[0]
                return one.apply(weights, x, mask, method="read_out")["logits"]

            return branch

        return {"logits": jax.lax.switch(bucket, [run(j) for j in range(len(self._models))]), "bucket": bucket}


def skip_decode(
    model: MixtureOfDepths | Gated, variables: Any, token: Array, cache: Cache
) -> tuple[Array, Cache, Array]:
    """One step of decoding one sequence, in which `lax.cond` skips the layers that its token does not take.

    Equal to the parallel pass of the same model without a key. It pays at batch 1 only (2.0 times as fast as dense
    decoding on two CPU cores, where half of the layers are skipped): for a batch, a layer could be
    skipped only where all its sequences skip it, and under `vmap` all of it is computed.

    Args:
        model: a decoder: `MixtureOfDepths`, or `Gated` with prune=("layers",) and per="token".
        variables: its variables.
        token: [1, 1] int.
        cache: as `Decoder(model.config).initialize_cache(1, size)` makes it, or as returned.

    Returns:
        Logits [1, V] of the next token, the cache, and 1 or 0 for each layer computed or not, [layers].

    Raises:
        ValueError: several sequences or tokens, a model without gates of layers by token, or a cache that is full or of
            another model.
    """
    if token.shape != (1, 1):
        raise ValueError(
            f"the token has shape {token.shape}, expected (1, 1): a batch cannot skip layers token by token"
        )
    by_layer = isinstance(model, Gated) and model.per == "token" and model.prune == ("layers",)
    by_token = isinstance(model, MixtureOfDepths) or by_layer
    if not by_token or not model.causal or model.seed is not None:
        raise ValueError(
            "nothing to skip, expected a decoder that learned to: MixtureOfDepths, or Gated of layers per token"
        )
    check_cache(cache, model.config.layers, *token.shape)
    decide: Any = model.apply
    whole: Any = Decoder(model.config)
    inner = {"params": variables["params"]["model"]}
    x_BLD, rotary = whole.apply(inner, token, cache.used, room=cache.size, method="embed")
    context, kept, taken = Context(rotary, used=cache.used), [], []
    for l in range(model.config.layers):
        gate = decide(variables, l, x_BLD, method="decide_one")

        def run(x: Array, held: Any, l: int = l, gate: Any = gate) -> tuple[Array, Any]:
            x, _, held = whole.apply(inner, l, x, context, Gates(tokens=gate), held, method="layer")
            return x, held

        if gate is None:
            x_BLD, held = run(x_BLD, cache.layers[l])
        else:
            x_BLD, held = jax.lax.cond(gate[0, 0] > 0, run, lambda x, held: (x, held), x_BLD, cache.layers[l])
        kept.append(held)
        taken.append(1.0 if gate is None else (gate[0, 0] > 0).astype(jnp.float32))
    logits = whole.apply(inner, x_BLD, method="read_out")["logits"][:, -1]
    return logits, Cache(tuple(kept), cache.used + 1), jnp.stack([jnp.asarray(t) for t in taken])


__all__ = ["BucketServer", "skip_decode"]
