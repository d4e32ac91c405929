"""The pictures of share_layers.py: alike layers with the groups that were chosen, and quality against parameters."""

from pathlib import Path
from typing import Any

import numpy as np
from sharing_rows import cka_of
from text_tasks import Characters

from hyperjax.transformer import Config, Decoder


def draw(found: Any, summary: dict[str, Any], task: Characters, teachers: Any, sizes: Config, folder: Path) -> None:
    """Writes `cka.png`, of the first seed's teacher, and `params.png`."""
    from hyperjax import plotting

    searched = {
        name.removeprefix("to_"): rows[0][0].layer_map
        for name, rows in found.items()
        if name.startswith("to_") and rows[0][0].layer_map is not None
    }
    if teachers and searched:
        matrix = cka_of(Decoder(sizes), teachers[0], task.batch_at(10**6)["tokens"])
        columns = min(4, len(searched))
        lines = -(-len(searched) // columns)
        figure, panels = plotting.subplots(lines, columns, (2.6 * columns + 0.8, 2.7 * lines + 0.4), squeeze=False)
        every = panels.ravel()
        for axes, (name, layer_map) in zip(every, searched.items(), strict=False):
            image = plotting.plot_groups(axes, matrix, layer_map).images[0]
            axes.set_title(name, fontsize=10)
        for axes in every[len(searched) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=list(every), label="CKA", shrink=0.8)
        figure.suptitle(f"{task.name}: how alike the states after layers are, and what shares weights", fontsize=11)
        plotting.save(figure, folder / "cka.png")
    figure, axes = plotting.subplots(size=(8.0, 4.8), title=f"{task.name}: quality against parameters")
    points = {
        name: (summary[f"{name}_params_unique"], np.array([quality for *_, quality in rows]))
        for name, rows in found.items()
    }
    plotting.plot_networks(axes, points, "unique parameters", "test bits per character")
    plotting.save(figure, folder / "params.png")
