"""Metrics for TensorBoard, beside the JSON lines, where it is installed."""

import contextlib
import importlib.util
import socket
import time
from pathlib import Path
from typing import Any


class Board:
    """Writes scalars that TensorBoard shows; does nothing where the package `tensorboard` is not installed.

        with Board(workdir / "tensorboard") as board:
            board.write(step, {"loss": 0.5})

    A run that goes on adds a file; steps that it makes again have the values that they had. Where nothing can be
    written, it stops: it is a copy, and the run's own files say that a disk is full. (The package's own writer does it
    in a thread, which would print that failure in the middle of all else.)

    Args:
        folder: where the event files are put; made with the first of them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._on = importlib.util.find_spec("tensorboard") is not None
        self._file: Any = None
        self._records: Any = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a value of each name; what is not a number is left out."""
        if not self._on:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        try:
            if self._file is None:
                self._open()
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._add(Event(wall_time=time.time(), step=step, summary=scalar_pb(name, value)))
        except OSError:
            self._on = False
            self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = self._records = None

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = (self.folder / name).open("wb", buffering=0)
        self._records = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
