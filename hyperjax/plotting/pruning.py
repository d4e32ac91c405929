"""Pictures of pruning: quality against cost, and what opens for which input.

G groups of inputs, U units, S seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hyperjax.plotting.base import GREY, MARKERS, color, plain


def plot_tradeoff(
    axes: Axes, points: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]], xlabel: str, ylabel: str
) -> Axes:
    """Draws quality against cost: a marker for each budget, with deviations over seeds both ways, joined by method.

    Methods named "dense", "small", "thin" or "random..." are what the others are compared with: grey and dashed.

    Args:
        axes: to draw on.
        points: by method, for each budget: costs [S] and qualities [S]; a method without any keeps its colour free.
        xlabel: what the costs are.
        ylabel: what the qualities are.

    Returns:
        The axes.
    """
    learned = [name for name in points if not _reference(name)]
    lines: dict[str, Any] = {}  # without error bars, which would hide the markers in the legend
    for name, found in points.items():
        if not found:
            continue
        number = learned.index(name) if name in learned else [n for n in points if _reference(n)].index(name)
        hue = color(number) if name in learned else GREY
        marker = MARKERS[number % len(MARKERS)]
        x, y = ([float(np.mean(pair[i])) for pair in found] for i in (0, 1))
        dx, dy = ([_deviation(pair[i]) for pair in found] for i in (0, 1))
        lines[name.replace("_", " ")] = axes.errorbar(
            x,
            y,
            xerr=dx,
            yerr=dy,
            color=hue,
            marker=marker,
            markersize=6,
            markerfacecolor=hue if name in learned else "white",
            linewidth=1.2,
            elinewidth=1,
            capsize=2,
            linestyle="-" if name in learned else "--",
        )[0]
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    plain(axes)
    axes.legend(lines.values(), lines.keys(), fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes


def plot_utilisation(axes: Axes, openness: np.ndarray, groups: Sequence[str], units: Sequence[str]) -> Axes:
    """Draws how often each unit is open for each group of inputs, and writes "dead" over units that never are.

    Args:
        axes: to draw on.
        openness: [G, U], shares in [0, 1].
        groups: names of the groups.
        units: names of the units; an empty one is not written.

    Returns:
        The axes, whose image is `axes.images[0]`.

    Raises:
        ValueError: not one name for each group and each unit.
    """
    openness = np.asarray(openness)
    if openness.shape != (len(groups), len(units)):
        found = f"{len(groups)} groups and {len(units)} units"
        raise ValueError(f"openness has shape {list(openness.shape)} for {found}, expected [G, U]")
    axes.imshow(openness, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    named = [i for i, unit in enumerate(units) if unit]
    axes.set_xticks(named, [units[i] for i in named], fontsize=7)
    for unit in np.flatnonzero(openness.max(0) == 0):
        axes.text(
            float(unit), (len(groups) - 1) / 2, "dead", rotation=90, color="white", fontsize=6, ha="center", va="center"
        )
    axes.tick_params(length=0)
    return axes


def _reference(name: str) -> bool:
    return name in ("dense", "small", "thin") or name.startswith("random")


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
