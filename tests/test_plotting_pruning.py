"""Pictures of pruning: what is drawn is what is there."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from hyperjax.plotting import COLORS, GREY, plot_tradeoff, plot_utilisation


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
