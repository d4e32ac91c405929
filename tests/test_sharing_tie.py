"""hyperjax.sharing.tie: unique parameters, values and gradients as untied, parts, maps, new sources, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from hyperjax import hypernet, paramtree
from hyperjax.sharing import ByEmbedding, LowRank, Scale, Tie, tie

KEY = jax.random.key(0)


class Net(nn.Module):
    """Embedding, four equal layers, a batch norm and an output."""

    width: int = 8

    @nn.compact
    def __call__(self, tokens, train=False):
        x = nn.Embed(11, self.width, name="embed")(tokens)
        for n in range(4):
            x = x + jnp.tanh(nn.Dense(self.width, name=f"layer_{n}")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(11, name="decoder")(x)

    def embed_only(self, tokens):
        return tokens


TOKENS = jax.random.randint(KEY, (3, 5), 0, 11)
TIES = [
    Tie(r"layer_[1-3]/(.*)", to=r"layer_0/\1"),
    Tie("decoder/kernel", to="embed/embedding", through=jnp.transpose),
]


def loss_of(module, params, stats, tokens=TOKENS):
    logits = module.apply({"params": params, "batch_stats": stats}, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def random_like(params, key=KEY):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree, [0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.fixture(scope="module")
def tied():
    return tie(Net(), TIES, TOKENS)


@pytest.fixture(scope="module")
def variables(tied):
    made = tied.init(KEY, TOKENS)
    return {**made, "params": random_like(made["params"])}


def test_only_unique_parameters_exist(tied, variables):
    params = variables["params"]
    assert sorted(params) == ["decoder", "embed", "layer_0", "norm"]
    assert list(params["decoder"]) == ["bias"]
    assert paramtree.count(params) == 11 * 8 + (8 * 8 + 8) + 2 * 8 + 11
    assert tied.uses["embed/embedding"] == ["embed/embedding", "decoder/kernel"]
    assert tied.uses["layer_0/kernel"] == [f"layer_{n}/kernel" for n in range(4)]
    assert variables["batch_stats"]["norm"]["mean"].shape == (8,)


def test_init_is_that_of_the_module(tied):
    own, whole = tied.init(KEY, TOKENS)["params"], Net().init(KEY, TOKENS)["params"]
    for path in ("embed", "layer_0", "norm"):
        jax.tree.map(np.testing.assert_array_equal, own[path], whole[path])


@pytest.mark.parametrize("jit", [False, True])
def test_tied_equals_its_untied_copy(tied, variables, jit):
    apply = jax.jit(tied.apply) if jit else tied.apply
    plain = tied.untie(variables)
    assert paramtree.count(plain["params"]) == paramtree.count(Net().init(KEY, TOKENS)["params"])
    np.testing.assert_allclose(apply(variables, TOKENS), Net().apply(plain, TOKENS), atol=1e-6, rtol=0)
    np.testing.assert_array_equal(plain["params"]["decoder"]["kernel"], variables["params"]["embed"]["embedding"].T)


def test_an_untied_copy_shares_no_buffer(tied, variables):
    leaves = jax.tree.leaves([tied.untie(variables)["params"], variables["params"]])
    addresses = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(addresses)) == len(addresses)


def test_gradients_are_sums_over_uses(tied, variables):
    stats = variables["batch_stats"]
    of_tied = jax.jit(jax.grad(lambda p: loss_of(tied, p, stats)))(variables["params"])
    of_each = jax.grad(lambda p: loss_of(Net(), p, stats))(tied.expand(variables["params"]))
    for name in ("kernel", "bias"):
        total = sum(of_each[f"layer_{n}"][name] for n in range(4))
        np.testing.assert_allclose(of_tied["layer_0"][name], total, atol=1e-6)
    total = of_each["embed"]["embedding"] + of_each["decoder"]["kernel"].T
    np.testing.assert_allclose(of_tied["embed"]["embedding"], total, atol=1e-6)
    np.testing.assert_allclose(of_tied["decoder"]["bias"], of_each["decoder"]["bias"], atol=1e-7)


def test_keys_may_come_by_stream(tied):
    keys = {"params": KEY, "dropout": jax.random.key(1)}
    jax.tree.map(np.testing.assert_array_equal, tied.init(keys, TOKENS), tied.init(KEY, TOKENS))


def test_collections_and_methods_pass_through(tied, variables):
    out, changed = tied.apply(variables, TOKENS, train=True, mutable=["batch_stats"])
    assert out.shape == (3, 5, 11)
    assert (changed["batch_stats"]["norm"]["mean"] != variables["batch_stats"]["norm"]["mean"]).any()
    np.testing.assert_array_equal(tied.apply(variables, TOKENS, method="embed_only"), TOKENS)


def test_a_checkpoint_holds_each_once(tmp_path):
    module = Net(width=256)
    tied = tie(module, TIES, TOKENS)
    params = random_like(tied.init(KEY, TOKENS)["params"])
    unique = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tied", params)
    written = sum(path.stat().st_size for path in (tmp_path / "tied").rglob("*") if path.is_file())
    assert unique / paramtree.count(params) == 4
    assert 0.5 * unique < written <= 1.05 * unique


def test_the_optimiser_sees_each_once(tied, variables):
    params = variables["params"]
    state = optax.adam(1e-3).init(params)
    assert paramtree.count((state[0].mu, state[0].nu)) == 2 * paramtree.count(params)


def test_groups_learn_at_their_own_rates(tied, variables):
    params = variables["params"]
    labels = tied.labels(params)
    assert labels["layer_0"] == {"kernel": "shared", "bias": "shared"}
    assert labels["decoder"] == {"bias": "private"}
    optimizer = optax.partition({"shared": optax.sgd(1e-3), "private": optax.sgd(1e-2)}, labels)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["layer_0"]["kernel"], -1e-3, rtol=1e-6)
    np.testing.assert_allclose(updates["decoder"]["bias"], -1e-2, rtol=1e-6)


class Pair(nn.Module):
    """A teacher and a narrower student."""

    @nn.compact
    def __call__(self, x):
        for name, width in (("teacher", 8), ("student", 6)):
            h = x
            for n in range(2):
                h = nn.tanh(nn.Conv(width, (3,), name=f"{name}_{n}")(h))
        return h


X = jax.random.normal(KEY, (2, 7, 3))


def test_a_part_is_the_sources_and_the_rest_its_own():
    first, inner = np.s_[..., 1:5], np.s_[:, :4, 2:6]
    tied = tie(
        Pair(),
        [
            Tie("student_0/kernel", "teacher_0/kernel", lambda w: 0.5 * w[..., :4], part=first),
            Tie("student_1/kernel", "teacher_1/kernel", lambda w: w[:, :4, :4], part=inner),
        ],
        X,
    )
    variables = tied.init(KEY, X)
    params, full, start = variables["params"], tied.expand(variables["params"]), Pair().init(KEY, X)["params"]
    assert {name: leaf.shape for name, leaf in params["student_0"]["kernel"].items()} == {"rest_2": (3, 3, 2)}
    shapes = {name: leaf.shape for name, leaf in params["student_1"]["kernel"].items()}
    assert shapes == {"rest_1": (3, 2, 6), "rest_2": (3, 4, 2)}
    assert paramtree.count(params) == paramtree.count(start) - 3 * 3 * 4 - 3 * 4 * 4
    for n, (part, scale) in enumerate(((first, 0.5), (inner, 1.0))):
        got, expected = full[f"student_{n}"]["kernel"], np.array(start[f"student_{n}"]["kernel"])
        expected[part] = scale * np.asarray(start[f"teacher_{n}"]["kernel"])[:, : expected[part].shape[1], :4]
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    out = tied.apply(variables, X)
    np.testing.assert_allclose(out, Pair().apply(tied.untie(variables), X), atol=1e-6)


def test_chains_lead_to_one_source():
    tied = tie(
        Net(), [Tie("layer_2/kernel", "layer_1/kernel", lambda w: 2 * w), Tie("layer_1/(.*)", r"layer_0/\1")], TOKENS
    )
    params = tied.init(KEY, TOKENS)["params"]
    assert tied.uses["layer_0/kernel"] == ["layer_0/kernel", "layer_1/kernel", "layer_2/kernel"]
    full = tied.expand(params)
    np.testing.assert_allclose(full["layer_2"]["kernel"], 2 * params["layer_0"]["kernel"])


@pytest.mark.parametrize("through", [LowRank(2), Scale(), ByEmbedding(3)], ids=lambda m: type(m).__name__)
def test_maps_start_at_the_source_and_learn(through):
    tied = tie(Net(), [Tie(r"layer_(\d)/(.*)", r"groups/\2", through)], TOKENS)
    variables = tied.init(KEY, TOKENS)
    params, whole = variables["params"], Net().init(KEY, TOKENS)["params"]
    full = tied.expand(params)
    for n in range(4):
        np.testing.assert_allclose(full[f"layer_{n}"]["kernel"], whole["layer_0"]["kernel"], rtol=1e-6)
    assert tied.uses["groups/kernel"] == [f"layer_{n}/kernel" for n in range(4)]
    grads = jax.grad(lambda p: loss_of(tied, p, variables["batch_stats"]))(params)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    moved = jax.tree.map(
        lambda p, g: p - 0.1 * g, moved, jax.grad(lambda p: loss_of(tied, p, variables["batch_stats"]))(moved)
    )
    full = tied.expand(moved)
    apart = [float(jnp.abs(full[f"layer_{n}"]["kernel"] - full["layer_0"]["kernel"]).max()) for n in range(1, 4)]
    assert min(apart) > 1e-6


def test_a_layer_embedding_scales_as_a_hypernetwork_does():
    z, theta = jax.random.normal(KEY, (3,)), jax.random.normal(jax.random.key(1), (5, 4))
    generator = jax.random.normal(jax.random.key(2), (4, 3))
    got = ByEmbedding(3).apply({"params": {"z": z}, "shared": {"generator": generator}}, theta)
    spec = paramtree.ParamSpec("w", (5, 4), np.dtype(np.float32))
    made = hypernet.Scale(leaves=(spec,)).apply(
        {"params": {f"{spec.name}.base": theta, f"{spec.name}.scale": generator}}, z
    )
    np.testing.assert_allclose(got, made["w"], rtol=1e-5)


def test_the_generator_of_embeddings_exists_once():
    tied = tie(Net(), [Tie(r"layer_(\d)/kernel", "groups/kernel", ByEmbedding(3))], TOKENS)
    params = tied.init(KEY, TOKENS)["params"]
    assert params["shared_maps"]["groups.kernel"]["generator"].shape == (8, 3)
    assert params["layer_2"]["kernel"]["map"]["z"].shape == (3,)
    z = [params[f"layer_{n}"]["kernel"]["map"]["z"] for n in range(4)]
    assert len({tuple(np.asarray(each).tolist()) for each in z}) == 4


def test_fit_takes_the_mean_and_what_is_left():
    whole = random_like(Net().init(KEY, TOKENS)["params"])
    strict = tie(Net(), [Tie(r"layer_[1-3]/(.*)", r"layer_0/\1")], TOKENS)
    mean = sum(whole[f"layer_{n}"]["kernel"] for n in range(4)) / 4
    np.testing.assert_allclose(strict.fit(whole)["layer_0"]["kernel"], mean, rtol=1e-6)
    exact = tie(Net(), [Tie(r"layer_(\d)/(.*)", r"groups/\2", LowRank(8))], TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), exact.expand(exact.fit(whole)), whole)
    errors = []
    for rank in (1, 3, 5):
        near = tie(Net(), [Tie(r"layer_(\d)/kernel", "groups/kernel", LowRank(rank))], TOKENS)
        made = near.expand(near.fit(whole))
        s = np.linalg.svd(np.asarray(whole["layer_1"]["kernel"] - mean), compute_uv=False)
        error = float(jnp.square(made["layer_1"]["kernel"] - whole["layer_1"]["kernel"]).sum())
        assert error == pytest.approx(float((s[rank:] ** 2).sum()), rel=1e-3)  # Eckart and Young
        errors.append(error)
    assert errors[0] > errors[1] > errors[2]


def test_scale_fits_by_least_squares():
    theta, factors = jax.random.normal(KEY, (5, 4)), jnp.arange(1.0, 5.0)
    np.testing.assert_allclose(Scale().fit(theta, theta * factors[None])["scale"], factors, rtol=1e-5)
    assert Scale().fit(jnp.zeros((2, 3)), jnp.ones((2, 3)))["scale"].tolist() == [1, 1, 1]


def test_half_precision_sums_gradients_in_float32():
    module = nn.Dense(64, dtype=jnp.bfloat16, use_bias=False)

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for n in range(8):
                x = module.clone(name=f"layer_{n}", parent=None)(x)
            return x

    class Stack(nn.Module):
        def setup(self):
            self.layers = [nn.Dense(64, dtype=jnp.bfloat16, use_bias=False, name=f"layer_{n}") for n in range(8)]

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    x = jax.random.normal(KEY, (4, 64))
    tied = tie(Stack(), [Tie(r"layer_[1-7]/(.*)", r"layer_0/\1")], x)
    params = tied.init(KEY, x)["params"]
    grads = jax.grad(lambda p: tied.apply({"params": p}, x).astype(jnp.float32).sum())(params)
    each = jax.grad(lambda p: Stack().apply({"params": p}, x).astype(jnp.float32).sum())(tied.expand(params))
    assert grads["layer_0"]["kernel"].dtype == jnp.float32
    total = sum(np.asarray(each[f"layer_{n}"]["kernel"], np.float64) for n in range(8))
    np.testing.assert_allclose(grads["layer_0"]["kernel"], total, rtol=1e-5, atol=1e-6)


BAD = {
    "fits no parameter": [Tie("layer_9/kernel", "layer_0/kernel")],
    "but its own source": [Tie("layer_0/kernel", "layer_0/kernel")],
    "no regular expression": [Tie("layer_[1-3/kernel", "layer_0/kernel")],
    "no regular expression: invalid group": [Tie("layer_1/kernel", r"layer_0/\1")],
    "layer_1/kernel is tied twice, to layer_0/kernel and to layer_2/kernel": [
        Tie("layer_1/kernel", "layer_0/kernel"),
        Tie("layer_1/kernel", "layer_2/kernel"),
    ],
    "in a circle: layer_0/bias -> layer_1/bias -> layer_0/bias": [
        Tie("layer_0/bias", "layer_1/bias"),
        Tie("layer_1/bias", "layer_0/bias"),
    ],
    r"decoder/kernel has shape \(8, 11\), but embed/embedding has shape \(11, 8\)": [
        Tie("decoder/kernel", "embed/embedding")
    ],
    r"what the map makes of layer_0/kernel has shape \(8, 4\)": [
        Tie("layer_1/kernel", "layer_0/kernel", lambda w: w[:, :4])
    ],
    "its map cannot be applied to layer_0/bias": [Tie("layer_1/bias", "layer_0/bias", lambda w: w @ jnp.ones((3, 3)))],
    "rank is 0": [Tie("layer_1/kernel", "layer_0/kernel", LowRank(0))],
    "expected slices within it": [Tie("layer_1/kernel", "layer_0/kernel", part=np.s_[:, :9])],
    "more axes than": [Tie("layer_1/bias", "layer_0/bias", part=np.s_[:, :4])],
    "in part has shape": [Tie("layer_1/kernel", "layer_0/kernel", part=np.s_[:, :4])],
    "layer_0/bias is in its way": [Tie("layer_1/bias", "layer_0/bias/new")],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_ties_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message) as error:
        tie(Net(), BAD[message], TOKENS)
    assert "\n" not in str(error.value)


def test_bad_parameters_are_refused_by_name(tied, variables):
    with pytest.raises(ValueError, match="lack embed/embedding"):
        tied.expand({name: part for name, part in variables["params"].items() if name != "embed"})
    with pytest.raises(ValueError, match=r"layer_1/\w+ is tied and has a value of its own"):
        tied.expand(tied.untie(variables)["params"])
    with pytest.raises(ValueError, match=r"decoder/kernel has shape \(8, 11\), and the parameters have nothing"):
        tied.fit(variables["params"])
    new = tie(Net(), [Tie("layer_[01]/kernel", "new", lambda w: 1 * w)], TOKENS)
    with pytest.raises(ValueError, match="new is new"):
        new.init(KEY, TOKENS)
