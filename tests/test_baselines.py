"""The baselines against loops in NumPy, against each other where they coincide, and what their gradients touch."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.budget import count_parameters
from hyperjax.routing.baselines import PLE, CrossStitch, MMoE, MultiLevelMMoE, SharedBottom, SingleTask
from hyperjax.routing.tasks import Binary, MultiClass, Regression, task_losses

TASKS = {"b": Binary(), "a": MultiClass(3), "c": Regression(2)}  # not in alphabetical order, on purpose
TOWERS = {"b": (4,), "a": (), "c": (5, 3)}
B, D, T = 6, 4, 3
X = np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)
LABELS = {"b": np.array([0, 1] * 3), "a": np.array([0, 1, 2] * 2), "c": np.ones((B, 2), np.float32)}
MODELS = [
    SingleTask((5, 3), tasks=TASKS, towers=TOWERS),
    SharedBottom((5, 3), tasks=TASKS, towers=TOWERS),
    CrossStitch((5, 3), tasks=TASKS, towers=TOWERS),
    MMoE(4, (5, 3), tasks=TASKS, towers=TOWERS),
    MultiLevelMMoE(((4, 5, 6), (2, 3), (3, 2)), tasks=TASKS, towers=TOWERS),
    PLE(((2, 1, 5, 6), (1, 2, 3), (3, 2, 2)), tasks=TASKS, towers=TOWERS),
    PLE(((2, 3, 4),), tasks=TASKS, towers=TOWERS),
]
NAMES = ["single", "shared", "stitch", "mmoe", "multi", "ple", "cgc"]
each = pytest.mark.parametrize("model", MODELS, ids=NAMES)


def variables_of(model, seed=0):
    """Random values of every parameter, biases and stitches too, so that none hides behind its start."""
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), X)
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: (0.7 * draw(size=leaf.shape)).astype(np.float32), shapes)


@functools.cache
def compiled(n):
    """MODELS[n], compiled once for all tests."""
    return jax.jit(MODELS[n].apply)


def mlp(group, index, v):
    """One expert on one sample."""
    for layer in range(len(group) // 2):
        v = np.maximum(v @ group[f"kernel_{layer}"][index] + group[f"bias_{layer}"][index, 0], 0)
    return v


def chosen(group, index, reads, candidates):
    """One softmax gate on one sample, and the candidates it weighs."""
    odds = np.exp(reads @ group["kernel"][index])
    return sum(odd / odds.sum() * candidate for odd, candidate in zip(odds, candidates, strict=True))


def tower(group, v):
    for layer in range(len(group) - 1):
        v = np.maximum(v @ group[f"layer_{layer}"]["kernel"] + group[f"layer_{layer}"]["bias"], 0)
    return v @ group["output"]["kernel"] + group["output"]["bias"]


def mixtures_of(model, p, x):
    """What each tower reads for one sample, from the equations."""
    if isinstance(model, SingleTask):
        return [mlp(p["bottom"], t, x) for t in range(T)]
    if isinstance(model, SharedBottom):
        return [mlp(p["bottom"], 0, x)] * T
    if isinstance(model, CrossStitch):
        columns = [x] * T
        for l in range(len(model.levels)):
            own = [mlp(p[f"columns_{l}"], t, columns[t]) for t in range(T)]
            columns = [sum(p[f"stitch_{l}"][t, s] * own[s] for s in range(T)) for t in range(T)]
        return columns
    if isinstance(model, MMoE):
        experts = [mlp(p["experts"], e, x) for e in range(model.experts)]
        return [chosen(p["gates"], t, x, experts) for t in range(T)]
    if isinstance(model, MultiLevelMMoE):
        inputs = [x] * model.levels[0][0]
        for l, (number, *_) in enumerate(model.levels):
            experts = [mlp(p[f"experts_{l}"], e, inputs[e]) for e in range(number)]
            readers = model.levels[l + 1][0] if l + 1 < len(model.levels) else T
            inputs = [chosen(p[f"gates_{l}"], r, x, experts) for r in range(readers)]
        return inputs
    reads, shared_read = [x] * T, x
    for l, (shared, private, *_) in enumerate(model.levels):
        own = [[mlp(p[f"private_{l}"], t * private + i, reads[t]) for i in range(private)] for t in range(T)]
        common = [mlp(p[f"shared_{l}"], i, shared_read) for i in range(shared)]
        reads = [chosen(p[f"gates_{l}"], t, reads[t], own[t] + common) for t in range(T)]
        if l + 1 < len(model.levels):
            shared_read = chosen(p[f"shared_gate_{l}"], 0, shared_read, [*itertools.chain(*own), *common])
    return reads


@each
def test_equals_loops_in_numpy(model):
    variables = variables_of(model)
    outputs, info = model.apply(variables, X, key=jax.random.key(3))
    jitted, _ = compiled(MODELS.index(model))(variables, X)
    params = variables["params"]
    mixtures = [mixtures_of(model, params, x) for x in X]
    assert set(outputs) == set(TASKS)
    for t, (name, task) in enumerate(sorted(TASKS.items())):
        assert outputs[name].shape == (B, *task.shape)
        wanted = np.stack([tower(params[f"tower_{name}"], rows[t]) for rows in mixtures])
        np.testing.assert_allclose(info["mixtures"][name], [rows[t] for rows in mixtures], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(outputs[name].reshape(B, -1), wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(jitted[name], outputs[name], rtol=1e-5, atol=1e-6)


def test_parameter_counts_follow_the_formulas():
    towers = {"b": 0, "a": 0, "c": 0}

    def towers_on(width):
        towers["b"] = (width * 4 + 4) + (4 * 1 + 1)
        towers["a"] = width * 3 + 3
        towers["c"] = (width * 5 + 5) + (5 * 3 + 3) + (3 * 2 + 2)
        return sum(towers.values())

    bottom = (D * 5 + 5) + (5 * 3 + 3)
    counts = {name: count_parameters(model, X) for name, model in zip(NAMES, MODELS, strict=True)}
    assert counts == {
        "single": T * bottom + towers_on(3),
        "shared": bottom + towers_on(3),
        "stitch": T * bottom + 2 * T * T + towers_on(3),
        "mmoe": 4 * bottom + T * D * 4 + towers_on(3),
        "multi": 4 * (D * 5 + 5 + 5 * 6 + 6) + 2 * (6 * 3 + 3) + 3 * (3 * 2 + 2)
        + 2 * D * 4 + 3 * D * 2 + T * D * 3 + towers_on(2),
        "ple": (2 + T) * (D * 5 + 5 + 5 * 6 + 6) + (1 + 2 * T) * (6 * 3 + 3) + (3 + 2 * T) * (3 * 2 + 2)
        + T * (D * 3 + 6 * 3 + 3 * 5) + D * (2 + T) + 6 * (1 + 2 * T) + towers_on(2),
        "cgc": (2 + 3 * T) * (D * 4 + 4) + T * D * 5 + towers_on(4),
    }  # fmt: skip


@each
def test_info_holds_gates_that_sum_to_one(model):
    _, info = compiled(MODELS.index(model))(variables_of(model), X)
    gates = jax.tree.leaves([info.get("gates"), info.get("shared_gates")])
    assert bool(gates) == isinstance(model, (MMoE, MultiLevelMMoE, PLE))
    for gate in gates:
        assert gate.dtype == jnp.float32
        np.testing.assert_allclose(gate.sum(-1), 1, rtol=1e-6)
        assert gate.std() > 0.01
    assert set(info["mixtures"]) == set(TASKS)


def test_info_shapes_by_level():
    _, info = jax.eval_shape(MODELS[4].apply, variables_of(MODELS[4]), X)
    shapes = jax.tree.map(lambda leaf: leaf.shape, {name: info[name] for name in ("experts", "gates")})
    assert shapes == {
        "experts": {"level_0": (4, B, 6), "level_1": (2, B, 3), "level_2": (3, B, 2)},
        "gates": {"level_1": (2, B, 4), "level_2": (3, B, 2), "towers": dict.fromkeys(TASKS, (B, 3))},
    }
    _, info = jax.eval_shape(MODELS[5].apply, variables_of(MODELS[5]), X)
    shapes = jax.tree.map(lambda leaf: leaf.shape, {name: info[name] for name in info if name != "mixtures"})
    assert shapes == {
        "experts": {"level_0": (5, B, 6), "level_1": (7, B, 3), "level_2": (9, B, 2)},
        "gates": {
            level: dict.fromkeys(TASKS, (B, choices))
            for level, choices in (("level_1", 3), ("level_2", 3), ("towers", 5))
        },
        "shared_gates": {"level_1": (B, 5), "level_2": (B, 7)},
    }


def test_half_precision_keeps_gates_in_float32():
    model = MODELS[3]
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables_of(model))
    _, info = jax.eval_shape(model.apply, variables, X.astype(jnp.bfloat16))
    assert {gate.dtype for gate in jax.tree.leaves(info["gates"])} == {jnp.dtype(jnp.float32)}
    assert {mixture.dtype for mixture in info["mixtures"].values()} == {jnp.dtype(jnp.bfloat16)}


def test_mmoe_of_one_expert_is_a_shared_bottom():
    shared = variables_of(MODELS[1])
    model = MMoE(1, (5, 3), tasks=TASKS, towers=TOWERS)
    towers = {name: group for name, group in shared["params"].items() if name != "bottom"}
    gates = variables_of(model)["params"]["gates"]
    outputs, _ = model.apply({"params": {"experts": shared["params"]["bottom"], "gates": gates, **towers}}, X)
    wanted, _ = MODELS[1].apply(shared, X)
    for name in TASKS:
        np.testing.assert_allclose(outputs[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_cross_stitch_of_identities_is_single_task():
    params = variables_of(MODELS[2])["params"]
    bottom = {f"{what}_{l}": params[f"columns_{l}"][f"{what}_0"] for l in range(2) for what in ("kernel", "bias")}
    towers = {name: group for name, group in params.items() if name.startswith("tower_")}
    outputs, _ = MODELS[2].apply({"params": {**params, "stitch_0": np.eye(T), "stitch_1": np.eye(T)}}, X)
    wanted, _ = MODELS[0].apply({"params": {"bottom": bottom, **towers}}, X)
    for name in TASKS:
        np.testing.assert_allclose(outputs[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_cross_stitch_starts_near_the_identity():
    stitch = jax.jit(CrossStitch((3,), tasks=TASKS, stay=0.8).init)(jax.random.key(0), X)["params"]["stitch_0"]
    np.testing.assert_allclose(stitch, [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]], rtol=1e-6)
    alone = jax.jit(CrossStitch((3,), tasks={"b": Binary()}).init)(jax.random.key(0), X)["params"]["stitch_0"]
    np.testing.assert_array_equal(alone, [[1.0]])


def test_order_of_the_tasks_outlives_transforms():
    variables = variables_of(MODELS[3])  # flax.linen.remat sorts the names of the tasks
    remade = nn.remat(MMoE)(4, (5, 3), tasks=TASKS, towers=TOWERS).apply(variables, X)[0]
    for name, logits in MODELS[3].apply(variables, X)[0].items():
        np.testing.assert_allclose(remade[name], logits, rtol=1e-5, atol=1e-6)


@each
def test_towers_read_mixtures_of_their_own(model):
    _, info = compiled(MODELS.index(model))(variables_of(model, 1), X)
    a, b, c = (info["mixtures"][name] for name in ("a", "b", "c"))
    least = min(np.abs(a - b).max(), np.abs(a - c).max(), np.abs(b - c).max())
    assert least == 0 if isinstance(model, SharedBottom) else least > 1e-3


@functools.cache
def gradients_of(n):
    """Those of each task's loss in MODELS[n], by task."""
    model = MODELS[n]

    @jax.jit
    @jax.jacrev
    def losses(variables):
        return task_losses(TASKS, model.apply(variables, X)[0], LABELS)

    return {name: gradient["params"] for name, gradient in losses(variables_of(model)).items()}


@pytest.mark.parametrize(("t", "name"), list(enumerate(sorted(TASKS))))
def test_gradient_spares_what_is_private_to_other_tasks(t, name):
    single = gradients_of(0)[name]["bottom"]["kernel_0"]
    cgc = gradients_of(6)[name]
    private = np.asarray(cgc["private_0"]["kernel_0"]).reshape(T, -1)
    for touched in (np.asarray(single).reshape(T, -1), private, np.asarray(cgc["gates_0"]["kernel"]).reshape(T, -1)):
        assert [bool(np.abs(part).max() > 0) for part in touched] == [other == t for other in range(T)]
    assert np.abs(cgc["shared_0"]["kernel_0"]).max() > 0


def test_gradient_of_ple_spares_the_last_level_of_others_only():
    gradient = gradients_of(5)["a"]
    last = np.asarray(gradient["private_2"]["kernel_0"]).reshape(T, -1)
    first = np.asarray(gradient["private_0"]["kernel_0"]).reshape(T, -1)
    assert [bool(np.abs(part).max() > 0) for part in last] == [True, False, False]
    assert all(np.abs(part).max() > 0 for part in first)  # by the shared gate of the level above


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SharedBottom((), tasks=TASKS), r"bottom is \(\), expected one width or more"),
        (lambda: SingleTask((4, 0), tasks=TASKS), "bottom has 0, expected whole numbers of at least 1"),
        (lambda: SingleTask((4.5,), tasks=TASKS), "bottom has 4.5, expected whole numbers"),
        (lambda: SharedBottom(4, tasks=TASKS), "bottom is 4, expected one width or more"),
        (lambda: MMoE(0, (4,), tasks=TASKS), "experts has 0, expected whole numbers of at least 1"),
        (lambda: MMoE(2, (), tasks=TASKS), r"widths is \(\), expected one width or more"),
        (lambda: CrossStitch((), tasks=TASKS), r"levels is \(\)"),
        (lambda: CrossStitch((4,), tasks=TASKS, stay=1.5), "stay is 1.5, expected 0 to 1"),
        (lambda: MultiLevelMMoE((), tasks=TASKS), r"levels is \(\), expected one level or more"),
        (lambda: MultiLevelMMoE((4, 8), tasks=TASKS), r"level 0 is 4, expected one level or more, each \(number of"),
        (lambda: MultiLevelMMoE(((4, 8), (4,)), tasks=TASKS), r"level 1 is \(4,\), expected one level or more"),
        (lambda: MultiLevelMMoE(((0, 8),), tasks=TASKS), "level 0 has 0, expected whole numbers of at least 1"),
        (lambda: PLE(((1, 8),), tasks=TASKS), r"each \(shared experts, experts of each task, width, ...\)"),
        (lambda: PLE(((1, 0, 8),), tasks=TASKS), "level 0 has 0"),
        (lambda: MMoE(2, (4,), tasks={}), "there are no tasks"),
        (lambda: MMoE(2, (4,), tasks=TASKS, towers=(0,)), "the tower of 'b' has widths"),
        (lambda: MMoE(2, (4,), tasks=TASKS, towers={"b": ()}), "'a' has no tower"),
    ],
)
def test_bad_fields_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each
def test_inputs_that_are_no_matrix_are_refused(model):
    with pytest.raises(ValueError, match=r"x has shape \(6, 2, 2\), expected \[B, features\]"):
        model.init(jax.random.key(0), X.reshape(B, 2, 2))
