"""What all pictures share: colours, an empty figure, a file, a notebook's cell, an animation."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hyperjax.training.metrics import write_bytes

# Okabe and Ito's colours, which the colour-blind can tell apart, and that stand out on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#332288")
MARKERS = "osD^vPX*"
STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
INK, GREY, PALE = "#333333", "#9a9a9a", "#f4f4f4"


def subplots(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.2, 4.2), title: str = "", **keywords: Any
) -> tuple[Figure, Any]:
    """An empty figure, of no window and no global state, whose parts keep clear of one another.

    Args:
        rows: of axes.
        columns: of axes.
        size: width and height in inches.
        title: a line over all of it, at its left.
        keywords: of `matplotlib.figure.Figure.subplots`, as `sharex`, `squeeze` or `width_ratios`.

    Returns:
        The figure and its axes: one, or an array of them.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        return figure, figure.subplots(rows, columns, **keywords)


def plain(axes: Axes) -> Axes:
    """Leaves of a frame what carries a scale, and draws faint lines to read heights by; returns the axes."""
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def color(number: int) -> str:
    """The colour of the n-th of several things, from the first again after the last."""
    return COLORS[number % len(COLORS)]


def shade(share: Any) -> Any:
    """Colours, dark blue to yellow, of shares in [0, 1]: for things that have an order."""
    return matplotlib.colormaps["cividis"](share)


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a picture, in the format of its suffix, PNG without one, in one step: after a kill the file is the old
    one or the new one. Folders that are not there are made.

    Raises:
        OSError: it cannot be written.
        ValueError: matplotlib does not know the suffix.
    """
    path, picture = Path(path), io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower() or "png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture.getvalue())


def show(figure: Figure) -> None:
    """Shows a figure under the cell of a notebook; elsewhere it does nothing."""
    if notebook := sys.modules.get("IPython.display"):
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=110)
        notebook.display(notebook.Image(image.getvalue()))


def play(figure: Figure, draw: Callable[[int], Any], frames: int, interval: float = 120.0) -> None:
    """Shows an animation, with buttons and a slider, under the cell of a notebook; elsewhere it does nothing.

    Args:
        figure: the figure.
        draw: changes it to what frame n shows.
        frames: how many there are.
        interval: milliseconds between them.
    """
    if notebook := sys.modules.get("IPython.display"):
        FigureCanvasAgg(figure)
        animation = FuncAnimation(figure, lambda n: (draw(n), [])[1], frames=frames, interval=interval)
        notebook.display(notebook.HTML(animation.to_jshtml()))
