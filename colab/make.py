"""Makes the notebooks of this folder from their texts: `python colab/make.py`, or with names, for some of them.

A text in jupytext's percent format is what is written, read and compared; the notebook beside it, without outputs, is
what Colab opens. They could be paired instead, but then each notebook would hold random names of cells and whatever was
saved last.
"""

import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat

FOLDER = Path(__file__).parent
SOURCES = sorted(path for path in FOLDER.glob("*.py") if path != Path(__file__))


def made(source: Path) -> Any:
    """The notebook that a text makes; nothing in it depends on when it was made."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem}-{number}"
    notebook.metadata.pop("jupytext", None)
    return notebook


def written(notebook: Any) -> str:
    """As it is kept."""
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    for path in SOURCES:
        if path.stem in sys.argv[1:] or not sys.argv[1:]:
            path.with_suffix(".ipynb").write_text(written(made(path)), encoding="utf-8")
