"""Pictures of pruning: what is drawn is what is there, and what they refuse."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from hyperjax.plotting import COLORS, GREY, save
from hyperjax.pruning.plots import plot_compute, plot_tradeoff, plot_utilisation


@pytest.fixture
def axes():
    return Figure(layout="constrained").subplots()


def shown(axes):
    """Texts on the axes by place."""
    return {text.get_position(): text.get_text() for text in axes.texts}


def test_quality_against_cost(axes):
    points = {
        "dense": [([1.0, 1.0], [2.0, 2.2])],
        "random_mod": [([0.6, 0.7], [2.5, 2.5])],
        "token": [],
        "mod": [([0.4], [2.6]), ([0.6, 0.8], [2.1, 2.5])],
    }
    assert plot_tradeoff(axes, points, "share", "bits") is axes
    lines = dict(zip(("dense", "random_mod", "mod"), (held[0] for held in axes.containers), strict=True))
    for name, line in lines.items():
        want = np.array([[np.mean(values) for values in pair] for pair in points[name]])
        np.testing.assert_allclose(np.transpose(line.get_data()).astype(float), want)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("share", "bits")
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "random mod", "mod"]
    assert len({line.get_marker() for line in (lines["dense"], lines["random_mod"])}) == 2
    for name in ("dense", "random_mod"):
        assert (to_hex(lines[name].get_color()), lines[name].get_linestyle()) == (GREY, "--")
    assert to_hex(lines["mod"].get_color()) == COLORS[1].lower()  # the first is kept for token, which has no point
    assert lines["mod"].get_linestyle() == "-"


def test_error_bars_are_deviations_of_seeds(axes):
    plot_tradeoff(axes, {"mod": [([0.4], [2.6]), ([0.6, 0.8], [2.1, 2.5])]}, "x", "y")
    _, _, (across, along) = axes.containers[0]
    widths = [np.ptp(segment[:, 0]) / 2 for segment in across.get_segments()]
    heights = [np.ptp(segment[:, 1]) / 2 for segment in along.get_segments()]
    np.testing.assert_allclose(widths, [0, np.std([0.6, 0.8], ddof=1)], atol=1e-9)
    np.testing.assert_allclose(heights, [0, np.std([2.1, 2.5], ddof=1)], atol=1e-9)


def test_dead_is_what_never_opens(axes):
    openness = np.array([[0.0, 0.0, 1.0, 0.3], [0.0, 1e-3, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert plot_utilisation(axes, openness, ("letter", "digit", "space"), ("head 1", "", "", "head 4")) is axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), openness)
    assert image.get_clim() == (0, 1)
    assert shown(axes) == {(0, 1.0): "dead"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["letter", "digit", "space"]
    assert list(axes.get_xticks()) == [0, 3]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["head 1", "head 4"]


def test_compute_along_a_text(axes):
    text, compute = "a b\n$x$", np.array([1.0, 0.2, 0.5, 0.2, 0.9, 0.3, 0.2])
    assert plot_compute(axes, text, compute, columns=4) is axes
    (image,) = axes.images
    ground = image.get_array()
    np.testing.assert_array_equal(np.ma.filled(ground, np.nan), [[1, 0.2, 0.5, 0.2], [0.9, 0.3, 0.2, np.nan]])
    assert image.get_clim() == (0.2, 1.0)
    assert shown(axes) == dict(zip([(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1)], "a·b¶$x$", strict=True))
    light = [to_hex(text.get_color()) == "#ffffff" for text in axes.texts]
    assert light == [True, False, False, False, True, False, False]  # on a dark ground
    assert not any(text.get_parse_math() for text in axes.texts)  # a $ is a character


def test_compute_of_equal_size_everywhere(axes):
    plot_compute(axes, "abc", [1.0, 1.0, 1.0])
    low, high = axes.images[0].get_clim()
    assert low == 1 < high
    assert {to_hex(text.get_color()) for text in axes.texts} == {"#222222"}


def test_a_number_for_each_character(axes):
    with pytest.raises(ValueError, match="2 numbers for 3 characters, expected one for each"):
        plot_compute(axes, "abc", [1.0, 0.5])


def test_pictures_are_written(tmp_path):
    figure = Figure(layout="constrained")
    for one, draw in zip(
        figure.subplots(3),
        (
            lambda axes: plot_tradeoff(axes, {"mod": [([0.5], [1.0])]}, "x", "y"),
            lambda axes: plot_utilisation(axes, np.zeros((2, 3)), "ab", "123"),
            lambda axes: plot_compute(axes, "a\n$ é", np.arange(5.0)),
        ),
        strict=True,
    ):
        draw(one)
    save(figure, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, hyperjax.pruning.plots, hyperjax.plotting; print([m for m in sys.modules if 'matplotlib' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "[]"
