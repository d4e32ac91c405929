"""What training on more devices costs: what they exchange, what each computes and holds, how long a step would take.

    python experiments/scaling.py --model language_model       # meshes of 1 to 64 devices, none of which is needed
    python experiments/scaling.py --model hypernetwork --width 512 --meshes data=8 data=4,model=2 --link-gb 25

The devices are virtual ones of this CPU. A step is compiled for each mesh, and XLA's own text of the program says what
it does; on few devices it is run as well, which shows that the losses agree. The predicted time is that of the products
at the rate given, and of the exchanges at the speed given, one after the other: to weigh meshes against each other.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import scaling_cases
import tqdm
from scaling_cases import CASES, IN_PLACE

from hyperjax import training
from hyperjax.training import programs
from hyperjax.training.mesh import mesh_shape

MESHES = ("data=1", "data=2", "data=4", "data=8", "data=16", "data=32", "data=64", "data=4,model=2", "data=8,model=8")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; the global batch is the same on every mesh."""

    preset: str = "quick"  # quick, or paper: the HyperLSTM of the paper's size
    model: str = "language_model"  # language_model, hypernetwork, snr or transformer
    meshes: tuple[str, ...] = MESHES  # to compile for
    batch: int = 64  # rows of a batch, over all devices
    width: int = 128  # units of the network
    length: int = 32  # steps of text
    run_up_to: int = 8  # run a step too on meshes of at most so many devices; 0 runs none
    tflops: float = 10.0  # what a device reaches in products, 1e12 operations a second
    link_gb: tuple[float, ...] = (10.0, 50.0, 450.0)  # what a device sends, 1e9 bytes a second
    latency_us: float = 10.0  # of an exchange, microseconds
    workdir: str | None = None  # where the table and the plot are kept; None is runs/scaling-MODEL


def defaults(preset: str = "quick", model: str = "language_model") -> Config:
    """The defaults of a preset and a model."""
    _expect(preset in ("quick", "paper"), "preset", preset, "quick or paper")
    _expect(model in CASES, "model", model, f"one of {', '.join(CASES)}")
    large: dict[str, Any] = {"batch": 128, "width": 1000, "length": 100, "run_up_to": 0} if preset == "paper" else {}
    return Config(preset, model, **large)


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    for name in ("batch", "width", "length"):
        _expect(getattr(config, name) >= 1, name, getattr(config, name), "1 or more")
    _expect(config.width % 4 == 0, "width", config.width, "a multiple of 4")
    _expect(config.run_up_to >= 0, "run_up_to", config.run_up_to, "0 or more")
    for value in (config.tflops, *config.link_gb):
        _expect(0 < value < math.inf, "tflops and --link-gb", value, "positive numbers")
    _expect(0 <= config.latency_us < math.inf, "latency_us", config.latency_us, "0 or more")
    for mesh in config.meshes:
        devices = math.prod(mesh_shape(mesh).values())
        _expect(config.batch % devices == 0, "batch", config.batch, f"a multiple of the {devices} devices of {mesh}")


def weigh(config: Config, text: str) -> dict[str, Any]:
    """Compiles a step for a mesh: what each device does in it, and how long it would take."""
    layout = training.Layout(training.make_mesh(text), config.batch, in_place=IN_PLACE)
    case = CASES[config.model](config.batch, config.width, config.length)
    optimizer = optax.adam(1e-3)
    step: Any = training.make_step(case.loss_fn, optimizer, layout)
    key, batch = jax.random.key(0), layout.join(case.batch_at(0))
    state = jax.eval_shape(lambda: training.TrainState.create(case.init(), optimizer, case.carry))
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, layout.shardings(state)
    )
    began = time.perf_counter()
    compiled = step.lower(shapes, batch, key).compile()
    devices, memory = layout.mesh.size, compiled.memory_analysis()
    exchanged = programs.collectives(compiled.as_text(), devices)
    sent = {kind: sum(each.sent for each in exchanged if each.kind == kind) for kind in programs.KINDS}
    row = {
        "mesh": text,
        "devices": devices,
        "gflop": programs.flops(compiled) / 1e9,
        "state_mib": sum(leaf.size * leaf.dtype.itemsize / _parts(leaf) for leaf in jax.tree.leaves(shapes)) / 2**20,
        "peak_mib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20,
        "exchanges": sum(each.times for each in exchanged),
        **{f"{kind}_mib": value / 2**20 for kind, value in sent.items()},
        "sent_mib": sum(sent.values()) / 2**20,
        "compile_seconds": time.perf_counter() - began,
    }
    row["compute_ms"] = row["gflop"] / config.tflops
    for link in config.link_gb:
        exchange = 1e3 * sum(sent.values()) / (1e9 * link) + row["exchanges"] * config.latency_us / 1e3
        row[f"ms_at_{link:g}"] = row["compute_ms"] + exchange
    if devices <= config.run_up_to:
        _, metrics = compiled(layout.place(case.state(optimizer)), batch, key)
        row["loss"] = float(metrics["loss"])
    return row


def report(config: Config, rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    links = "".join(f"{f'at {link:g} GB/s':>14}" for link in config.link_gb)
    lines = [f"{'':18}{'GFLOP':>9}{'state':>9}{'peak':>9}{'sent':>9}{'exchanges':>11}   predicted ms a step"]
    lines += [f"{'mesh':18}{'':>9}{'MiB':>9}{'MiB':>9}{'MiB':>9}{'':>11}{links}{'loss':>12}"]
    for row in rows:
        times = "".join(f"{row[f'ms_at_{link:g}']:14.3f}" for link in config.link_gb)
        sizes = f"{row['gflop']:9.3f}{row['state_mib']:9.2f}{row['peak_mib']:9.2f}{row['sent_mib']:9.2f}"
        loss = f"{row['loss']:12.6f}" if "loss" in row else f"{'not run':>12}"
        lines.append(f"{row['mesh']:18}{sizes}{row['exchanges']:11}{times}{loss}")
    training.say("\n".join(lines))


def draw(config: Config, rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted time of a step over the number of devices, at each speed of the links."""
    from hyperjax import plotting

    title = f"{config.model.replace('_', ' ')}, batch {config.batch}: what links allow"
    figure, axes = plotting.subplots(size=(7.4, 4.2), title=title)
    plain = sorted((row for row in rows if mesh_shape(row["mesh"])["model"] == 1), key=lambda row: row["devices"])
    split = [row for row in rows if mesh_shape(row["mesh"])["model"] > 1]
    axes.plot([r["devices"] for r in plain], [r["compute_ms"] for r in plain], "k:", label="products alone")
    for number, link in enumerate(config.link_gb):
        name, colour = f"ms_at_{link:g}", plotting.color(number)
        axes.plot([r["devices"] for r in plain], [r[name] for r in plain], "o-", color=colour, label=f"{link:g} GB/s")
        axes.plot([r["devices"] for r in split], [r[name] for r in split], "s", color=colour, mfc="white")
    if split:
        axes.plot([], [], "ks", mfc="white", label="parameters split")
    counts = sorted({row["devices"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_xlabel("devices")
    axes.set_ylabel("predicted time of a step (ms)")
    axes.legend(frameon=False, fontsize=9)
    plotting.plain(axes)
    plotting.save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status, 2 for bad input."""
    started = time.perf_counter()
    config = training.parse(defaults, argv=argv, description=__doc__, prog="scaling.py")
    with training.bad_input(__file__, scaling_cases.__file__):
        check(config)
        most = max(math.prod(mesh_shape(mesh).values()) for mesh in config.meshes)
        if len(jax.devices("cpu")) < most:
            raise ValueError(f"{most} devices are needed; start it by itself, in a process that has not used JAX yet")
        workdir = training.Workdir(config.workdir or f"runs/scaling-{config.model}", config)
        if workdir.summary is None:
            workdir.open()
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to measure again")
        return 0
    with workdir, training.stopping():
        sizes = f"batch {config.batch}, width {config.width}, length {config.length}"
        training.say(f"{config.model}: {sizes}; on at most {most} devices, all virtual")
        rows = [weigh(config, mesh) for mesh in tqdm.tqdm(config.meshes, unit="mesh")]
        losses = [row["loss"] for row in rows if "loss" in row]
        if losses and not np.allclose(losses, losses[0], rtol=1e-5):
            raise training.NonFinite(f"the losses of the meshes differ: {losses}")
        report(config, rows)
        training.write_json(workdir.path / "scaling.json", rows)
        draw(config, rows, workdir.path / "scaling.png")
        workdir.finish({"model": config.model, "meshes": len(rows), "seconds": time.perf_counter() - started})
    print(f"{workdir.path / 'scaling.png'} and scaling.json hold the rest")
    return 0


def _parts(leaf: jax.ShapeDtypeStruct) -> float:
    """In how many parts an array is split."""
    return math.prod(leaf.shape) / max(1, math.prod(leaf.sharding.shard_shape(leaf.shape)))


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 64)
    sys.exit(main())
