"""Pictures of training and of hypernetworks, files, and where matplotlib is: what is drawn is what is there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hyperjax import plotting

ROOT = Path(__file__).parents[1]
MATRIX = np.array([[0.9, np.nan], [0.6, 1.0]])


@pytest.fixture
def axes():
    return plotting.subplots()[1]


def test_matplotlib_is_imported_only_there():
    texts = [path for folder in ("hyperjax", "experiments", "colab") for path in (ROOT / folder).rglob("*.py")]
    users = [path for path in texts if re.search(r"^\s*(import|from) matplotlib", path.read_text("utf-8"), re.M)]
    assert {path.parent.relative_to(ROOT).as_posix() for path in users} == {"hyperjax/plotting"}


def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, hyperjax, hyperjax.data, hyperjax.training; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], timeout=100, check=True)


@pytest.mark.parametrize("name", [name for name in plotting.__all__ if name.startswith("plot_")])
def test_figures_take_axes_and_return_them(name):
    function = getattr(plotting, name)
    assert next(iter(function.__annotations__.items())) == ("axes", plotting.base.Axes)
    assert function.__annotations__["return"] is plotting.base.Axes


def test_similar_embeddings_are_red_and_opposite_ones_blue(axes):
    half = np.ones((4, 3)) * np.array([1, 1, -1, -1])[:, None]
    assert plotting.plot_similarity(axes, half, names=["first one", "second", "c", "d"]) is axes
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), np.kron([[1, -1], [-1, 1]], np.ones((2, 2))), atol=1e-6)
    red, _, blue, _ = image.to_rgba(1.0)
    assert red > blue + 0.2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first one", "second", "c", "d"]
    assert [text.get_text() for text in axes.texts][:3] == ["1.00", "1.00", "-1.00"]
    with pytest.raises(ValueError, match="there are 5 names for 4 embeddings, expected one for each"):
        plotting.plot_similarity(axes, half, names=["a"] * 5)


def test_names_of_many_embeddings_are_numbers(axes):
    plotting.plot_similarity(axes, np.ones((70, 3)), names=["name"] * 70)
    assert not axes.texts
    axes.figure.draw_without_rendering()
    assert "name" not in {label.get_text() for label in axes.get_xticklabels()}


def test_a_kernel_is_a_grid_with_gaps(axes):
    kernel = np.arange(2 * 3 * 20 * 4, dtype=np.float32).reshape(2, 3, 20, 4)
    assert plotting.plot_kernel(axes, kernel, most=5) is axes
    grid = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert grid.shape == (5 * 3 - 1, 4 * 4 - 1)
    np.testing.assert_array_equal(grid[6:8, 12:15], kernel[:, :, 2, 3])
    assert np.all(np.isnan(grid[2]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3", "4", "5"]
    plotting.plot_kernel(plotting.subplots()[1], np.zeros((2, 3, 1, 4)))  # without a range of values
    with pytest.raises(ValueError, match=r"the kernel has shape \[3, 4\], expected \[h, w, in, out\]"):
        plotting.plot_kernel(axes, np.ones((3, 4)))


def test_accuracies_stand_in_their_places_under_what_they_come_to(axes):
    assert plotting.plot_accuracies(axes, MATRIX, ["0/1", "2/3"]) is axes
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "90", (0, 1): "60", (1, 1): "100"}
    assert axes.get_title(loc="left") == "80.0 % in the end, 30.0 points forgotten"
    assert axes.images[0].get_clim() == (60, 100)
    with pytest.raises(ValueError, match=r"shape \[2, 2\], and there are 1 names"):
        plotting.plot_accuracies(axes, MATRIX, ["0/1"])


def test_curves_mark_the_best(axes):
    rows = [
        {"step": step, "bpc": 2 + 30 / step, "valid_bpc": 2.1 + (step - 80) ** 2 / 1e4} for step in range(10, 200, 10)
    ]
    assert plotting.plot_curves(axes, rows) is axes
    train, valid, best = axes.lines
    np.testing.assert_allclose(np.transpose(train.get_data()), [(row["step"], row["bpc"]) for row in rows])
    assert valid.get_label() == "validation"
    assert list(best.get_ydata()) == [2.1, 2.1]
    assert axes.texts[0].get_text() == "best 2.100 at step 80"
    assert not plotting.plot_curves(plotting.subplots()[1], [{"step": 1}]).lines


def test_losses_are_smoothed_over_a_window(axes):
    losses = np.random.default_rng(0).uniform(size=40)
    assert plotting.plot_losses(axes, {"a": losses, "b": losses[:5]}, window=10) is axes
    _, smooth, _, short = axes.lines
    x, y = smooth.get_data()
    assert (x[0], x[-1]) == (9, 39)
    np.testing.assert_allclose([y[0], y[-1]], [losses[:10].mean(), losses[-10:].mean()])
    np.testing.assert_allclose(short.get_data(), [[4], [losses[:5].mean()]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_colours_begin_again():
    assert plotting.color(8) == plotting.color(0) == plotting.COLORS[0]
    assert len({plotting.color(n) for n in range(8)}) == 8
    np.testing.assert_array_less(plotting.shade(0.0)[:2], plotting.shade(1.0)[:2])


def test_files_have_the_format_of_their_suffix(tmp_path, axes):
    plotting.save(axes.figure, tmp_path / "new" / "a.svg")
    assert "<svg" in (tmp_path / "new" / "a.svg").read_text()
    with pytest.raises(ValueError, match="nonsense"):
        plotting.save(axes.figure, tmp_path / "a.nonsense")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_notebook_shows_a_picture_and_nothing_else_does(monkeypatch, axes):
    shown = []

    class Notebook:
        display, Image, HTML = shown.append, bytes, str

    monkeypatch.delitem(sys.modules, "IPython.display", raising=False)
    plotting.show(axes.figure)
    assert not shown
    monkeypatch.setitem(sys.modules, "IPython.display", Notebook)
    plotting.show(axes.figure)
    plotting.play(axes.figure, lambda n: axes.set_title(f"frame {n}"), 2)
    picture, animation = shown
    assert picture.startswith(b"\x89PNG")
    assert animation.count("data:image/png;base64") == 2
    assert axes.get_title() == "frame 1"


def test_a_file_that_cannot_be_replaced_stays(tmp_path, axes, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            plotting.save(axes.figure, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    plotting.save(axes.figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_groups_are_framed_over_how_alike_layers_are(axes):
    alike = np.array([[1.0, 0.95, 0.6], [0.95, 1.0, 0.7], [0.6, 0.7, 1.0]])
    assert plotting.plot_groups(axes, alike, (0, 0, 2)) is axes
    np.testing.assert_array_equal(axes.images[0].get_array(), alike)
    assert {(round(box.get_x() + 0.44), round(box.get_y() + 0.44)) for box in axes.patches} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    }


def test_networks_have_deviations_and_the_converted_are_filled(axes):
    points = {"cycle": (100, [2.0, 2.2]), "to_cycle": (100, [1.9]), "random": (50, np.array([2.5]))}
    assert plotting.plot_networks(axes, points, "parameters", "bits") is axes
    markers = [held[0] for held in axes.containers]
    assert [float(marker.get_ydata()[0]) for marker in markers] == pytest.approx([2.1, 1.9, 2.5])
    assert [marker.get_markerfacecolor() for marker in markers] == ["white", plotting.COLORS[0], "white"]
    assert markers[2].get_color() == plotting.GREY
    _, _, (bars,) = axes.containers[0]
    assert np.ptp(bars.get_segments()[0][:, 1]) / 2 == pytest.approx(np.std([2.0, 2.2], ddof=1))


@pytest.mark.parametrize(
    ("draw", "line"),
    [
        (lambda axes: plotting.plot_losses(axes, {"a": []}), "'a' has no loss, expected one for each step"),
        (lambda axes: plotting.plot_losses(axes, {"a": [1.0]}, window=0), "window is 0, expected a number of steps"),
        (lambda axes: plotting.plot_utilisation(axes, np.ones((2, 3)), "ab", "abcd"), "2 groups and 4 units"),
        (lambda axes: plotting.plot_groups(axes, np.ones((6, 6)), (0, 0, 1)), "the map 3 layers, expected"),
        (lambda axes: plotting.plot_gates(axes, [], {"level_1": np.ones((0, 2, 2))}), "no step was logged"),
        (lambda axes: plotting.plot_text(axes, "ab", [1.0, 2.0], columns=0), "0 columns, expected at least 1"),
        (lambda axes: plotting.plot_text(axes, "ab", [1.0, np.nan]), "nan for a character, expected at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(axes, draw, line):
    with pytest.raises(ValueError, match=line):
        draw(axes)


def test_perfect_accuracies_are_bright(axes):
    plotting.plot_accuracies(axes, [[1.0, np.nan], [1.0, 1.0]], ["a", "b"])
    red, green, _, _ = axes.images[0].to_rgba(100.0)
    assert min(red, green) > 0.8
    assert {text.get_color() for text in axes.texts} == {"black"}
