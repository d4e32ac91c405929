"""What bench_pruning.py times beside whole passes: training steps, decoding token by token, and routers alone.

B samples, L positions, D width, N tokens decoded.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bench_pruning_paths as paths
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_pruning_paths import Path, Paths, Setting

from hyperjax import pruning
from hyperjax.pruning.experts import choose_blocks, dispatch, places
from hyperjax.timing import compiled
from hyperjax.transformer import Cache, Decoder, Gates

ADAM = optax.adam(1e-3)


def step_paths(setting: Setting, tokens: jax.Array) -> Paths:
    """Training steps of a decoder: dense; gates that multiply; Mixture-of-Depths; experts."""
    shape, blocks, length = setting.shape, setting.blocks, tokens.shape[1]
    depths = pruning.MixtureOfDepths(shape, keep=paths.KEEP)
    gated, _ = paths.closed_by_hand(setting, 50, tokens)
    found = {
        "dense_step": step("dense step", Decoder(shape), tokens, 1.0, setting.seed),
        "masked_step": step("gates multiply (training)", gated, tokens, 1.0, setting.seed),
        "mod_step": step(
            f"depths, {100 * paths.KEEP:g} %", depths, tokens, paths.depth_share(setting, depths, length), setting.seed
        ),
    }
    for percent in setting.percent:
        k = paths.kept(blocks, percent)
        for capacity in (paths.CAPACITY, 2.0) if percent == 50 else (paths.CAPACITY,):
            model = pruning.Experts(shape, blocks=blocks, keep=k, capacity=capacity)
            name = f"experts_{percent}" + ("" if capacity == paths.CAPACITY else f"_c{capacity:g}") + "_step"
            share = paths.expert_share(setting, k, capacity, tokens)
            found[name] = step(f"experts, {percent} %, capacity {capacity:g}", model, tokens, share, setting.seed)
    return found


def step(label: str, model: nn.Module, tokens: jax.Array, share: float, seed: int) -> Path:
    """One donated step of Adam, on the loss of the next token and the model's own losses; it keeps its state."""
    dense = isinstance(model, Decoder)

    def loss(params: Any, key: jax.Array, tokens: jax.Array) -> jax.Array:
        out: Any = model.apply({"params": params}, tokens, *(() if dense else (key,)))
        own = out.get("losses", {})
        cost = optax.softmax_cross_entropy_with_integer_labels(out["logits"][:, :-1], tokens[:, 1:])
        return cost.mean() + 0.01 * sum(own.values(), jnp.zeros(()))

    def train(state: Any, tokens: jax.Array) -> Any:
        params, moments, number = state
        value, gradients = jax.value_and_grad(loss)(params, jax.random.fold_in(jax.random.key(seed), number), tokens)
        updates, moments = ADAM.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments, number + 1), value

    params = paths.random_params(model, tokens, seed)
    state = [(params, ADAM.init(params), jnp.zeros((), jnp.int32))]
    start = time.perf_counter()
    call = compiled(train, state[0], tokens, donate=(0,))
    seconds = time.perf_counter() - start

    def run() -> Any:
        state[0], value = call(state[0], tokens)
        return value

    return Path(label, "" if dense else "dense_step", run, share, paths.operations(call), seconds)


def decode_paths(setting: Setting, tokens: jax.Array, size: int) -> Paths:
    """Decoding one sequence [1, N] token by token with a cache of `size`: dense, compact, and skipping layers."""
    count = tokens.shape[1]
    each = tokens.T[..., None]
    whole = pruning.costs(setting.shape, 1, cached=size)
    decoder = Decoder(setting.shape)
    model, gated = paths.closed_by_hand(setting, 50, tokens)
    small = pruning.compact(model, {"params": gated})
    smaller = pruning.costs(small.model.config, 1, cached=size).total / whole.total
    found = {}
    for name, label, share, one, params in (
        ("decode_dense", "dense decoding", 1.0, decoder, gated["model"]),
        ("decode_compact_50", "compact, 50 % kept", smaller, small.model, small.variables["params"]),
    ):
        cache = one.initialize_cache(1, size)
        against = "" if one is decoder else "decode_dense"
        found[name] = paths.path(label, against, share, loop(one), params, each, cache, tokens=count)
    depths = pruning.MixtureOfDepths(setting.shape, every=1)
    params, cache = paths.random_params(depths, tokens, setting.seed), decoder.initialize_cache(1, size)
    made = paths.path("", "decode_dense", None, skipping(depths), params, each, cache, tokens=count)
    for percent, skipped in zip(setting.percent, skip(depths, params, tokens, setting.percent), strict=True):
        run = partial(made.run.func, skipped, each, cache)  # type: ignore[attr-defined]
        taken = run()[1].mean(0)
        share = float(pruning.share(whole, Gates(layer=taken)))  # a layer that is computed attends to the whole cache
        label = f"skips {100 * (1 - float(taken.mean())):.0f} % of the layers"
        found[f"decode_skip_{percent}"] = made._replace(label=label, run=run, share=share, flops=None)
        made = made._replace(compiling=0.0)
    return found


def loop(model: Any) -> Callable:
    """Logits of a decoder for tokens [N, 1, 1] given one after another."""

    def one(params: Any, cache: Cache, token: jax.Array) -> tuple[Cache, jax.Array]:
        out: Any = model.apply({"params": params}, token, cache=cache)
        return out["cache"], out["logits"][:, -1]

    return lambda params, each, cache: jax.lax.scan(partial(one, params), cache, each)[1]


def skipping(model: pruning.MixtureOfDepths) -> Callable:
    """The same by `skip_decode`, and the layers taken [N, layers]."""

    def one(params: Any, cache: Cache, token: jax.Array) -> tuple[Cache, tuple[jax.Array, jax.Array]]:
        logits, cache, taken = pruning.skip_decode(model, {"params": params}, token, cache)
        return cache, (logits, taken)

    return lambda params, each, cache: jax.lax.scan(partial(one, params), cache, each)[1]


def skip(
    model: pruning.MixtureOfDepths, params: Any, tokens: jax.Array, percent: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Params for each percentage, whose thresholds skip that share of these tokens in every layer, each other ones."""
    call, rng, found = jax.jit(partial(parallel, model)), np.random.default_rng(0), []
    for share in percent:
        made = dict(params)
        for l in range(model.config.layers):
            kernel = jnp.asarray(rng.normal(size=(model.config.width, 1)), jnp.float32)
            made[f"predictors_{l}"] = {"kernel": kernel, "bias": jnp.zeros(1)}
            logits = np.sort(call(made, tokens)[l].ravel())
            cut = round(share / 100 * logits.size)
            middle = float(logits[max(cut - 1, 0)] + logits[min(cut, logits.size - 1)]) / 2
            made[f"threshold_{l}"] = jnp.float32(middle)
        found.append(made)
    return found


def parallel(model: pruning.MixtureOfDepths, params: Any, tokens: jax.Array) -> list[jax.Array]:
    """The predictors' logits [1, N] of each layer, in a pass that leaves out what it skips."""
    out: Any = model.apply({"params": params}, tokens)
    states = [out["embedded"], *(done["state"] for done in out["layers"][:-1])]

    def predict(model: pruning.MixtureOfDepths, states: list[jax.Array]) -> list[jax.Array]:
        return [model.predictors[str(l)](x)[..., 0] for l, x in enumerate(states)]

    found: Any = model.apply({"params": params}, states, method=predict)
    return found


def router_paths(setting: Setting, tokens: jax.Array) -> Paths:
    """Each kind of router alone, on random states of all its layers; the experts' also with their plans."""
    shape, shares = setting.shape, (*(p / 100 for p in setting.percent), 1.0)
    keys = jax.random.split(jax.random.key(setting.seed), shape.layers)
    states = [jax.random.normal(key, (*tokens.shape, shape.width)) for key in keys]
    k = paths.kept(setting.blocks, setting.percent[0])
    token = pruning.Gated(shape, per="token", blocks=setting.blocks)
    kinds: dict[str, tuple[nn.Module, Callable]] = {
        "sequence": (
            pruning.Buckets(setting.encoder, False, shares, blocks=setting.blocks),
            lambda model, states: model.decide(states[0]),
        ),
        "token": (
            token,
            lambda model, states: [model.routers[f"{n}_{l}"](x) for n in model.prune for l, x in enumerate(states)],
        ),
        "mod": (
            pruning.MixtureOfDepths(setting.encoder, causal=False),
            lambda model, states: [model.routers[str(l)](states[l]) for l in model.routed],
        ),
        "experts": (
            pruning.Experts(shape, blocks=setting.blocks, keep=k),
            lambda model, states: [router(x) for router, x in zip(model.routers, states, strict=True)],
        ),
    }

    def plans(model: pruning.Experts, states: list[jax.Array]) -> list[Any]:
        chosen = [choose_blocks(router(x), k) for router, x in zip(model.routers, states, strict=True)]
        return [dispatch(gates, places(gates.shape, k, paths.CAPACITY)) for gates in chosen]

    kinds["experts_plan"] = (kinds["experts"][0], plans)
    params = paths.random_params(token, tokens, setting.seed)
    # what the router by token belongs to; the others' passes are among the paths
    found = {"token": paths.path("gates by token (training)", "dense", 1.0, paths.applied(token), params, tokens)}
    for kind, (model, method) in kinds.items():
        params = paths.random_params(model, tokens, setting.seed)

        def alone(params: Any, states: Any, model: nn.Module = model, method: Callable = method) -> Any:
            return model.apply({"params": params}, states, method=method)

        found[f"router_{kind}"] = paths.path(f"router alone: {kind}", "", None, alone, params, states)
    return found
