"""The pictures of dynamic_pruning.py.

G groups of positions, U units of a layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pruning_report import Trained, compute_by_position
from text_tasks import Characters, Task

from hyperjax.transformer import Config


def draw(
    trained: Sequence[Trained], times: Mapping[str, dict[str, list[float]]], task: Task, dense: Config, folder: Path
) -> None:
    """Writes the pictures; of what opens where, those of the first seed."""
    by_label: dict[str, list[Trained]] = {}
    for each in trained:
        by_label.setdefault(each.label, []).append(each)
    points: dict[str, list] = {each.name: [] for each in trained}
    timed: dict[str, list] = {each.name: [] for each in trained}  # one without times keeps the method's colour
    for label, (first, *others) in by_label.items():
        found = [first.found, *(other.found for other in others)]
        quality = [one.quality for one in found]
        points[first.name].append(([one.share for one in found], quality))
        if "ms_b32" in times[label]:
            timed[first.name].append((times[label]["ms_b32"], quality))
    label = "test bits per character" if task.unit == "bpc" else "test error"
    share = "share of the dense network's operations"
    draw_tradeoff(points, folder / "flops.png", share, label, f"{task.name}: quality against operations")
    options = ("ms for 32 samples", label, f"{task.name}: quality against time")
    if any(timed.values()):
        draw_tradeoff(timed, folder / "time.png", *options)
    firsts = {label: seeds[0] for label, seeds in by_label.items()}
    openness = {label: one.found.openness for label, one in firsts.items() if "random" not in label}
    draw_openness(openness, task.groups, folder / "open.png", f"What opens for which input, {task.name}")
    if isinstance(task, Characters):
        windows = (256 // task.length or 1, task.length)
        tokens = np.asarray(task.corpus.test[: windows[0] * windows[1]], np.int32).reshape(windows)
        text = task.corpus.decode(tokens.reshape(-1))
        texts = {
            label: compute_by_position(one.model, one.params, tokens, task, dense).reshape(-1)
            for label, one in firsts.items()
            if one.name in ("layers", "mod", "token", "sequence")
        }
        draw_compute(texts, text, folder / "compute.png", "Compute by character")


def draw_tradeoff(points: Mapping[str, list], path: Path, xlabel: str, ylabel: str, title: str) -> None:
    """Writes the picture of quality against cost."""
    from hyperjax import plotting

    figure, axes = plotting.subplots(size=(8.0, 4.6), title=title)
    plotting.plot_tradeoff(axes, points, xlabel, ylabel)
    plotting.save(figure, path)


def draw_openness(found: Mapping[str, dict[str, np.ndarray]], groups: tuple[str, ...], path: Path, title: str) -> None:
    """Writes the picture of which units are open for which inputs, a row of axes for each network and kind of unit."""
    from hyperjax import plotting

    rows = [(name, kind, part) for name, kinds in found.items() for kind, part in kinds.items()]
    if not rows:
        return
    figure, panels = plotting.subplots(len(rows), 1, (9.0, 0.9 + 1.25 * len(rows)), title, squeeze=False)
    for axes, (name, kind, part) in zip(panels[:, 0], rows, strict=True):
        layers, units = part.shape[1:]
        plotting.plot_utilisation(axes, part.reshape(len(groups), -1), groups, [""] * (layers * units))
        axes.set_xticks([(l + 0.5) * units - 0.5 for l in range(layers)], [f"layer {l + 1}" for l in range(layers)])
        for l in range(1, layers):
            axes.axvline(l * units - 0.5, color="white", linewidth=1.5)
        axes.set_title(f"{name.replace('_', ' ')}: {kind}", loc="left", fontsize=9)
    figure.colorbar(axes.images[0], ax=figure.axes, label="share of positions that compute it", shrink=0.6)
    plotting.save(figure, path)


def draw_compute(texts: Mapping[str, np.ndarray], text: str, path: Path, title: str) -> None:
    """Writes the picture of compute by character, for each network."""
    from hyperjax import plotting

    if not texts:
        return
    width, height = plotting.text_size(text, 96)
    size = (width + 1.4, 0.5 + len(texts) * (0.4 + height))
    figure, panels = plotting.subplots(len(texts), 1, size, title, squeeze=False)
    limits = min(map(np.min, texts.values())), max(map(np.max, texts.values()))  # of all, so that they compare
    for axes, (name, compute) in zip(panels[:, 0], texts.items(), strict=True):
        plotting.plot_text(axes, text, compute, columns=96, limits=limits)
        axes.set_title(f"{name.replace('_', ' ')}", loc="left", fontsize=9)
    figure.colorbar(axes.images[0], ax=panels, label="share of dense", shrink=0.9, pad=0.01)
    plotting.save(figure, path)
