"""A hypernetwork is its target with other parameters: two routes to one output, for every generator and target."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax.test_util import check_grads
from targets import ConvNet, Mlp, NnxNet, all_targets, function_params, plain, random_variables, x

import hyperjax as hj
from hyperjax.hypernet.generators import matvec

KEY = jax.random.key(3)
GENERATORS = {
    "linear": hj.Linear(),
    "linear_no_bias": hj.Linear(use_bias=False),
    "mlp": hj.MLP(hidden=(8, 8)),
    "separable": hj.SeparableMLP(hidden=(8, 8), groups=2),
    "chunked": hj.Chunked(features=8),
    "chunked_whole": hj.Chunked(chunk=10_000, features=8),
    "scale": hj.Scale(),
    "scale_full": hj.Scale(full=True),
    "low_rank": hj.LowRank(rank=2, alpha=3.0),
}


def build(name, generator, **more):
    model, inputs, keywords, arguments = all_targets()[name]
    rules = [("Conv.*kernel", generator)] if isinstance(generator, hj.ConvTiles) else []
    fallback = hj.Learned() if rules else generator
    arguments = {"embedding_dim": 6, "num_embeddings": 3, "generator": fallback, "rules": rules} | arguments | more
    hyper = hj.HyperNetwork.from_target(model, *inputs, **arguments, **keywords)
    return hyper, random_variables(hyper, *inputs, task_id=0, **keywords), inputs, keywords


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("name", ["mlp", "conv", "block", "nnx", "function"])
def test_generate_then_apply_is_apply(name, generator):
    hyper, variables, inputs, keywords = build(name, GENERATORS[generator])
    y = hyper.apply(variables, *inputs, task_id=1, **keywords)
    scale = max(1.0, float(jnp.max(jnp.abs(y))))
    alone = plain(name, hyper, variables, inputs, keywords, task_id=1)
    np.testing.assert_allclose(y / scale, alone / scale, atol=1e-6)
    np.testing.assert_array_equal(
        alone, plain(name, hyper, variables, inputs, keywords, z=hyper.embeddings(variables)[1])
    )


def test_generate_then_apply_is_apply_for_tiles():
    hyper, variables, inputs, keywords = build("conv", hj.ConvTiles(tile=4, embedding=5, hidden=3))
    y = hyper.apply(variables, *inputs, task_id=2)
    np.testing.assert_allclose(y, plain("conv", hyper, variables, inputs, keywords, task_id=2), atol=1e-6)


def test_jit_changes_nothing():
    hyper, variables, inputs, keywords = build("mlp", hj.Chunked(features=8))
    run = lambda v, task: hyper.apply(v, *inputs, task_id=task, **keywords)  # noqa: E731
    for wanted, task in ((run(variables, 2), 2), (run(variables, jnp.array(2)), jnp.array(2))):
        np.testing.assert_allclose(jax.jit(run)(variables, task), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("generator", ["linear", "mlp", "separable", "chunked", "scale", "low_rank"])
def test_gradients_reach_every_parameter_of_the_generator(generator):
    hyper, variables, inputs, keywords = build("mlp", GENERATORS[generator])

    def loss(params):
        return jnp.sum(hyper.apply({**variables, "params": params}, *inputs, task_id=1, **keywords) ** 2)

    grads = jax.jit(jax.grad(loss))(variables["params"])
    silent = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not jnp.any(g)]
    assert [path for path in silent if "kernel.gain" not in path] == []  # those move only what started constant
    rows = np.asarray(jnp.any(grads["embedding"] != 0, axis=1))
    assert rows.tolist() == [False, True, False]


def test_the_head_has_the_gradient_of_a_product():
    weights, f = jax.random.normal(KEY, (4, 3, 5)), jax.random.normal(KEY, (5,))
    with jax.enable_x64(True):
        check_grads(matvec, (np.asarray(weights, np.float64), np.asarray(f, np.float64)), 1, ["rev"])
    many = jax.vmap(matvec, in_axes=(None, 0))(weights, jnp.stack([f, 2 * f]))
    np.testing.assert_allclose(many[1], 2 * (weights @ f), rtol=1e-5)


def test_bfloat16_parameters_from_float32_generators():
    hyper, variables, inputs, keywords = build("mlp", hj.Linear(), dtype=jnp.bfloat16)
    params = hyper.generate(variables, task_id=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.float32)}
    full, full_variables, *_ = build("mlp", hj.Linear())
    wanted = full.apply(full_variables, *inputs, task_id=0, **keywords)
    np.testing.assert_allclose(hyper.apply(variables, *inputs, task_id=0, **keywords), wanted, atol=0.1)


def test_mixed_dtypes_and_integers_stay_what_they_are():
    hyper, variables, *_ = build("function", hj.Linear())
    made = jax.tree.map(lambda leaf: leaf.dtype, hyper.generate(variables, task_id=0))
    assert made == jax.tree.map(lambda leaf: leaf.dtype, function_params())
    assert hyper.generate(variables, task_id=2)["shift"] == 1


def test_remat_changes_memory_not_gradients():
    def grads(remat):
        hyper, variables, inputs, keywords = build("mlp", hj.MLP(hidden=(8,)), remat=remat)
        loss = lambda p: jnp.sum(hyper.apply({"params": p}, *inputs, task_id=1, **keywords) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(variables["params"]), str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))

    (plain_grads, plain_text), (remat_grads, remat_text) = grads(False), grads(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain_grads, remat_grads)
    assert "remat" in remat_text
    assert "remat" not in plain_text


def test_batch_norm_moves_and_dropout_is_reached():
    hyper, variables, inputs, _ = build("conv", hj.Chunked(features=8))
    rngs = {"dropout": KEY}
    y, changed = hyper.apply(variables, *inputs, train=True, task_id=0, rngs=rngs, mutable=["batch_stats"])
    model = ConvNet()
    whole = hyper.materialize(variables, task_id=0)
    _, wanted = model.apply(whole, *inputs, train=True, rngs=rngs, mutable=["batch_stats"])
    got = changed["batch_stats"]["target"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, wanted["batch_stats"])
    again, _ = hyper.apply(variables, *inputs, train=True, task_id=0, rngs=rngs, mutable=["batch_stats"])
    rngs = {"dropout": jax.random.key(9)}
    other, _ = hyper.apply(variables, *inputs, train=True, task_id=0, rngs=rngs, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, again)
    assert jnp.any(y != other)


def test_statistics_of_each_task_apart():
    hyper, variables, inputs, _ = build("conv", hj.Linear(), per_task=("batch_stats",))

    @jax.jit
    def step(variables, task_id):
        _, changed = hyper.apply(
            variables, *inputs, train=True, task_id=task_id, rngs={"dropout": KEY}, mutable=["batch_stats"]
        )
        return changed

    before = variables["batch_stats"]["target"]["BatchNorm_0"]["mean"]
    after = step(variables, 1)["batch_stats"]["target"]["BatchNorm_0"]["mean"]
    assert after.shape == (3, 8)
    moved = np.asarray(jnp.any(after != before, axis=1))
    assert moved.tolist() == [False, True, False]
    for outside in (-1, 3):
        kept = step(variables, outside)["batch_stats"]["target"]["BatchNorm_0"]["mean"]
        np.testing.assert_array_equal(kept, before)
    assert hyper.materialize(variables, task_id=2)["batch_stats"]["BatchNorm_0"]["mean"].shape == (8,)


def test_nnx_statistics_and_dropout():
    net = NnxNet(nnx.Rngs(0, dropout=1))
    inputs = x(5, 6)
    hyper = hj.HyperNetwork.from_target(net, inputs, embedding_dim=4, num_embeddings=2)
    variables = random_variables(hyper, inputs, task_id=0)
    with pytest.raises(ValueError, match="random stream 'dropout'"):
        hyper.apply(variables, inputs, task_id=0)
    run = jax.jit(lambda key: hyper.apply(variables, inputs, task_id=1, rngs={"dropout": key}, mutable=["batch_stats"]))
    (a, changed), (b, _), (c, _) = run(KEY), run(KEY), run(jax.random.key(5))
    np.testing.assert_array_equal(a, b)
    assert jnp.any(a != c)
    assert jnp.any(changed["batch_stats"]["target"]["norm"]["mean"] != 0)
    assert not jnp.any(net.norm.mean[...] != 0)  # the module itself is left alone


def test_rules_choose_by_path():
    hyper, variables, inputs, keywords = build(
        "mlp", hj.Linear(), rules=[("LayerNorm", hj.Learned()), ("head", hj.PerTask()), ("Dense_1/bias", hj.Frozen())]
    )
    made = {type(g).__name__: [spec.path for spec in g.leaves] for g in hyper.generators}
    assert made["PerTask"] == ["head/bias", "head/kernel"]
    assert made["Frozen"] == ["Dense_1/bias"]
    assert made["Linear"] == ["Dense_0/bias", "Dense_0/kernel", "Dense_1/kernel"]
    assert len(made["Learned"]) == 4
    loss = lambda p: jnp.sum(hyper.apply({**variables, "params": p}, *inputs, task_id=1, **keywords) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables["params"])
    head = next(g["theta.head.kernel"] for g in grads.values() if isinstance(g, dict) and "theta.head.kernel" in g)
    assert np.asarray(jnp.any(head != 0, axis=(1, 2))).tolist() == [False, True, False]
    assert "theta.Dense_1.bias" not in str(grads)


def test_tasks_with_heads_of_different_sizes():
    models = [Mlp(classes=2), Mlp(classes=3), Mlp(classes=2)]
    inputs = x(3, 6)
    hyper = hj.HyperNetwork.from_target(models, inputs, embedding_dim=4, generator=hj.Linear())
    variables = random_variables(hyper, inputs, task_id=0)
    for task, model in enumerate(models):
        y = hyper.apply(variables, inputs, task_id=task)
        assert y.shape == (3, model.classes)
        np.testing.assert_allclose(
            y, model.apply({"params": hyper.generate(variables, task_id=task)}, inputs), atol=1e-6
        )
    own = hj.HyperNetwork.from_target(models, inputs, embedding_dim=4, rules=[("head", hj.PerTask())])
    heads = [
        p["theta.head.kernel"].shape
        for p in random_variables(own, inputs, task_id=0)["params"].values()
        if isinstance(p, dict) and "theta.head.kernel" in p
    ]
    assert sorted(heads) == [(1, 12, 3), (2, 12, 2)]
    with pytest.raises(ValueError, match="one Python int"):
        jax.jit(lambda t: hyper.apply(variables, inputs, task_id=t))(0)


def test_an_encoder_makes_the_embedding():
    inputs, keywords = all_targets()["mlp"][1:3]
    hyper = hj.HyperNetwork.from_target(
        Mlp(), *inputs, embedding_dim=6, num_embeddings=0, encoder=nn.Dense(6), generator=hj.Linear(), **keywords
    )
    condition = 100 * x(9)
    variables = jax.jit(lambda key: hyper.init(key, *inputs, condition=condition, **keywords))(KEY)
    z = nn.Dense(6).apply({"params": variables["params"]["encoder"]}, condition) * variables["frozen"]["encoder_scale"]
    np.testing.assert_allclose(jnp.mean(z**2), 1, rtol=1e-4)
    a = hyper.apply(variables, *inputs, condition=condition, **keywords)
    np.testing.assert_allclose(a, hyper.apply(variables, *inputs, z=z, **keywords), atol=1e-5)
    many = hyper.apply(variables, *inputs, condition=x(3, 9), **keywords)  # a set of weights for each sample
    for i in range(3):
        one = hyper.apply(variables, *(v[i : i + 1] for v in inputs), condition=x(3, 9)[i], **keywords)
        np.testing.assert_allclose(many[i : i + 1], one, atol=1e-5)


def test_the_target_s_own_input_as_condition():
    inputs = x(3, 6)
    hyper = hj.HyperNetwork.from_target(Mlp(), inputs, embedding_dim=4, encoder=nn.Dense(4), generator=hj.Scale())
    variables = random_variables(hyper, inputs, condition=inputs)
    loss = lambda p: jnp.sum(hyper.apply({**variables, "params": p}, inputs, condition=inputs) ** 2)  # noqa: E731
    assert jnp.any(jax.jit(jax.grad(loss))(variables["params"])["encoder"]["kernel"] != 0)


def test_starting_from_trained_parameters():
    model, inputs = Mlp(), x(3, 6)
    trained = jax.jit(model.init)(jax.random.key(8), inputs)["params"]
    for generator in (hj.LowRank(), hj.LowRank(freeze_base=True), hj.Learned(), hj.Frozen()):
        hyper = hj.HyperNetwork.from_target(model, inputs, embedding_dim=4, generator=generator, params=trained)
        variables = jax.jit(hyper.init)(KEY, inputs)
        np.testing.assert_allclose(hyper.apply(variables, inputs), model.apply({"params": trained}, inputs), atol=1e-6)
    assert jax.tree.leaves(variables["frozen"])
    with pytest.raises(ValueError, match=r"head/kernel .*expected \(12, 4\)"):
        hj.HyperNetwork.from_target(
            model, inputs, embedding_dim=4, params={**trained, "head": {**trained["head"], "kernel": jnp.zeros((2, 2))}}
        )


def test_residual_starts_near_trained_parameters():
    model, inputs = Mlp(widths=(48, 48)), x(3, 6)
    trained = freeze(jax.jit(model.init)(jax.random.key(8), inputs)["params"])
    for generator in (hj.Linear(residual=True), hj.MLP(residual=True)):
        hyper = hj.HyperNetwork.from_target(model, inputs, embedding_dim=4, generator=generator, params=trained)
        made = hyper.generate(jax.jit(hyper.init)(KEY, inputs))["Dense_1"]["kernel"]
        apart = jnp.std(made - trained["Dense_1"]["kernel"]) / jnp.std(made)
        assert 0.08 < apart < 0.12


def test_init_in_training_mode():
    inputs = x(3, 6, 6, 2)
    hyper = hj.HyperNetwork.from_target(ConvNet(), inputs, embedding_dim=4, num_embeddings=2)
    shapes = [
        jax.eval_shape(lambda key, more=more: hyper.init(key, inputs, train=True, **more), KEY)
        for more in ({"task_id": 0}, {"z": x(3, 4)})
    ]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    start = jax.jit(lambda key: hyper.init(key, inputs, train=True, task_id=0))(KEY)["batch_stats"]["target"]
    assert not jnp.any(start["BatchNorm_0"]["mean"])


def test_collections_that_only_a_call_makes():
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            if train:
                self.sow("aux", "loss", jnp.sum(x))
            return nn.Dense(3)(x)

    hyper, inputs = hj.HyperNetwork.from_target(Sows(), x(3, 6), embedding_dim=4), x(3, 6)
    variables = random_variables(hyper, inputs)
    _, changed = hyper.apply(variables, inputs, train=True, mutable=["aux"])
    np.testing.assert_allclose(changed["aux"]["target"]["loss"][0], jnp.sum(inputs), rtol=1e-6)


def test_integer_state_of_each_task():
    class Counts(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("calls", "n", lambda: jnp.int32(0))
            if self.is_mutable_collection("calls"):
                calls.value += 1
            return nn.Dense(3)(x)

    inputs = x(3, 6)
    hyper = hj.HyperNetwork.from_target(Counts(), inputs, embedding_dim=4, num_embeddings=3, per_task=("calls",))
    start = variables = jax.jit(lambda key: hyper.init(key, inputs, task_id=0))(KEY)
    for task in (1, 1, 2):
        _, changed = hyper.apply(variables, inputs, task_id=task, mutable=["calls"])
        variables = {**variables, **changed}
    assert (variables["calls"]["target"]["n"] - start["calls"]["target"]["n"]).tolist() == [0, 2, 1]


@pytest.mark.parametrize(("per_task", "slots"), [((), ["target"]), (("batch_stats",), ["target_0", "target_1"])])
def test_targets_share_their_statistics_unless_told_otherwise(per_task, slots):
    inputs = x(3, 6, 6, 2)
    models = [ConvNet(classes=2), ConvNet(classes=3)]
    hyper = hj.HyperNetwork.from_target(models, inputs, embedding_dim=4, per_task=per_task)
    variables = random_variables(hyper, inputs, task_id=0)
    assert sorted(variables["batch_stats"]) == slots
    call = {"train": True, "rngs": {"dropout": KEY}, "mutable": ["batch_stats"]}
    _, changed = hyper.apply(variables, inputs, task_id=1, **call)
    before, after = variables["batch_stats"], changed["batch_stats"]
    moved = [s for s in slots if jnp.any(before[s]["BatchNorm_0"]["mean"] != after[s]["BatchNorm_0"]["mean"])]
    assert moved == slots[-1:]


def test_nnx_state_of_several_kinds_and_state_that_would_be_lost():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)])
            self.norm, self.calls = nnx.BatchNorm(5, rngs=rngs), nnx.Variable(jnp.zeros(2))

        def __call__(self, x):
            self.calls[...] = self.calls[...] + 1
            return self.layers[1](self.norm(self.layers[0](x)))

    inputs = x(3, 6)
    hyper = hj.HyperNetwork.from_target(Net(nnx.Rngs(0)), inputs, embedding_dim=4, num_embeddings=2)
    variables = random_variables(hyper, inputs, task_id=0)
    state = ["batch_stats", "variable"]
    assert set(state) < set(variables)
    with pytest.raises(ValueError, match=r"changes .*; pass mutable=\['batch_stats', 'variable'\]"):
        hyper.apply(variables, inputs, task_id=0)
    _, changed = hyper.apply(variables, inputs, task_id=0, mutable=state)
    np.testing.assert_allclose(changed["variable"]["target"]["calls"], variables["variable"]["target"]["calls"] + 1)
    assert jnp.any(
        changed["batch_stats"]["target"]["norm"]["mean"] != variables["batch_stats"]["target"]["norm"]["mean"]
    )


def test_gradients_have_the_dtypes_of_their_parameters():
    hyper, variables, inputs, keywords = build("mlp", hj.MLP(hidden=(8,)))

    def grads(dtype):
        params = jax.tree.map(lambda p: p.astype(dtype), variables["params"])
        loss = lambda p: jnp.sum(hyper.apply({"params": p}, *inputs, task_id=1, **keywords) ** 2)  # noqa: E731
        return jax.eval_shape(jax.grad(loss), params)

    assert {g.dtype for g in jax.tree.leaves(grads(jnp.bfloat16))} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        assert {g.dtype for g in jax.tree.leaves(grads(jnp.float64))} == {jnp.dtype(jnp.float64)}
        shapes = jax.eval_shape(lambda key: hyper.init(key, *inputs, task_id=0, **keywords), KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["params"])} == {jnp.dtype(jnp.float32)}


def test_equal_plans_are_equal_and_functions_pickle():
    inputs = x(3, 6)
    one, two = (hj.HyperNetwork.from_target(Mlp(), inputs, embedding_dim=4) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != hj.HyperNetwork.from_target(Mlp(), inputs, embedding_dim=5)
    model, _, _, arguments = all_targets()["function"]
    hyper = hj.HyperNetwork.from_target(model, inputs, embedding_dim=4, **arguments)
    again = pickle.loads(pickle.dumps(hyper))
    variables = random_variables(hyper, inputs)
    np.testing.assert_array_equal(again.apply(variables, inputs), hyper.apply(variables, inputs))


def test_names_of_the_target_do_not_meet_those_of_the_generator():
    params = {
        name: jnp.ones((4, 3)) for name in ("Dense_0", "lift", "bias_1", "group_1", "head", "condition", "embedding")
    }
    model = lambda p, x: x @ sum(p.values())  # noqa: E731
    for generator in ("linear", "mlp", "separable", "chunked", "scale", "low_rank"):
        hyper = hj.HyperNetwork.from_target(model, params=params, embedding_dim=4, generator=GENERATORS[generator])
        assert hyper.apply(random_variables(hyper, x(2, 4)), x(2, 4)).shape == (2, 3)


def test_inside_another_module():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, task_id):
            hyper = hj.HyperNetwork.from_target(Mlp(), x, embedding_dim=4, num_embeddings=2, generator=hj.Chunked())
            return nn.Dense(2)(hyper(x, task_id=task_id))

    inputs = x(3, 6)
    variables = random_variables(Outer(), inputs, 0)
    assert Outer().apply(variables, inputs, 1).shape == (3, 2)
    loss = lambda p: jnp.sum(Outer().apply({**variables, "params": p}, inputs, 1) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables["params"])
    inner = next(part for part in grads.values() if "embedding" in part)
    assert np.asarray(jnp.any(inner["embedding"] != 0, axis=1)).tolist() == [False, True]


def test_counts_are_as_documented():
    inputs = x(3, 6)
    size = sum(p.size for p in jax.tree.leaves(jax.eval_shape(Mlp().init, KEY, inputs)["params"]))

    def weights(generator):
        hyper = hj.HyperNetwork.from_target(Mlp(), inputs, embedding_dim=5, generator=generator)
        return sum(p.size for p in jax.tree.leaves(random_variables(hyper, inputs)["params"])) - 5

    leaves = jax.tree.leaves(jax.eval_shape(Mlp().init, KEY, inputs)["params"])
    vectors = sum(p.size for p in leaves if p.ndim < 2)
    assert weights(hj.Linear(use_bias=False)) == 5 * size + vectors
    assert weights(hj.Linear()) == 6 * size
    assert weights(hj.MLP(hidden=(7,), use_bias=False)) == 7 * size + vectors + 5 * 7 + 7
    assert weights(hj.Learned()) == size


def test_works_under_vmap_and_grad_of_z():
    hyper, variables, inputs, keywords = build("mlp", hj.Chunked(features=8))
    zs = x(4, 6)
    f = lambda z: jnp.sum(hyper.apply(variables, *inputs, z=z, **keywords) ** 2)  # noqa: E731
    many = jax.jit(jax.vmap(jax.grad(f)))(zs)
    np.testing.assert_allclose(many[2], jax.jit(jax.grad(f))(zs[2]), rtol=1e-4, atol=1e-5)
