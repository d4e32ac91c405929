"""Pictures of hypernetworks: similar embeddings, the kernels they draw, tasks learned one after another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hyperjax.hypernet.continual import continual_scores
from hyperjax.hypernet.diagnostics import embedding_similarity


def plot_similarity(axes: Axes, table: Any, names: Sequence[str] | None = None) -> Axes:
    """Draws the cosine similarity of all pairs of embeddings as a heat map; for up to 12 of them with its values.

    Args:
        axes: to draw on.
        table: [T, E], as from `hyper.embeddings(variables)`.
        names: of the T tasks, drawn for up to 60; by default their numbers.

    Returns:
        The axes, whose image is `axes.images[0]`.

    Raises:
        ValueError: not one name for each row, or as in `hyperjax.hypernet.embedding_similarity`.
    """
    similarity = np.asarray(embedding_similarity(table))
    tasks = len(similarity)
    if names is not None and len(names) != tasks:
        raise ValueError(f"there are {len(names)} names for {tasks} embeddings, expected one for each")
    axes.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    for (i, j), value in np.ndenumerate(similarity) if tasks <= 12 else ():
        ink = "white" if abs(value) > 0.6 else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    if names is not None and tasks <= 60:
        axes.set_xticks(range(tasks), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(tasks), names)
        axes.tick_params(labelsize=9 if tasks <= 20 else 5)
    else:
        axes.locator_params(integer=True, min_n_ticks=1)
    axes.set(xlabel="task", ylabel="task")
    return axes


def plot_kernel(axes: Axes, kernel: Any, most: int = 16) -> Axes:
    """Draws the kernel of a convolution as a grid: a row for each input channel, a column for each output channel.

    Args:
        axes: to draw on.
        kernel: [h, w, in, out].
        most: channels that are drawn, of either.

    Returns:
        The axes, whose image is `axes.images[0]`.

    Raises:
        ValueError: the kernel has not four axes.
    """
    kernel = np.asarray(kernel, np.float32)
    if kernel.ndim != 4 or not kernel.size:
        raise ValueError(f"the kernel has shape {list(kernel.shape)}, expected [h, w, in, out]")
    kernel = kernel[:, :, :most, :most]
    h, w, rows, columns = kernel.shape
    grid = np.full((rows, h + 1, columns, w + 1), np.nan, np.float32)  # a gap after each kernel
    grid[:, :h, :, :w] = kernel.transpose(2, 0, 3, 1)
    bound = float(np.quantile(np.abs(kernel), 0.995)) or 1.0
    grid = grid.reshape(rows * (h + 1), columns * (w + 1))[:-1, :-1]
    axes.imshow(grid, cmap="PuOr", vmin=-bound, vmax=bound, interpolation="nearest")
    axes.set_xticks(np.arange(columns) * (w + 1) + (w - 1) / 2, [str(i + 1) for i in range(columns)], fontsize=7)
    axes.set_yticks(np.arange(rows) * (h + 1) + (h - 1) / 2, [str(i + 1) for i in range(rows)], fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="output channel", ylabel="input channel")
    return axes


def plot_accuracies(axes: Axes, matrix: np.ndarray, names: Sequence[str], lowest: float | None = None) -> Axes:
    """Draws an accuracy matrix, as `hyperjax.hypernet.continual.continual_scores` takes it, under what it comes to.

    Args:
        axes: to draw on.
        matrix: [T, T] of shares; NaN where nothing was measured.
        names: of the tasks, T.
        lowest: the accuracy of the darkest colour, in percent; by default the tens below the least, at most 90.

    Returns:
        The axes, whose image is `axes.images[0]`, in percent.

    Raises:
        ValueError: not one name for each task.
    """
    matrix = np.asarray(matrix, np.float64)
    if np.shape(matrix) != (len(names), len(names)):
        raise ValueError(f"the matrix has shape {list(np.shape(matrix))}, and there are {len(names)} names of tasks")
    low = min(10 * float(np.floor(10 * np.nanmin(matrix))), 90.0) if lowest is None else lowest
    axes.imshow(100 * matrix, cmap="cividis", vmin=low, vmax=100)
    for (row, column), value in np.ndenumerate(100 * matrix):
        if np.isfinite(value):
            ink = "white" if value < (low + 100) / 2 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    scores = continual_scores(matrix)
    found = f"{100 * scores['accuracy']:.1f} % in the end, {100 * scores['forgetting']:.1f} points forgotten"
    axes.set_title(found, loc="left", fontsize=10)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="tested in task", ylabel="after learning task")
    axes.spines[:].set_visible(False)
    return axes
