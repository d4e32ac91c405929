"""Text from a trained character model, and a picture of what its hyper cell did while the text was read.

    python experiments/sample_text.py runs/char_lm-quick --prime "The statement " --temperature 0.7
    python experiments/sample_text.py runs/char_lm-quick --dynamics dynamics.png

The text alone goes to stdout, so that it can be piped; everything else goes to stderr.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import char_lm_runs
import jax
import numpy as np
import tyro

from hyperjax import training
from hyperjax.recurrent import generate
from hyperjax.recurrent.dynamics import scale_changes

GATE_NAMES = {"i": "input gate i", "g": "candidate g", "f": "forget gate f", "o": "output gate o", "": "recurrent net"}
PICTURES = (".png", ".svg", ".pdf")
COLUMNS = 112  # of text side by side, over all panels
LONGEST = 1200  # characters in a picture
SIGNS = {" ": "\N{MIDDLE DOT}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW}"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to sample from, and how."""

    workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")] = (
        tyro.MISSING
    )  # folder of a run of char_lm.py, finished or not
    prime: str = ""  # text to go on from; empty starts from no text at all
    length: int = 300  # number of characters to draw
    temperature: float = 0.7  # divides the logits; 0 takes the most probable character, 1 samples the model as it is
    seed: int = 0  # of the draws
    dynamics: Path | None = None  # also draw how the generated scales change: the .png, .svg or .pdf to write
    data_dir: str | None = None  # folder or archive with the run's corpus, if it is no longer where the run found it


def check(config: Config) -> None:
    """Raises ValueError for a setting that makes no sense."""
    if config.length < 1:
        raise ValueError(f"--length is {config.length}, expected a whole number of at least 1")
    if not 0 <= config.temperature < math.inf:
        raise ValueError(
            f"--temperature is {config.temperature}, expected a finite number >= 0; 0 takes the most probable character"
        )
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"--seed is {config.seed}, expected a whole number from 0 to 2**32 - 1")
    path = config.dynamics
    if path is None:
        return
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"--dynamics is {path}, expected a file that ends in {', '.join(PICTURES)}; rename it")
    if not os.path.isdir(path.parent):
        raise ValueError(f"--dynamics is {path}, but there is no folder {path.parent}; create it first")
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--dynamics is {path}, which cannot be written; choose another file")


def draw(
    path: Path, symbols: Sequence[str], changes: dict[str, dict[str, np.ndarray]], prime: int, title: str, note: str
) -> None:
    """Draws a text once per gate, each character on the colour of how far the gate's scales moved there.

    Args:
        path: the picture to write.
        symbols: the text, a character each.
        changes: layer -> gate -> a distance per character.
        prime: how many characters were given; they are underlined.
        title, note: the two lines over the picture.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    panels = [(layer, gate) for layer, gates in changes.items() for gate in gates]
    across = min(2, len(panels))
    columns = COLUMNS // across
    places = lay_out(symbols, columns)
    lines = places[-1][0] + 1
    down = math.ceil(len(panels) / across)
    size, cell, row = 9.0, 9.0 * 0.0092, 9.0 * 0.0205  # points; inches of a cell
    wide, high = (columns + 1) * cell, lines * row
    left, gap, head, panel_head, foot = 0.4, 0.4, 0.72, 0.4, 0.95
    width = 2 * left + across * wide + (across - 1) * gap
    height = head + down * (high + panel_head) + foot

    values = np.concatenate([changes[layer][gate] for layer, gate in panels])
    norm = Normalize(0, max(float(np.percentile(values, 98)), 1e-12))
    # Perceptually uniform; without its black end, on which no two values can be told apart behind text.
    colours = LinearSegmentedColormap.from_list("dynamics", matplotlib.colormaps["magma_r"](np.linspace(0, 0.82, 256)))
    shown = drawable(symbols)
    figure = Figure(figsize=(width, height))
    for n, (layer, gate) in enumerate(panels):
        x = left + n % across * (wide + gap)
        y = height - head - (n // across + 1) * (high + panel_head)
        axes = figure.add_axes((x / width, y / height, wide / width, high / height))
        axes.set(xlim=(0, columns + 1), ylim=(lines, 0))
        axes.axis("off")
        prefix = f"layer {int(layer.removeprefix('layer_')) + 1}, " if len(changes) > 1 else ""
        axes.set_title(prefix + GATE_NAMES[gate], loc="left", fontsize=11, fontweight="bold", pad=5)
        grid = np.full((lines, columns + 1), np.nan)
        grid[tuple(np.transpose(places))] = changes[layer][gate]
        axes.imshow(
            np.ma.masked_invalid(grid), cmap=colours, norm=norm, extent=(0, columns + 1, lines, 0), aspect="auto"
        )
        axes.hlines(range(1, lines), 0, columns + 1, color="white", lw=1.4)
        for m, (line, column) in enumerate(places):
            ink = ink_on(colours(norm(changes[layer][gate][m])))
            faint = 0.55 if symbols[m] in SIGNS else 1.0
            style: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": size, "ha": "center", "va": "center"}
            axes.text(column + 0.5, line + 0.53, shown[m], color=ink, alpha=faint, parse_math=False, **style)
            if m < prime:
                axes.plot([column, column + 1], [line + 0.93] * 2, color="#0e7490", lw=1.8, solid_capstyle="butt")
    figure.text(left / width, 1 - 0.34 / height, title, fontsize=14, fontweight="bold", va="center")
    figure.text(left / width, 1 - 0.62 / height, note, fontsize=9.5, color="0.35", va="center")
    bar = figure.add_axes((left / width, 0.5 / height, min(wide, 4.5) / width, 0.13 / height))
    figure.colorbar(ScalarMappable(norm, colours), cax=bar, orientation="horizontal", extend="max")
    bar.tick_params(labelsize=8.5)
    moved = r"how far the generated scales moved at a character, $\Vert d_h(t) - d_h(t-1)\Vert$"
    bar.set_title(moved, loc="left", fontsize=9, pad=4)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=160, facecolor="white")
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); choose another file") from error


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
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    font = FT2Font(findfont("DejaVu Sans Mono"))
    shown = [SIGNS.get(symbol, symbol) for symbol in symbols]
    return [s if s.isprintable() and font.get_char_index(ord(s)) else "\N{REPLACEMENT CHARACTER}" for s in shown]


def ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever stands out more from a colour (the relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def main(argv: Sequence[str] | None = None) -> int:
    """Samples.

    Args:
        argv: the command line's arguments; by default those of the process.

    Returns:
        The exit status; 2 for bad input.
    """
    config = training.parse(Config, (), argv, description=__doc__, prog="sample_text.py")
    ours = training.bad_input(__file__), training.bad_input(char_lm_runs.__file__)
    with ours[0], ours[1], contextlib.redirect_stdout(sys.stderr):
        check(config)
        workdir, picture = config.workdir.expanduser(), config.dynamics
        run, corpus, model, restore = char_lm_runs.open_run(workdir, config.data_dir)
        if picture and model.cell in ("lstm", "ln_lstm"):
            raise ValueError(f"--dynamics needs a model with a hyper cell, and {workdir} holds {run.model}; drop it")
        prime = corpus.encode(config.prime)
        params, step = restore()
    read = corpus.decode(prime)
    if read != config.prime:
        char_lm_runs.tell(f"the prime has characters that {corpus.name} has not, read as the unknown symbol: {read!r}")
    drawn = generate(model, params, prime, config.length, jax.random.key(config.seed), config.temperature)
    ids = np.concatenate([prime, np.asarray(drawn)])
    training.say(corpus.decode(ids))
    if picture:
        # The model reads "no symbol" before a text; without it the first character would show the start-up jump.
        changes = {
            layer: {gate: np.asarray(d_N)[1 : LONGEST + 1] for gate, d_N in gates.items()}
            for layer, gates in scale_changes(model, params, np.concatenate([[-1], ids])).items()
        }
        note = f"{run.model}, {run.units} units, step {step:,} on {corpus.name}; temperature {config.temperature:g}"
        note += "; the given text is underlined" if len(prime) else ""
        if len(ids) > LONGEST:
            note += f"; first {LONGEST:,} of {len(ids):,} characters"
        kind = "HyperRNN" if model.cell == "hyper_rnn" else "HyperLSTM"
        title = f"How much the {kind} changes its own weights, character by character"
        with training.bad_input(__file__):
            draw(picture, [corpus.symbols[n] for n in ids[:LONGEST]], changes, len(prime), title, note)
        char_lm_runs.tell(f"drew {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
