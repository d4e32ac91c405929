"""Pictures of sharing: how alike layers are, and which share; quality against unique parameters.

Each draws on axes that the caller gives, and returns them. L layers, S seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hyperjax.plotting import COLORS, GREY, MARKERS


def plot_groups(axes: Any, similarity: np.ndarray, layer_map: Sequence[int]) -> Any:
    """Draws a matrix of similarities [L, L] in [0, 1], and over it a square for each pair of layers that share weights,
    in the colour of their group.

    Args:
        axes: to draw on.
        similarity: [L, L].
        layer_map: of L layers.

    Returns:
        The axes; the matrix is its first image.
    """
    from matplotlib.patches import Rectangle

    layers = len(layer_map)
    lowest = np.floor(10 * np.min(similarity)) / 10  # similar layers differ little
    axes.imshow(similarity, vmin=min(lowest, 0.9), vmax=1, cmap="Greys")
    shared = [n for n in dict.fromkeys(layer_map) if list(layer_map).count(n) > 1]
    for i in range(layers):
        for j in range(layers):
            if layer_map[i] == layer_map[j] and layer_map[i] in shared:
                color = COLORS[shared.index(layer_map[i]) % len(COLORS)]
                box = Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, edgecolor=color, linewidth=2)
                axes.add_patch(box)
    axes.set_xticks(range(layers), [str(l + 1) for l in range(layers)], fontsize=8)
    axes.set_yticks(range(layers), [str(l + 1) for l in range(layers)], fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    return axes


def plot_quality(axes: Any, points: Mapping[str, tuple[float, np.ndarray]], xlabel: str, ylabel: str) -> Any:
    """Draws a marker for each network, with its deviation over seeds; those converted from a teacher are filled.

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
        color = GREY if name.removeprefix("to_") == "random" else COLORS[number % len(COLORS)]
        axes.errorbar(
            [x],
            [quality.mean()],
            yerr=[quality.std(ddof=1)] if len(quality) > 1 else None,
            color=color,
            marker=MARKERS[(number // len(COLORS) + number) % len(MARKERS)],
            markerfacecolor=color if filled else "white",
            markersize=7,
            capsize=2,
            linestyle="none",
            label=name.replace("_", " "),
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    markers = [handle[0] for handle in handles]
    axes.legend(markers, labels, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes
