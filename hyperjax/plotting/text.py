"""A text on grounds of colour: what a network did at each character."""

import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font

SIGNS = {" ": "\N{MIDDLE DOT}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}"}
FONT = "DejaVu Sans Mono"
CELL, LINE = 0.0092, 0.0205  # inches a character is wide and a line high, for each point of the font


def plot_text(
    axes: Axes,
    text: Sequence[str],
    values: Sequence[float] | np.ndarray,
    *,
    columns: int = 64,
    limits: tuple[float, float] | None = None,
    given: int = 0,
    size: float = 8.0,
) -> Axes:
    """Writes a text whose characters lie on the darker a ground, the larger their values; lines break between words.

    Args:
        axes: to draw on; about `text_size(...)` inches large, for characters to fill their places.
        text: N characters.
        values: [N].
        columns: characters in a line.
        limits: values of the lightest and the darkest ground; by default the smallest and the largest value.
        given: how many characters at the start to underline.
        size: of the characters, in points.

    Returns:
        The axes, whose image is `axes.images[0]`.

    Raises:
        ValueError: there is no text, not one finite number for each character, or no column.
    """
    if not len(text) or len(text) != len(values):
        raise ValueError(f"{len(values)} numbers for {len(text)} characters, expected one for each, and at least one")
    values = np.asarray(values, np.float64)
    if columns < 1 or not np.isfinite(values).all():
        found = f"{columns} columns" if columns < 1 else f"{values[~np.isfinite(values)][0]} for a character"
        raise ValueError(f"{found}, expected at least 1 column and finite numbers")
    low, high = limits or (values.min(), values.max())
    norm = Normalize(low, high if high > low else low + 0.1 * (abs(low) or 1.0))
    # Perceptually uniform; without its black end, on which no two values can be told apart behind text.
    colors = LinearSegmentedColormap.from_list("text", matplotlib.colormaps["magma_r"](np.linspace(0, 0.82, 256)))
    places = lay_out(text, columns)
    lines = places[-1][0] + 1
    grid = np.full((lines, columns + 1), np.nan)
    grid[tuple(np.transpose(places))] = values
    edges = (0, columns + 1, lines, 0)
    axes.imshow(np.ma.masked_invalid(grid), cmap=colors, norm=norm, extent=edges, aspect=LINE / CELL)
    axes.hlines(range(1, lines), 0, columns + 1, color="white", lw=1.4)
    for n, ((line, column), sign) in enumerate(zip(places, drawable(text), strict=True)):
        axes.text(
            column + 0.5,
            line + 0.53,
            sign,
            color=ink_on(colors(norm(values[n]))),
            alpha=0.55 if text[n] in SIGNS else 1.0,
            family=FONT,
            fontsize=size,
            ha="center",
            va="center",
            parse_math=False,
        )
        if n < given:
            axes.plot([column, column + 1], [line + 0.93] * 2, color="#0e7490", lw=1.8, solid_capstyle="butt")
    axes.set_axis_off()
    return axes


def text_size(text: Sequence[str], columns: int, size: float = 8.0) -> tuple[float, float]:
    """Width and height in inches of axes on which `plot_text` fits."""
    lines = lay_out(text, columns)[-1][0] + 1 if len(text) else 1
    return (columns + 1) * size * CELL, lines * size * LINE


def lay_out(symbols: Sequence[str], columns: int) -> list[tuple[int, int]]:
    """The line and column of every character, wrapped between words; blanks may hang one column over the edge."""
    places: list[tuple[int, int]] = []
    line = column = 0
    for token in re.findall(r"\s|\S+", "".join(symbols)):
        edge = columns + token.isspace()
        if column and column + len(token) > edge:
            line, column = line + 1, 0
        for _ in token:
            if column == edge:
                line, column = line + 1, 0
            places.append((line, column))
            column += 1
        if token == "\n":
            line, column = line + 1, 0
    return places


def drawable(symbols: Sequence[str]) -> list[str]:
    """The characters as signs that the picture's font has; blanks become visible."""
    font = FT2Font(findfont(FONT))
    shown = [SIGNS.get(symbol, symbol) for symbol in symbols]
    return [s if s.isprintable() and font.get_char_index(ord(s)) else "\N{REPLACEMENT CHARACTER}" for s in shown]


def ink_on(color: Sequence[float]) -> str:
    """Black or white, whichever stands out more from a colour (the relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"
