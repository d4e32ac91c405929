"""The SNR network against loops in NumPy, its gates, its sizes and penalty, and the bugs of public SNR code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from hyperjax.routing.gates import Connection, HardConcrete
from hyperjax.routing.snr import SNR, connection_sizes, normalise, reader_widths, served_gates
from hyperjax.routing.tasks import Binary, MultiClass, Regression

TASKS = {"b": Binary(), "a": MultiClass(3), "c": Regression(2)}  # not in alphabetical order, on purpose
TOWERS = {"b": (4,), "a": (), "c": (2, 3)}
TRANS = ((2, (3, 1), 2), (2, (1, 2)))
AVER = (((3, 2), 2), (2, (1, 2), 2))
TWO = (2, 2), (1, 2)
B, T = 3, 3
X = np.random.default_rng(0).normal(size=(B, 4)).astype(np.float32)
KEY = jax.random.key(5)
PER, (BETA, GAMMA, ZETA) = ["connection", "task", "sample"], (2 / 3, -0.1, 1.1)


def variables_of(model, seed=0):
    """Random values of every parameter, biases and log alphas too, so that none hides behind its start."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), X))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = 1.5 if path[-1].key == "log_alpha" else 0.7
        return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def built(kind="trans", per="connection", levels=None, **kw):
    towers = kw.pop("towers", TOWERS)
    return SNR(levels or (TRANS if kind == "trans" else AVER), TASKS, towers, connection=kind, per=per, **kw)


def dense(p, v):
    return v @ p["kernel"] + p["bias"]


def cut(p, widths_below, widths, i, j):
    """W_ij out of the kernel of a level."""
    down, right = sum(widths_below[:j]), sum(widths[:i])
    return p["kernel"][down : down + widths_below[j], right : right + widths[i]]


def by_loops(model, params, x, z, task, row):
    """A task's output for one sample: v_i = sum_j z_ij W_ij u_j, and what every sub-network puts out."""

    def gate(level, i, j):
        z_ij = np.asarray(z[level])
        return (z_ij[row] if model.per == "sample" else z_ij[task] if z_ij.ndim == 3 else z_ij)[i, j]

    def reads(level, i, first, u):
        total = 0.0
        for j, u_j in enumerate(u):
            if model.connection == "trans":
                u_j = u_j @ cut(params[level], [len(one) for one in u], first, i, j)
            total = total + gate(level, i, j) * u_j
        if model.connection == "aver":
            return total
        at = sum(first[:i])
        return total + params[level]["bias"][at : at + first[i]]

    def finish(name, u, start, widths):
        for layer in range(start, len(widths)):
            u = np.maximum(dense(params[f"{name}_layer_{layer}"], u), 0)
        return u

    levels = normalise(model.levels)
    first = [widths[0] for widths in levels[0]]
    ends = np.cumsum(first)
    u = [np.maximum(dense(params["level_0"], x), 0)[end - width : end] for width, end in zip(first, ends, strict=True)]
    u = [finish(f"level_0_sub_{i}", u_i, 1, levels[0][i]) for i, u_i in enumerate(u)]
    features = [np.concatenate(u)]
    for number, level in enumerate(levels[1:], 1):
        name, first = f"level_{number}", [widths[0] for widths in level]
        v = [reads(name, i, first, u) for i in range(len(level))]
        if model.connection == "trans":
            v = [np.maximum(v_i, 0) for v_i in v]
        start = 1 if model.connection == "trans" else 0
        u = [finish(f"{name}_sub_{i}", v_i, start, level[i]) for i, v_i in enumerate(v)]
        features.append(np.concatenate(u))
    names = sorted(model.tasks)
    name, kind = names[task], model.tasks[names[task]]
    v = reads("towers", task, [([*model.towers[n], model.tasks[n].outputs])[0] for n in names], u)
    if model.connection == "trans":
        if not model.towers[name]:
            return v.reshape(kind.shape), features
        v = np.maximum(v, 0)
    tower = params[f"tower_{name}"]
    for layer in range(len(tower) - 1):
        v = np.maximum(dense(tower[f"layer_{layer}"], v), 0)
    return dense(tower["output"], v).reshape(kind.shape), features


@pytest.mark.parametrize("key", [None, KEY], ids=["served", "sampled"])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("kind", ["trans", "aver"])
def test_the_network_is_the_paper_s_formula(kind, per, key):
    model = built(kind, per)
    variables = variables_of(model)
    outputs, info = model.apply(variables, X, key)
    assert list(outputs) == sorted(TASKS)
    for z, a in zip(info["gates"].values(), info["log_alpha"].values(), strict=True):
        served = np.clip(special.expit(a) * (ZETA - GAMMA) + GAMMA, 0, 1)
        assert np.allclose(z, served, atol=1e-6) == (key is None)
    for task, name in enumerate(sorted(TASKS)):
        assert outputs[name].shape == (B, *TASKS[name].shape)
        for row in range(B):
            wanted, features = by_loops(model, variables["params"], X[row], info["gates"], task, row)
            np.testing.assert_allclose(outputs[name][row], wanted, rtol=2e-5, atol=2e-6)
            for number, level in enumerate(features):
                found = info["features"][f"level_{number}"]
                found = found[task] if found.ndim == 3 else found
                np.testing.assert_allclose(found[row], level, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["trans", "aver"])
def test_a_single_level_and_no_gates(kind):
    levels = ((2, (3, 2)),)
    model, plain = built(kind, levels=levels), built(kind, levels=levels, gates=None)
    variables = variables_of(model)
    del variables["params"]["towers"]["log_alpha"]
    if kind == "aver":
        del variables["params"]["towers"]
    assert jax.tree.structure(variables) == jax.tree.structure(variables_of(plain))
    outputs, info = plain.apply(variables, X, KEY)
    assert set(info) == {"gates", "log_alpha", "features"}
    assert not info["gates"]
    for task, name in enumerate(sorted(TASKS)):
        wanted, _ = by_loops(plain, variables["params"], X[1], {"towers": np.ones((T, 2))}, task, 1)
        np.testing.assert_allclose(outputs[name][1], wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("kind", "per"), [("trans", "connection"), ("aver", "task")])
def test_jit_and_vmap_over_keys_change_nothing(kind, per):
    model = built(kind, per)
    variables, keys = variables_of(model), jax.random.split(KEY, 2)
    plain = [model.apply(variables, X, key) for key in keys]
    together = jax.jit(jax.vmap(lambda key: model.apply(variables, X, key)))(keys)
    for n, alone in enumerate(plain):
        jax.tree.map(lambda a, b, n=n: np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-6), together, alone)
    assert not np.allclose(together[0]["a"][0], together[0]["a"][1])


def test_settings_may_be_traced():
    variables, settings = variables_of(built(levels=TWO, towers=())), ((0.5, -1.0, 2.0), (0.9, -0.1, 1.1))

    def run(numbers):
        model = built(levels=TWO, towers=(), gates=HardConcrete(*numbers, open=0.5))
        outputs, info = model.apply(variables, X, KEY)
        return outputs, info["gates"], info["l0"], model.init(KEY, X)["params"]["towers"]["log_alpha"]

    together = jax.jit(jax.vmap(run))(jnp.array(settings))
    for n, numbers in enumerate(settings):
        alone = jax.jit(lambda numbers=numbers: run(numbers))()
        jax.tree.map(lambda a, b, n=n: np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-6), together, alone)


@pytest.mark.parametrize("per", ["connection", "task"])
def test_one_sample_of_u_for_the_whole_batch(per):
    model = built(per=per)
    variables = variables_of(model)
    together, info = model.apply(variables, X, KEY)
    for row in range(B):
        alone, again = model.apply(variables, X[row : row + 1], KEY)
        jax.tree.map(np.testing.assert_array_equal, info["gates"], again["gates"])
        for name, answer in alone.items():
            np.testing.assert_allclose(answer[0], together[name][row], rtol=2e-5, atol=2e-6)


def test_each_level_and_step_has_its_own_sample():
    model = built("aver", levels=((2, 2), (2, 2), (2, 2)), towers=(2,))
    variables = jax.tree.map(np.zeros_like, variables_of(model))  # all log alphas are equal
    one = model.apply(variables, X, KEY)[1]["gates"]
    assert not np.array_equal(one["level_1"], one["level_2"])
    again, other = (model.apply(variables, X, key)[1]["gates"] for key in (KEY, jax.random.fold_in(KEY, 1)))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert all(not np.array_equal(one[level], other[level]) for level in one)


def test_gates_per_task_belong_to_their_task_alone():
    model = built(per="task", levels=TWO, towers=())
    variables = variables_of(model)
    params = variables["params"]

    @jax.jit
    @jax.jacrev
    def by_alpha(log_alpha):
        level = params["level_1"] | {"log_alpha": log_alpha}
        outputs, _ = model.apply({"params": params | {"level_1": level}}, X)
        return {name: (y**2).sum() for name, y in outputs.items()}

    found = by_alpha(np.zeros((T, 2, 2), np.float32))
    for task, name in enumerate(sorted(TASKS)):
        assert np.any(found[name][task] != 0)
        assert np.all(np.delete(found[name], task, 0) == 0)


@pytest.mark.parametrize("key", [None, KEY], ids=["served", "sampled"])
def test_gates_per_sample_depend_on_the_sample_alone(key):
    model = built(per="sample", levels=TWO, towers=(), router=(3,))
    variables = variables_of(model)
    _, info = model.apply(variables, X, key)
    for z in info["gates"].values():
        assert len(np.unique(np.asarray(z), axis=0)) == B
    moved = X.copy()
    moved[1] += 1
    _, changed = model.apply(variables, moved, key)
    for level, z in info["gates"].items():
        same = (np.asarray(z) == np.asarray(changed["gates"][level])).all((1, 2))
        assert same.tolist() == [True, False, True]


def probability(a):
    return special.expit(np.asarray(a, float) - BETA * np.log(-GAMMA / ZETA))


@pytest.mark.parametrize("kind", ["trans", "aver"])
@pytest.mark.parametrize("per", PER)
def test_l0_and_shares_by_hand(kind, per):
    model = built(kind, per)
    variables = variables_of(model, 3)
    _, info = model.apply(variables, X)
    l0 = expected = served = total = 0.0
    first = {"level_1": [w[0] for w in normalise(model.levels)[1]], "towers": [3, 4, 2]}
    below = [[w[-1] for w in level] for level in normalise(model.levels)]
    for (name, readers), sources in zip(first.items(), below, strict=True):
        assert reader_widths(model)[name] == readers
        for at, a in np.ndenumerate(info["log_alpha"][name]):
            weights = readers[at[-2]] * sources[at[-1]] if kind == "trans" else 1
            assert connection_sizes(model)[name][at[-2:]] == weights
            l0 += probability(a) / (B if per == "sample" else 1)
            expected += probability(a) * weights
            served += weights * (special.expit(a) * 1.2 > 0.1)
            total += weights
    wanted = {"l0": l0, "expected_share": expected / total, "served_share": served / total}
    for name, value in wanted.items():
        np.testing.assert_allclose(info[name], value, rtol=1e-5)
    assert 0 < wanted["served_share"] < 1
    if per != "sample":
        jax.tree.map(np.testing.assert_array_equal, served_gates(model, variables), info["gates"])


def check_l0_is_the_closed_form(model):
    """The penalty has a gradient to every log alpha, p(1 - p), also through a loss it is added to."""
    variables = variables_of(model)
    by_params = jax.jit(jax.grad(lambda v: model.apply(v, X, KEY)[1]["l0"]))(variables)["params"]
    for name in ("level_1", "towers"):
        p = probability(variables["params"][name]["log_alpha"])
        np.testing.assert_allclose(by_params[name]["log_alpha"], p * (1 - p), rtol=1e-4)

    @jax.jit
    @jax.grad
    def by_loss(variables, weight):
        outputs, info = model.apply(variables, X, KEY)
        return (outputs["a"] ** 2).mean() + weight * info["l0"]

    with_, without = (by_loss(variables, weight)["params"] for weight in (0.5, 0.0))
    gap = jax.tree.map(lambda a, b: a - b, with_, without)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.5 * b, rtol=1e-3, atol=1e-5), gap, by_params)


@pytest.mark.parametrize("per", ["connection", "task"])
def test_bug_l0_a_hard_count_or_never_added(per, monkeypatch):
    model = built(per=per, levels=TWO, towers=())
    check_l0_is_the_closed_form(model)
    monkeypatch.setattr(HardConcrete, "l0", lambda self, a: (self.deterministic(a) > 0).astype(a.dtype))
    with pytest.raises(AssertionError):
        check_l0_is_the_closed_form(model)


def check_every_block_learns():
    """Every W_ij is a parameter: it has a gradient, and a step of the optimiser moves it."""
    model = built(levels=((2, 1), (1, 2), (2, 1)), towers=())
    variables = variables_of(model)
    variables, x = jax.tree.map(lambda leaf: np.abs(leaf) + 0.1, variables), np.abs(X)  # no ReLU is shut
    by_params = jax.jit(jax.grad(lambda v: sum(y.sum() for y in model.apply(v, x)[0].values())))(variables)
    optimiser = optax.adam(0.1)
    moved = optax.apply_updates(variables, optimiser.update(by_params, optimiser.init(variables))[0])["params"]
    below = [[2, 1], [1, 2], [2, 1]]
    for (name, first), sources in zip(reader_widths(model).items(), below, strict=True):
        for i, j in np.ndindex(len(first), len(sources)):
            assert np.all(cut(by_params["params"][name], sources, first, i, j) != 0), (name, i, j)
            gap = cut(moved[name], sources, first, i, j) - cut(variables["params"][name], sources, first, i, j)
            assert np.all(np.abs(gap) > 0.05), (name, i, j)


def test_bug_blocks_not_registered_as_parameters(monkeypatch):
    check_every_block_learns()
    trans = Connection._trans
    monkeypatch.setattr(Connection, "_trans", lambda self, u, z: jax.tree.map(jax.lax.stop_gradient, trans(self, u, z)))
    with pytest.raises(AssertionError):
        check_every_block_learns()
