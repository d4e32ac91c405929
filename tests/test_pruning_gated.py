"""Networks with gates in training: every way to decide and to choose, gradients of routers, and the share asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_transformer import random_variables

from hyperjax.estimators import exponential_temperature
from hyperjax.pruning import (
    Buckets,
    Experts,
    Gated,
    GumbelSigmoid,
    HardConcrete,
    MixtureOfDepths,
    Multipliers,
    Threshold,
    TopK,
    ascend,
    lagrangian,
)
from hyperjax.transformer import Config, Decoder

B, L, P, V = 4, 8, 3, 5
C = Config(vocabulary=V, layers=1, width=8, heads=2, ffn=8, outputs=V)
TEXT = np.random.default_rng(0).integers(0, V, (B, L))
MASK = np.arange(L) < np.array([[8], [3], [5], [1]])
KEY = jax.random.key(0)
CHOICES = {"hard": HardConcrete(), "gumbel": GumbelSigmoid(), "threshold": Threshold(), "top-k": TopK(0.5)}


def built(per="static", choice="gumbel", causal=True, prune=("heads", "blocks", "layers"), **more):
    prune = tuple(name for name in prune if choice != "top-k" or name != "layers")
    return Gated(C, causal=causal, prune=prune, per=per, choice=CHOICES[choice], blocks=4, after=0, prompt=P, **more)


def loss_of(model, out):
    """Of the next character, or of the class."""
    logits, target = (out["logits"][:, :-1], TEXT[:, 1:]) if model.causal else (out["logits"], TEXT[:, 0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


@functools.cache
def training(model):
    """Compiled: loss, outputs and gradient."""
    options = {} if model.causal else {"mask": MASK}

    def loss(variables, key, temperature):
        out = model.apply(variables, TEXT, key, temperature=temperature, **options)
        return loss_of(model, out) + out["share"].mean(), {name: out[name] for name in ("gates", "share", "logits")}

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


WAYS = [
    *((per, choice, True) for per in ("static", "token") for choice in CHOICES),
    *(("batch", choice, True) for choice in ("hard", "threshold")),
    *(("sequence", choice, True) for choice in ("gumbel", "top-k")),
    *zip(("static", "batch", "sequence", "token"), CHOICES, (False,) * 4, strict=True),
]


def routers(tree):
    return {name: part for name, part in tree["params"].items() if name.startswith("router")}


@pytest.mark.parametrize(("per", "choice", "causal"), WAYS)
def test_gates_and_their_gradients(per, choice, causal):
    model = built(per, choice, causal)
    variables = random_variables(model, TEXT)
    for part in routers(variables).values():  # not too sure of anything, and no layer closed: it has all it needs
        part["logits" if per == "static" else "bias"] += 1.5
        part["logits" if per == "static" else "kernel"] *= 0.2
    (_, out), gradient = training(model)(variables, KEY, 0.7)
    axes = {"static": (), "token": (B, L)}.get(per, (B, L) if causal else (B,))
    gates = out["gates"]
    assert gates.heads.shape == (1, *axes, 2)
    assert gates.blocks.shape == (1, *axes, 4)
    if "layers" in model.prune:
        assert (gates.tokens if len(axes) == 2 else gates.layer).shape == (1, *axes)
    assert out["share"].shape == (() if per == "static" else (B,))
    assert np.all((out["share"] > 0) & (out["share"] <= 1))
    for gate in jax.tree.leaves(gates):
        assert np.all((gate >= 0) & (gate <= 1))
        assert choice == "hard" or np.all((gate < 1e-6) | (gate > 1 - 1e-6))
        if causal and per in ("batch", "sequence"):
            np.testing.assert_array_equal(gate[:, :, :P], 1)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))
    for name, part in routers(gradient).items():
        assert np.any(part["logits" if per == "static" else "kernel"]), name
    if choice == "top-k":
        behind = gates.heads[0, :, P:] if per == "sequence" and causal else gates.heads[0]
        np.testing.assert_allclose(behind.sum(-1), 1, atol=1e-6)  # one of two


@pytest.mark.parametrize(("per", "after"), [("static", 1), ("sequence", 1), ("sequence", 0), ("token", 0)])
def test_open_gates_leave_the_network_as_it_is(per, after):
    model = built(per, "hard").clone(after=after, config=Config(**{**vars(C), "layers": 1 + after}))
    variables = random_variables(model, TEXT)
    params = dict(variables["params"])
    for name in routers(variables):
        params[name] = {**params[name]} | {
            field: np.full_like(params[name][field], value)
            for field, value in (("logits", 9), ("kernel", 0), ("bias", 9))
            if field in params[name]
        }
    out = jax.jit(model.apply)({"params": params}, TEXT)
    np.testing.assert_allclose(out["share"], 1, rtol=1e-6)
    plain = jax.jit(Decoder(model.config).apply)({"params": params["model"]}, TEXT)
    np.testing.assert_allclose(out["logits"], plain["logits"], rtol=1e-4, atol=1e-5)


def test_keys_and_temperature():
    model = built("token", "gumbel", prune=("heads",))
    variables, run = random_variables(model, TEXT), training(model)
    (_, first), gradient = run(variables, KEY, 0.7)
    (_, again), same = run(variables, KEY, 0.7)
    jax.tree.map(np.testing.assert_array_equal, (first, gradient), (again, same))
    (_, other), _ = run(variables, jax.random.key(1), 0.7)
    assert np.any(first["gates"].heads != other["gates"].heads)
    np.testing.assert_array_equal(first["share"], other["share"])  # as it is served: nothing is drawn
    (_, hot), flat = run(variables, KEY, 3.0)
    np.testing.assert_allclose(first["gates"].heads, hot["gates"].heads, atol=1e-6)  # the sample is the same
    cold, warm = (tree["params"]["routers_heads_0"]["kernel"] for tree in (gradient, flat))
    assert np.abs(cold - warm).max() > 0.01 * np.abs(cold).max()  # but not its slope
    eager = model.apply(variables, TEXT, KEY, temperature=0.7)
    np.testing.assert_allclose(eager["logits"], first["logits"], rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager["gates"], first["gates"])
    serve = jax.jit(lambda: model.apply(variables, TEXT)["gates"].heads)
    served, hot = serve(), jax.jit(lambda: model.apply(variables, TEXT, temperature=3.0)["gates"].heads)()
    np.testing.assert_array_equal(served, serve())
    np.testing.assert_array_equal(served, hot)
    assert set(np.unique(served)) == {0, 1}
    soft = built("token", "gumbel").clone(choice=GumbelSigmoid(hard=False))
    drawn = jax.jit(soft.apply)(random_variables(soft, TEXT), TEXT, KEY, temperature=0.7)["gates"].heads
    assert np.all((drawn > 0) & (drawn < 1))


@pytest.mark.parametrize("kind", ["static", "sequence", "token", "buckets"])
def test_settled_gates_are_those_that_are_served(kind):
    dropout = 0.3 * (kind == "static")  # other routers look at states, which dropout changes
    config = Config(**{**vars(C), "dropout": dropout})
    if kind == "buckets":
        model = Buckets(config, prompt=P, after=0, blocks=4, shares=(0.25, 0.5, 1.0))
    else:
        model = built(kind, "hard" if kind == "static" else "gumbel").clone(config=config)
    variables = random_variables(model, TEXT)

    @jax.jit
    def run(settled):
        return model.apply(variables, TEXT, KEY, settled=settled)

    served, drawn, settled = model.apply(variables, TEXT), run(False), run(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), settled["gates"], served["gates"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), drawn["gates"], served["gates"])
    assert max(jax.tree.leaves(moved)) > 0.1
    assert (np.abs(settled["logits"] - served["logits"]).max() > 0.01) == (dropout > 0)  # which goes on
    without = model.apply(variables, TEXT, KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), drawn["gates"], without["gates"])


@pytest.mark.parametrize("per", ["static", "token"])
def test_keep_k_and_random_gates(per):
    model = Gated(C, per=per, choice=TopK(3), prune=("blocks",), blocks=4, seed=5)
    variables = random_variables(model, TEXT)
    assert set(variables["params"]) == {"model"}
    run = jax.jit(lambda key: model.apply(variables, TEXT, key)["gates"].blocks)
    served = jax.jit(lambda: model.apply(variables, TEXT)["gates"].blocks)()
    np.testing.assert_array_equal(served.sum(-1), 3)
    for key in (KEY, jax.random.key(1)):
        drawn = run(key)
        np.testing.assert_allclose(drawn.sum(-1), 3, atol=1e-5)
        assert (per == "token") == np.any(np.abs(drawn - served) > 0.5)  # by token anew each time; static as served
    other = jax.jit(lambda: model.clone(seed=6).apply(variables, TEXT)["gates"].blocks)()
    assert np.any(other != served)


FINE = Config(vocabulary=V, layers=2, width=4, heads=2, ffn=32)


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def trained(model, goal, weights, steps):
    """Trains on texts of which each symbol tells the next; by step, loss, share and the routers' largest gradients.

    A Lagrangian steers to the goal, if it is above 0; the penalties, mean and mean square of the gates, have weights.
    """
    start, jump = np.random.default_rng(0).integers(0, V, (64, 8, 1)), np.arange(8)[:, None] % 2 + 1
    texts = jnp.asarray((start + jump * np.arange(L)) % V)
    temperature, slowing = exponential_temperature(4 / steps, 0.3, 2.0), optax.linear_schedule(0.02, 0.002, steps)
    params = {"model": model.init(KEY, texts[0]), "multipliers": Multipliers.zeros()}
    labels = {name: "gates" if name.startswith("routers") else "rest" for name in params["model"]["params"]}
    optimizer = optax.partition(
        {"rest": optax.adam(3e-3), "gates": optax.adam(slowing), "up": ascend(optax.sgd(1.0))},
        {"model": {"params": labels}, "multipliers": "up"},
    )

    def loss(params, n):
        text, key = texts[n % 64], jax.random.fold_in(KEY, n)
        out = model.apply(params["model"], text, key, temperature=temperature(n))
        total = optax.softmax_cross_entropy_with_integer_labels(out["logits"][:, :-1], text[:, 1:]).mean()
        target = 1 + (goal - 1) * jnp.minimum(3 * n / steps, 1)
        total += (goal > 0) * lagrangian(out["share"].mean(), target, params["multipliers"])
        for gate in jax.tree.leaves(out["gates"]):
            total += weights[0] * gate.mean() + weights[1] * jnp.square(gate).mean()
        return total, out["share"].mean()

    def step(carry, n):
        params, state = carry
        (total, found), gradient = jax.value_and_grad(loss, has_aux=True)(params, n)
        change, state = optimizer.update(gradient, state, params)
        sizes = [jnp.abs(leaf).max() for leaf in jax.tree.leaves(routers(gradient["model"]))]
        return (optax.apply_updates(params, change), state), (total, found, jnp.stack(sizes))

    (params, _), (losses, shares, sizes) = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    served = jax.lax.map(lambda text: model.apply(params["model"], text)["share"].mean(), texts).mean()
    return served, losses, shares, sizes


def test_the_lagrangian_meets_its_targets_and_routers_learn():
    model = Gated(FINE, per="token", choice=GumbelSigmoid(), blocks=16)
    goals = jnp.float32([0.4, 0.6, 0.8])
    runs = jax.vmap(lambda goal: trained(model, goal, jnp.zeros(2), 2000))(goals)
    served, losses, shares, sizes = runs
    np.testing.assert_allclose(served, goals, rtol=0.02)
    np.testing.assert_allclose(shares[:, -200:].mean(1), goals, rtol=0.02)
    assert np.all(losses[:, -20:].mean(1) < losses[:, :20].mean(1))
    assert np.all(np.isfinite(losses))
    assert np.all(np.isfinite(sizes))
    assert np.all(sizes.max(-1) > 0)  # of 2,000 steps through all temperatures, none without a gradient
    assert np.all((sizes > 0).mean(1) > 0.9)


@pytest.mark.parametrize(
    "model",
    [
        Buckets(FINE, prompt=P, after=0, blocks=4, shares=(0.5, 1.0)),
        MixtureOfDepths(FINE, keep=0.5),
        Experts(FINE, blocks=4, keep=2),
    ],
    ids=["buckets", "depths", "experts"],
)
def test_other_routers_learn_at_every_temperature(model):
    _, losses, _, sizes = trained(model, jnp.zeros(()), jnp.zeros(2), 2000)
    assert losses[-20:].mean() < losses[:20].mean()
    assert np.all(np.isfinite(losses))
    assert np.all(np.isfinite(sizes))
    assert np.all(sizes.max(-1) > 0)


def test_simple_penalties_close_gates():
    model = Gated(FINE, choice=HardConcrete(), blocks=16)
    weights = jnp.float32([[0, 0], [2, 0], [0, 2]])
    served, _, shares, _ = jax.vmap(lambda weights: trained(model, jnp.zeros(()), weights, 1000))(weights)
    np.testing.assert_array_equal(shares[:, 0], 1)
    assert served[0] > 0.8
    assert np.all(served[1:] < 0.6 * served[0])
