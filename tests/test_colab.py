"""The notebooks: each is what its text makes, and runs from top to bottom without an error or a warning."""

import importlib.util
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "colab"
# By its path: on the list of folders to import from, the notebooks' texts would hide scripts of the same names.
spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
SOURCES, made, written = make.SOURCES, make.made, make.written
PICTURES = 4  # at least


def test_there_is_a_notebook_for_each_text():
    assert [path.stem for path in SOURCES] == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_what_its_text_makes(source):
    kept = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert kept == written(made(source)), f"make it again: python colab/make.py {source.stem}"
    notebook = nbformat.reads(kept, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert f"colab/{source.stem}.ipynb" in notebook.cells[0].source  # the badge
    assert 'find_spec("google.colab")' in notebook.cells[1].source
    assert "## Exercises" in notebook.cells[-1].source


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(source, monkeypatch):
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):  # as whoever opens it would run it
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = made(source)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES
