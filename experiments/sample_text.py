"""Text from a trained character model, and a picture of what its hyper cell did while the text was read.

    python experiments/sample_text.py runs/char_lm-quick --prime "The statement " --temperature 0.7
    python experiments/sample_text.py runs/char_lm-quick --dynamics dynamics.png

The text alone goes to stdout, so that it can be piped; everything else goes to stderr.
"""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

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
POINTS = 9.0  # size of a character


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
    from hyperjax import plotting

    panels = [(layer, gate) for layer, gates in changes.items() for gate in gates]
    across = min(2, len(panels))
    columns, down = COLUMNS // across, math.ceil(len(panels) / across)
    width, height = plotting.text_size(symbols, columns, POINTS)
    size = (across * (width + 0.2) + 0.2, down * (height + 0.35) + 1.1)
    figure, every = plotting.subplots(down, across, size, f"{title}\n{note}", squeeze=False)
    top = float(np.percentile(np.concatenate([changes[layer][gate] for layer, gate in panels]), 98))
    for axes in every.ravel()[len(panels) :]:
        axes.set_axis_off()
    for axes, (layer, gate) in zip(every.ravel(), panels, strict=False):
        given = changes[layer][gate]
        plotting.plot_text(axes, symbols, given, columns=columns, limits=(0.0, top), given=prime, size=POINTS)
        prefix = f"layer {int(layer.removeprefix('layer_')) + 1}, " if len(changes) > 1 else ""
        axes.set_title(prefix + GATE_NAMES[gate], loc="left", fontsize=11, fontweight="bold")
    bar = figure.colorbar(axes.images[0], ax=every, orientation="horizontal", extend="max", shrink=0.5, aspect=40)
    bar.set_label(r"how far the generated scales moved at a character, $\Vert d_h(t) - d_h(t-1)\Vert$", fontsize=9)
    try:
        plotting.save(figure, path)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}); choose another file") from error


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
