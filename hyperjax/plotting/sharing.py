"""Pictures of sharing: how alike layers are, and which share; quality against unique parameters.

L layers, S seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hyperjax.plotting.base import COLORS, GREY, MARKERS, color, plain


def plot_groups(axes: Axes, similarity: np.ndarray, layer_map: Sequence[int]) -> Axes:
    """Draws a matrix of similarities [L, L] in [0, 1], and over it a square for each pair of layers that share weights,
    in the colour of their group.

    Args:
        axes: to draw on.
        similarity: [L, L].
        layer_map: of L layers.

    Returns:
        The axes; the matrix is its first image.

    Raises:
        ValueError: the matrix is not [L, L].
    """
    similarity, layers = np.asarray(similarity), len(layer_map)
    if not layers or similarity.shape != (layers, layers):
        raise ValueError(f"the matrix has shape {list(similarity.shape)} and the map {layers} layers, expected [L, L]")
    lowest = np.floor(10 * np.min(similarity)) / 10  # similar layers differ little
    axes.imshow(similarity, vmin=min(lowest, 0.9), vmax=1, cmap="Greys")
    shared = [n for n in dict.fromkeys(layer_map) if list(layer_map).count(n) > 1]
    for i in range(layers):
        for j in range(layers):
            if layer_map[i] == layer_map[j] and layer_map[i] in shared:
                hue = color(shared.index(layer_map[i]))
                box = Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, edgecolor=hue, linewidth=2)
                axes.add_patch(box)
    axes.set_xticks(range(layers), [str(l + 1) for l in range(layers)], fontsize=8)
    axes.set_yticks(range(layers), [str(l + 1) for l in range(layers)], fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    return axes


def plot_networks(axes: Axes, points: Mapping[str, tuple[float, Any]], xlabel: str, ylabel: str) -> Axes:
    """Draws a marker for each network, with its deviation over seeds.

    A name that begins with "to_", of one converted from a teacher, is filled, in the colour of the name after it;
    "random" is grey.

    Args:
        axes: to draw on.
        points: by name: parameters, and qualities [S].
        xlabel: what the first are.
        ylabel: what the qualities are.

    Returns:
        The axes.
    """
    kinds = list(dict.fromkeys(name.removeprefix("to_") for name in points))
    for name, (x, quality) in points.items():
        number, filled = kinds.index(name.removeprefix("to_")), name.startswith("to_")
        hue, quality = GREY if name.removeprefix("to_") == "random" else color(number), np.asarray(quality)
        axes.errorbar(
            [x],
            [quality.mean()],
            yerr=[quality.std(ddof=1)] if len(quality) > 1 else None,
            color=hue,
            marker=MARKERS[(number // len(COLORS) + number) % len(MARKERS)],
            markerfacecolor=hue if filled else "white",
            markersize=7,
            capsize=2,
            linestyle="none",
            label=name.replace("_", " "),
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    markers = [handle[0] for handle in handles]  # type: ignore[index]
    axes.legend(markers, labels, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes
