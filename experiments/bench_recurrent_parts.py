"""What bench_recurrent.py holds the recurrent layer against: floors, PyTorch, and the kernels that XLA made of it."""

import importlib.util
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hyperjax.recurrent import Weights
from hyperjax.recurrent.scan import product
from hyperjax.timing import compiled, in_turn


def products_alone(weights: Weights) -> Callable:
    """The matrix products of one forward and backward pass as a CPU does them, in order, and nothing else.

    On an accelerator the layer has fewer and larger ones: there `counted_floor` is the measure.

    Args:
        weights: of a HyperLSTM.

    Returns:
        run(x [T, B, D], h [B, H]).
    """
    to_z, U, recurrent = weights.small["z"]["W"], weights.small["hyper"]["U"], weights.recurrent["h"]
    d_KZH = weights.small["z"]["d"].reshape(-1, *weights.small["z"]["d"].shape[2:])
    (K, Z, H), S = d_KZH.shape, U.shape[0]
    thin = [slice(n * Z, (n + 1) * Z) for n in range(K)]

    def run(x_TBD, h_BH):
        xp = {k: product(x_TBD, w) for k, w in weights.inputs.items()}

        def forward(state, _):
            h, h_hat = state
            p, u, e = product(h, recurrent), product(h_hat, U), product(h_hat, to_z)
            d = lax.optimization_barrier([product(e[:, part], w) for part, w in zip(thin, d_KZH, strict=True)])
            return (p[:, :H], u[:, :S]), (h, p, u, e, sum(v[0, 0] for v in d))

        (dh, dh_hat), (h, p, u, e, used) = lax.scan(forward, (h_BH, h_BH[:, :S]), None, x_TBD.shape[0])

        def backward(_, at_t):
            p, u, e = at_t
            dh, dd = product(p, recurrent.T), p[:, :H]
            dz = [product(dd, w.T) for w in d_KZH]
            dscales = [product(e[:, part].T, dd) for part in thin]
            small = [product(u, U.T), product(e, to_z.T), product(u[:, :S].T, u), product(u[:, :S].T, e)]
            kept = lax.optimization_barrier((dz, dscales, small))
            return dh, sum(v[0, 0] for v in jax.tree.leaves(kept))

        dh, kept = lax.scan(backward, dh, (p, u, e), reverse=True)
        dW = product(h.reshape(-1, H).T, p.reshape(-1, p.shape[-1]))
        x = x_TBD.reshape(-1, x_TBD.shape[-1]).T
        dinputs = {k: product(x, v.reshape(-1, v.shape[-1])) for k, v in xp.items()}
        return dh, dh_hat, dW, dinputs, used, kept

    return run


def counted_floor(weights: Weights, batch: int, steps: int, repeats: int) -> dict[str, float]:
    """The time that the arithmetic of one forward and backward pass would take, with one launch a time step each way.

    The rate is measured on the product of h with all its matrices, 200 times in a loop; so is a launch, on an addition
    of a single row in its place. What is done for all steps at once, the gradients of the matrices and the product with
    x, goes at the rate of one such product. Flops are counted: a product, and two of its size on the way back.

    Args:
        weights: of a HyperLSTM.
        batch: B, rows of every product.
        steps: T.
        repeats: rounds of the measurement.

    Returns:
        gflop, tflop_per_second (in the loop, and _at_once), launch_seconds, seconds.
    """
    recurrent, count = weights.recurrent["h"], 200
    H = recurrent.shape[0]
    matrices = [recurrent, *weights.inputs.values(), weights.small["hyper"]["U"], weights.small["z"]["W"]]
    entries = sum(w.size for w in matrices) + weights.small["z"]["d"].size
    rows, of_x = 2.0 * batch * steps, sum(w.size for w in weights.inputs.values())
    at_once, in_loop = rows * (entries + of_x), rows * 2 * (entries - of_x)

    def multiplied(h, w):
        def body(h, _):
            p = lax.optimization_barrier(product(h, w))
            return p[:, :H], None

        return lax.scan(body, h, None, count)[0]

    def launched(h, w):
        return lax.scan(lambda h, _: (h + w, None), h, None, count)[0]

    h, row, deep = jnp.ones((batch, H)), jnp.ones((1, H)), jnp.ones((batch * steps, recurrent.shape[1]))
    calls = {
        "product": (multiplied, (h, recurrent)),
        "launch": (launched, (row, row)),
        "at_once": (lambda h, d: product(h.T, d), (jnp.ones((batch * steps, H)), deep)),
    }
    timed = in_turn({name: partial(compiled(call, *a), *a) for name, (call, a) in calls.items()}, repeats)
    each = {name: float(np.median(seconds)) for name, seconds in timed.items()}
    launch = each["launch"] / count
    rate = 2.0 * batch * recurrent.size / max(each["product"] / count - launch, 1e-9)
    rate_at_once = rows * recurrent.size / each["at_once"]
    return {
        "gflop": (in_loop + at_once) / 1e9,
        "tflop_per_second": rate / 1e12,
        "tflop_per_second_at_once": rate_at_once / 1e12,
        "launch_seconds": launch,
        "seconds": in_loop / rate + at_once / rate_at_once + 2 * steps * launch,
    }


def torch_runs(x_TBD: np.ndarray, cotangent: np.ndarray, units: int, hyper_units: int, embedding: int) -> dict:
    """PyTorch's LSTM (cuDNN's on CUDA) and labml-nn's HyperLSTM, where installed, forward and backward.

    Returns:
        {"torch_lstm": call, "labml": call}; on CUDA "torch_lstm_bfloat16" too. A call returns when the device is done.
    """
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    cuda = torch.cuda.is_available() and jax.default_backend() == "gpu"
    if jax.default_backend() != "cpu" and not cuda:
        return {}  # on another device than ours
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_float32_matmul_precision("high" if cuda else "highest")  # as JAX's default on each
    x, v = (torch.from_numpy(np.array(a)).to(device) for a in (x_TBD, cotangent))

    def timed(module, dtype=torch.float32):
        module = module.to(device, dtype)

        def call():
            module.zero_grad(set_to_none=True)
            (module(x.to(dtype))[0] * v).sum().backward()
            if cuda:
                torch.cuda.synchronize()

        return call

    features = x.shape[-1]
    found = {"torch_lstm": timed(torch.nn.LSTM(features, units))}
    if cuda:
        found["torch_lstm_bfloat16"] = timed(torch.nn.LSTM(features, units), torch.bfloat16)
    if importlib.util.find_spec("labml_nn") is not None:
        from labml_nn.hypernetworks.hyper_lstm import HyperLSTM

        found["labml"] = timed(HyperLSTM(features, units, hyper_units, embedding, 1))
    return found


def kernels_in_a_step(hlo: str) -> list[int]:
    """How many kernels the body of each loop launches, in the text of a compiled program for a GPU.

    Fusions, library calls, copies and whatever else is no bookkeeping count; loops inside loops are not counted.
    """
    free = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
    computations: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if (header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)) is not None:
            lines = computations[header.group(1)] = []
        elif computations:
            lines.append(line)

    def count(name: str) -> int:
        total = 0
        for line in computations[name]:
            operation = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(", line)
            if operation is None:
                continue
            if operation.group(1) == "call":  # a command buffer
                total += count(_referred("to_apply", line))
            total += operation.group(1) not in free
        return total

    return [count(_referred("body", line)) for lines in computations.values() for line in lines if " while(" in line]


def _referred(key: str, line: str) -> str:
    found = re.search(rf"{key}=%?([\w.\-]+)", line)
    assert found is not None, line
    return found.group(1)
