"""Pictures of routing: who reads whom, gates over time, and quality against the size that is served.

I readers, J sources of a connection, T tasks, S seeds, n logged steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from hyperjax.plotting.base import COLORS, GREY, INK, MARKERS, PALE, color, plain
from hyperjax.routing.pathways import trace
from hyperjax.routing.snr import SNR, normalise, served_gates
from hyperjax.routing.towers import tower_widths

HEIGHT, INPUT = 0.34, 0.3  # height of a box, and where the input is: levels are 1 apart, the first at 1


def plot_routing(axes: Axes, model: SNR, variables: Mapping[str, Any]) -> Axes:
    """Draws a trained network from its input, below, to the towers: what is left of it, and which tasks use what.

    A connection is the thicker and darker the larger its gate, and absent where that is 0; it has a task's colour
    where the gate is that task's own. The stripe of a sub-network shows the tasks that use it, the number in it its
    widths. Dashed is what no path from the input to a task uses: `compact` cuts it out.

    Args:
        axes: to draw on.
        model: a network with gates per connection or task.
        variables: its variables, concrete arrays.

    Returns:
        The axes.

    Raises:
        ValueError: the gates depend on the sample, or there are none.
    """
    gates, paths, levels = served_gates(model, variables), trace(model, variables), normalise(model.levels)
    names = list(tower_widths(model.towers, model.tasks))
    used = _users(model, paths.reads, [len(level) for level in levels])
    span = max(len(names), *map(len, levels))
    places = [_places(len(level), span) for level in [*levels, names]]
    widths = [min(0.8, 0.8 * span / len(level)) for level in levels] + [min(1.5, 0.8 * span / len(names))]

    axes.set(xticks=[], xlim=(-0.05, span + 0.05), ylim=(0, len(levels) + 1.3))
    _box(axes, span / 2, INPUT, 0.92 * span, "input", face="white")
    for i, x in enumerate(places[0]):
        dead = not used[0][i]
        style: dict[str, Any] = {"color": GREY, "ls": (0, (3, 3)), "lw": 0.7} if dead else {"color": INK, "lw": 0.9}
        axes.plot([x, x], [INPUT + HEIGHT / 2, 1 - HEIGHT / 2], **style, zorder=1)
    for level, z in enumerate(gates.values()):
        _connections(axes, level, z, paths.reads[level], places, level == len(levels) - 1)
    for level, subs in enumerate(levels):
        for i, sub in enumerate(subs):
            label = "-".join(map(str, sub))
            _box(axes, places[level][i], level + 1, widths[level], label, dead=not used[level][i])
            _stripe(axes, places[level][i], level + 1, widths[level], sorted(used[level][i]))
    for t, name in enumerate(names):
        lost = name in paths.lost
        label = f"{name}, lost" if lost else name
        _box(axes, places[-1][t], len(levels) + 1, widths[-1], label, dead=lost, face=color(t))

    rows = ["", *(f"level {level}" for level in range(len(levels))), "tasks"]
    axes.set_yticks([INPUT, *range(1, len(rows))], rows, fontsize=9, color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _routing_legend(axes)
    return axes


def plot_gates(
    axes: Axes, steps: Sequence[int], history: Mapping[str, Any], *, threshold: float = 0.0, label: str = "gate"
) -> Axes:
    """Draws every gate over the steps of training, thin, and the share of the open ones, bold.

    Args:
        axes: to draw on.
        steps: the n steps that were logged.
        history: by level, [n, I, J] or [n, T, I, J]: the deterministic gates, or the probabilities that they are open.
        threshold: a connection counts as open above it.
        label: what the values are.

    Returns:
        The axes.

    Raises:
        ValueError: there is no step or no level, or a level has another number of steps.
    """
    if not len(steps):
        raise ValueError("no step was logged, expected one or more")
    flat = {level: np.asarray(values).reshape(len(values), -1) for level, values in history.items()}
    wrong = [level for level, values in flat.items() if len(values) != len(steps)]
    if not flat or wrong:
        found = f"{wrong[0]!r} has {len(flat[wrong[0]])} steps" if wrong else "the history has no level"
        raise ValueError(f"{found}, expected gates [{len(steps)}, ...] of every level: as many as there are steps")
    for number, (level, values) in enumerate(flat.items()):
        name = f"{level.replace('_', ' ')}, {values.shape[1]} gates"
        alpha = float(np.clip(12 / values.shape[1], 0.3, 0.7))
        axes.plot(steps, values, color=color(number), lw=0.7, alpha=alpha)
        axes.plot([], [], color=color(number), lw=1.6, label=name)
    share = (np.concatenate(list(flat.values()), 1) > threshold).mean(1)
    axes.plot(steps, share, color="white", lw=5, zorder=3)
    axes.plot(steps, share, color="black", lw=2.4, zorder=4, label=f"share open, {100 * share[-1]:.0f} % in the end")
    axes.set(xlabel="step", ylabel=f"{label}; share of open gates", ylim=(-0.02, 1.02))
    axes.margins(x=0.01)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return plain(axes)


def plot_quality(
    axes: Axes,
    points: Mapping[str, Sequence[tuple[Any, Any]]],
    *,
    label: str,
    size_label: str = "parameters served",
) -> Axes:
    """Draws quality against size: a line for each kind of network, means and standard deviations over seeds.

    Args:
        axes: to draw on.
        points: by the network's name, for each budget: the numbers of parameters that are served, one or [S], and the
            scores [S]. NaN, the score of a run that failed, is left out; so is a budget of nothing else.
        label: the score, with its unit and its better direction.
        size_label: what the sizes are.

    Returns:
        The axes.

    Raises:
        ValueError: there are no points, a network has none, a size is not above 0, or there are not as many sizes.
    """
    if not points or not all(points.values()):
        empty = next((name for name, budgets in points.items() if not budgets), None)
        raise ValueError(f"{'there are' if empty is None else f'{empty!r} has'} no points, expected one or more")
    for number, (name, budgets) in enumerate(points.items()):
        rows = [found for sizes, scores in budgets if (found := _moments(name, sizes, scores)) is not None]
        if not rows:
            raise ValueError(f"{name!r} has no score that is a number, expected one or more; leave it out")
        x, x_error, y, y_error = np.array(sorted(rows)).T
        axes.errorbar(
            x,
            y,
            xerr=x_error if x_error.any() else None,
            yerr=y_error if y_error.any() else None,
            label=name,
            color=color(number),
            marker=MARKERS[number % len(MARKERS)],
            markersize=6.5,
            markeredgecolor="white",
            linewidth=1.6,
            elinewidth=1.1,
            capsize=2.5,
        )
    axes.set_xscale("log")
    axes.set(xlabel=size_label, ylabel=label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=9)
    return plain(axes)


def _moments(name: str, sizes: Any, scores: Any) -> tuple[float, ...] | None:
    """Means and standard deviations of one budget's sizes and scores, or None if no score is a number."""
    x, y = (np.atleast_1d(np.asarray(values, np.float64)) for values in (sizes, scores))
    if not np.all(x > 0):
        raise ValueError(f"{name!r} has the size {x.min():g}, expected a number of parameters above 0")
    if len(x) not in (1, len(y)):
        raise ValueError(f"{name!r} has {len(x)} sizes and {len(y)} scores, expected one size, or one for each score")
    finite = np.isfinite(y)
    x, y = np.broadcast_to(x, y.shape)[finite], y[finite]
    if not len(y):
        return None
    return float(x.mean()), float(x.std(ddof=len(x) > 1)), float(y.mean()), float(y.std(ddof=len(y) > 1))


def _places(number: int, span: int) -> list[float]:
    return [span * (i + 0.5) / number for i in range(number)]


def _users(model: SNR, reads: Any, sizes: Sequence[int]) -> list[list[set[int]]]:
    """By level and sub-network, the tasks that it has a path to."""
    used: list[list[set[int]]] = [[set() for _ in range(size)] for size in sizes]
    for level in range(len(sizes) - 1, -1, -1):
        for stream, readers in enumerate(reads[level]):
            for i, sources in readers.items():
                for j in sources:
                    if level == len(sizes) - 1:
                        used[level][j].add(i)
                    else:
                        used[level][j] |= {stream} if model.per == "task" else used[level + 1][i]
    return used


def _connections(axes: Axes, level: int, z: np.ndarray, reads: Any, places: Any, to_towers: bool) -> None:
    """Lines from sub-networks j to their readers i; those of several tasks run side by side."""
    streams = len(reads)
    for s, readers in enumerate(reads):
        z_ij = z if z.ndim == 2 else z[s]
        shift = 0.0 if to_towers else 0.09 * (s - (streams - 1) / 2)
        for i, j in zip(*np.nonzero(z_ij), strict=True):
            if to_towers and streams > 1 and i != s:
                continue
            value = float(z_ij[i, j])
            style: dict[str, Any] = {"color": GREY, "ls": (0, (3, 3)), "lw": 0.6, "alpha": 0.6, "zorder": 1}
            if j in readers.get(int(i), ()):
                hue = color(int(i)) if to_towers else color(s) if streams > 1 else INK
                style = {"color": hue, **_weight(value), "zorder": 2}
            x = [places[level][j] + shift, places[level + 1][i] + shift]
            axes.plot(x, [level + 1 + HEIGHT / 2, level + 2 - HEIGHT / 2], solid_capstyle="butt", **style)


def _weight(value: float) -> dict[str, Any]:
    return {"lw": 0.7 + 1.9 * value, "alpha": 0.35 + 0.5 * value}


def _box(axes: Axes, x: float, y: float, width: float, label: str, *, dead: bool = False, face: str = PALE) -> None:
    text = INK if np.dot(to_rgb(face), (0.299, 0.587, 0.114)) > 0.55 else "white"
    style: dict[str, Any] = {"facecolor": face, "edgecolor": face if face in COLORS else INK, "linewidth": 0.9}
    if dead:
        text, style = GREY, {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.9, "linestyle": (0, (3, 2))}
    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x - width / 2, y - HEIGHT / 2), width, HEIGHT, boxstyle=shape, zorder=3, **style))
    points = 72 * axes.bbox.width / axes.figure.dpi * width / np.ptp(axes.get_xlim())
    size = min(8.0, points / (0.65 * len(label)))  # a letter is about 0.65 times as wide as the font is high
    axes.text(x, y, label, ha="center", va="center", fontsize=size, color=text, zorder=5)


def _stripe(axes: Axes, x: float, y: float, width: float, tasks: Sequence[int]) -> None:
    """The colours of the tasks, along the lower edge of a box."""
    inner = 0.86 * width
    for n, t in enumerate(tasks):
        left = x - inner / 2 + n * inner / len(tasks)
        bar = Rectangle((left, y - 0.42 * HEIGHT), inner / len(tasks), 0.16 * HEIGHT, color=color(t), lw=0, zorder=4)
        axes.add_patch(bar)


def _routing_legend(axes: Axes) -> None:
    lines = [Line2D([], [], color=INK, **_weight(value), label=f"gate {value:g}") for value in (0.2, 0.6, 1.0)]
    lines.append(Line2D([], [], color=GREY, ls=(0, (3, 3)), lw=0.9, label="on no path"))
    axes.legend(handles=lines, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=4)
