"""How fast hypernetworks are: generation, gradient and a whole Adam step, beside the plain target and other libraries.

    python experiments/bench_hypernet.py --json bench.json
    python experiments/bench_hypernet.py --targets mlp3 --repeats 20

Everything runs in one process, in turn, so that the ratios hold although the machine's speed drifts. A gradient is
forward and backward; a step is one donated `jit` with Adam 1e-3. Where the `bench` extra is installed, hypnettorch,
hyper-nn and hyperlight do the same. Then: the memory that `Chunked` takes for a target of 25M parameters, and the time
and memory of one set of weights for each sample of a batch.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bench_hypernet_peers as peers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from bench_hypernet_peers import Candidate, Target, cross_entropy

from hyperjax import hypernet as hn
from hyperjax import training
from hyperjax.hypernet.generators import matvec
from hyperjax.hypernet.image_models import WideResNet
from hyperjax.paramtree import count
from hyperjax.timing import compiled, in_turn

Figures = dict[str, float]
TARGETS = ("mlp3", "80leaf", "wrn", "25m", "per_sample")
GENERATORS = {  # name -> label, generator, weights of its head for each pair of parameter and feature of z
    "linear": ("Linear", hn.Linear(), 1.0),
    "mlp": ("MLP", hn.MLP(), 1.0),
    "separable_mlp": ("SeparableMLP", hn.SeparableMLP(), 0.25),
    "chunked": ("Chunked", hn.Chunked(), 0.0),
    "scale": ("Scale", hn.Scale(), 0.0),
    "low_rank": ("LowRank", hn.LowRank(), 0.0),
    "conv_tiles": ("ConvTiles, 3x3 kernels", hn.ConvTiles(), 0.0),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the measurement."""

    targets: tuple[str, ...] = TARGETS  # what to measure: of all these
    generators: tuple[str, ...] = tuple(GENERATORS)  # which generators, where they suit the target
    embedding: int = 64  # width of z
    batch: int = 128  # samples of a step, but for wrn
    repeats: int = 5  # turns of each candidate, each two timed runs after one untimed; the median counts
    layers: tuple[int, ...] = (784, 300, 100, 10)  # mlp3: widths from features to classes
    depth: int = 40  # 80leaf: number of layers, each a kernel and a bias
    width: int = 128  # 80leaf: width of every layer
    image_depth: int = 40  # wrn: depth of the Wide ResNet, 6 n + 4
    image_width: int = 2  # wrn: its widening factor
    image_batch: int = 4  # wrn: samples of a step; convolutions are slow on a CPU
    image_size: int = 32  # wrn: height and width of an image
    memory_layers: tuple[int, ...] = (784, *6 * (2160,), 10)  # 25m: widths of the MLP
    max_head_mb: int = 400  # what has a larger head is left out
    peers: tuple[str, ...] = tuple(peers.PEERS)  # which other libraries, where installed; --peers alone is none
    json: str | None = None  # file to write the figures to


class PlainMLP(nn.Module):
    """Dense layers with ReLU between."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def make_target(config: Config, name: str) -> Target:
    """The target that `config.targets` names."""
    key = jax.random.key(0)
    kinds: tuple[str, ...] = ("generate", "gradient", "step")
    if name == "wrn":
        layers: tuple[int, ...] = (config.image_depth, config.image_width)
        model: nn.Module = WideResNet(*layers)
        x = jax.random.normal(key, (config.image_batch, config.image_size, config.image_size, 3))
        title, kinds = f"Wide ResNet {layers[0]}-{layers[1]}", ("generate", "step")  # compilation takes the time
    else:
        layers = {"mlp3": config.layers, "80leaf": (config.width,) * (config.depth + 1)}.get(name, config.memory_layers)
        model, x = PlainMLP(layers[1:]), jax.random.normal(key, (config.batch, layers[0]))
        title = f"MLP {'-'.join(map(str, layers))}" if name != "80leaf" else f"MLP of {2 * config.depth} leaves"
    size = count(jax.eval_shape(model.init, key, x)["params"])
    y = jax.random.randint(jax.random.key(1), x.shape[:1], 0, 10 if name == "wrn" else layers[-1])
    suffix = "" if name == "mlp3" else f"_{name}"
    return Target(title, suffix, model, layers, x, y, size, config.embedding, kinds)


def hypernetwork(target: Target, name: str, *, model: Any = None, **options: Any) -> hn.HyperNetwork:
    generator: hn.Generator = GENERATORS[name][1]
    rules: list[Any] = []
    if name == "conv_tiles":
        generator, rules = hn.Learned(), [("^group.*/conv", generator)]
    options |= {"embedding_dim": target.embedding, "num_embeddings": 1, "generator": generator, "rules": rules}
    return hn.HyperNetwork.from_target(model or target.model, target.x, **options)


def loss_of(network: nn.Module, **keywords: Any) -> Callable:
    """Cross-entropy as a function of (variables, x, y); batch statistics are computed, and not kept."""

    def loss(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(network.apply(variables, x, mutable=["batch_stats"], **keywords)[0], y)

    return loss


def ours(target: Target, name: str | None = None) -> Candidate:
    """The plain target (no name), or a hypernetwork of ours."""
    train = {"train": True} if target.images else {}
    if name is None:
        variables = target.model.init(jax.random.key(2), target.x)
        return peers.jax_candidate(target, "plain target", loss_of(target.model, **train), variables, None)
    hyper = hypernetwork(target, name)
    variables = hyper.init(jax.random.key(2), target.x)
    return peers.jax_candidate(target, GENERATORS[name][0], loss_of(hyper, **train), variables, hyper.generate)


def candidates(target: Target, config: Config) -> Iterator[tuple[str, Candidate | str]]:
    """Everything to measure on a target, or why not."""
    too_large = f"left out: a head of {target.head_mb:,.0f} MB, --max-head-mb is {config.max_head_mb}"
    yield "plain", ours(target)
    for name in config.generators:
        label, _, share = GENERATORS[name]
        if target.images or name != "conv_tiles":
            small = target.head_mb * share <= config.max_head_mb
            yield name, ours(target, name) if small else f"{label} {too_large}"
    for name in config.peers:
        label, _, share = peers.PEERS[name]
        small = target.head_mb * share <= config.max_head_mb
        yield name, peers.build_peer(name, target) if small else f"{label} {too_large}"


def products(target: Target) -> Callable[[], Any]:
    """The products of `Linear` and nothing else: W z, and for a given gradient g of it, W^T g and the outer g z^T."""
    shapes = jax.tree.leaves(jax.eval_shape(target.model.init, jax.random.key(0), target.x)["params"])
    weights = [jnp.full((*leaf.shape, target.embedding), 0.1) for leaf in shapes]
    gradients = [jnp.full(leaf.shape, 0.1) for leaf in shapes]

    def run(weights: list[jax.Array], z: jax.Array, gradients: list[jax.Array]) -> Any:
        made, backward = jax.vjp(lambda weights, z: [matvec(w, z) for w in weights], weights, z)
        return made, backward(gradients)

    arguments = (weights, jnp.full((target.embedding,), 0.1), gradients)
    return partial(compiled(run, *arguments), *arguments)


def measure(target: Target, config: Config) -> Figures:
    """Times everything on one target and prints a table."""
    print(f"\n{target.title}: {target.size:,} parameters, batch {len(target.x)}, z {target.embedding}", flush=True)
    found: dict[str, Candidate] = {}
    notes: list[str] = []
    runs: peers.Runs = {}
    for name, candidate in candidates(target, config):
        if isinstance(candidate, str):
            notes.append(f"  {candidate}")
            continue
        found[name] = candidate
        runs |= {f"{name}_{kind}": run for kind, run in candidate.runs.items()}
    if "linear" in found:
        runs["linear_products"] = products(target)
    end = target.suffix
    figures: Figures = {}
    for name, seconds in in_turn(runs, config.repeats).items():
        figures |= {f"seconds_{name}{end}": float(np.median(seconds)), f"min_seconds_{name}{end}": min(seconds)}
    plain = figures[f"seconds_plain_step{end}"]
    figures |= {f"ratio_{n}_over_plain{end}": figures[f"seconds_{n}_step{end}"] / plain for n in found if n != "plain"}
    print("milliseconds                     weights  generate  gradient      step    fastest   x plain  compile s")
    for name, candidate in found.items():
        times = [figures.get(f"seconds_{name}_{kind}{end}") for kind in ("generate", "gradient", "step")]
        times.append(figures[f"min_seconds_{name}_step{end}"])
        shown = "".join(f"{'-':>10}" if value is None else f"{1e3 * value:10.2f}" for value in times)
        ratio = figures.get(f"ratio_{name}_over_plain{end}", 1.0)
        compilation = "-" if candidate.compile_seconds is None else f"{candidate.compile_seconds:.1f}"
        print(f"{candidate.label:28}{candidate.weights:12,}{shown} {ratio:10.2f}{compilation:>11}")
    print(*notes, sep="\n", end="\n" if notes else "")
    return figures | verdicts(figures, end, found)


def verdicts(figures: Figures, end: str, found: dict[str, Candidate]) -> Figures:
    """Prints what the speeds were asked to be, and what they are."""
    new: Figures = {}
    if f"seconds_linear_gradient{end}" in figures:
        names = ("linear_gradient", "plain_gradient", "linear_products")
        own, plain, bare = (1e3 * figures[f"seconds_{name}{end}"] for name in names)
        new[f"ratio_linear_gradient_over_allowed{end}"] = ratio = own / (1.5 * plain + bare)
        allowed = f"1.5 x plain {plain:.1f} + its products alone {bare:.1f} ms"
        print(f"  gradient through Linear {own:.1f} ms, {allowed}: {ratio:.2f} of what is allowed")
    pairs = [("hypnettorch", "linear")] if {"hypnettorch", "linear"} <= found.keys() else []
    if "chunked" in found:
        pairs += [(name, "chunked") for name in peers.PEERS if name in found and name != "torch"]
    for name, own_name in pairs:
        ratio = figures[f"seconds_{name}_step{end}"] / figures[f"seconds_{own_name}_step{end}"]
        new[f"ratio_{name}_over_{own_name}{end}"] = ratio
        print(f"  a step of {found[name].label} takes {ratio:.2f} times as long as one of {found[own_name].label}")
    return new


def measure_memory(config: Config) -> Figures:
    """Peak memory of forward and backward through `Chunked`, beside the target's own bytes."""
    target = make_target(config, "25m")
    own = 4 * target.size
    print(f"\nmemory of a gradient through Chunked, {target.title}: {target.size:,} parameters, {own / 1e6:,.1f} MB")
    figures: Figures = {"bytes_target_25m": own}
    rest = dict(hypernetwork(target, "chunked").init(jax.random.key(2), target.x))
    arguments = (rest.pop("params"), rest, target.x, target.y)
    for key, remat in (("chunked_25m", False), ("chunked_25m_remat", True)):
        hyper = hypernetwork(target, "chunked", remat=remat)
        call = compiled(peers.gradient_of(loss_of(hyper)), *arguments)
        peak, resident = peers.account(call), peers.resident_peak(partial(call, *arguments))
        figures |= {f"peak_bytes_{key}": peak, f"ratio_peak_{key}_over_target": peak / own}
        figures |= {} if math.isnan(resident) else {f"resident_bytes_{key}": resident}
        print(f"  remat={remat!s:6}{peak / 1e6:8,.1f} MB, {peak / own:.2f} x the target; ", end="")
        print(f"while it ran the process grew by {resident / 1e6:,.1f} MB", flush=True)
    return figures


def measure_per_sample(config: Config) -> Figures:
    """A gradient with one set of weights for each sample: by factors, by `vmap`, and by `vmap` in blocks."""
    target = make_target(config, "mlp3")
    own = target.model.init(jax.random.key(2), target.x)["params"]
    z = jax.random.normal(jax.random.key(3), (len(target.x), target.embedding))
    block = max(1, len(z) // 8)
    # Factors are for Linen targets only; the same target as a function goes through vmap.
    function = {"model": lambda params, x: target.model.apply({"params": params}, x), "params": own}
    routes: list[tuple[str, str, dict[str, Any]]] = [
        *((name, "factored", {}) for name in ("scale", "low_rank")),
        *((name, "vmap", function) for name in ("scale", "low_rank", "chunked")),
        ("chunked", f"vmap_in_blocks_of_{block}", {**function, "sample_block": block}),
    ]
    runs: peers.Runs = {}
    figures: Figures = {}
    for name, route, options in (found for found in routes if found[0] in config.generators):
        hyper = hypernetwork(target, name, **options)
        rest = dict(hyper.init(jax.random.key(2), target.x, z=z))
        arguments = (rest.pop("params"), rest, target.x, target.y)
        call = compiled(peers.gradient_of(loss_of(hyper, z=z)), *arguments)
        figures[f"peak_bytes_{name}_{route}_per_sample"] = peers.account(call)
        runs[f"{name}_{route}_per_sample"] = partial(call, *arguments)
    print(f"\none set of weights for each of {len(z)} samples, {target.title}: a gradient")
    print("milliseconds                    median   fastest       MB")
    for name, seconds in in_turn(runs, config.repeats).items():
        median, fastest, peak = float(np.median(seconds)), min(seconds), figures[f"peak_bytes_{name}"]
        figures |= {f"seconds_{name}": median, f"min_seconds_{name}": fastest}
        label = name.removesuffix("_per_sample").replace("_", " ")
        print(f"{label:28}{1e3 * median:10.2f}{1e3 * fastest:10.2f}{peak / 1e6:9,.1f}")
    return figures


def check(config: Config) -> None:
    """Raises ValueError for a setting that makes no sense."""
    for name, value in dataclasses.asdict(config).items():
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(number, int) and not isinstance(number, bool) and number < 1 for number in numbers):
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected whole numbers of at least 1")
    for name, known in (("targets", TARGETS), ("generators", GENERATORS), ("peers", peers.PEERS)):
        unknown = [one for one in getattr(config, name) if one not in known]
        if unknown:
            raise ValueError(f"--{name} has {unknown[0]!r}, expected some of {', '.join(known)}")
    if min(len(config.layers), len(config.memory_layers)) < 2:
        raise ValueError("--layers and --memory-layers need at least two widths each, of features and classes")
    if config.image_depth % 6 != 4 or config.image_depth < 10:
        raise ValueError(f"--image-depth is {config.image_depth}, expected 6 n + 4, as 10, 16 or 40")
    if config.json is not None:
        folder = os.path.dirname(os.path.abspath(config.json))
        if os.path.isdir(config.json) or not os.access(folder, os.W_OK):
            raise ValueError(f"--json is {config.json}, which cannot be written; choose a file in a folder that exists")


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status, 2 for bad input."""
    config = training.parse(Config, (), argv, description=__doc__, prog="bench_hypernet.py")
    with training.bad_input(__file__):
        check(config)
    print(f"medians of {2 * config.repeats} runs in turn, on {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
    figures: Figures = {}
    parts: dict[str, Callable[[Config], Figures]] = {"25m": measure_memory, "per_sample": measure_per_sample}
    for name in config.targets:
        figures |= parts[name](config) if name in parts else measure(make_target(config, name), config)
    if config.json is not None:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
