"""hyperjax.sharing: conversion, soft ties, new plans in training, mixtures, tools."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax import paramtree, sharing
from hyperjax.sharing import LowRank, Maps, Mixture, Scale, Tie
from hyperjax.transformer import Config, Decoder, Encoder

KEY = jax.random.key(0)
CONFIG = Config(vocabulary=13, layers=4, width=16, heads=4, ffn=32, length=12)
MODEL = Decoder(CONFIG)
TOKENS = jax.random.randint(KEY, (2, 10), 0, 13)
HALF = Maps.same((0, 0, 2, 2))


@pytest.fixture(scope="module")
def params():
    return MODEL.init(KEY, TOKENS)["params"]


def logits(model, params):
    return model.apply({"params": params}, TOKENS)["logits"]


def test_a_full_rank_residual_is_the_teacher(params):
    for maps in (Maps.same((0, 0, 0, 0)), HALF, Maps.same((0, 1, 1, 0))):
        tied, start = sharing.convert(MODEL, params, maps, TOKENS, through=LowRank(32))
        np.testing.assert_allclose(logits(tied, start), logits(MODEL, params), atol=1e-5)


def test_the_identity_converts_to_itself(params):
    tied, start = sharing.convert(MODEL, params, Maps.same(sharing.identity(4)), TOKENS)
    jax.tree.map(np.testing.assert_array_equal, start, params)
    np.testing.assert_array_equal(logits(tied, start), logits(MODEL, params))


@pytest.mark.parametrize("transfer", ["mean", "first", "last", "stepwise"])
def test_transfers(params, transfer):
    stack = params["stack"]
    tied, start = sharing.convert(
        MODEL, params, Maps.same((5, 1, 1, 5)) if 0 else Maps.same((0, 1, 1, 0)), TOKENS, transfer=transfer
    )
    got = {n: start["stack"][f"ffn_{n}"]["up"] for n in (0, 1)}
    chosen = {"first": (0, 1), "last": (3, 2), "stepwise": (0, 3)}
    for u, group in enumerate(((0, 3), (1, 2))):
        if transfer == "mean":
            expected = sum(stack[f"ffn_{l}"]["up"] for l in group) / 2
        else:
            expected = stack[f"ffn_{chosen[transfer][u]}"]["up"]
        np.testing.assert_allclose(got[u], expected, rtol=1e-6)
    native = Decoder(Maps.same((0, 1, 1, 0)).on(CONFIG))
    np.testing.assert_allclose(logits(tied, start), logits(native, start), atol=1e-6)


def test_alignment_before_the_mean_changes_no_function_and_brings_layers_nearer(params):
    aligned = sharing.align_groups(params, HALF)
    np.testing.assert_allclose(logits(MODEL, aligned), logits(MODEL, params), atol=1e-5)
    assert float(sharing.soft_tie(aligned, HALF)) < float(sharing.soft_tie(params, HALF))
    _, start = sharing.convert(MODEL, params, HALF, TOKENS, aligned=True)
    expected = (aligned["stack"]["ffn_0"]["down"] + aligned["stack"]["ffn_1"]["down"]) / 2
    np.testing.assert_allclose(start["stack"]["ffn_0"]["down"], expected, atol=1e-6)


def test_untie_goes_back(params):
    tied, start = sharing.convert(MODEL, params, HALF, TOKENS, through=Scale())
    plain = tied.untie({"params": start})["params"]
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    np.testing.assert_allclose(logits(MODEL, plain), logits(tied, start), atol=1e-6)


def test_the_soft_tie_leads_to_equal_layers(params):
    assert float(sharing.soft_tie(params, HALF)) == pytest.approx(0.5, abs=0.05)
    optimizer = optax.adam(0.01)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: sharing.soft_tie(p, HALF))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(60):
        params, state = step(params, state)
    assert float(sharing.soft_tie(params, HALF)) < 0.01
    tied, start = sharing.convert(MODEL, params, HALF, TOKENS)
    assert float(jnp.abs(logits(tied, start) - logits(MODEL, params)).max()) < 0.2


def test_a_new_plan_carries_the_optimiser_over(params):
    old = sharing.tie(MODEL, sharing.layer_ties(HALF), TOKENS)
    new = sharing.tie(MODEL, sharing.layer_ties(Maps.same((0, 1, 1, 1))), TOKENS)
    start, optimizer = old.fit(params), optax.adamw(1e-3)
    grads = jax.grad(lambda p: logits(old, p).std())(start)
    _, state = optimizer.update(grads, optimizer.init(start), start)
    after, carried = sharing.replan(old, new, start, state)
    mu, was = carried[0].mu["stack"], state[0].mu["stack"]
    assert jax.tree.structure(carried[0].mu) == jax.tree.structure(after)
    assert int(carried[0].count) == 1
    np.testing.assert_allclose(mu["ffn_0"]["up"], was["ffn_0"]["up"])
    np.testing.assert_allclose(mu["ffn_1"]["up"], (was["ffn_0"]["up"] + 2 * was["ffn_2"]["up"]) / 3, rtol=1e-5)
    again = sharing.replan(new, new, after, carried)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), again, (after, carried))
    with pytest.raises(ValueError, match="LowRank, whose parameters no other plan has"):
        sharing.replan(old, sharing.tie(MODEL, sharing.layer_ties(HALF, LowRank(2)), TOKENS), start, state)


def test_bad_conversions_are_refused(params):
    with pytest.raises(ValueError, match="transfer is 'average', expected one of mean"):
        sharing.convert(MODEL, params, HALF, TOKENS, transfer="average")
    with pytest.raises(ValueError, match="fits no parameter"):
        sharing.convert(MODEL, params, Maps.same((0, 0, 0, 0, 4, 4)), TOKENS)
    with pytest.raises(ValueError, match=r"stack/ffn_0/down has shape \(64, 16\), and .* shape \(32, 16\)"):
        sharing.convert(Decoder(dataclasses.replace(CONFIG, ffn=64)), params, HALF, TOKENS)
    with pytest.raises(ValueError, match="points to layer 9"):
        sharing.convert(MODEL, params, Maps.same((0, 0, 9, 9)), TOKENS)


def test_mixtures_of_one_base_share_all_and_choose_by_input():
    one = Mixture(CONFIG, bases=1, prompt=4)
    variables = jax.jit(one.init)(KEY, TOKENS)
    params = variables["params"]["model"]
    native = {**{k: v for k, v in params.items() if k != "bases"}, "stack": dict(params["stack"])}
    native["stack"] |= {f"{kind}_0": jax.tree.map(lambda w: w[0], base) for kind, base in params["bases"].items()}
    shared = Decoder(Maps.same((0,) * 4).on(CONFIG))
    np.testing.assert_allclose(jax.jit(one.apply)(variables, TOKENS)["logits"], logits(shared, native), atol=1e-5)
    two = Mixture(CONFIG, bases=2, prompt=4)
    variables = jax.jit(two.init)(KEY, TOKENS)
    kernel = jax.random.normal(KEY, (16, 8))
    variables["params"]["router"]["kernel"] = 3 * kernel
    apply = jax.jit(two.apply)
    out = apply(variables, TOKENS)
    np.testing.assert_allclose(out["gates"].sum(-1), 1, rtol=1e-5)
    assert float(jnp.abs(out["gates"][0] - out["gates"][1]).max()) > 0.01
    alone = apply(variables, TOKENS[1:])
    np.testing.assert_allclose(alone["logits"][0], out["logits"][1], atol=1e-5)
    changed = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % 13)
    np.testing.assert_allclose(apply(variables, changed)["logits"][:, :7], out["logits"][:, :7], atol=1e-5)


def test_hard_mixtures_take_one_and_learn():
    model = Mixture(CONFIG, bases=2, prompt=4, hard=True)
    variables = jax.jit(model.init)(KEY, TOKENS)
    for key in (None, jax.random.key(3)):
        gates = jax.jit(model.apply)(variables, TOKENS, key)["gates"]
        assert set(np.unique(np.asarray(gates).round(5))) == {0.0, 1.0}
    loss = lambda p: model.apply({"params": p}, TOKENS, jax.random.key(3))["logits"].std()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert float(jnp.abs(grads["router"]["kernel"]).max()) > 0
    encoder = Mixture(dataclasses.replace(CONFIG, outputs=3), bases=2, prompt=4, causal=False)
    assert jax.eval_shape(encoder.init_with_output, KEY, TOKENS)[0]["logits"].shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bases": 5}, "bases is 5, expected 1 to 4"),
        ({"bases": 0}, "bases is 0"),
        ({"prompt": 10}, "prompt is 10, expected 1 to 9"),
        ({"config": HALF.on(CONFIG)}, "the config has maps"),
        ({"config": dataclasses.replace(CONFIG, ffn=(32, 32, 16, 32))}, "layers of several sizes"),
    ],
)
def test_bad_mixtures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{"config": CONFIG, "bases": 2, "prompt": 4} | change).init(KEY, TOKENS)


def test_gradients_by_use_sum_to_the_tied_one(params):
    tied, start = sharing.convert(MODEL, params, HALF, TOKENS)

    def loss(model):
        return lambda p: jnp.square(logits(model, p)).mean()

    found = sharing.use_gradients(tied, start, loss(MODEL))
    whole = jax.grad(loss(tied))(start)
    by_use = found["stack/ffn_2/up"]
    assert list(by_use) == ["stack/ffn_2/up", "stack/ffn_3/up"]
    np.testing.assert_allclose(sum(by_use.values()), whole["stack"]["ffn_2"]["up"], atol=1e-6)
    matrix = sharing.cosines(by_use)
    assert matrix.shape == (2, 2)
    assert matrix[0, 0] == pytest.approx(1)
    assert -1 < matrix[0, 1] < 0.999
    fighting = {"a": jnp.ones(3), "b": -2 * jnp.ones(3), "c": jnp.zeros(3)}
    np.testing.assert_allclose(sharing.cosines(fighting), [[1, -1, 0], [-1, 1, 0], [0, 0, 0]], atol=1e-12)


def test_gradients_by_use_go_through_maps():
    class Tall(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(13, 8, name="embed")(tokens)
            return nn.Dense(13, name="out", use_bias=False)(x)

    tied = sharing.tie(Tall(), [Tie("out/kernel", "embed/embedding", lambda w: 2 * w.T)], TOKENS)
    params = tied.init(KEY, TOKENS)["params"]
    loss = lambda model: lambda p: jnp.square(model.apply({"params": p}, TOKENS)).mean()  # noqa: E731
    found = sharing.use_gradients(tied, params, loss(Tall()))["embed/embedding"]
    assert all(g.shape == (13, 8) for g in found.values())
    np.testing.assert_allclose(sum(found.values()), jax.grad(loss(tied))(params)["embed"]["embedding"], atol=1e-6)


def test_xavier_suits_all_uses():
    class Tall(nn.Module):
        vocabulary: int

        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(self.vocabulary, 32, name="embed")(tokens)
            x = nn.Dense(32, name="middle")(x)
            x = nn.Dense(32, name="last")(x)
            return nn.Dense(self.vocabulary, name="out", use_bias=False)(x)

    ties = [Tie("out/kernel", "embed/embedding", jnp.transpose), Tie("last/kernel", "middle/kernel", lambda w: 2 * w)]
    tied = sharing.tie(Tall(2000), ties, TOKENS)
    params = tied.init(KEY, TOKENS)["params"]
    with pytest.warns(UserWarning, match="uses of") as warned:
        made = sharing.xavier(tied, params, KEY)
    assert len(warned) == 2  # the other, of the factor 2, by a ratio of 4
    assert re.search(r"embed/embedding want different .* 0\.246, out/kernel 0\.031", str(warned[0].message))
    wanted = 2 / (np.mean([1 + 32, 32 + 2000]))
    assert float(made["embed"]["embedding"].var()) == pytest.approx(wanted, rel=0.05)
    v = 2 / 64  # of each use; through the factor 2 a quarter
    assert float(made["middle"]["kernel"].var()) == pytest.approx(2 / (1 / v + 4 / v), rel=0.15)
    np.testing.assert_array_equal(made["middle"]["bias"], params["middle"]["bias"])
    even = sharing.tie(Tall(33), ties[:1], TOKENS)
    sharing.xavier(even, even.init(KEY, TOKENS)["params"], KEY)  # no warning: they agree within 2


def test_memory_falls_with_the_parameters():
    config = dataclasses.replace(CONFIG, width=64, ffn=256)
    model, optimizer = Decoder(config), optax.adam(1e-3)
    found = {}
    for name, maps in (("untied", Maps()), ("tied", Maps.same((0, 0, 0, 0)))):
        tied = sharing.tie(model, sharing.layer_ties(maps), TOKENS)
        shapes = jax.eval_shape(tied.init, KEY, TOKENS)["params"]

        def step(params, state, tokens, tied=tied):
            loss = lambda p: jnp.square(tied.apply({"params": p}, tokens)["logits"]).mean()  # noqa: E731
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(optimizer.init, shapes)
        found[name] = sharing.memory(jax.jit(step, donate_argnums=(0, 1)), shapes, state, TOKENS)
        assert found[name].params == 4 * paramtree.count(shapes)
        assert found[name].optimizer == 2 * found[name].params + 4
        assert found[name].peak > found[name].params + found[name].optimizer
    saved = found["untied"].params - found["tied"].params
    assert found["untied"].optimizer - found["tied"].optimizer == 2 * saved
    assert found["untied"].peak - found["tied"].peak > 2.5 * saved


def test_encoders_convert_too(params):
    config = dataclasses.replace(CONFIG, outputs=3)
    model = Encoder(config)
    whole = model.init(KEY, TOKENS)["params"]
    tied, start = sharing.convert(model, whole, Maps(None, (0, 0, 0, 0)), TOKENS)
    assert paramtree.count(whole) - paramtree.count(start) == 3 * 2 * 16 * 32
    assert logits(tied, start).shape == (2, 3)
