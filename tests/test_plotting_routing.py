"""Pictures of routing: what is drawn is what is there, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from hyperjax.plotting import COLORS, GREY, INK, plot_gates, plot_quality, plot_routing
from hyperjax.routing import SNR, Binary, MultiClass

TASKS = {"class": MultiClass(3), "parity": Binary()}
LEVELS = ((2, 2, 2), (2, (2, 3)))


@pytest.fixture
def axes():
    return Figure(layout="constrained").subplots()


def variables_with(model, opened):
    """Ones, with the gates open that are listed by level, and all others closed."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4)))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    for level, indices in opened.items():
        log_alpha = np.full_like(variables["params"][level]["log_alpha"], -10)
        for index, value in indices.items():
            log_alpha[index] = value
        variables["params"][level]["log_alpha"] = log_alpha
    return variables


def connections(axes):
    """Lines by (colour, whether dashed), each from (x, y) to (x, y), rounded; without those from the input."""
    found = {}
    for line in axes.get_lines():
        (x0, x1), (y0, y1) = line.get_data()
        if y0 > 1:
            ends = (round(x0, 2), round(y0), round(x1, 2), round(y1))
            found.setdefault((to_hex(line.get_color()), line.get_linestyle() == "--"), []).append(ends)
    return found


def stripes(axes):
    """Colours of the stripes by (x, y) of the box that they are in."""
    boxes = [patch.get_bbox() for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    found = {}
    for patch in axes.patches:
        if isinstance(patch, Rectangle):
            x, y = patch.get_bbox().x0 + 1e-6, patch.get_bbox().y0
            (box,) = [box for box in boxes if box.x0 < x < box.x1 and box.y0 < y < box.y1]
            place = (round((box.x0 + box.x1) / 2, 2), round((box.y0 + box.y1) / 2))
            found.setdefault(place, []).append(to_hex(patch.get_facecolor()).upper())
    return found


def test_routing_draws_open_gates_and_who_uses_what(axes):
    model = SNR(LEVELS, tasks=TASKS)
    # Sub-network 1 of level 1 reads nothing; sub-network 2 of level 0 is read by nothing.
    opened = {"level_1": {(0, 0): 3, (0, 1): -1}, "towers": {(0, 0): 3, (1, 0): 3, (1, 1): 3}}
    assert plot_routing(axes, model, variables_with(model, opened)) is axes
    found = connections(axes)
    assert sorted(found[INK, False]) == [(0.5, 1, 0.75, 2), (1.5, 1, 0.75, 2)]
    assert found[COLORS[0].lower(), False] == [(0.75, 2, 0.75, 3)]
    assert found[COLORS[1].lower(), False] == [(0.75, 2, 2.25, 3)]
    assert found[GREY, True] == [(2.25, 2, 2.25, 3)]
    assert len(found) == 4
    assert stripes(axes) == {place: list(COLORS[:2]) for place in [(0.5, 1), (1.5, 1), (0.75, 2)]}
    texts = [(text.get_text(), text.get_color()) for text in axes.texts]
    boxes = [("input", INK), ("2", INK), ("2", INK), ("2", GREY), ("2", INK), ("2-3", GREY)]
    assert texts == [*boxes, ("class", "white"), ("parity", "white")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["", "level 0", "level 1", "tasks"]
    strong, weak = [line for line in axes.get_lines() if line.get_color() == INK and line.get_ydata()[0] > 1]
    assert strong.get_linewidth() > weak.get_linewidth()
    assert strong.get_alpha() > weak.get_alpha()


def test_routing_names_a_lost_task(axes):
    model = SNR(LEVELS, tasks=TASKS)
    plot_routing(axes, model, variables_with(model, {"level_1": {(0, 0): 3}, "towers": {(0, 0): 3}}))
    assert [text.get_text() for text in axes.texts if "lost" in text.get_text()] == ["parity, lost"]
    assert stripes(axes) == {(0.5, 1): [COLORS[0]], (0.75, 2): [COLORS[0]]}


def test_gates_of_tasks_have_their_colours(axes):
    model = SNR(LEVELS, tasks=TASKS, per="task")
    opened = {"level_1": {(0, 0, 0): 3, (1, 0, 1): 3, (1, 1, 2): 3}, "towers": {(0, 0): 3, (1, 0): 3}}
    plot_routing(axes, model, variables_with(model, opened))
    found = connections(axes)
    below, above = found[COLORS[0].lower(), False]
    assert above == (0.75, 2, 0.75, 3)
    assert below == pytest.approx((0.5, 1, 0.75, 2), abs=0.06)
    below, above = found[COLORS[1].lower(), False]
    assert above == (0.75, 2, 2.25, 3)
    assert below == pytest.approx((1.5, 1, 0.75, 2), abs=0.06)
    (dead,) = found[GREY, True]
    assert dead == pytest.approx((2.5, 1, 2.25, 2), abs=0.06)
    assert stripes(axes) == {(0.5, 1): [COLORS[0]], (1.5, 1): [COLORS[1]], (0.75, 2): list(COLORS[:2])}


@pytest.mark.parametrize(("option", "line"), [({"gates": None}, "no gates"), ({"per": "sample"}, "gates per sample")])
def test_routing_needs_gates_that_are_known(axes, option, line):
    model = SNR(LEVELS, tasks=TASKS, **option)
    with pytest.raises(ValueError, match=line):
        plot_routing(axes, model, {"params": {}})


def test_gates_over_time(axes):
    rng = np.random.default_rng(0)
    history = {"level_1": rng.uniform(-1, 1, (4, 3, 2)).clip(0), "towers": rng.uniform(-1, 1, (4, 2, 2, 3)).clip(0)}
    assert plot_gates(axes, [0, 10, 20, 30], history) is axes
    values = np.concatenate([gates.reshape(4, -1) for gates in history.values()], 1)
    lines = axes.get_lines()
    thin = [line for line in lines if line.get_linewidth() < 1]
    assert np.array_equal(np.stack([line.get_ydata() for line in thin], 1), values)
    assert [line.get_color() for line in thin] == [COLORS[0]] * 6 + [COLORS[1]] * 12
    share = (values > 0).mean(1)
    assert np.array_equal(lines[-1].get_ydata(), share)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["level 1, 6 gates", "towers, 12 gates", f"share open, {100 * share[-1]:.0f} % in the end"]
    plot_gates(axes, [0, 10, 20, 30], history, threshold=0.5, label="P(open)")
    assert np.array_equal(axes.get_lines()[-1].get_ydata(), (values > 0.5).mean(1))


@pytest.mark.parametrize(
    ("history", "line"),
    [({"towers": np.ones((3, 1, 1))}, "'towers' has 3 steps"), ({}, "the history has no level")],
)
def test_gates_need_as_many_steps(axes, history, line):
    with pytest.raises(ValueError, match=line):
        plot_gates(axes, [0, 1], history)


def test_quality_shows_means_and_deviations(axes):
    points = {
        "SNR": [([3000, 5000, 900], [0.8, 0.9, np.nan]), (1000, [0.6, 0.7, 0.5]), (50, [np.nan])],
        "MMoE": [(2000, [0.7])],
    }
    assert plot_quality(axes, points, label="AUC") is axes
    snr, mmoe = axes.containers
    assert np.array_equal(snr.lines[0].get_xdata(), [1000, 4000])
    assert snr.lines[0].get_ydata() == pytest.approx([0.6, 0.85])
    across, up = (bar.get_segments() for bar in snr.lines[2])
    assert across[1][:, 0] == pytest.approx(4000 + np.std([3000, 5000], ddof=1) * np.array([-1, 1]))
    assert up[0][:, 1] == pytest.approx(0.6 + np.std([0.6, 0.7, 0.5], ddof=1) * np.array([-1, 1]))
    assert up[1][:, 1] == pytest.approx(0.85 + np.std([0.8, 0.9], ddof=1) * np.array([-1, 1]))
    assert not mmoe.lines[2]
    assert axes.get_xscale() == "log"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("AUC", "parameters served")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["SNR", "MMoE"]


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ({}, "there are no points"),
        ({"SNR": []}, "'SNR' has no points"),
        ({"SNR": [(0, [0.5])]}, "'SNR' has the size 0, expected"),
        ({"SNR": [([1, 2], [0.5, 0.5, 0.5])]}, "'SNR' has 2 sizes and 3 scores"),
        ({"SNR": [(5, [np.nan])]}, "'SNR' has no score that is a number"),
    ],
)
def test_quality_refuses_what_cannot_be_drawn(axes, points, line):
    with pytest.raises(ValueError, match=line):
        plot_quality(axes, points, label="AUC")
