"""The ways to run less of a Transformer that bench_pruning.py times, each as a compiled function beside its costs.

B samples, L positions, D width.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax import pruning, transformer
from hyperjax.pruning.experts import places
from hyperjax.timing import compiled
from hyperjax.transformer import Cache, Decoder, Encoder, Gates

CLASSES = 4  # of the encoder
KEEP = 0.125  # share of the positions that Mixture-of-Depths computes, if none is said
CAPACITY = 1.25  # places of an expert, likewise


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all paths share: sizes of the Transformer, blocks of its FFN, tokens of a prompt, percentages kept."""

    shape: transformer.Config
    blocks: int
    prompt: int
    percent: tuple[int, ...]
    seed: int

    @property
    def encoder(self) -> transformer.Config:
        """The same sizes, with classes."""
        return dataclasses.replace(self.shape, outputs=CLASSES)


class Path(NamedTuple):
    """One way to run it.

    Attributes:
        label: for the reader.
        against: name of the dense path that it should be faster than; "" of that one itself and of parts.
        run: what is timed.
        share: its operations as `hyperjax.pruning` counts them, a share of the dense path's; None of parts.
        flops: as XLA counts those of the compiled function; None where it cannot know which branch is taken.
        compiling: seconds that tracing and compiling took; 0 if the program is that of another path.
        tokens: by which the time is divided: of decoding.
    """

    label: str
    against: str
    run: Callable[[], Any]
    share: float | None
    flops: float | None
    compiling: float
    tokens: int = 1


Paths = dict[str, Path]


def path(label: str, against: str, share: float | None, function: Callable, *arguments: Any, tokens: int = 1) -> Path:
    """Compiles a function for these arguments, with which it is timed."""
    start = time.perf_counter()
    call = compiled(function, *arguments)
    seconds = time.perf_counter() - start
    return Path(label, against, partial(call, *arguments), share, operations(call), seconds, tokens)


def operations(call: Any) -> float | None:
    """XLA's count of a compiled function; None if the backend does not count."""
    found = (call.cost_analysis() or {}).get("flops", -1.0)
    return float(found) if found > 0 else None


def random_params(model: nn.Module, tokens: jax.Array, seed: int) -> Any:
    """Parameters drawn without compiling: matrices of deviation 0.05, normalisations 1, biases 0."""
    rng = np.random.default_rng(seed)

    def draw(place: Any, leaf: Any) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.full(leaf.shape, float(place[-1].key == "scale"), leaf.dtype)
        return jnp.asarray(rng.normal(0, 0.05, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def applied(model: nn.Module, **options: Any) -> Callable:
    """The logits as a function of (params, tokens)."""

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        out: Any = model.apply({"params": params}, tokens, **options)
        return out["logits"]

    return logits


def closed_by_hand(setting: Setting, percent: int, tokens: jax.Array) -> tuple[pruning.Gated, Any]:
    """A network with static gates, of which `percent` % of each layer's heads and blocks are open, and its params."""
    model = pruning.Gated(setting.shape, choice=pruning.HardConcrete(), blocks=setting.blocks)
    params, rng = dict(random_params(model, tokens, setting.seed)), np.random.default_rng(setting.seed)
    for name in model.prune:
        layers, units = params[f"routers_{name}"]["logits"].shape
        rank = np.argsort(rng.random((layers, units)), 1)
        logits = np.where(rank < kept(units, percent), 10.0, -10.0)
        params[f"routers_{name}"] = {"logits": jnp.asarray(logits, jnp.float32)}
    return model, params


def kept(units: int, percent: int) -> int:
    """How many of so many units stay."""
    return max(1, round(units * percent / 100))


def static_paths(setting: Setting, tokens: jax.Array, masked: bool) -> Paths:
    """A decoder: dense; compact; and, if `masked`, with the gates of half its units multiplied by."""
    decoder, length, found = Decoder(setting.shape), tokens.shape[1], {}
    params = random_params(decoder, tokens, setting.seed)
    found["dense"] = path("dense decoder", "", 1.0, applied(decoder), params, tokens)
    for percent in setting.percent:
        model, gated = closed_by_hand(setting, percent, tokens)
        small = pruning.compact(model, {"params": gated})
        share = small.share(setting.shape, length)
        if masked and percent == 50:
            name = f"masked_{percent}"
            found[name] = path("gates multiply (training)", "dense", share, applied(model), gated, tokens)
        name, label = f"compact_{percent}", f"compact, {percent} % kept"
        found[name] = path(label, "dense", share, applied(small.model), small.variables["params"], tokens)
    return found


def bucket_paths(setting: Setting, tokens: jax.Array, natives: tuple[int, ...], causal: bool) -> Paths:
    """Each width of the buckets, and, for the percentages in `natives`, a network that has just that width.

    The native encoder is the plain network of that width behind the first layer. The native decoder does what the
    buckets do without a choice: it reads the prompt whole, and the rest at that width. XLA's count is the native one's.
    """
    kind, shape = ("bucket", setting.shape) if causal else ("bucket_encoder", setting.encoder)
    against, what = ("dense", "decoder") if causal else ("dense_encoder", "encoder")
    shares = (*(p / 100 for p in setting.percent), 1.0)
    model = pruning.Buckets(shape, causal, shares, per="batch", blocks=setting.blocks, prompt=setting.prompt)
    params, found = random_params(model, tokens, setting.seed), {}
    server = pruning.BucketServer(model, {"params": params})
    if not causal:
        found[against] = path("dense encoder", "", 1.0, applied(Encoder(shape)), params["model"], tokens)
    whole = path("", against, None, lambda v, t: tuple(server(v, t).values()), server.variables, tokens)
    call, compiling = whole.run.func, whole.compiling  # type: ignore[attr-defined]
    for j, percent in enumerate(setting.percent):
        share, name = float(model.costs(tokens.shape[1])[j]), f"{kind}_{percent}"
        if percent in natives:
            native = native_path(setting, model, params["model"], j, tokens)
            found[f"native_{name}"] = native._replace(label=f"native {what}, {percent} %", against=against, share=share)
        flops = found[f"native_{name}"].flops if percent in natives else None
        bias = jnp.zeros(len(shares)).at[j].set(1e3)
        chosen = {"params": {**params, "router": {**params["router"], "bias": bias}}}
        run = partial(call, {**server.variables, "whole": chosen}, tokens)
        if int(run()[1]) != j:
            raise AssertionError(f"bucket {int(run()[1])} was served, expected number {j}")
        found[name] = Path(f"bucket of {what}, {percent} %", against, run, share, flops, compiling)
        compiling = 0.0
    return found


def native_path(setting: Setting, model: pruning.Buckets, params: Any, j: int, tokens: jax.Array) -> Path:
    """A network of the width of bucket j, cut out of the whole one."""
    behind = jnp.arange(setting.shape.layers)[:, None] < model.after
    heads, blocks = setting.shape.heads_by_layer[0], setting.blocks
    gates = Gates(
        heads=jnp.float32(behind | (jnp.arange(heads)[None] < model.heads[j])),
        blocks=jnp.float32(behind | (jnp.arange(blocks)[None] < model.kept_blocks[j])),
    )
    shape, narrow = pruning.cut(model.config, params, gates)
    if not model.causal:
        return path("", "", None, applied(Encoder(shape)), narrow, tokens)

    def run(whole: Any, narrow: Any, tokens: jax.Array) -> jax.Array:
        decoder = Decoder(model.config)
        cache = decoder.initialize_cache(tokens.shape[0], model.prompt)
        out: Any = decoder.apply({"params": whole}, tokens[:, : model.prompt], cache=cache)
        held = zip(out["cache"].layers, shape.heads_by_layer, strict=True)
        layers = tuple(layer.resized(tokens.shape[1], n) for layer, n in held)
        cache = Cache(layers, out["cache"].used)
        rest: Any = Decoder(shape).apply({"params": narrow}, tokens[:, model.prompt :], cache=cache)
        return jnp.concatenate([out["logits"], rest["logits"]], 1)

    return path("", "", None, run, params, narrow, tokens)


def depth_share(setting: Setting, model: pruning.MixtureOfDepths, length: int) -> float:
    """Counted operations of Mixture-of-Depths at a length."""
    layers = np.isin(np.arange(setting.shape.layers), model.routed)
    tokens = jnp.where(layers, model.chosen(length) / length, 1.0)
    return float(pruning.share(pruning.costs(model.config, length, causal=model.causal), Gates(tokens=tokens)))


def depth_paths(setting: Setting, tokens: jax.Array, percent: tuple[int, ...]) -> Paths:
    """Mixture-of-Depths in every second layer of an encoder, serving; 12.5 % of the positions, and others."""
    found = {}
    for name, keep in {"mod": KEEP, **{f"mod_{p}": p / 100 for p in percent}}.items():
        model = pruning.MixtureOfDepths(setting.encoder, causal=False, keep=keep)
        params, share = random_params(model, tokens, setting.seed), depth_share(setting, model, tokens.shape[1])
        label = f"depths of encoder, {100 * keep:g} %"
        found[name] = path(label, "dense_encoder", share, applied(model), params, tokens)
    return found


def expert_share(setting: Setting, k: int, capacity: float, tokens: jax.Array) -> float:
    """Counted operations of experts with that many places, filled or not."""
    places_each = places((*tokens.shape, setting.blocks), k, capacity) / tokens.size
    open_part = jnp.full((setting.shape.layers, 1), places_each)
    return float(pruning.share(pruning.costs(setting.shape, tokens.shape[1]), Gates(blocks=open_part)))


def expert_paths(setting: Setting, tokens: jax.Array, capacities: tuple[float, ...]) -> Paths:
    """Dispatch to blocks of a decoder's feed-forward networks."""
    found = {}
    for percent in setting.percent:
        k = kept(setting.blocks, percent)
        model = pruning.Experts(setting.shape, blocks=setting.blocks, keep=k)
        params = random_params(model, tokens, setting.seed)
        for capacity in capacities:
            name = f"experts_{percent}" + ("" if capacity == CAPACITY else f"_c{capacity:g}")
            label, share = f"experts, {percent} %, capacity {capacity:g}", expert_share(setting, k, capacity, tokens)
            found[name] = path(label, "dense", share, applied(model, capacity=capacity), params, tokens)
    return found
