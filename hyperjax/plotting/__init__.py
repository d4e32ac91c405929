"""The pictures that scripts and notebooks share.

Every figure is a function that draws on axes and returns them; where they stand, and what becomes of them, is the
caller's:

    from hyperjax import plotting

    figure, axes = plotting.subplots(size=(7.2, 5))
    plotting.plot_routing(axes, model, variables).set_title("digits, seed 0", loc="left")
    plotting.save(figure, "routing.png")  # or plotting.show(figure), in a notebook

Nowhere else is matplotlib imported. It is slow to load, so a script imports this package where it draws.
"""

from hyperjax.plotting.base import (
    COLORS,
    GREY,
    INK,
    MARKERS,
    PALE,
    color,
    plain,
    play,
    save,
    shade,
    show,
    subplots,
)
from hyperjax.plotting.hypernet import plot_accuracies, plot_kernel, plot_similarity
from hyperjax.plotting.pruning import plot_tradeoff, plot_utilisation
from hyperjax.plotting.routing import plot_gates, plot_quality, plot_routing
from hyperjax.plotting.sharing import plot_groups, plot_networks
from hyperjax.plotting.text import plot_text, text_size
from hyperjax.plotting.training import plot_curves, plot_losses

__all__ = [
    "COLORS",
    "GREY",
    "INK",
    "MARKERS",
    "PALE",
    "color",
    "plain",
    "play",
    "plot_accuracies",
    "plot_curves",
    "plot_gates",
    "plot_groups",
    "plot_kernel",
    "plot_losses",
    "plot_networks",
    "plot_quality",
    "plot_routing",
    "plot_similarity",
    "plot_text",
    "plot_tradeoff",
    "plot_utilisation",
    "save",
    "shade",
    "show",
    "subplots",
    "text_size",
]
