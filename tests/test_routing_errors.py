"""Bad SNR networks, gates, inputs and compactions: each refused in one line that names the value and the fix."""

import jax
import numpy as np
import pytest

from hyperjax.routing.compact import compact, lost_tasks
from hyperjax.routing.gates import HardConcrete
from hyperjax.routing.snr import SNR, served_gates
from hyperjax.routing.tasks import Binary, MultiClass

TASKS = {"income": Binary(), "job": MultiClass(3)}
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def built(**kw):
    return SNR(**({"levels": ((2, 2), (2, 2)), "tasks": TASKS, "towers": (2,)} | kw))


def refused(message, call, *args):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        call(*args)
    assert "\n" not in str(error.value)


BAD_NETWORKS = [
    ({"levels": ()}, r"levels are \(\), expected one or more, each a sequence of sub-networks, as in \(\(64, 64\), "),
    ({"levels": ((2, 2), ())}, r"levels are \(\(2, 2\), \(\)\), expected one or more"),
    ({"levels": (64, 64)}, r"levels are \(64, 64\), expected one or more, each a sequence"),
    ({"levels": 2}, "levels are 2, expected one or more, each a sequence"),
    ({"levels": ((2, 0), (2,))}, r"level 0 has widths \(2, 0\), expected for each sub-network a whole number above 0"),
    ({"levels": ((2,), (2, (3, -1)))}, r"level 1 has widths \(2, \(3, -1\)\), expected"),
    ({"levels": ((2, ()),)}, r"level 0 has widths \(2, \(\)\), expected for each sub-network"),
    ({"levels": ((2.5,),)}, r"level 0 has widths \(2.5,\), expected"),
    (
        {"levels": ((2, (2, 3)), (2, 2)), "connection": "aver"},
        r"level 0 has sub-networks of widths \[2, 3\], but 'aver' adds them up: give all one width, or use 'trans'",
    ),
    ({"levels": ((2, 2), (1, 4)), "connection": "aver"}, r"level 1 has sub-networks of widths \[1, 4\], but 'aver'"),
    ({"connection": "Trans"}, "connection is 'Trans', expected 'trans' or 'aver'"),
    ({"per": "layer"}, "per is 'layer', expected 'connection', 'task' or 'sample'"),
    ({"gates": True}, r"gates are True, expected HardConcrete\(\) or None"),
    ({"per": "sample", "router": (0,)}, r"router has widths \(0,\), expected a sequence of whole numbers above 0"),
    ({"per": "sample", "router": 16}, "router has widths 16, expected a sequence"),
    ({"tasks": {}}, "there are no tasks, expected one or more"),
    ({"tasks": ["income"]}, r"tasks are \['income'\], expected kinds by name"),
    ({"tasks": {"income": "binary"}}, r"task 'income' is 'binary', expected a kind, such as Binary\(\)"),
    ({"towers": {"income": (2,)}}, "'job' has no tower; the tasks are income, job"),
    ({"towers": {"income": (2,), "job": (), "age": ()}}, "'age' has a tower but is no task; the tasks are income, job"),
    ({"towers": (4, 0)}, r"the tower of 'income' has widths \(4, 0\), expected a sequence of whole numbers above 0"),
    ({"towers": 16}, "the tower of 'income' has widths 16, expected a sequence"),
]


@pytest.mark.parametrize(("kw", "message"), BAD_NETWORKS)
def test_bad_networks_are_refused_when_they_are_built(kw, message):
    refused(message, lambda: built(**kw))


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0, expected above 0"),
        ({"beta": float("nan")}, "beta is nan, expected above 0"),
        ({"gamma": 0.1}, "gamma is 0.1, expected 0 or below: samples are clipped at 0"),
        ({"gamma": 0.0}, "gamma is 0.0, expected below 0, such as -0.1: with 0, gates are never exactly 0"),
        ({"zeta": 0.9}, "zeta is 0.9, expected 1 or above: samples are clipped at 1"),
        ({"open": 1.0}, r"open_probability is 1.0, expected inside of \(0, 1\), such as 0.9"),
        ({"open": -0.5}, r"open_probability is -0.5, expected inside of \(0, 1\)"),
    ],
)
def test_bad_gates(kw, message):
    refused(message, lambda: HardConcrete(**kw))


def test_whole_widths_of_any_type_and_lists_are_fine():
    levels = [[np.int64(2), [np.int32(3), 2]], [2]]
    found, same = (
        jax.tree.map(np.shape, variables_of(built(levels=one)))["params"] for one in (levels, ((2, (3, 2)), (2,)))
    )
    assert found == same
    assert found["level_0"]["kernel"] == (3, 5)


@pytest.mark.parametrize("x", [X[0], X[None], np.float32(1)])
def test_x_is_a_matrix(x):
    model = built()
    message = r"x has shape \(.*\), expected \[B, features\]; flatten each sample"
    refused(message, model.init, jax.random.key(0), x)
    variables = variables_of(model)
    refused(message, jax.eval_shape, model.apply, variables, x)  # before anything is compiled
    small = compact(model, variables)
    refused(message, small.model.apply, small.variables, x)


def variables_of(model, value=9.0):
    """Variables of one value: those of the weights do not matter here, and with 9 all gates are open."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), X))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), shapes)


def shut(variables, level, *index):
    variables["params"][level]["log_alpha"][index] = -9.0


@pytest.mark.parametrize("connection", ["trans", "aver"])
@pytest.mark.parametrize("per", ["connection", "task"])
def test_a_lost_task_is_refused_by_name(connection, per):
    model = built(connection=connection, per=per)
    variables = variables_of(model)
    assert lost_tasks(model, variables) == []
    shut(variables, "towers", 1)
    assert lost_tasks(model, variables) == ["job"]
    refused("task 'job' has lost its last path to the input.*; train with a smaller", compact, model, variables)
    shut(variables, "level_1", *(() if per == "connection" else (0,)))  # all of it, or what belongs to "income"
    assert lost_tasks(model, variables) == ["income", "job"]
    refused("task 'income' has lost its last path", compact, model, variables)


def test_a_task_is_lost_where_its_only_source_is_dead():
    model = built()
    variables = variables_of(model)
    shut(variables, "level_1", 0)  # sub-network 0 puts out a constant
    shut(variables, "towers", 0, 1)  # the first task reads it alone
    assert lost_tasks(model, variables) == ["income"]
    alone = np.asarray(model.apply(variables, X)[0]["income"])
    np.testing.assert_array_equal(alone, np.full_like(alone, alone[0]))
    refused("task 'income' has lost its last path", compact, model, variables)


def test_all_gates_shut():
    model = built(per="task")
    assert lost_tasks(model, variables_of(model, -9.0)) == ["income", "job"]


@pytest.mark.parametrize("call", [compact, lost_tasks, served_gates])
def test_networks_without_gates_to_serve(call):
    for kw, message in (
        ({"per": "sample"}, "gates per sample are known only with their samples; take them from apply's second result"),
        ({"gates": None}, r"this network has no gates, .*; build it with gates=HardConcrete\(\)"),
    ):
        model = built(**kw)
        refused(message, call, model, variables_of(model))


@pytest.mark.parametrize("call", [compact, lost_tasks, served_gates])
def test_variables_of_another_network(call):
    model, variables = built(), variables_of(built())
    expected = r"expected \(2, 2\); give the variables of this network, {\"params\": ...}"
    refused(rf"log_alpha of 'level_1' has shape \(\), {expected}", call, model, variables["params"])
    other = variables_of(built(levels=((2, 2, 2), (2, 2))))
    refused(rf"log_alpha of 'level_1' has shape \(2, 3\), {expected}", call, model, other)
    per_task = variables_of(built(per="task"))
    refused(rf"log_alpha of 'level_1' has shape \(2, 2, 2\), {expected}", call, model, per_task)
