"""Metrics for TensorBoard, beside the JSON lines, where it is installed."""

import importlib.util
from pathlib import Path
from typing import Any


class Board:
    """Writes scalars that TensorBoard shows; does nothing where the package `tensorboard` is not installed.

        with Board(workdir / "tensorboard") as board:
            board.write(step, {"loss": 0.5})

    A run that goes on adds a file; steps that it makes again have the values that they had.

    Args:
        folder: where the event files are put; made with the first of them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._installed = importlib.util.find_spec("tensorboard") is not None
        self._writer: Any = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a value of each name; what is not a number is left out."""
        if not self._installed:
            return
        if self._writer is None:
            from tensorboard.summary import Writer

            self._writer = Writer(str(self.folder))
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Returns when everything is on the disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
