"""Counts of parameters and operations against formulas and XLA, the width for a budget, where the Lagrangian ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import paramtree
from hyperjax.budget import Multipliers, ascend, count_parameters, fit_width, flops, lagrangian
from hyperjax.routing.baselines import PLE, MMoE, SharedBottom
from hyperjax.routing.tasks import Binary, Regression

TASKS = {"a": Binary(), "b": Regression()}
X = jax.ShapeDtypeStruct((8, 10), jnp.float32)


def bottom(width):
    return SharedBottom((width,), tasks=TASKS, towers=(4,))


def bottom_count(width):
    return (10 * width + width) + 2 * (width * 4 + 4 + 4 * 1 + 1)


def test_parameters_are_counted_from_shapes_alone():
    model = bottom(7)
    assert count_parameters(model, X) == bottom_count(7)
    assert count_parameters(model, X) == paramtree.count(model.init(jax.random.key(0), jnp.ones((8, 10)))["params"])
    assert count_parameters(bottom(10**9), X) == bottom_count(10**9)  # gigabytes, were it made


def test_only_parameters_are_counted():
    normed = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    assert count_parameters(normed, X) == 10 * 3 + 3 + 2 * 3


def test_flops_of_products_by_formula():
    a, b = jnp.ones((3, 5, 7)), jnp.ones((3, 7, 2))
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 2 * 3 * 5 * 7 * 2
    assert flops(lambda a, b: jnp.tanh(a[0] @ b[0]) + 1, a, b) == 2 * 5 * 7 * 2
    assert flops(lambda a: jnp.exp(a).sum(), a) == 0


def test_flops_of_a_network_and_its_gradient():
    model, x = bottom(16), jnp.ones((8, 10))
    variables = model.init(jax.random.key(0), x)
    first, rest = 2 * 8 * 10 * 16, 2 * 2 * 8 * (16 * 4 + 4)
    assert flops(model.apply, variables, x) == first + rest
    assert flops(jax.jit(model.apply), variables, x) == first + rest
    assert flops(model.apply, jax.eval_shape(lambda: variables), X) == first + rest

    def loss(variables, x):
        return sum(jnp.square(y).sum() for y in model.apply(variables, x)[0].values())

    assert flops(jax.grad(loss), variables, x) == 2 * first + 3 * rest  # x needs no gradient


def test_flops_of_control_flow():
    w, x = jnp.ones((6, 6)), jnp.ones((2, 6))
    one = 2 * 2 * 6 * 6
    assert flops(lambda w, x: jax.lax.scan(lambda c, _: (c @ w, None), x, length=9)[0], w, x) == 9 * one
    assert flops(lambda w, x: jax.lax.fori_loop(0, 5, lambda _, c: c @ w, x), w, x) == 5 * one
    branches = [lambda w, x: x, lambda w, x: x @ w, lambda w, x: x @ w @ w]
    assert flops(lambda w, x: jax.lax.switch(1, branches, w, x), w, x) in (one, 2 * one)
    assert flops(lambda i, w, x: jax.lax.switch(i, branches, w, x), 1, w, x) == 2 * one
    assert flops(lambda w, x: jax.checkpoint(lambda x: x @ w)(x), w, x) == one
    with pytest.raises(ValueError, match="a while holds matrix products: how often it runs them is not known"):
        flops(lambda w, x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x), w, x)
    assert flops(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x), x) == 0


def test_flops_of_custom_derivatives():
    w, x = jnp.ones((6, 6)), jnp.ones((2, 6))
    product = jax.custom_vjp(lambda x, w: x @ w)
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    assert flops(product, x, w) == 2 * 2 * 6 * 6
    assert flops(jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2), argnums=(0, 1)), x, w) == 3 * 2 * 2 * 6 * 6


def test_flops_leave_out_what_nothing_depends_on():
    model, x = MMoE(3, (8,), tasks=TASKS, towers=()), jnp.ones((8, 10))
    variables = model.init(jax.random.key(0), x)
    experts, gates, mixtures, towers = 2 * 8 * 10 * 3 * 8, 2 * 8 * 10 * 3, 2 * 8 * 3 * 8, 2 * 8 * 8
    assert flops(model.apply, variables, x) == experts + 2 * (gates + mixtures + towers)
    assert flops(lambda v, x: model.apply(v, x)[1]["experts"], variables, x) == experts
    assert flops(jax.jit(lambda v, x: model.apply(v, x)[1]["experts"]), variables, x) == experts


def test_flops_of_a_convolution():
    x, kernel = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 2, 6))
    conv = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2)
    assert flops(lambda x: conv.apply({"params": {"kernel": kernel, "bias": jnp.zeros(6)}}, x), x) == (
        2 * (2 * 7 * 7 * 6) * (3 * 3 * 2)
    )


@pytest.mark.parametrize(
    "model",
    [MMoE(4, (64, 64), tasks=TASKS, towers=(32,)), PLE(((2, 1, 64), (1, 1, 64)), tasks=TASKS, towers=(32,))],
    ids=["mmoe", "ple"],
)
def test_flops_agree_with_xla_where_products_dominate(model):
    x = jnp.ones((128, 200))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    compiled = jax.jit(lambda v, x: model.apply(v, x)[0]).lower(variables, x).compile()
    assert flops(model.apply, variables, x) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


@pytest.mark.parametrize("width", [1, 2, 37, 1000, 4096])
def test_fit_width_finds_the_width_again(width):
    assert fit_width(bottom, bottom_count(width), X) == bottom(width)


def test_fit_width_takes_the_closest():
    made = []

    def make(width):
        made.append(width)
        return bottom(width)

    step = bottom_count(51) - bottom_count(50)
    assert fit_width(make, bottom_count(50) + step // 2 - 1, X) == bottom(50)
    assert len(set(made)) <= 14
    assert fit_width(bottom, bottom_count(50) + step // 2 + 1, X) == bottom(51)
    counts = np.abs([bottom_count(width) - 1234 for width in range(1, 200)])
    assert fit_width(bottom, 1234, X) == bottom(1 + int(counts.argmin()))
    assert fit_width(bottom, bottom_count(1) - 1, X) == bottom(1)
    assert fit_width(bottom, bottom_count(9), X, low=9, high=9) == bottom(9)


@pytest.mark.parametrize(
    ("budget", "limits", "message"),
    [
        (
            20,
            {},
            r"the budget is 20 parameters, but widths 1 to 4096 come no closer than 37 at width 1, expected within",
        ),
        (5000, {"high": 16}, r"the budget is 5,000 parameters, .* 1 to 16 come no closer than 322 at width 16, exp"),
        (65, {"tolerance": 0.01}, "come no closer than 56 at width 2 and 75 at width 3, expected within 1%"),
        (65, {"low": 5, "high": 4}, "the widths are 5 to 4, expected 1 <= low <= high"),
        (65, {"low": 0}, "the widths are 0 to 4096"),
    ],
)
def test_budgets_that_no_width_meets_are_refused(budget, limits, message):
    with pytest.raises(ValueError, match=message):
        fit_width(bottom, budget, X, **limits)


def test_lagrangian_and_its_gradients():
    def of(size, linear, quadratic):
        return lagrangian(size, 0.5, Multipliers(linear, quadratic))

    assert of(0.8, 2.0, 3.0) == pytest.approx(2 * 0.3 + 3 * 0.09, rel=1e-6)
    np.testing.assert_allclose(jax.grad(of, argnums=(0, 1, 2))(0.8, 2.0, 3.0), [2 + 6 * 0.3, 0.3, 0.09], rtol=1e-5)
    assert lagrangian(jnp.float32(0.8), 0.5, Multipliers.zeros()) == 0
    assert lagrangian(jnp.ones(7), 0.5, Multipliers.zeros((7,))).shape == (7,)


def test_ascend_climbs_where_the_optimizer_descends():
    params, gradient = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([0.5, 0.1])}
    up, down = ascend(optax.sgd(0.1)), optax.sgd(0.1)
    changes = [opt.update(gradient, opt.init(params), params)[0]["a"] for opt in (up, down)]
    np.testing.assert_allclose(changes[0], -changes[1])
    np.testing.assert_allclose(changes[0], [0.05, 0.01])


@pytest.mark.parametrize("goal", [0.3, 0.7])
def test_lagrangian_steers_a_size_to_its_target(goal):
    # sixteen gates, each worth keeping by another amount
    worth = jnp.linspace(0.02, 0.3, 16)

    def loss(params, step):
        gates = jax.nn.sigmoid(params["model"])
        return -worth @ gates + lagrangian(gates.mean(), target(step), params["multipliers"])

    def step(carry, step):
        params, state = carry
        change, state = optimizer.update(jax.grad(loss)(params, step), state, params)
        return (optax.apply_updates(params, change), state), jax.nn.sigmoid(params["model"]).mean()

    target = optax.linear_schedule(1.0, goal, 500)
    optimizer = optax.partition(
        {"descend": optax.adam(0.03), "ascend": ascend(optax.adam(0.03))},
        {"model": "descend", "multipliers": "ascend"},
    )
    params = {"model": jnp.full(16, 2.0), "multipliers": Multipliers.zeros()}
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(3000)))
    (params, _), sizes = run((params, optimizer.init(params)))
    np.testing.assert_allclose(sizes[-300:], goal, rtol=0.02)
    assert params["multipliers"].quadratic > 0
