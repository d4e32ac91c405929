"""A set of weights for each sample: the same numbers by factors, by vmap, in blocks, and one by one."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import Block, ConvNet, Mlp, all_targets, random_variables, x

import hyperjax as hj
from hyperjax.hypernet import per_sample

B = 3
ZS = x(B, 6)


class Layers(nn.Module):
    """Every kind of layer that factors know."""

    @nn.compact
    def __call__(self, tokens, image):
        y = nn.Embed(7, 6)(tokens)
        y = y + nn.MultiHeadDotProductAttention(2)(nn.RMSNorm()(y), y)
        z = nn.Conv(4, (3, 3), padding="VALID", kernel_dilation=2)(image)
        z = nn.Conv(6, (3,), strides=2, padding="CIRCULAR")(nn.GroupNorm(2)(z).reshape(len(z), -1, 4))
        return nn.DenseGeneral((2, 3), axis=(1, 2))(y[:, : z.shape[1]] * z[:, : y.shape[1]])


class Tied(nn.Module):
    """An embedding that is also the output layer: factors do not know `attend`."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 6)
        return embed.attend(nn.Dense(6)(embed(tokens)))


class Turned(nn.Module):
    """A layer that sees the batch on another axis."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(x.swapaxes(0, 1)).swapaxes(0, 1)


class Head(nn.Module):
    """A kernel that is read apart from its layer."""

    def setup(self):
        self.embed, self.dense = nn.Embed(7, 6), nn.Dense(6)

    def __call__(self, tokens):
        return self.dense(self.embed(tokens)) @ self.embed.embedding.T


class Standardised(nn.Module):
    """A layer whose kernel is changed on the way to it."""

    @nn.compact
    def __call__(self, x):
        halve = lambda tree: jax.tree.map(lambda p: p / (1 + jnp.sum(p**2)), tree)  # noqa: E731
        return nn.map_variables(nn.Dense, "params", halve, init=self.is_initializing())(5)(x)


def one_by_one(hyper, variables, inputs, **keywords):
    rows = [hyper.apply(variables, *(v[i : i + 1] for v in inputs), z=ZS[i], **keywords) for i in range(B)]
    return jnp.concatenate(rows)


def build(model, *inputs, generator, **more):
    hyper = hj.HyperNetwork.from_target(model, *inputs, embedding_dim=6, num_embeddings=4, generator=generator, **more)
    return hyper, random_variables(hyper, *inputs, task_id=0)


def routes(monkeypatch):
    """Counts which route a call takes."""
    taken = []
    for name in ("apply_factored", "_blocks"):
        original = getattr(per_sample, name)

        def spy(*args, name=name, original=original):
            if name == "_blocks" or args[4] != per_sample.PROBE:
                taken.append(name)
            return original(*args)

        monkeypatch.setattr(per_sample, name, spy)
    return taken


LAYERS = (jnp.array([[0, 1, 2, 3], [4, 5, 6, 0], [1, 1, 2, 2]]), x(B, 6, 6, 2))


@pytest.mark.parametrize(
    ("model", "inputs", "generator", "route"),
    [
        (Mlp(), (x(B, 6),), hj.Scale(), "apply_factored"),
        (Mlp(), (x(B, 6),), hj.LowRank(), "apply_factored"),
        (ConvNet(), (x(B, 6, 6, 2),), hj.Scale(), "apply_factored"),
        (ConvNet(), (x(B, 6, 6, 2),), hj.LowRank(), "apply_factored"),
        (Block(), (x(B, 5, 16),), hj.LowRank(), "apply_factored"),
        (Layers(), LAYERS, hj.Scale(), "apply_factored"),
        (Layers(), LAYERS, hj.LowRank(), "_blocks"),
        (Tied(), LAYERS[:1], hj.Scale(), "_blocks"),
        (Turned(), (x(B, B, 6),), hj.Scale(), "_blocks"),
        (Mlp(), (x(B, 6),), hj.Scale(full=True), "_blocks"),
        (Mlp(), (x(B, 6),), hj.Chunked(features=8), "_blocks"),
        (nn.Dense(3), (x(B, 6),), hj.LowRank(), "apply_factored"),
        (nn.Dense(3), (x(B, B),), hj.Scale(), "apply_factored"),  # as many samples as features
        (nn.Embed(B, 4), (jnp.arange(B),), hj.Scale(), "apply_factored"),
        (Head(), LAYERS[:1], hj.Scale(), "_blocks"),
        (Standardised(), (x(B, 6),), hj.Scale(), "_blocks"),
        (nn.remat(Mlp)(), (x(B, 6),), hj.Scale(), "apply_factored"),
        (nn.LayerNorm(feature_axes=1, reduction_axes=(1,)), (x(B, 5, 5),), hj.Scale(), "_blocks"),
        (nn.Conv(4, (3,), feature_group_count=2), (x(B, 5, 4),), hj.LowRank(), "_blocks"),
    ],
)
def test_each_sample_has_its_own_weights(model, inputs, generator, route, monkeypatch):
    hyper, variables = build(model, *inputs, generator=generator)
    taken = routes(monkeypatch)
    got = hyper.apply(variables, *inputs, z=ZS)
    assert taken == [route]
    wanted = one_by_one(hyper, variables, inputs)
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(got / scale, wanted / scale, atol=1e-5)
    assert float(jnp.abs(got - hyper.apply(variables, *inputs, z=ZS[0])).max()) > 1e-3 * scale


def test_low_rank_of_every_layer_but_embeddings():
    hyper, variables = build(Layers(), *LAYERS, generator=hj.LowRank(), rules=[("Embed", hj.Learned())])
    wanted = one_by_one(hyper, variables, LAYERS)
    np.testing.assert_allclose(hyper.apply(variables, *LAYERS, z=ZS), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("generator", [hj.Scale(), hj.LowRank(rank=2)])
def test_factors_never_make_a_batch_of_weights(generator):
    inputs, zs = x(50, 6), x(50, 6)
    hyper, variables = build(Mlp(widths=(40, 40)), inputs, generator=generator)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(hyper.apply(v, inputs, z=zs) ** 2)))
    text = gradient.lower(variables).as_text()
    assert not re.search(r"tensor<50x40x40xf32>", text)
    full, full_variables = build(Mlp(widths=(40, 40)), inputs, generator=hj.Linear())
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(full.apply(v, inputs, z=zs) ** 2)))
    assert re.search(r"tensor<50x40x40xf32>", gradient.lower(full_variables).as_text())


def test_gradients_by_factors_and_by_vmap():
    inputs = x(B, 6, 6, 2)
    hyper, variables = build(ConvNet(), inputs, generator=hj.LowRank())
    loss = lambda p, z: jnp.sum(hyper.apply({**variables, "params": p}, inputs, z=z) ** 2)  # noqa: E731

    def own(p):
        return sum(jnp.sum(hyper.apply({**variables, "params": p}, inputs[i : i + 1], z=ZS[i]) ** 2) for i in range(B))

    ours, wanted = jax.jit(jax.grad(loss))(variables["params"], ZS), jax.jit(jax.grad(own))(variables["params"])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max() + 1e-6))


def test_as_many_tasks_as_features():
    hyper, variables = build(nn.Dense(3), x(B, 4), generator=hj.Scale())
    many = hyper.generate(variables, task_id=jnp.arange(4))
    np.testing.assert_allclose(many["kernel"][2], hyper.generate(variables, task_id=2)["kernel"], rtol=1e-6)


def test_blocks_are_the_whole_and_use_less_memory():
    inputs, zs = x(7, 6), x(7, 6)
    whole, variables = build(Mlp(), inputs, generator=hj.Linear())
    blocks, _ = build(Mlp(), inputs, generator=hj.Linear(), sample_block=3)
    loss = lambda h: lambda v: jnp.sum(h.apply(v, inputs, z=zs) ** 2)  # noqa: E731
    np.testing.assert_allclose(blocks.apply(variables, inputs, z=zs), whole.apply(variables, inputs, z=zs), rtol=1e-5)
    a, b = jax.jit(jax.grad(loss(whole)))(variables), jax.jit(jax.grad(loss(blocks)))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), a, b)
    assert " scan[" in str(jax.make_jaxpr(loss(blocks))(variables))
    assert " scan[" not in str(jax.make_jaxpr(loss(whole))(variables))


def test_tasks_of_a_mixed_batch():
    inputs = x(B, 6)
    hyper, variables = build(Mlp(), inputs, generator=hj.Linear(), rules=[("head", hj.PerTask())])
    tasks = jnp.array([2, 0, 2])
    got = jax.jit(lambda t: hyper.apply(variables, inputs, task_id=t))(tasks)
    for i, task in enumerate([2, 0, 2]):
        np.testing.assert_allclose(
            got[i], hyper.apply(variables, inputs[i : i + 1], task_id=task)[0], rtol=1e-4, atol=1e-5
        )
    outside = jax.jit(lambda t: hyper.apply(variables, inputs, task_id=t))(jnp.array([2, 9, -1]))
    assert np.isnan(outside).any(axis=1).tolist() == [False, True, True]


def test_statistics_move_by_factors_and_are_refused_by_vmap():
    inputs = x(B, 6, 6, 2)
    call = {"train": True, "z": ZS, "rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
    hyper, variables = build(ConvNet(), inputs, generator=hj.Scale())
    _, changed = hyper.apply(variables, inputs, **call)
    before = variables["batch_stats"]["target"]["BatchNorm_0"]["mean"]
    assert jnp.any(changed["batch_stats"]["target"]["BatchNorm_0"]["mean"] != before)
    hyper, variables = build(ConvNet(), inputs, generator=hj.Chunked(features=8))
    with pytest.raises(ValueError, match="batch_stats cannot be updated where each sample has weights of its own"):
        hyper.apply(variables, inputs, **call)


def test_dropout_differs_from_sample_to_sample():
    inputs = jnp.ones((B, 6))
    model = nn.Sequential([nn.Dense(32), nn.Dropout(0.5, deterministic=False), nn.Dense(3)])
    hyper, variables = build(model, inputs, generator=hj.Linear())
    z = jnp.broadcast_to(ZS[0], ZS.shape)
    y = hyper.apply(variables, inputs, z=z, rngs={"dropout": jax.random.key(0)})
    assert jnp.any(y[0] != y[1])


def test_functions_and_keywords():
    model, inputs, keywords, arguments = all_targets()["function"]
    hyper = hj.HyperNetwork.from_target(model, *inputs, embedding_dim=6, generator=hj.Chunked(features=8), **arguments)
    variables = random_variables(hyper, *inputs)
    got = hyper.apply(variables, *inputs, z=ZS, **keywords)
    np.testing.assert_allclose(got, one_by_one(hyper, variables, inputs, **keywords), rtol=1e-4, atol=1e-5)
