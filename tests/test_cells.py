"""Cells against the NumPy reference (values, gradients), Flax's own cells, initial statistics, state and dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_cells
import pytest

from hyperjax.recurrent import LSTM, FastRNN, HyperLSTM, HyperRNN

T, B, D, H = 6, 3, 5, 8
CASES = {
    "lstm": (LSTM, {}, numpy_cells.lstm),
    "ln_lstm": (LSTM, {"layer_norm": True}, numpy_cells.lstm),
    "hyper_rnn": (HyperRNN, {"hyper_units": 4, "embedding": 2}, numpy_cells.hyper_rnn),
    "hyper_lstm": (HyperLSTM, {"hyper_units": 4, "embedding": 2}, numpy_cells.hyper_lstm),
    "ln_hyper_lstm": (HyperLSTM, {"hyper_units": 4, "embedding": 3, "layer_norm": True}, numpy_cells.hyper_lstm),
    "gated_hyper_lstm": (HyperLSTM, {"hyper_units": 4, "embedding": 2, "gate_input": True}, numpy_cells.hyper_lstm),
}
cases = pytest.mark.parametrize("name", CASES)


def perturbed(params, seed=0):
    """Random parameters of the shapes given, so that no term of an equation is multiplied by its initial 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: 0.4 * rng.normal(size=a.shape), params)


def setup(name, seed=0, dtype=jnp.float64, **options):
    kind, own, reference = CASES[name]
    cell = kind(H, **own | options, param_dtype=dtype)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(T, B, D))
    carry = tuple(0.5 * rng.normal(size=(B, n)) for n in cell.state_sizes())
    params = perturbed(jax.eval_shape(cell.init, jax.random.key(seed), carry, x[0])["params"], seed)
    return cell, params, carry, x, reference


@cases
@pytest.mark.parametrize("jit", [False, True])
def test_values_are_the_equations(name, jit):
    with jax.enable_x64(True):
        cell, params, carry, x, reference = setup(name)
        apply = jax.jit(cell.apply) if jit else cell.apply
        want, last = numpy_cells.run(reference, params, carry, x)
        state = carry
        for t in range(T):
            state, h = apply({"params": params}, state, x[t])
            np.testing.assert_allclose(h, want[t], rtol=1e-10, atol=1e-12)
        for got, expected in zip(state, last, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@cases
def test_gradients_are_finite_differences_of_the_reference(name):
    with jax.enable_x64(True):
        cell, params, carry, x, reference = setup(name, seed=1)
        weight = np.random.default_rng(2).normal(size=(T, B, H))

        def loss(p, carry, x):
            last, h = FastRNN(cell, time_major=True).apply({"params": {"cell": p}}, x, carry)
            return jnp.sum(weight * h) + sum(jnp.sum(c**2) for c in last)

        def numpy_loss(p, carry, x):
            h, last = numpy_cells.run(reference, p, carry, x)
            return np.sum(weight * h) + sum(np.sum(c**2) for c in last)

        arguments = (params, carry, x)
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
        leaves, tree = jax.tree.flatten(arguments)
        for n, g in enumerate(jax.tree.leaves(gradients)):
            direction = np.random.default_rng(n).normal(size=leaves[n].shape)
            moved = [
                numpy_loss(*tree.unflatten([*leaves[:n], leaves[n] + s * 1e-6 * direction, *leaves[n + 1 :]]))
                for s in (1, -1)
            ]
            np.testing.assert_allclose(np.sum(g * direction), (moved[0] - moved[1]) / 2e-6, rtol=1e-6, atol=1e-7)


@cases
def test_works_in_flax_rnn_and_gives_our_scans_numbers(name):
    kind, own, _ = CASES[name]
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    theirs, ours = nn.RNN(kind(H, **own), return_carry=True), FastRNN(kind(H, **own))
    variables = jax.jit(theirs.init)(jax.random.key(1), x)
    shapes = [jax.tree.map(jnp.shape, v) for v in (variables, jax.eval_shape(ours.init, jax.random.key(1), x))]
    assert shapes[0] == shapes[1]
    (carry_a, h_a), (carry_b, h_b) = jax.jit(theirs.apply)(variables, x), jax.jit(ours.apply)(variables, x)
    for a, b in zip(jax.tree.leaves((carry_a, h_a)), jax.tree.leaves((carry_b, h_b)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_lstm_is_flax_lstm_when_the_parameters_are():
    x, ours = jax.random.normal(jax.random.key(0), (B, D)), LSTM(H, forget_bias=0.0)
    carry = tuple(jax.random.normal(jax.random.key(n), (B, H)) for n in (1, 2))
    p = ours.init(jax.random.key(3), carry, x)["params"]
    flax = {f"i{y}": {"kernel": p[f"W_x{y}"]} for y in "igfo"}
    flax |= {f"h{y}": {"kernel": p[f"W_h{y}"], "bias": p[f"b_{y}"]} for y in "igfo"}
    want, _ = nn.LSTMCell(H).apply({"params": flax}, carry, x)
    got, _ = ours.apply({"params": p}, carry, x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_initial_statistics_are_the_papers():
    cell = HyperLSTM(40, hyper_units=64, embedding=16, layer_norm=True)
    carry = cell.initialize_carry(jax.random.key(0), (1, 20))
    p = jax.jit(cell.init)(jax.random.key(0), carry, jnp.zeros((1, 20)))["params"]
    for y in "igfo":
        np.testing.assert_allclose(p[f"W_h{y}"].T @ p[f"W_h{y}"], np.eye(40), atol=1e-4)
        np.testing.assert_allclose(p[f"W_x{y}"] @ p[f"W_x{y}"].T, np.eye(20), atol=1e-4)
        np.testing.assert_allclose(p[f"W_d_h{y}"], 0.1 / 16)
        np.testing.assert_allclose(p[f"W_d_x{y}"], 0.1 / 16)
        np.testing.assert_array_equal(p[f"W_d_b{y}"], 0)
        np.testing.assert_array_equal(p[f"b_{y}"], 0)
    for columns in np.split(np.asarray(p["hyper_U"]), 4, -1):
        np.testing.assert_allclose(columns.T @ columns, np.eye(64), atol=1e-4)
    for k in "hx":
        np.testing.assert_array_equal(p[f"W_z_{k}"], 0)
        np.testing.assert_array_equal(p[f"b_z_{k}"], 1)
    assert "b_z_b" not in p
    assert abs(float(jnp.std(p["W_z_b"])) - 0.01) < 0.0005
    assert abs(float(jnp.mean(p["W_z_b"]))) < 0.0005
    for y in "igfoc":
        np.testing.assert_array_equal(p[f"gamma_{y}"], 1)
        np.testing.assert_array_equal(p[f"hyper_beta_{y}"], 0)


def test_at_the_start_a_hyper_lstm_is_an_lstm_scaled_by_a_tenth():
    hyper, plain = HyperLSTM(H, hyper_units=4), LSTM(H)
    x = jax.random.normal(jax.random.key(0), (B, D))
    c, h = (jax.random.normal(jax.random.key(n), (B, H)) for n in (1, 2))
    p = hyper.init(jax.random.key(3), (c, h, jnp.zeros((B, 4)), jnp.zeros((B, 4))), x)["params"]
    tenth = {k: 0.1 * v if k.startswith("W_h") or k.startswith("W_x") else v for k, v in p.items()}
    want, _ = plain.apply({"params": tenth}, (c, h), x)
    got, _ = hyper.apply({"params": p}, (c, h, jnp.zeros((B, 4)), jnp.zeros((B, 4))), x)
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "ln_hyper_lstm"])
def test_recurrent_dropout_touches_the_candidate_alone(name):
    with jax.enable_x64(True):
        cell, params, carry, x, reference = setup(name, keep=0.5)
        key = jax.random.key(7)
        _, h = FastRNN(cell, time_major=True).apply({"params": {"cell": params}}, x, carry, rngs={"dropout": key})
        module_key = FastRNN(cell).apply({}, rngs={"dropout": key}, method=lambda m: m.cell.make_rng("dropout"))
        masks = np.asarray(cell.masks(module_key, jnp.arange(T), B))
        assert 0.3 < masks.mean() < 0.7
        assert not (masks[0] == masks[1]).all()
        want, _ = numpy_cells.run(reference, params, carry, x, mask=masks / 0.5)
        np.testing.assert_allclose(h, want, rtol=1e-10, atol=1e-12)


def test_dropout_needs_a_key_and_follows_it():
    cell = LSTM(H, keep=0.5)
    carry, x = cell.initialize_carry(jax.random.key(0), (B, D)), jax.random.normal(jax.random.key(1), (B, D))
    variables = LSTM(H).init(jax.random.key(2), carry, x)
    with pytest.raises(Exception, match="dropout"):
        cell.apply(variables, carry, x)
    draw = jax.jit(lambda key: cell.apply(variables, carry, x, rngs={"dropout": key})[1])
    same, again, other = draw(jax.random.key(3)), draw(jax.random.key(3)), draw(jax.random.key(4))
    np.testing.assert_array_equal(same, again)
    assert not np.allclose(same, other)
    calm = LSTM(H, keep=0.5, deterministic=True).apply(variables, carry, x)[1]
    np.testing.assert_array_equal(calm, LSTM(H).apply(variables, carry, x)[1])


@cases
def test_bfloat16_products_with_a_float32_state_stay_within_two_percent(name):
    kind, own, _ = CASES[name]
    x = jax.random.normal(jax.random.key(0), (B, 20, D))
    single, half = FastRNN(kind(32, **own)), FastRNN(kind(32, **own, dtype=jnp.bfloat16))
    variables = jax.jit(single.init)(jax.random.key(1), x)

    def loss(layer, v):
        carry, h = layer.apply(v, x)
        assert all(c.dtype == jnp.float32 for c in carry)
        return jnp.mean(h**2), h

    grad_a, h_a = jax.jit(jax.grad(lambda v: loss(single, v), has_aux=True))(variables)
    grad_b, h_b = jax.jit(jax.grad(lambda v: loss(half, v), has_aux=True))(variables)
    assert float(jnp.linalg.norm(h_a - h_b) / jnp.linalg.norm(h_a)) < 0.02
    assert float(jnp.linalg.norm(h_a - h_b)) > 0, "bfloat16 was not used"
    for a, b in zip(jax.tree.leaves(grad_a), jax.tree.leaves(grad_b), strict=True):
        assert b.dtype == jnp.float32
        assert float(jnp.linalg.norm(a - b)) <= 0.05 * float(jnp.linalg.norm(a)) + 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSTM(0), "units is 0"),
        (lambda: LSTM(4, param_dtype=jnp.bfloat16), "param_dtype is bfloat16.*set dtype"),
        (lambda: LSTM(4, keep=0.0), r"keep is 0.0.*\(0, 1\]"),
        (lambda: LSTM(4, keep=1.5), "keep is 1.5"),
        (lambda: HyperLSTM(4, hyper_units=0), "hyper_units is 0"),
        (lambda: HyperLSTM(4, embedding=-1), "embedding is -1"),
        (lambda: HyperRNN(4, keep=0.9), "leave keep at 1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
