"""How fast the recurrent layer is: forward and backward of a layer-norm HyperLSTM, beside what else there is.

    python experiments/bench_recurrent.py --json bench.json

Everything runs in one process, in turn, so that the ratios hold although the machine's speed drifts: our layer; the
same cell under `lax.scan`, differentiated as it stands; the same matrix products and nothing else (the floor); Flax's
LSTM; and, where the `bench` extra is installed, PyTorch's LSTM and labml-nn's HyperLSTM.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hyperjax import training
from hyperjax.recurrent import FastRNN, HyperLSTM, Weights
from hyperjax.recurrent.scan import product


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the measurement; the defaults are those of the paper's layer-norm HyperLSTM."""

    units: int = 1000  # width of the main cell
    hyper_units: int = 128  # width of the hyper cell
    embedding: int = 4  # N_z
    features: int = 50  # width of the input, a one-hot symbol
    batch: int = 128  # sequences in parallel
    steps: int = 25  # time steps of the speed measurement
    memory_steps: int = 400  # time steps of the memory measurement
    remat_chunk: int = 20  # steps of a rematerialised chunk, in the memory measurement
    repeats: int = 5  # timed runs of each candidate, in turn; the median counts
    json: str | None = None  # file to write the figures to


def setup(config: Config, steps: int) -> tuple[jax.Array, jax.Array]:
    """One-hot inputs [T, B, D], and a cotangent [T, B, H] that makes the output a scalar."""
    ids = jax.random.randint(jax.random.key(0), (steps, config.batch), 0, config.features)
    return jax.nn.one_hot(ids, config.features), jax.random.normal(jax.random.key(1), (*ids.shape, config.units))


def cell(config: Config) -> HyperLSTM:
    return HyperLSTM(config.units, hyper_units=config.hyper_units, embedding=config.embedding, layer_norm=True)


def gradient(layer: Any, cotangent: jax.Array) -> Callable:
    """value_and_grad of <cotangent, outputs>, with respect to the parameters."""

    def loss(variables, x):
        out = layer.apply(variables, x)
        return jnp.vdot(out[-1] if isinstance(out, tuple) else out, cotangent)

    return jax.value_and_grad(loss)


def floor(weights: Weights, config: Config) -> Callable:
    """The matrix products of one forward and backward pass, each with its real shapes and order, and nothing else."""
    z = weights.small["z"]
    to_z = jnp.concatenate([z["W_h"], z["W_x"], z["W_b"]], -1)
    scales = [v for k, v in z.items() if k.startswith("d_")]
    U, gates, inputs = weights.small["hyper"]["U"], weights.recurrent, weights.inputs
    S, Z = config.hyper_units, config.embedding
    last = max(gates, key=lambda k: gates[k].shape[1] == config.units)  # the product that becomes the next h

    def run(x_TBD, h_BH):
        xp = {k: product(x_TBD, w) for k, w in inputs.items()}

        def forward(state, _):
            h, h_hat = state
            p = {k: product(h, w) for k, w in gates.items()}
            u, e = product(h_hat, U), product(h_hat, to_z)
            d = lax.optimization_barrier([product(e[:, n * Z : (n + 1) * Z], w) for n, w in enumerate(scales)])
            return (p[last], u[:, :S]), (h, p, u, e, sum(v[0, 0] for v in d))

        (dh, dh_hat), (h, p, u, e, used) = lax.scan(forward, (h_BH, h_BH[:, :S]), None, x_TBD.shape[0])

        def backward(_, at_t):
            p, u, e = at_t
            dh = sum(product(p[k], w.T) for k, w in gates.items())
            dz = [product(p[last], w.T) for w in scales]
            dscales = [product(e[:, n * Z : (n + 1) * Z].T, p[last]) for n in range(len(scales))]
            small = [product(u, U.T), product(e, to_z.T), product(u[:, :S].T, u), product(u[:, :S].T, e)]
            kept = lax.optimization_barrier((dz, dscales, small))
            return dh, sum(v[0, 0] for v in jax.tree.leaves(kept))

        dh, kept = lax.scan(backward, dh, (p, u, e), reverse=True)
        flat = h.reshape(-1, h.shape[-1]).T
        dgates = {k: product(flat, v.reshape(-1, v.shape[-1])) for k, v in p.items()}
        x = x_TBD.reshape(-1, x_TBD.shape[-1]).T
        dinputs = {k: product(x, v.reshape(-1, v.shape[-1])) for k, v in xp.items()}
        return dh, dh_hat, dgates, dinputs, used, kept

    return run


def torch_candidates(config: Config, steps: int) -> dict[str, Callable[[], None]]:
    """PyTorch's LSTM and labml-nn's HyperLSTM, where installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    x = torch.from_numpy(np.array(setup(config, steps)[0]))
    v = torch.from_numpy(np.array(setup(config, steps)[1]))

    def timed(module):
        def call():
            module.zero_grad(set_to_none=True)
            (module(x)[0] * v).sum().backward()

        return call

    found = {"torch_lstm": timed(torch.nn.LSTM(config.features, config.units))}
    if importlib.util.find_spec("labml_nn") is not None:
        from labml_nn.hypernetworks.hyper_lstm import HyperLSTM as Labml

        found["labml"] = timed(Labml(config.features, config.units, config.hyper_units, config.embedding, 1))
    return found


def compiled(function: Callable, *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    made = jax.jit(function).lower(*arguments).compile()
    return made, time.perf_counter() - start


def peak_bytes(config: Config, remat_chunk: int | None) -> int:
    """XLA's own account of the memory of one gradient: arguments, results and everything in between."""
    x, v = setup(config, config.memory_steps)
    layer = FastRNN(cell(config), time_major=True, remat_chunk=remat_chunk)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    memory = compiled(gradient(layer, v), variables, x)[0].memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def measure(config: Config) -> dict[str, float]:
    """Flat figures: seconds_NAME, compile_seconds_NAME, ratios and peak bytes."""
    x, v = setup(config, config.steps)
    layers = {
        "ours": FastRNN(cell(config), time_major=True),
        "naive": nn.RNN(cell(config), time_major=True),
        "flax_lstm": nn.RNN(nn.OptimizedLSTMCell(config.units), time_major=True),
    }
    runs: dict[str, Callable[[], Any]] = {}
    figures: dict[str, float] = {}
    for name, layer in layers.items():
        variables = jax.jit(layer.init)(jax.random.key(2), x)
        if name == "ours":
            weights = FastRNN(cell(config)).bind(variables).cell.weights(config.features)
        call, figures[f"compile_seconds_{name}"] = compiled(gradient(layer, v), variables, x)
        runs[name] = partial(call, variables, x)
    call, figures["compile_seconds_floor"] = compiled(floor(weights, config), x, v[0])
    runs["floor"] = partial(call, x, v[0])
    runs |= torch_candidates(config, config.steps)

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(config.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    figures |= {f"seconds_{name}": float(np.median(values)) for name, values in seconds.items()}
    figures["ratio_ours_over_floor"] = figures["seconds_ours"] / figures["seconds_floor"]
    figures["ratio_naive_over_ours"] = figures["seconds_naive"] / figures["seconds_ours"]
    if "labml" in runs:
        figures["ratio_labml_over_ours"] = figures["seconds_labml"] / figures["seconds_ours"]
    figures["peak_bytes_remat"] = peak_bytes(config, config.remat_chunk)
    figures["peak_bytes_plain"] = peak_bytes(config, None)
    return figures


LABELS = {
    "floor": "its matrix products alone",
    "ours": "HyperLSTM, hyperjax",
    "naive": "the same cell, lax.scan",
    "flax_lstm": "LSTM, flax",
    "torch_lstm": "LSTM, PyTorch",
    "labml": "HyperLSTM, labml-nn",
}


def report(config: Config, figures: dict[str, float]) -> None:
    """Prints the table."""
    print(f"{'':28}{'seconds':>9}{'x floor':>9}{'compile s':>11}")
    for name, label in LABELS.items():
        if (seconds := figures.get(f"seconds_{name}")) is None:
            print(f"{label:28}  not installed: pip install -e '.[bench]'")
            continue
        compile_seconds = figures.get(f"compile_seconds_{name}")
        shown = "-" if compile_seconds is None else f"{compile_seconds:.1f}"
        print(f"{label:28}{seconds:9.3f}{seconds / figures['seconds_floor']:9.2f}{shown:>11}")
    plain, remat = figures["peak_bytes_plain"], figures["peak_bytes_remat"]
    print(
        f"peak memory at {config.memory_steps} steps: {plain / 2**20:,.0f} MiB, "
        f"{remat / 2**20:,.0f} MiB rematerialised in chunks of {config.remat_chunk} ({plain / remat:.1f}x less)"
    )


def check(config: Config) -> None:
    """Raises ValueError for a setting that makes no sense."""
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected a whole number of at least 1")
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
    print(
        f"{config.units} units, hyper {config.hyper_units}, N_z {config.embedding}, batch {config.batch}, "
        f"{config.steps} steps, forward and backward, medians of {config.repeats}; {jax.devices()[0].device_kind}"
    )
    figures = measure(config)
    report(config, figures)
    if config.json is not None:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
