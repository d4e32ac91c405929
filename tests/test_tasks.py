"""Kinds of tasks: losses against NumPy, scores against scikit-learn, what is wrong with labels; widths of towers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from hyperjax.routing.tasks import (
    Binary,
    MultiClass,
    MultiLabel,
    Regression,
    Task,
    check_labels,
    task_losses,
    task_scores,
)
from hyperjax.routing.towers import Experts, Tower, tower_widths

B = 6
RNG = np.random.default_rng(0)
TASKS = {
    "b": Binary(),
    "a": MultiClass(3),
    "m": MultiLabel(2),
    "r": Regression(),
    "rs": Regression(2),
}
LABELS = {
    "b": np.array([0, 1, 1, 0, 1, 0]),
    "a": np.array([2, 0, 1, 1, 2, 0]),
    "m": np.array([[0, 1], [1, 1], [0, 0], [1, 0], [1, 0], [0, 1]]),
    "r": RNG.normal(size=B).astype(np.float32),
    "rs": RNG.normal(size=(B, 2)).astype(np.float32),
}
OUTPUTS = {name: (3 * RNG.normal(size=(B, *task.shape))).astype(np.float32) for name, task in TASKS.items()}
OUTPUTS["a"][:3] = np.eye(3)[LABELS["a"][:3]]  # some answers are right


def cross_entropy(y, labels):
    p = special.expit(np.asarray(y, float))
    return -(labels * np.log(p) + (1 - labels) * np.log1p(-p))


def losses_of(y):
    odds = special.log_softmax(np.asarray(y["a"], float), -1)
    return {
        "b": cross_entropy(y["b"], LABELS["b"]),
        "a": -odds[np.arange(B), LABELS["a"]],
        "m": cross_entropy(y["m"], LABELS["m"]).mean(1),
        "r": (y["r"] - LABELS["r"]) ** 2,
        "rs": ((y["rs"] - LABELS["rs"]) ** 2).mean(1),
    }


def test_losses_against_numpy():
    for name, wanted in losses_of(OUTPUTS).items():
        loss = TASKS[name].loss(jnp.asarray(OUTPUTS[name]), jnp.asarray(LABELS[name]))
        assert loss.shape == (B,)
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_task_losses_are_the_means(wrap):
    found = wrap(lambda outputs, labels: task_losses(TASKS, outputs, labels))(OUTPUTS, LABELS)
    assert found.keys() == TASKS.keys()
    for name, wanted in losses_of(OUTPUTS).items():
        np.testing.assert_allclose(found[name], wanted.mean(), rtol=1e-5)


def test_losses_of_half_precision_and_of_sure_answers():
    for name, wanted in losses_of({name: y.astype(jnp.bfloat16).astype(float) for name, y in OUTPUTS.items()}).items():
        loss = TASKS[name].loss(jnp.asarray(OUTPUTS[name], jnp.bfloat16), jnp.asarray(LABELS[name]))
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    np.testing.assert_allclose(Binary().loss(jnp.array([1e4, -1e4]), jnp.array([0, 0])), [1e4, 0])
    np.testing.assert_allclose(MultiClass(2).loss(jnp.array([[1e4, -1e4]]), jnp.array([1])), [2e4])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int32])
def test_labels_of_any_whole_type(dtype):
    for task, logits in ((Binary(), [0.3, -1.0]), (MultiClass(2), [[0.3, 1.0], [0.2, 2.0]])):
        labels = np.array([1, 0], dtype)
        check_labels({"t": task}, {"t": labels})
        wanted = task.loss(jnp.array(logits), jnp.array([1, 0]))
        np.testing.assert_array_equal(task.loss(jnp.array(logits), jnp.asarray(labels)), wanted)


def test_scores_against_scikit_learn():
    found = task_scores(TASKS, jax.tree.map(jnp.asarray, OUTPUTS), LABELS)
    wanted = {
        "b_auc": metrics.roc_auc_score(LABELS["b"], OUTPUTS["b"]),
        "a_accuracy": metrics.accuracy_score(LABELS["a"], OUTPUTS["a"].argmax(1)),
        "m_auc": metrics.roc_auc_score(LABELS["m"], OUTPUTS["m"], average="macro"),
        "r_r2": metrics.r2_score(LABELS["r"], OUTPUTS["r"]),
        "rs_r2": metrics.r2_score(LABELS["rs"], OUTPUTS["rs"]),
        "r_mse": metrics.mean_squared_error(LABELS["r"], OUTPUTS["r"]),
        "rs_mse": metrics.mean_squared_error(LABELS["rs"], OUTPUTS["rs"]),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert isinstance(found[name], float)
        np.testing.assert_allclose(found[name], value, rtol=1e-6)
    assert 0 < found["a_accuracy"] < 1


def test_auc_of_ties_and_of_perfect_answers():
    labels = np.array([0, 0, 1, 1])
    for logits, wanted in (([0, 1, 2, 3], 1.0), ([3, 2, 1, 0], 0.0), ([5, 5, 5, 5], 0.5), ([0, 1, 1, 2], 0.875)):
        assert task_scores({"t": Binary()}, {"t": logits}, {"t": labels}) == {"t_auc": wanted}


@pytest.mark.parametrize("task", [Binary(), MultiLabel(2)])
def test_no_auc_of_one_class(task):
    labels = np.ones(task.label_shape(3), int)
    with pytest.raises(ValueError, match="task 't': all 3 labels are 1: no AUC without both 0 and 1; give a larger"):
        task_scores({"t": task}, {"t": np.zeros(labels.shape)}, {"t": labels})


@pytest.mark.parametrize("task", [Regression(), Regression(2)])
def test_no_r2_of_equal_labels(task):
    labels = np.full(task.label_shape(3), 0.1)
    if labels.ndim > 1:
        labels[:, 0] = [1, 2, 3]  # only the other target is constant
    with pytest.raises(
        ValueError, match="task 't': all 3 labels of a target are equal: no R2 without some that differ"
    ):
        task_scores({"t": task}, {"t": np.zeros(labels.shape)}, {"t": labels})


def test_shapes():
    assert [task.outputs for task in TASKS.values()] == [1, 3, 2, 1, 2]
    assert [task.shape for task in TASKS.values()] == [(), (3,), (2,), (), (2,)]
    assert [task.label_shape(5) for task in TASKS.values()] == [(5,), (5,), (5, 2), (5,), (5, 2)]
    assert Binary() == Binary() != MultiClass(2)
    assert len({Regression(), Regression(1), Regression(1)}) == 2


def test_good_labels_pass():
    check_labels(TASKS, LABELS)
    check_labels(TASKS, {name: labels.tolist() for name, labels in LABELS.items()})
    check_labels({"r": Regression()}, {"r": np.array([1, -7])})


BAD_LABELS = [
    ({}, {}, "there are no tasks, expected one or more; name each with its kind"),
    ({"b": Binary()}, {}, "task 'b' has no labels and so no loss; give its labels, or leave the task out"),
    ({"b": Binary()}, {"b": [0, 1], "d": [0, 1]}, "labels 'd' belong to no task; the tasks are b"),
    ({"b": Binary()}, {"b": 1}, "labels of 'b' are 1, expected an array"),
    ({"b": Binary()}, {"b": [[0], [1]]}, r"labels of 'b' have shape \(2, 1\), expected \(2,\) of Binary\(\)"),
    ({"b": Binary()}, {"b": [0.0, 1.0]}, "labels of 'b' have dtype float64, expected integers; convert them"),
    ({"b": Binary()}, {"b": ["no", "yes"]}, "labels of 'b' have dtype <U3, expected integers"),
    ({"b": Binary()}, {"b": [0, 2]}, "labels of 'b' hold 2, expected 0 to 1 for Binary"),
    ({"a": MultiClass(3)}, {"a": [0, 3]}, "labels of 'a' hold 3, expected 0 to 2 for MultiClass"),
    ({"a": MultiClass(3)}, {"a": [-1, 2]}, "labels of 'a' hold -1, expected 0 to 2"),
    ({"a": MultiClass(2)}, {"a": [[0, 1], [1, 0]]}, r"labels of 'a' have shape \(2, 2\), expected \(2,\)"),
    ({"m": MultiLabel(2)}, {"m": [[0, 1], [2, 0]]}, "labels of 'm' hold 2, expected 0 to 1"),
    ({"m": MultiLabel(3)}, {"m": [[0, 1]]}, r"labels of 'm' have shape \(1, 2\), expected \(1, 3\)"),
    ({"r": Regression()}, {"r": [1.0, np.nan]}, "labels of 'r' hold nan, expected finite numbers"),
    ({"r": Regression()}, {"r": [1.0, -np.inf]}, "labels of 'r' hold -inf, expected finite numbers"),
    ({"r": Regression()}, {"r": ["1"]}, "labels of 'r' have dtype <U1, expected numbers; convert them"),
    ({"r": Regression(1)}, {"r": [1.0, 2.0]}, r"labels of 'r' have shape \(2,\), expected \(2, 1\)"),
    (
        {"b": Binary(), "r": Regression()},
        {"b": [0, 1], "r": [1.0]},
        r"labels of 'r' have shape \(1,\), expected \(2,\)",
    ),
]


@pytest.mark.parametrize(("tasks", "labels", "message"), BAD_LABELS)
def test_bad_labels(tasks, labels, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        check_labels(tasks, labels)
    assert "\n" not in str(error.value)


BAD_LOSSES = [
    ({}, {"b": np.zeros(2, int)}, "task 'b' has no output and so no loss; give it, or leave the task out"),
    ({"b": np.zeros(2)}, {}, "task 'b' has no labels and so no loss"),
    ({"b": np.zeros(2)}, {"b": np.zeros((2, 1), int)}, r"labels of 'b' have shape \(2, 1\), expected \(2,\)"),
    ({"b": np.zeros(2)}, {"b": np.zeros(3, int)}, r"labels of 'b' have shape \(3,\), expected \(2,\)"),
]


@pytest.mark.parametrize(("outputs", "labels", "message"), BAD_LOSSES)
def test_bad_arguments_of_task_losses(outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        task_losses({"b": Binary()}, outputs, labels)
    with pytest.raises(ValueError, match=message):  # before anything is compiled
        jax.eval_shape(lambda *a: task_losses({"b": Binary()}, *a), outputs, labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiClass(1), "classes is 1, expected 2 or more"),
        (lambda: MultiLabel(0), "labels is 0, expected 1 or more"),
        (lambda: Regression(0), "targets is 0, expected 1 or more, or None"),
    ],
)
def test_bad_kinds(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_towers_by_task_or_for_all():
    tasks = {"b": Binary(), "a": MultiClass(3)}
    assert tower_widths((4, 2), tasks) == {"b": (4, 2), "a": (4, 2)}
    by_task = tower_widths({"a": [], "b": [np.int64(3)]}, tasks)
    assert by_task == {"b": (3,), "a": ()}
    assert list(by_task) == ["a", "b"]  # whatever the order of the tasks


BAD_TOWERS = [
    ((2,), {}, "there are no tasks, expected one or more"),
    ((2,), ["b"], r"tasks are \['b'\], expected kinds by name"),
    ((2,), {"b": "binary"}, r"task 'b' is 'binary', expected a kind, such as Binary\(\)"),
    ((2,), {"b": Binary}, "task 'b' is <class .*Binary'>, expected a kind"),
    ({"b": (2,)}, {"b": Binary(), "a": Binary()}, "'a' has no tower; the tasks are b, a"),
    ({"b": (2,), "d": ()}, {"b": Binary()}, "'d' has a tower but is no task; the tasks are b"),
    (2, {"b": Binary()}, r"the tower of 'b' has widths 2, expected a sequence of whole numbers above 0: \(16,\)"),
    ({"b": (4, 0)}, {"b": Binary()}, r"the tower of 'b' has widths \(4, 0\), expected"),
    ((2.5,), {"b": Binary()}, r"the tower of 'b' has widths \(2.5,\), expected"),
]


@pytest.mark.parametrize(("towers", "tasks", "message"), BAD_TOWERS)
def test_bad_towers(towers, tasks, message):
    with pytest.raises(ValueError, match=message):
        tower_widths(towers, tasks)


@pytest.mark.parametrize("task", TASKS.values())
@pytest.mark.parametrize("hidden", [(), (3, 2)])
def test_a_tower_answers_in_the_task_s_shape(task: Task, hidden):
    x = RNG.normal(size=(B, 4)).astype(np.float32)
    tower = Tower(task, hidden)
    variables = jax.tree.map(np.asarray, tower.init(jax.random.key(0), x))
    v = x
    for name in [f"layer_{i}" for i in range(len(hidden))]:
        v = np.maximum(v @ variables["params"][name]["kernel"] + variables["params"][name]["bias"], 0)
    last = variables["params"]["output"]
    wanted = (v @ last["kernel"] + last["bias"]).reshape(B, *task.shape)
    np.testing.assert_allclose(tower.apply(variables, x), wanted, rtol=1e-5, atol=1e-6)


def test_experts_are_separate_networks():
    experts, x = Experts(2, (4, 3)), RNG.normal(size=(B, 5)).astype(np.float32)
    p = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), experts.init(jax.random.key(0), x)["params"])
    together, apart = experts.apply({"params": p}, x), experts.apply({"params": p}, np.stack([x, 2 * x]))
    for e in range(2):
        for found, v in ((together[e], x), (apart[e], (1 + e) * x)):
            for layer in range(2):
                v = np.maximum(v @ p[f"kernel_{layer}"][e] + p[f"bias_{layer}"][e], 0)
            np.testing.assert_allclose(found, v, rtol=1e-4, atol=1e-5)
