"""Pictures of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from hyperjax.plotting.base import COLORS, color, plain
from hyperjax.training import series


def plot_curves(
    axes: Axes,
    rows: list[dict[str, Any]],
    *,
    train: str = "bpc",
    valid: str = "valid_bpc",
    label: str = "bits per character",
) -> Axes:
    """Draws training and validation curves over steps, with the best, lowest validation value marked.

    Args:
        axes: to draw on.
        rows: the lines of a file of metrics, as from `hyperjax.training.read_lines`.
        train: key of the training curve.
        valid: key of the validation curve.
        label: what the vertical axis shows, with its unit.

    Returns:
        The axes; a curve without a point is left out.
    """
    curves: tuple[tuple[str, str, dict[str, Any]], ...] = (
        (train, "train", {"color": "#9db4c8", "lw": 1.6}),
        (valid, "validation", {"color": COLORS[1], "lw": 2, "marker": "o", "ms": 4.5, "mec": "white"}),
    )
    for key, name, style in curves:
        points = series(rows, key)
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), label=name, **style)
        if key == valid:
            step, best = min(points, key=lambda point: point[1])
            axes.axhline(best, color=style["color"], lw=0.8, ls=":", zorder=0)
            axes.annotate(
                f"best {best:.3f} at step {step:,}",
                (0.99, best),
                (0, -14),
                ("axes fraction", "data"),
                "offset points",
                ha="right",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
            )
    seen = sorted(value for key in (train, valid) for _, value in series(rows, key))
    if seen:  # the first steps are far above all others and would flatten the rest
        top = seen[min(len(seen) - 1, int(0.98 * len(seen)))]
        low, span = seen[0], max(top - seen[0], 1e-3)
        axes.set_ylim(low - 0.13 * span, top + 0.08 * span)
        axes.legend(frameon=False, loc="upper right")
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return plain(axes)


def plot_losses(axes: Axes, losses: Mapping[str, Sequence[float] | np.ndarray], *, window: int = 25) -> Axes:
    """Draws the loss of every step, faint, and its mean over a window, for one or several networks.

    Args:
        axes: to draw on.
        losses: [steps] by name; a name that is empty is not in the legend.
        window: how many steps a mean is over, at most all of them.

    Returns:
        The axes.

    Raises:
        ValueError: a network has no loss, or the window is below 1 step.
    """
    if window < 1:
        raise ValueError(f"window is {window}, expected a number of steps of at least 1")
    for number, (name, values) in enumerate(losses.items()):
        values, hue = np.asarray(values), color(number)
        if not len(values):
            raise ValueError(f"{name!r} has no loss, expected one for each step")
        width = min(window, len(values))
        smooth = np.convolve(values, np.full(width, 1 / width), "valid")
        axes.plot(values, color=hue, lw=0.5, alpha=0.25)
        axes.plot(np.arange(width - 1, len(values)), smooth, color=hue, lw=2, label=name or None)
    axes.set(xlabel="step", ylabel="loss")
    if any(losses):
        axes.legend(frameon=False)
    return plain(axes)
