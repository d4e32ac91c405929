"""The recurrent cells once more, written from the paper's equations in float64 NumPy: slow, plain, independent."""

import numpy as np

GATES = "igfo"


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normed(x, gamma, beta, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


def identity(value, gate):
    return value


def memory_cell(y, c, norm, forget_bias, mask=1.0):
    y = {k: norm(v, k) for k, v in y.items()}
    c = sigmoid(y["f"] + forget_bias) * c + sigmoid(y["i"]) * mask * np.tanh(y["g"])
    return c, sigmoid(y["o"]) * np.tanh(norm(c, "c"))


def norm_of(p, prefix, epsilon):
    if prefix + "gamma_i" not in p:
        return identity
    return lambda value, y: normed(value, p[f"{prefix}gamma_{y}"], p[f"{prefix}beta_{y}"], epsilon)


def lstm(p, carry, x, forget_bias=1.0, epsilon=1e-3, mask=1.0):
    c, h = carry
    y = {k: h @ p[f"W_h{k}"] + x @ p[f"W_x{k}"] + p[f"b_{k}"] for k in GATES}
    return memory_cell(y, c, norm_of(p, "", epsilon), forget_bias, mask)


def generated(p, h_hat, gates):
    """d[kind][gate], one embedding at a time."""
    d = {}
    for kind in "hxb":
        for n, y in enumerate(gates):
            width = p[f"W_d_{kind}{y}"].shape[0]
            columns = slice(n * width, (n + 1) * width)
            z = h_hat @ p[f"W_z_{kind}"][:, columns]
            if kind != "b":
                z = z + p[f"b_z_{kind}"][columns]
            d[kind, y] = z @ p[f"W_d_{kind}{y}"]
    return d


def hyper_rnn(p, carry, x):
    h_hat, h = carry
    seen = np.concatenate([h, x], -1)
    W = np.concatenate([p["hyper_W_h"], p["hyper_W_x"]], 0)
    h_hat = np.tanh(seen @ W + h_hat @ p["hyper_U"] + p["hyper_b"])
    d = generated(p, h_hat, [""])
    return h_hat, np.tanh(d["h", ""] * (h @ p["W_h"]) + d["x", ""] * (x @ p["W_x"]) + d["b", ""] + p["b"])


def hyper_lstm(p, carry, x, forget_bias=1.0, epsilon=1e-3, mask=1.0):
    c, h, c_hat, h_hat = carry
    seen = np.concatenate([h, x], -1)
    W = np.concatenate([p["hyper_W_h"], p["hyper_W_x"]], 0)
    total = seen @ W + h_hat @ p["hyper_U"] + p["hyper_b"]
    S = h_hat.shape[-1]
    y_hat = {k: total[..., n * S : (n + 1) * S] for n, k in enumerate(GATES)}
    c_hat, h_hat = memory_cell(y_hat, c_hat, norm_of(p, "hyper_", epsilon), forget_bias)
    d = generated(p, h_hat, GATES)
    if "W_d_m" in p:
        x = 2 * sigmoid((h_hat @ p["W_z_m"] + p["b_z_m"]) @ p["W_d_m"]) * x
    y = {k: d["h", k] * (h @ p[f"W_h{k}"]) + d["x", k] * (x @ p[f"W_x{k}"]) + d["b", k] + p[f"b_{k}"] for k in GATES}
    return *memory_cell(y, c, norm_of(p, "", epsilon), forget_bias, mask), c_hat, h_hat


def run(step, p, carry, x_TBD, **options):
    """All outputs h [T, B, H] and the last carry; `mask` in options is indexed by time."""
    outputs, masks = [], options.pop("mask", None)
    for t, x in enumerate(x_TBD):
        extra = options if masks is None else options | {"mask": masks[t]}
        carry = step(p, carry, x, **extra)
        outputs.append(carry[1])
    return np.stack(outputs), carry
