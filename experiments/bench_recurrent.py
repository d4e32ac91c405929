"""How fast the recurrent layer is: forward and backward of a layer-norm HyperLSTM, beside what else there is.

    python experiments/bench_recurrent.py --json bench.json

Everything runs in one process, in turn, so that the ratios hold although the machine's speed drifts: our layer, also
with bfloat16 products; the same cell under `lax.scan`, differentiated as it stands; the same matrix products and
nothing else (the floor); Flax's LSTM; and, where installed (the `bench` extra), PyTorch's LSTM and labml-nn's
HyperLSTM, on the GPU if JAX is. Then a whole training step, several to a call, and the floor by counting.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_recurrent_parts as parts
import char_lm
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from char_lm_presets import defaults

from hyperjax import training
from hyperjax.data import Streams
from hyperjax.recurrent import FastRNN, HyperLSTM
from hyperjax.timing import compiled, in_turn


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the measurement; the defaults are those of the paper's layer-norm HyperLSTM."""

    units: int = 1000  # width of the main cell
    hyper_units: int = 128  # width of the hyper cell
    embedding: int = 4  # N_z
    features: int = 50  # width of the input, a one-hot symbol
    batch: int = 128  # sequences in parallel
    steps: int = 0  # time steps; 0 is 100, but 25 on a CPU
    calls: int = 0  # training steps a call; 0 is 20, but 2 on a CPU
    memory_steps: int = 400  # time steps of the memory measurement
    remat_chunk: int = 20  # steps of a rematerialised chunk, in the memory measurement
    repeats: int = 5  # rounds of two timed runs of each candidate, in turn; the median counts
    json: str | None = None  # file to write the figures to


def sized(config: Config) -> Config:
    """With the sizes that depend on the machine."""
    cpu = jax.default_backend() == "cpu"
    return dataclasses.replace(
        config, steps=config.steps or (25 if cpu else 100), calls=config.calls or (2 if cpu else 20)
    )


def setup(config: Config, steps: int) -> tuple[jax.Array, jax.Array]:
    """One-hot inputs [T, B, D], and a cotangent [T, B, H] that makes the output a scalar."""
    ids = jax.random.randint(jax.random.key(0), (steps, config.batch), 0, config.features)
    return jax.nn.one_hot(ids, config.features), jax.random.normal(jax.random.key(1), (*ids.shape, config.units))


def cell(config: Config, dtype: Any = None) -> HyperLSTM:
    return HyperLSTM(
        config.units, hyper_units=config.hyper_units, embedding=config.embedding, layer_norm=True, dtype=dtype
    )


def gradient(layer: Any, cotangent: jax.Array) -> Callable:
    """value_and_grad of <cotangent, outputs>, with respect to the parameters."""

    def loss(variables, x):
        out = layer.apply(variables, x)
        return jnp.vdot(out[-1] if isinstance(out, tuple) else out, cotangent)

    return jax.value_and_grad(loss)


def training_call(config: Config, dtype: Any) -> Callable[[], Any]:
    """A call of `calls` steps of char_lm.py's training of this model, on random text that lies on the device."""
    sizes = {name: getattr(config, name) for name in ("units", "hyper_units", "embedding", "batch")}
    run = dataclasses.replace(
        defaults("paper", "ln_hyper_lstm"), **sizes, length=config.steps, steps_per_call=config.calls, dtype=dtype
    )
    ids = np.random.default_rng(0).integers(0, config.features, config.batch * config.steps * 4 + 1)
    model, optimizer = char_lm.make_model(run, config.features), char_lm.make_optimizer(run, 1000)
    advance, read = char_lm.make_advance(
        run, char_lm.make_loss(model), optimizer, Streams(ids, config.batch, config.steps)
    )
    state, key, data = (
        jax.jit(char_lm.make_create(run, model, optimizer))(jax.random.key(0)),
        jax.random.key(1),
        read(0),
    )

    def call():
        nonlocal state
        state, metrics = advance(state, data, key, config.calls)
        return metrics

    return call


def peak_bytes(config: Config, remat_chunk: int | None) -> int:
    """XLA's own account of the memory of one gradient: arguments, results and everything in between."""
    x, v = setup(config, config.memory_steps)
    layer = FastRNN(cell(config), time_major=True, remat_chunk=remat_chunk)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    memory = compiled(gradient(layer, v), variables, x).memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def least(figures: dict[str, Any]) -> float:
    """The floor in seconds: the products alone on a CPU, by counting on an accelerator, which has larger ones."""
    return figures["seconds_floor"] if jax.default_backend() == "cpu" else figures["counted_seconds"]


def measure(config: Config) -> dict[str, Any]:
    """Flat figures: seconds_NAME, compile_seconds_NAME, ratios, counts and peak bytes."""
    x, v = setup(config, config.steps)
    layers: dict[str, Any] = {
        "ours": FastRNN(cell(config), time_major=True),
        "ours_bfloat16": FastRNN(cell(config, jnp.bfloat16), time_major=True),
        "naive": nn.RNN(cell(config), time_major=True),
        "flax_lstm": nn.RNN(nn.OptimizedLSTMCell(config.units), time_major=True),
    }
    runs: dict[str, Callable[[], Any]] = {}
    figures: dict[str, Any] = {"device": jax.devices()[0].device_kind}

    def add(name: str, function: Callable, *arguments: Any) -> Any:
        start = time.perf_counter()
        call = compiled(function, *arguments)
        figures[f"compile_seconds_{name}"] = time.perf_counter() - start
        runs[name] = partial(call, *arguments)
        return call

    for name, layer in layers.items():
        variables = jax.jit(layer.init)(jax.random.key(2), x)
        call = add(name, gradient(layer, v), variables, x)
        if name == "ours":
            weights = FastRNN(cell(config)).bind(variables).cell.weights(config.features)
            if jax.default_backend() == "gpu":
                figures["kernels"] = parts.kernels_in_a_step(call.as_text())
    add("floor", parts.products_alone(weights), x, v[0])
    runs |= parts.torch_runs(np.array(x), np.array(v), config.units, config.hyper_units, config.embedding)
    runs |= {f"step_{dtype}": training_call(config, dtype) for dtype in ("float32", "bfloat16")}

    for name, seconds in in_turn(runs, config.repeats).items():
        each = config.calls if name.startswith("step_") else 1
        figures[f"seconds_{name}"] = float(np.median(seconds)) / each
    figures |= {f"counted_{k}": v for k, v in parts.counted_floor(weights, config.batch, config.steps, 3).items()}
    figures["ratio_ours_over_floor"] = figures["seconds_ours"] / least(figures)
    figures["ratio_naive_over_ours"] = figures["seconds_naive"] / figures["seconds_ours"]
    for name in ("torch_lstm", "labml"):
        if name in runs:
            figures[f"ratio_{name}_over_ours"] = figures[f"seconds_{name}"] / figures["seconds_ours"]
    figures["peak_bytes_remat"] = peak_bytes(config, config.remat_chunk)
    figures["peak_bytes_plain"] = peak_bytes(config, None)
    return figures


LABELS = {
    "floor": "its matrix products alone",
    "ours": "HyperLSTM, hyperjax",
    "ours_bfloat16": "the same, bfloat16 products",
    "naive": "the same cell, lax.scan",
    "flax_lstm": "LSTM, flax",
    "torch_lstm": "LSTM, PyTorch",
    "torch_lstm_bfloat16": "LSTM, PyTorch, bfloat16",
    "labml": "HyperLSTM, labml-nn",
    "step_float32": "training step, hyperjax",
    "step_bfloat16": "the same, bfloat16 products",
}


def report(config: Config, figures: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"{'':28}{'ms':>10}{'x floor':>9}{'characters/s':>14}{'compile s':>11}")
    for name, label in LABELS.items():
        if (seconds := figures.get(f"seconds_{name}")) is None:
            if name != "torch_lstm_bfloat16":
                print(f"{label:28}  not there: pip install -e '.[bench]', on a GPU with PyTorch's CUDA")
            continue
        compile_seconds = figures.get(f"compile_seconds_{name}")
        shown = "-" if compile_seconds is None else f"{compile_seconds:.1f}"
        speed = config.batch * config.steps / seconds
        print(f"{label:28}{1e3 * seconds:10.2f}{seconds / least(figures):9.2f}{speed:14,.0f}{shown:>11}")
    print(
        f"floor by counting: {1e3 * figures['counted_seconds']:.2f} ms, for {figures['counted_gflop']:.3g} GFLOP at "
        f"{figures['counted_tflop_per_second']:.3g} TFLOP/s in the loop, "
        f"{figures['counted_tflop_per_second_at_once']:.3g} at once, and 2 x {config.steps} launches of "
        f"{1e6 * figures['counted_launch_seconds']:.2f} us"
    )
    if "kernels" in figures:
        print(f"kernels in a time step, a loop each: {', '.join(map(str, figures['kernels']))}")
    plain, remat = figures["peak_bytes_plain"], figures["peak_bytes_remat"]
    print(
        f"peak memory at {config.memory_steps} steps: {plain / 2**20:,.0f} MiB, "
        f"{remat / 2**20:,.0f} MiB rematerialised in chunks of {config.remat_chunk} ({plain / remat:.1f}x less)"
    )


def check(config: Config) -> None:
    """Raises ValueError for a setting that makes no sense."""
    for name, value in dataclasses.asdict(config).items():
        lowest = 0 if name in ("steps", "calls") else 1
        if isinstance(value, int) and value < lowest:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected a whole number of at least {lowest}")
    if config.hyper_units > config.units:
        raise ValueError(f"--hyper-units is {config.hyper_units}, expected at most the --units, {config.units}")
    if config.json is not None:
        folder = os.path.dirname(os.path.abspath(config.json))
        if os.path.isdir(config.json) or not os.access(folder, os.W_OK):
            raise ValueError(f"--json is {config.json}, which cannot be written; choose a file in a folder that exists")


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status, 2 for bad input."""
    config = training.parse(Config, (), argv, description=__doc__, prog="bench_recurrent.py")
    with training.bad_input(__file__):
        check(config)
    config = sized(config)
    print(
        f"{config.units} units, hyper {config.hyper_units}, N_z {config.embedding}, batch {config.batch}, "
        f"{config.steps} steps, forward and backward; training {config.calls} steps a call; medians of "
        f"{2 * config.repeats}; {jax.devices()[0].device_kind}"
    )
    figures = measure(config)
    report(config, figures)
    if config.json is not None:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
