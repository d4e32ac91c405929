"""Compaction: the compact network computes what the network with its gates computes, and is what is left of it."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.budget import flops
from hyperjax.routing.compact import compact, lost_tasks
from hyperjax.routing.gates import HardConcrete
from hyperjax.routing.snr import SNR, connection_sizes, normalise
from hyperjax.routing.tasks import Binary, MultiClass, Regression

TASKS = {"b": Binary(), "a": MultiClass(3), "c": Regression(2)}  # not in alphabetical order, on purpose
NETWORKS = {  # levels with "trans", levels with "aver", towers
    "ragged": (
        ((2, (3, 1), 2), (2, (1, 2)), (3, 2)),
        ((2, (3, 2)), ((1, 2), 2, 2), (1, 1)),
        {"b": (2,), "a": (), "c": (2, 1)},
    ),
    "even": (((2, 2), (2, 2), (2, 2)), ((2, 2), (2, 2), (2, 2)), {"b": (2,), "a": (2,), "c": (2,)}),
    "single": ((((2, 3), 1),), (((2, 3), 3),), {"b": (), "a": (3,), "c": ()}),
}
OPEN, SHUT = 9.0, -9.0
X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def built(name="ragged", connection="trans", per="connection", levels=None, **kw):
    trans, aver, towers = NETWORKS[name]
    levels = levels or (trans if connection == "trans" else aver)
    return SNR(levels, TASKS, towers, connection=connection, per=per, **kw)


def variables_of(model, seed=0, log_alpha=None):
    """Random values of every parameter; biases that mostly keep units alive; gates random or all of one value."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), X))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape)
        if path[-1].key == "log_alpha":
            value = 3 * value if log_alpha is None else np.full(leaf.shape, log_alpha)
        return (np.abs(value) if path[-1].key == "bias" else value).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def alive_variables(model):
    """Random variables of a seed that loses no task, and the number of the seed."""
    for seed in range(100):
        variables = variables_of(model, seed)
        if not lost_tasks(model, variables):
            yield seed, variables


def shut(variables, level, *index):
    """Shuts gates, in place."""
    variables["params"][level]["log_alpha"][index] = SHUT


def same(model, variables, small, x=X, tolerance=1e-6):
    """Compares outputs, relative to their scale."""
    wanted, _ = model.apply(variables, x)
    found, nothing = small.model.apply(small.variables, x)
    assert nothing == {}
    assert list(found) == list(wanted)
    for name, y in wanted.items():
        assert found[name].shape == y.shape
        assert found[name].dtype == y.dtype
        scale = max(1.0, float(np.abs(y).max()))
        np.testing.assert_allclose(found[name], y, rtol=0, atol=tolerance * scale)
    return wanted


def count(model, variables):
    """Counts by walking the graph: open connections on a way from input to task, sub-networks on one, their weights."""
    levels, tasks = normalise(model.levels), sorted(model.tasks)
    streams = range(len(tasks)) if model.per == "task" else [None]
    edges, nodes, blocks, gates = set(), set(), set(), 0
    for stream in streams:
        opened = collections.defaultdict(list)  # (level, i) -> what it reads
        for number, name in enumerate(connection_sizes(model), 1):
            log_alpha = variables["params"][name]["log_alpha"]
            log_alpha = log_alpha[stream] if log_alpha.ndim == 3 else log_alpha
            z = np.clip(1.2 / (1 + np.exp(-log_alpha)) - 0.1, 0, 1)
            for i, j in np.argwhere(z > 0):
                opened[number, int(i)].append((number - 1, int(j)))

        def grounded(node, opened=opened):
            return node[0] == 0 or any(grounded(below) for below in opened[node])

        todo = [(len(levels), t) for t in range(len(tasks)) if stream in (None, t)]
        seen = set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            for below in opened[node]:
                if grounded(below):
                    edges.add((stream, node, below))
                    blocks.add((node, below))
                    todo.append(below)
        nodes |= seen
    first = {number: [sub[0] for sub in level] for number, level in enumerate(levels)}
    first[len(levels)] = [([*model.towers[name], model.tasks[name].outputs])[0] for name in tasks]
    params, own = 0, [name for name in variables["params"] if name.startswith("tower_")]
    for number, i in nodes:
        if number < len(levels):
            own += [name for name in variables["params"] if name.startswith(f"level_{number}_sub_{i}_")]
        if number == 0:
            params += first[0][i] * (X.shape[1] + 1)
        elif model.connection == "trans":
            params += first[number][i]
    if model.connection == "trans":
        params += sum(first[above[0]][above[1]] * levels[below[0]][below[1]][-1] for above, below in blocks)
        gates = sum(above[0] < len(levels) for _, above, _ in edges) if model.per == "task" else 0
    else:
        gates = len(edges)
    params += gates + sum(leaf.size for name in own for leaf in jax.tree.leaves(variables["params"][name]))
    return len(edges), len({node for node in nodes if node[0] < len(levels)}), params


def spec(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def shifts_of(small):
    found = jax.tree_util.tree_leaves_with_path(small.variables)
    return sum(leaf.size for path, leaf in found if path[-1].key.endswith("_shift"))


@pytest.mark.parametrize("per", ["connection", "task"])
@pytest.mark.parametrize("connection", ["trans", "aver"])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_the_same_and_counts_what_is_left(name, connection, per):
    model = built(name, connection, per)
    alive, varies = alive_variables(model), 0
    for _ in range(2):
        _, variables = next(alive)
        small = compact(model, variables)
        outputs = same(model, variables, small)
        varies += sum(float(np.std(y, 0).max()) > 1e-3 for y in outputs.values())
        edges, nodes, params = count(model, variables)
        sizes = {level: counts.size for level, counts in connection_sizes(model).items()}
        total = (len(TASKS) if per == "task" else 1) * (sum(sizes.values()) - sizes["towers"]) + sizes["towers"]
        assert small.connections == (total, edges)
        assert small.subnetworks == (sum(map(len, model.levels)), nodes)
        folded = total if connection == "trans" and per == "connection" else 0
        before = sum(leaf.size for leaf in jax.tree.leaves(variables)) - folded
        assert small.params == (before, params + shifts_of(small))
        assert params <= before
        assert per == "task" or not shifts_of(small)
        empty = jax.eval_shape(lambda model=small.model: model.init(jax.random.key(0), X))
        assert spec(empty) == spec(small.variables)
    assert varies >= 3


@pytest.mark.parametrize(("connection", "per"), [("trans", "task"), ("aver", "connection")])
def test_double_precision_agrees_to_ten_digits(connection, per):
    model = built("ragged", connection, per)
    _, variables = next(alive_variables(model))
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        small = compact(model, double)
        assert {leaf.dtype for leaf in jax.tree.leaves(small.variables)} == {jnp.dtype(jnp.float64)}
        same(model, double, small, X.astype(np.float64) * 100, 1e-10)


@pytest.mark.parametrize("connection", ["trans", "aver"])
def test_jit_any_batch_and_any_input(connection):
    model = built("ragged", connection)
    _, variables = next(alive_variables(model))
    small = compact(model, variables)
    x = np.concatenate([1e3 * X, 0 * X, 1e-3 * X, X])
    wanted = same(model, variables, small, x)
    found = jax.jit(small.model.apply)(small.variables, x)[0]
    for name, y in wanted.items():
        np.testing.assert_allclose(found[name], y, rtol=1e-5, atol=1e-6 * float(np.abs(y).max()))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), variables, next(alive_variables(model))[1])


@pytest.mark.parametrize("connection", ["trans", "aver"])
@pytest.mark.parametrize("per", ["connection", "task"])
def test_with_all_gates_at_one_it_removes_nothing(connection, per):
    model = built("ragged", connection, per)
    variables = variables_of(model, log_alpha=OPEN)
    small = compact(model, variables)
    outputs = same(model, variables, small)
    assert small.connections[0] == small.connections[1]
    assert small.subnetworks == (sum(map(len, model.levels)),) * 2
    if per == "connection":
        assert small.params[0] == small.params[1]
        params = {k: {n: leaf for n, leaf in v.items() if n != "log_alpha"} for k, v in variables["params"].items()}
        plain = {"params": {name: leaves for name, leaves in params.items() if leaves}}
        ungated, _ = built("ragged", connection, gates=None).apply(plain, X)
        for name, y in ungated.items():
            np.testing.assert_allclose(outputs[name], y, rtol=1e-5, atol=1e-5)


CHAIN = ((2, 2), (2, 2), (2, 2), (2, 2))


@pytest.mark.parametrize("connection", ["trans", "aver"])
@pytest.mark.parametrize("per", ["connection", "task"])
def test_a_chain_of_dead_subnetworks_folds_into_biases(connection, per):
    model = built(connection=connection, per=per, levels=CHAIN)
    variables = variables_of(model, log_alpha=1.0)
    every = () if per == "connection" else (slice(None),)
    shut(variables, "level_1", *every, 0)  # sub-network 0 reads nothing
    shut(variables, "level_2", *every, 1, 1)  # reads the dead one alone
    shut(variables, "level_3", *every, 0, 0)  # 0 reads the dead one alone, 1 reads both
    small = compact(model, variables)
    before = same(model, variables, small)
    assert small.subnetworks == (8, 5)
    kept = {name[: len("level_0_sub_0")] for name in small.variables["params"] if "_sub_" in name}
    if connection == "aver":
        assert kept == {f"level_{at}" for at in ("1_sub_1", "2_sub_0", "3_sub_1")}
    moved = jax.tree.map(np.copy, variables)
    moved["params"]["level_1" if connection == "trans" else "level_1_sub_0_layer_0"]["bias"][:2] += 1.0
    after = same(model, moved, compact(model, moved))
    assert max(np.abs(after[name] - y).max() for name, y in before.items()) > 1e-2  # the constant matters


def test_subnetworks_that_nothing_reads_are_gone():
    model = built(levels=CHAIN)
    variables = variables_of(model, log_alpha=OPEN)
    shut(variables, "towers", slice(None), 1)
    shut(variables, "level_3", 0, 0)  # so of level 2, 1 is read by 0, and 0 by 1, which no tower reads
    small = compact(model, variables)
    same(model, variables, small)
    assert small.subnetworks == (8, 6)
    assert small.connections == (18, 3 + 1 + 2 + 4)


def test_dead_subnetworks_of_one_task_only():
    model = built(connection="trans", per="task", levels=((2, 2), (2, 2), (2, 2)))
    variables = variables_of(model, log_alpha=1.0)
    shut(variables, "level_1", 1, 0)  # in the network of the second task
    small = compact(model, variables)
    same(model, variables, small)
    assert small.subnetworks == (6, 6)
    assert small.connections == (30, 30 - 2 - 2)
    assert shifts_of(small) == 4


@pytest.mark.parametrize("connection", ["trans", "aver"])
def test_many_readers_of_a_constant_cost_nothing(connection):
    model = built("even", connection, levels=((2,), (2, 2), (2,) * 12))
    variables = variables_of(model, log_alpha=1.0)
    shut(variables, "level_1", 0)
    small = compact(model, variables)
    assert small.params[1] < small.params[0]
    assert not shifts_of(small)


@pytest.mark.parametrize("connection", ["trans", "aver"])
@pytest.mark.parametrize("per", ["connection", "task"])
def test_fewer_operations(connection, per):
    model = built("even", connection, per)
    variables = variables_of(model, log_alpha=1.0)
    every = () if per == "connection" else (slice(None),)
    shut(variables, "level_1", *every, 1)
    shut(variables, "level_2", *every, 0, 1)
    small = compact(model, variables)
    before, after = flops(model.apply, variables, X), flops(small.model.apply, small.variables, X)
    assert after < before
    if connection == "trans" and per == "connection":  # level 0; 4 x 2; 2 x 2 twice; 4 x 2 of each tower; the towers
        assert after == 2 * len(X) * (3 * 4 + 4 * 2 + 2 * 4 + 3 * 4 * 2 + 2 * (1 + 3 + 2))


@pytest.mark.parametrize("per", ["connection", "task"])
def test_transforms_that_sort_dicts_leave_tasks_with_their_own_gates(per):
    model = built("even", per=per)
    _, variables = next(alive_variables(model))
    small = compact(model, variables)
    names = set(type(small.model).__dataclass_fields__) - {"parent", "name"}
    fields = {name: getattr(small.model, name) for name in names}
    wanted, _ = model.apply(variables, X)
    again = nn.remat(SNR)(model.levels, model.tasks, model.towers, per=per).apply(variables, X)[0]
    smaller = nn.remat(type(small.model))(**fields).apply(small.variables, X)[0]
    reordered = SNR(model.levels, dict(sorted(TASKS.items())), model.towers, per=per).apply(variables, X)[0]
    for found in (again, smaller, reordered):
        for name, y in wanted.items():
            np.testing.assert_allclose(found[name], y, rtol=1e-5, atol=1e-5)


def test_other_settings_of_the_gates_count():
    model = built("even", gates=HardConcrete(0.5, -1.0, 2.0))
    variables = variables_of(model, log_alpha=-0.6)  # sigmoid 0.354: z-hat is 0.06, and with -0.1 and 1.1 would be 0.33
    assert compact(model, variables).connections == (14, 14)
    same(model, variables, compact(model, variables))
    shut(variables, "towers", 0, 0)
    variables["params"]["towers"]["log_alpha"][0, 0] = -0.8  # sigmoid 0.31: 0 here, 0.27 there
    assert compact(model, variables).connections == (14, 13)
    same(model, variables, compact(model, variables))
