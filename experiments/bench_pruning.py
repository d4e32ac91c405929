"""How much faster a Transformer gets by what it leaves out: each way to run less of it, against the dense network.

    python experiments/bench_pruning.py --json bench.json
    python experiments/bench_pruning.py --lengths 128 --batches 1 32 --repeats 40

Everything runs in one process, and each family of paths in turn with the dense network, so that the ratios hold
although the machine's speed drifts: dense; compact; buckets of widths, beside networks built at that width;
Mixture-of-Depths; experts; training steps; decoding one sequence token by token; routers alone. Parameters are random,
and decisions set by hand, to keep 25, 50 or 75 % of heads and hidden units, or of positions; `decode_skip` leaves out
as much of the layers. Beside the times stands the share of the dense network's operations, as `hyperjax.pruning` counts
it and as XLA does. Compiling is not in the times.

Keys: speedup_PATH_bBATCH, with _lLENGTH behind it for all lengths but the first; a path at x % kept is NAME_x.
"""

import dataclasses
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import bench_pruning_parts as parts
import bench_pruning_paths as paths
import jax
import numpy as np
from bench_pruning_paths import Paths, Setting

from hyperjax import training, transformer
from hyperjax.pruning.gated import check_sizes
from hyperjax.timing import in_turn

Figures = dict[str, float]
ROUTED = {"sequence": "bucket_encoder_{}", "token": "token", "mod": "mod", "experts": "experts_{}"}  # by router


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the measurement."""

    vocabulary: int = 98  # symbols
    layers: int = 6  # of the Transformer
    width: int = 256  # of its state
    heads: int = 8  # of each layer
    ffn: int = 1024  # hidden units of each layer
    blocks: int = 8  # blocks of hidden units that gates and experts choose among
    prompt: int = 32  # tokens from which a decoder with buckets decides
    percent: tuple[int, ...] = (25, 50, 75)  # of heads and hidden units kept; with 50
    batches: tuple[int, ...] = (1, 8, 32)  # sequences of a pass; decoding is measured if 1 is among them
    lengths: tuple[int, ...] = (128, 512)  # positions; all variants at the first, with the first and last of batches
    train_batch: int = 16  # sequences of a training step, of the first length
    decoded: int = 32  # tokens decoded in a run
    repeats: int = 16  # turns at 128 positions, two timed runs each; n times the positions get sqrt(n) times fewer
    seed: int = 0  # of parameters, tokens and gates that are closed
    json: str | None = None  # file to write the figures to


def setting_of(config: Config) -> Setting:
    shape = transformer.Config(
        vocabulary=config.vocabulary, layers=config.layers, width=config.width, heads=config.heads, ffn=config.ffn
    )
    return Setting(shape, config.blocks, config.prompt, config.percent, config.seed)


def tokens_of(config: Config, batch: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(config.seed), (batch, length), 0, config.vocabulary)


def turns(config: Config, positions: int) -> int:
    return max(1, round(config.repeats / max(1.0, positions / 128) ** 0.5))


def all_variants(config: Config, batch: int, length: int) -> bool:
    return length == config.lengths[0] and batch in (config.batches[0], config.batches[-1])


def forward(config: Config, batch: int, length: int) -> list[Paths]:
    """What is timed at a batch and length, by family; some variants only where all_variants says so."""
    setting, tokens, full = setting_of(config), tokens_of(config, batch, length), all_variants(config, batch, length)
    natives = config.percent if full else (50,)
    found = [
        paths.static_paths(setting, tokens, masked=full),
        paths.expert_paths(setting, tokens, (paths.CAPACITY, 2.0) if full else (paths.CAPACITY,)),
        paths.bucket_paths(setting, tokens, natives, causal=True),
        paths.bucket_paths(setting, tokens, natives, causal=False),
        paths.depth_paths(setting, tokens, natives),
    ]
    return [*found, parts.router_paths(setting, tokens)] if full else found


def timed(families: list[Paths], end: str, repeats: int) -> Figures:
    """Figures under keys with that end. Each family is timed in turn, with the dense path that it is compared with."""
    figures: Figures = {}
    found, every = merged(families), defaultdict[str, list[float]](list)
    for family in families:
        together = {one.against: found[one.against] for one in family.values() if one.against} | family
        seconds = in_turn({name: one.run for name, one in together.items()}, repeats)
        for name, one in together.items():
            every[name] += [each / one.tokens for each in seconds[name]]
            if one.against:
                figures[f"speedup_{name}{end}"] = float(np.median(seconds[one.against]) / np.median(seconds[name]))
    for name, one in found.items():
        figures[f"seconds_{name}{end}"] = float(np.median(every[name]))
        figures[f"min_seconds_{name}{end}"] = min(every[name])
        if one.compiling:
            figures[f"compile_seconds_{name}{end}"] = one.compiling
        if one.against and one.share is not None:
            figures[f"share_{name}{end}"] = one.share
        whole = found[one.against].flops if one.against else None
        if one.flops and whole:
            figures[f"xla_share_{name}{end}"] = one.flops / whole
    return figures


def merged(families: list[Paths]) -> Paths:
    return {name: one for family in families for name, one in family.items()}


def measure(config: Config) -> Figures:
    """Builds, times and prints everything, and returns the figures, whose keys are flat."""
    figures: Figures = {}
    for length in config.lengths:
        tail = "" if length == config.lengths[0] else f"_l{length}"
        for batch in config.batches:
            families, end = forward(config, batch, length), f"_b{batch}{tail}"
            figures |= timed(families, end, turns(config, batch * length))
            table(f"batch {batch}, length {length}", merged(families), figures, end)
        if 1 in config.batches:
            found = parts.decode_paths(setting_of(config), tokens_of(config, 1, config.decoded), length)
            figures |= timed([found], f"_b1{tail}", turns(config, 128))
            table(f"decoding one sequence, per token, with a cache of {length}", found, figures, f"_b1{tail}")
    length = config.lengths[0]
    found = parts.step_paths(setting_of(config), tokens_of(config, config.train_batch, length))
    figures |= timed([found], "", turns(config, 3 * config.train_batch * length))
    table(f"training step, batch {config.train_batch}, length {length}", found, figures, "")
    for name, one in found.items():
        if one.against:
            figures[f"ratio_{name}_over_dense"] = 1 / figures[f"speedup_{name}"]
    return figures | ratios(config, figures)


def ratios(config: Config, figures: Figures) -> Figures:
    """Buckets over networks of their width, and routers over what they belong to: each, and the median and largest."""
    found: Figures = {}
    for key in [key for key in figures if key.startswith("seconds_native_")]:
        name, _, end = key.removeprefix("seconds_native_").rpartition("_b")
        found[f"ratio_{name}_over_native_b{end}"] = figures[f"seconds_{name}_b{end}"] / figures[key]
    every = list(found.values())
    found |= {"ratio_bucket_over_native": float(np.median(every)), "max_ratio_bucket_over_native": max(every)}
    shares: Figures = {}
    routed = [batch for batch in config.batches if all_variants(config, batch, config.lengths[0])]
    for batch in routed:
        for kind, owner in ROUTED.items():
            alone, name = figures[f"seconds_router_{kind}_b{batch}"], owner.format(config.percent[0])
            shares[f"router_share_{kind}_b{batch}"] = alone / figures[f"seconds_{name}_b{batch}"]
    found |= shares | {"router_share": max(shares.values())}
    for batch in routed:
        whole = figures[f"seconds_experts_{config.percent[0]}_b{batch}"]
        found[f"plan_share_experts_b{batch}"] = figures[f"seconds_router_experts_plan_b{batch}"] / whole
    return found


def table(title: str, found: Paths, figures: Figures, end: str) -> None:
    """Prints what was timed together; paths that are not faster than the dense one are marked."""
    print(f"\n{title:54}{'ms':>10}{'speed-up':>10}{'counted':>9}{'XLA':>7}{'compile s':>11}")
    for name, one in found.items():
        line = f"{one.label:54}{1e3 * figures[f'seconds_{name}{end}']:10.3f}"
        speedup = figures.get(f"speedup_{name}{end}")
        for key, width, form in (("speedup", 10, ".2f"), ("share", 9, ".2f"), ("xla_share", 7, ".2f")):
            value = figures.get(f"{key}_{name}{end}")
            line += f"{'-' if value is None else format(value, form):>{width}}"
        line += f"{one.compiling:11.1f}" if one.compiling else f"{'-':>11}"
        print(line + ("  slower than dense" if speedup is not None and speedup < 1 else ""), flush=True)


def report(config: Config, figures: Figures) -> None:
    """Prints what the speeds were asked to be."""
    print()
    for batch in config.batches:
        asked = {1: "; asked: at least 1.4", 32: "; asked: at least 1.6"}.get(batch, "")
        speedup = figures[f"speedup_compact_50_b{batch}"]
        print(f"compact at half the heads and blocks, batch {batch}: {speedup:.2f} times as fast{asked}")
    taken = figures["ratio_mod_step_over_dense"]
    print(f"a step of Mixture-of-Depths takes {taken:.2f} times as long as a dense one; asked: at most 0.7")
    median, most = figures["ratio_bucket_over_native"], figures["max_ratio_bucket_over_native"]
    print(
        f"a bucket takes {median:.2f} times as long as a network of its width, {most:.2f} at most; asked: at most 1.15"
    )
    for kind in ROUTED:
        shares = {b: figures.get(f"router_share_{kind}_b{b}") for b in config.batches}
        shown = ", ".join(f"{100 * share:.1f} % at batch {b}" for b, share in shares.items() if share is not None)
        print(f"router of {kind}: {shown} of the pass; asked: at most 3 %")
    slow = [key.removeprefix("speedup_") for key in figures if key.startswith("speedup_") and figures[key] < 1]
    print(f"slower than dense: {', '.join(sorted(slow)) or 'none'}")


def check(config: Config) -> None:
    """Raises ValueError for a setting that makes no sense."""
    for name, value in dataclasses.asdict(config).items():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int) and each < (name != "seed"):
                least = int(name != "seed")
                raise ValueError(f"--{name.replace('_', '-')} is {each}, expected a whole number of at least {least}")
        if isinstance(value, tuple) and (not value or len(set(value)) < len(value)):
            raise ValueError(f"--{name} is {value}, expected one number or more, each once")
    if 50 not in config.percent or list(config.percent) != sorted(config.percent) or config.percent[-1] > 99:
        raise ValueError(f"--percent is {config.percent}, expected rising numbers from 1 to 99 with 50 among them")
    check_sizes(setting_of(config).shape, config.blocks)
    for name, units in (("heads", config.heads), ("blocks", config.blocks)):
        numbers = [paths.kept(units, percent) for percent in config.percent]
        if len(set(numbers)) < len(numbers) or numbers[-1] == units:
            raise ValueError(
                f"--{name} is {units}, of which {config.percent} % are {numbers}, expected different numbers below it"
            )
    if min(config.lengths) <= config.prompt:
        raise ValueError(f"--lengths is {config.lengths}, expected more than the {config.prompt} tokens of --prompt")
    if config.layers < 2:
        raise ValueError(f"--layers is {config.layers}, expected 2 or more: every second one chooses positions")
    if config.decoded > min(config.lengths):
        raise ValueError(
            f"--decoded is {config.decoded}, expected at most {min(config.lengths)}, the size of the cache"
        )
    if config.json is not None:
        folder = os.path.dirname(os.path.abspath(config.json))
        if os.path.isdir(config.json) or not os.access(folder, os.W_OK):
            raise ValueError(f"--json is {config.json}, which cannot be written; choose a file in a folder that exists")


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status, 2 for bad input."""
    config = training.parse(Config, (), argv, description=__doc__, prog="bench_pruning.py")
    with training.bad_input(__file__):
        check(config)
    print(
        f"{config.layers} layers of width {config.width}, {config.heads} heads, {config.ffn} hidden units, float32; "
        f"medians of runs in turn, on {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        flush=True,
    )
    figures = measure(config)
    report(config, figures)
    if config.json is not None:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
