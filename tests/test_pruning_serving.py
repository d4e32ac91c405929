"""What saves time computes what the gates say, and only that: cut weights, buckets, skipped layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import random_variables

from hyperjax import paramtree
from hyperjax.pruning import (
    Buckets,
    BucketServer,
    Gated,
    GumbelSigmoid,
    HardConcrete,
    MixtureOfDepths,
    TopK,
    compact,
    costs,
    cut,
    skip_decode,
)
from hyperjax.transformer import Config, Decoder, Encoder, Gates, generate

B, L, V, N = 3, 6, 7, 4
C = Config(vocabulary=V, layers=2, width=8, heads=2, ffn=16)
TEXT = np.random.default_rng(0).integers(0, V, (B, L))
MASK = np.arange(L) < np.array([[6], [4], [5]])
GATES = Gates(  # one layer has no head, one no block, the last is gone; what is between 0 and 1 is multiplied in
    heads=np.float32([[0, 0], [0.3, 0], [1, 0.5]]),
    blocks=np.float32([[0.7, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]]),
    layer=np.float32([0.6, 1, 0]),
)


def apply(model, variables, *inputs, **options):
    """Compiled at once: faster than piece by piece."""
    return jax.jit(lambda v, *inputs: model.apply(v, *inputs, **options))(variables, *inputs)


def close(found, wanted, tolerance=1e-5):
    """Compares relative to the largest output."""
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_cut_out_computes_the_same(causal, activation):
    config = dataclasses.replace(C, layers=3, activation=activation, outputs=5)
    make, options = (Decoder, {}) if causal else (Encoder, {"mask": MASK})
    variables = random_variables(make(config), TEXT)
    wanted = apply(make(config), variables, TEXT, gates=GATES, **options)["logits"]
    for multiple, ffn in ((64, (16, 0)), (3, (9, 0))) if causal else ((1, (8, 0)),):
        small, params = cut(config, variables["params"], GATES, multiple=multiple)
        assert (small.layers, small.heads, small.ffn) == (2, (0, 1), ffn)
        close(apply(make(small), {"params": params}, TEXT, **options)["logits"], wanted)
    assert "attention_0" not in params["stack"]
    assert set(jax.eval_shape(make(small).init, jax.random.key(0), TEXT)["params"]["stack"]) == set(params["stack"])


def test_attention_to_an_encoder_is_cut_as_well():
    config, memory = dataclasses.replace(C, layers=3), np.float32(np.random.default_rng(1).normal(size=(B, 4, 8)))
    variables = random_variables(Decoder(config, cross=True), TEXT, memory=memory)
    gates = GATES.replace(cross=np.float32([[0, 0], [0.5, 0], [1, 0.2]]), layer=np.float32([0.6, 1, 1]))
    small, params = cut(config, variables["params"], gates)
    assert (small.heads, small.cross_heads, small.ffn) == ((0, 1, 2), (0, 1, 2), (8, 0, 12))
    wanted = apply(Decoder(config, cross=True), variables, TEXT, gates=gates, memory=memory)["logits"]
    close(apply(Decoder(small, cross=True), {"params": params}, TEXT, memory=memory)["logits"], wanted)


def spread(variables):
    """Logits of static gates far apart: some of them open, some closed, some in between."""
    params = {
        name: {"logits": np.resize(np.float32([5, -5, 0.5]), part["logits"].shape)} if "routers" in name else part
        for name, part in variables["params"].items()
    }
    return {"params": params}


@pytest.mark.parametrize(
    ("choice", "prune"),
    [(HardConcrete(), ("heads", "blocks", "layers")), (GumbelSigmoid(), ("layers",)), (TopK(1), ("heads", "blocks"))],
    ids=["hard concrete", "layers", "top-k"],
)
def test_compact_is_the_gated_model_as_it_is_served(choice, prune):
    model = Gated(dataclasses.replace(C, layers=4), prune=prune, choice=choice, blocks=N)
    variables = spread(random_variables(model, TEXT))
    out, small = apply(model, variables, TEXT), compact(model, variables)
    assert min(np.min(gate) for gate in jax.tree.leaves(out["gates"])) == 0
    close(apply(small.model, small.variables, TEXT)["logits"], out["logits"])
    assert small.params == paramtree.count(small.variables["params"]) < small.params_before
    assert small.params_before == paramtree.count(variables["params"]["model"])
    assert small.share(model.config, L) == pytest.approx(float(out["share"]), rel=1e-5)
    assert costs(small.model.config, L).total < costs(model.config, L).total


def test_compact_of_random_gates():
    model = Gated(C, choice=TopK(0.5), blocks=N, seed=3)
    variables = random_variables(model, TEXT)
    small = compact(model, variables)
    assert (small.model.config.heads, small.model.config.ffn) == ((1, 1), (8, 8))
    out, trained = apply(model, variables, TEXT), apply(model, variables, TEXT, jax.random.key(0))
    close(apply(small.model, small.variables, TEXT)["logits"], out["logits"])
    jax.tree.map(np.testing.assert_array_equal, trained["gates"], out["gates"])  # it trains on those


def test_compact_decodes():
    model = Gated(C, choice=HardConcrete(), blocks=N)
    variables = spread(random_variables(model, TEXT))
    small = compact(model, variables)
    drawn = generate(small.model, small.variables, TEXT, 2, jax.random.key(0), temperature=0)
    out = apply(model, variables, np.concatenate([TEXT, drawn], 1))
    np.testing.assert_array_equal(drawn, out["logits"][:, L - 1 : -1].argmax(-1))
    kept = [held.keys.shape[2] for held in small.model.initialize_cache(B, L).layers if held is not None]
    assert kept == [1, 2]


BUCKETS = dict(shares=(0.25, 0.5, 1.0), blocks=N, prompt=2)


@pytest.mark.parametrize(("causal", "after"), [(True, 0), (True, 1), (False, 1)])
def test_bucket_server_is_the_gated_model(causal, after):
    model = Buckets(dataclasses.replace(C, layers=1 + after, outputs=5), causal=causal, after=after, **BUCKETS)
    variables, mask = random_variables(model, TEXT), None if causal else MASK
    kernel = variables["params"]["router"]["kernel"]
    gated = jax.jit(lambda v: model.apply(v, TEXT, mask=mask))
    each = jax.jit(lambda v: server.each(v, TEXT, mask))
    found = set()
    for scale in (1.0, -1.0):  # so that several buckets are taken
        variables["params"]["router"]["kernel"] = scale * kernel
        server = BucketServer(model, variables)
        wanted, out = gated(variables), each(server.variables)
        np.testing.assert_array_equal(out["bucket"], wanted["bucket"].argmax(-1))
        close(out["logits"], wanted["logits"])
        np.testing.assert_allclose(wanted["share"], model.costs(L)[out["bucket"]], rtol=1e-6)
        found |= set(np.asarray(out["bucket"]).tolist())
    assert len(found) > 1


@pytest.mark.parametrize("causal", [True, False])
def test_bucket_server_of_a_batch(causal):
    model = Buckets(dataclasses.replace(C, outputs=5), causal=causal, per="batch", **BUCKETS)
    variables, mask = random_variables(model, TEXT), None if causal else MASK
    wanted, server = apply(model, variables, TEXT, mask=mask), BucketServer(model, variables)
    out = jax.jit(server)(server.variables, TEXT, mask)
    np.testing.assert_array_equal(wanted["bucket"].argmax(-1), np.full(B, out["bucket"]))
    close(out["logits"], wanted["logits"])


def primitives(jaxpr):
    """Names of all that a program computes, and those inside of its branches."""
    outside, inside = [], []
    for equation in jaxpr.eqns:
        outside.append(equation.primitive.name)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            sub = getattr(value, "jaxpr", value)
            if hasattr(sub, "eqns"):
                found = primitives(sub)
                inside += found[1] + (found[0] if equation.primitive.name == "cond" else [])
                outside += found[0] if equation.primitive.name != "cond" else []
    return outside, inside


def test_only_one_branch_is_run():
    model = Buckets(C, **BUCKETS)
    server = BucketServer(model, random_variables(model, TEXT))
    for run, texts in ((server, TEXT[:1]), (server.each, TEXT)):
        outside, inside = primitives(jax.make_jaxpr(run)(server.variables, texts).jaxpr)
        assert outside.count("cond") == 1
        assert inside.count("dot_general") >= 3 * 2 * 6  # three buckets of two layers; none of them outside
        assert outside.count("dot_general") <= 2 * 8 + 3  # the prompt, at full width, and the router
    skipping = MixtureOfDepths(C, keep=0.4, every=1)
    variables, cache = random_variables(skipping, TEXT), Decoder(C).initialize_cache(1, L)
    step = jax.make_jaxpr(lambda v, t, c: skip_decode(skipping, v, t, c))(variables, TEXT[:1, :1], cache)
    outside, inside = primitives(step.jaxpr)
    assert outside.count("cond") == 2
    assert outside.count("dot_general") == 2 * 2 + 1  # routers and predictors, output
    assert inside.count("dot_general") >= 2 * 8


@pytest.mark.parametrize(
    "model",
    [
        MixtureOfDepths(dataclasses.replace(C, positions="learned", length=L), keep=0.4, every=1),
        Gated(C, per="token", prune=("layers",)),
        Gated(C, per="token", prune=("layers",), choice=HardConcrete()),
    ],
    ids=["depths", "layers", "soft layers"],
)
def test_decoding_that_skips_is_the_parallel_pass(model):
    variables = random_variables(model, TEXT)
    wanted = apply(model, variables, TEXT)
    step = jax.jit(lambda token, cache: skip_decode(model, variables, token, cache))
    skipped = []
    for b in range(B):
        cache, logits = Decoder(model.config).initialize_cache(1, L), []
        for t in range(L):
            out, cache, taken = step(TEXT[b : b + 1, t : t + 1], cache)
            logits.append(out)
            np.testing.assert_array_equal(taken, wanted["gates"].tokens[:, b, t] > 0)
            skipped.append(1 - taken)
        close(jnp.concatenate(logits), wanted["logits"][b])
        assert int(cache.used) == L
    assert 0 < np.mean(skipped) < 1
