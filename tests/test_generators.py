"""Generated parameters start as their own initializers would have started them, for every generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import Block, ConvNet, Mlp, x

import hyperjax as hj
from hyperjax import initializers
from hyperjax.paramtree import structure

KEY = jax.random.key(5, impl="rbg")  # its draws compile faster
TASKS = 8
TARGETS = {
    "mlp": (Mlp(widths=(128, 64), classes=64), (64, 32)),
    "conv": (ConvNet(channels=(32, 32), classes=64), (64, 6, 6, 16)),
    "block": (Block(width=64), (8, 6, 64)),
}
GENERATORS = {
    "linear": hj.Linear(),
    "mlp": hj.MLP(hidden=(32,)),
    "separable": hj.SeparableMLP(),
    "chunked": hj.Chunked(),
    "chunked_large": hj.Chunked(chunk=1500, features=48),
    "scale": hj.Scale(),
    "scale_full": hj.Scale(full=True),
    "low_rank": hj.LowRank(),
}


@pytest.fixture(scope="module")
def native():
    """For each target: several native draws of its parameters, and the mean spread of their outputs."""
    found = {}
    for name, (model, shape) in TARGETS.items():
        inputs = x(*shape)
        keys = jax.random.split(KEY, TASKS)
        init = jax.jit(model.init)
        many = [init(key, inputs) for key in keys]
        run = jax.jit(lambda variables, model=model, inputs=inputs: jnp.std(model.apply(variables, inputs)))
        leaves = [structure(variables["params"]).flatten(variables["params"]) for variables in many]
        found[name] = (
            {path: np.stack([own[path] for own in leaves]) for path in leaves[0]},
            np.mean([run(variables) for variables in many]),
        )
    return found


@pytest.mark.parametrize(
    ("name", "generator"),
    [(name, generator) for name in TARGETS for generator in GENERATORS] + [("conv", "conv_tiles")],
)
def test_every_leaf_starts_like_its_own_initializer(name, generator, native):
    model, shape = TARGETS[name]
    inputs = x(*shape)
    if generator == "conv_tiles":
        chosen = {"generator": hj.Learned(), "rules": [("Conv.*kernel", hj.ConvTiles())]}
    else:
        chosen = {"generator": GENERATORS[generator]}
    hyper = hj.HyperNetwork.from_target(model, inputs, embedding_dim=32, num_embeddings=TASKS, **chosen)

    @jax.jit
    def start(key):
        variables = hyper.init(key, inputs, task_id=0)
        params = hyper.generate(variables, task_id=jnp.arange(TASKS))
        outputs = jax.vmap(lambda p: model.apply({**variables_of(variables), "params": p}, inputs))(params)
        return params, jax.vmap(jnp.std)(outputs)

    def variables_of(variables):
        return {"batch_stats": variables["batch_stats"]["target"]} if "batch_stats" in variables else {}

    params, spreads = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), jax.vmap(start)(jax.random.split(KEY, 3)))
    wanted, wanted_spread = native[name]
    kernels = 0
    for path, leaf in structure(params).flatten(params).items():
        mean, spread = np.asarray(leaf).mean(), np.asarray(leaf).std(axis=tuple(range(1, leaf.ndim)))
        if leaf[0].size >= 1000:
            kernels += 1
            assert abs(spread / wanted[path].std() - 1).max() < 0.1, path
        elif path.endswith(("scale", "bias")):
            np.testing.assert_allclose(leaf, np.broadcast_to(wanted[path][0], leaf.shape), atol=1e-6)
        assert abs(mean - wanted[path].mean()) < 5 * (wanted[path].std() / leaf[0].size ** 0.5) + 1e-6
    assert kernels >= 2
    assert abs(float(spreads.mean()) / wanted_spread - 1) < 0.2


def test_stacked_and_constant_matrices_start_as_they_are():
    params = {"scale": jnp.ones((3, 8)), "zero": jnp.zeros((16, 8)), "kernel": jax.random.normal(KEY, (16, 8))}
    for generator in GENERATORS.values():
        hyper = hj.HyperNetwork.from_target(
            lambda p, x: x @ p["kernel"] + p["scale"].sum(0, keepdims=True),
            params=params,
            embedding_dim=4,
            generator=generator,
        )
        variables = jax.jit(lambda key, hyper=hyper: hyper.init(key, x(2, 16)))(KEY)
        made = jax.jit(hyper.generate)(variables)
        if not isinstance(generator, hj.Scale):  # whose factors differ from 1, as they must for tasks to differ
            np.testing.assert_allclose(made["scale"], 1.0, atol=1e-6)
        np.testing.assert_allclose(made["zero"], 0.0, atol=1e-6)


@pytest.mark.parametrize("generator", ["linear", "mlp", "separable", "chunked"])
def test_a_kernel_whose_mean_is_not_zero(generator):
    params = {"w": jax.random.uniform(KEY, (50, 60)), "scale": jnp.ones(3)}
    hyper = hj.HyperNetwork.from_target(lambda p, x: x, params=params, embedding_dim=8, generator=GENERATORS[generator])
    made = hyper.generate(jax.jit(lambda key: hyper.init(key, x(1)))(KEY))
    assert made["w"].mean() == pytest.approx(0.5, abs=0.05)
    assert made["w"].std() == pytest.approx(12**-0.5, rel=0.1)


def test_vectors_have_a_bias_of_their_own_always():
    hyper = hj.HyperNetwork.from_target(
        lambda p, x: x, params={"scale": jnp.ones(3)}, embedding_dim=2, generator=hj.Linear(use_bias=False)
    )
    np.testing.assert_array_equal(hyper.generate(hyper.init(KEY, x(1)))["scale"], 1.0)


def test_hyperfan():
    """Equations of Chang et al.: variance kept forward, or backward."""
    kernel, bias = structure({"layer": {"bias": jnp.zeros(50), "kernel": jnp.zeros((3, 3, 20, 50))}}).specs[::-1]
    value = jnp.zeros(kernel.shape)
    assert initializers.hyperfan_in(relu=True)(kernel, value) ** 2 == pytest.approx(2 / 180, rel=1e-5)
    assert initializers.hyperfan_in(relu=False, bias=True)(kernel, value) ** 2 == pytest.approx(1 / 360, rel=1e-5)
    assert initializers.hyperfan_in(relu=True, bias=True)(bias, value) ** 2 == pytest.approx(1.0, rel=1e-5)
    assert initializers.hyperfan_in()(bias, value) == 0
    assert initializers.hyperfan_out(relu=True)(kernel, value) ** 2 == pytest.approx(2 / 450, rel=1e-5)
    assert initializers.hyperfan_out()(bias, value) == 0
    heads = structure({"SelfAttention_0": {"out": {"kernel": value[0, :2]}, "query": {"kernel": value[0, :2]}}}).specs
    assert [initializers.fans(spec) for spec in heads] == [(40, 50), (2, 1000)]
    chunked = hj.Chunked(spread=initializers.hyperfan_in(bias=True))
    params = {"kernel": jnp.zeros((100, 80)), "bias": jnp.zeros(400)}
    hyper = hj.HyperNetwork.from_target(lambda p, x: x, params=params, embedding_dim=8, generator=chunked)
    made = hyper.generate(jax.jit(lambda key: hyper.init(key, x(1)))(KEY))
    assert made["kernel"].var() == pytest.approx(1 / 100, rel=0.2)
    assert made["bias"].var() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("generator", [hj.Linear, hj.MLP, hj.Chunked])
def test_a_generator_starts_as_hyperfan_says(generator):
    spread = initializers.hyperfan_out(relu=True)
    hyper = hj.HyperNetwork.from_target(
        Mlp(widths=(64, 48)), x(2, 32), embedding_dim=16, generator=generator(spread=spread)
    )
    params = hyper.generate(jax.jit(lambda key: hyper.init(key, x(2, 32)))(KEY))
    for layer, out in (("Dense_0", 64), ("Dense_1", 48)):
        assert params[layer]["kernel"].std() == pytest.approx((2 / out) ** 0.5, rel=0.1)


def test_embeddings_have_mean_square_one():
    rows = initializers.unit_rows(KEY, (50, 7))
    np.testing.assert_allclose(jnp.mean(rows**2, axis=1), 1.0, rtol=1e-5)
    assert abs(float(rows.mean())) < 0.2


def test_tiles_cover_a_kernel():
    """A 40 x 24 kernel is 3 x 2 basic kernels of 16 x 16, the last ones cropped; linear in each tile's embedding."""
    params = {"kernel": jax.random.normal(KEY, (3, 3, 40, 24))}
    hyper = hj.HyperNetwork.from_target(
        lambda p, x: x, params=params, embedding_dim=1, num_embeddings=0, generator=hj.ConvTiles(embedding=8, hidden=8)
    )
    variables = jax.jit(lambda key: hyper.init(key, x(1)))(KEY)
    own = variables["params"]["generators_0"]
    assert own["theta.kernel.tiles"].shape == (6, 8)
    kernel = np.asarray(hyper.generate(variables)["kernel"])
    w_in, w_out = np.asarray(own["3x3.w_in"]), np.asarray(own["3x3.w_out"])
    assert not own["3x3.b_in"].any()
    assert not own["3x3.b_out"].any()
    for tile, (row, column) in enumerate((r, c) for r in range(3) for c in range(2)):
        a = w_in @ np.asarray(own["theta.kernel.tiles"])[tile]  # [16, d]
        basic = np.einsum("hwod,id->hwio", w_out, a)
        got = kernel[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        np.testing.assert_allclose(got, basic[:, :, : got.shape[2], : got.shape[3]], rtol=2e-4, atol=1e-6)


def test_the_paper_s_generator_has_75920_weights():
    """Section 4.1: 16 (64 * 64 + 64) + 9 * 16 * (64 + 1), one embedding of 64 for each basic kernel."""
    params = {"kernel": jnp.ones((3, 3, 32, 32))}
    hyper = hj.HyperNetwork.from_target(
        lambda p, x: x, params=params, embedding_dim=64, num_embeddings=0, generator=hj.ConvTiles()
    )
    shapes = jax.eval_shape(lambda: hyper.init(KEY, x(1)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 75_920 + 4 * 64
