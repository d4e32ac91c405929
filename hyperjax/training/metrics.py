"""What a run writes down: JSON lines that survive a kill, a summary, and a picture of the curves."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST = 1e30  # of what is drawn or averaged


class JsonLines:
    """An append-only file of JSON objects, each with a `step`.

    Opening it for a run that resumes at step s drops what comes after s, and the torn line that a kill may have
    left: those lines are written again. Values that a rerun repeats to the bit belong in one file (metrics), times
    in another.

    Args:
        path: the file; created if absent.
        step: the step that the run resumes from; 0 starts afresh.

    Raises:
        ValueError: a line before the last is not a JSON object with a step, or the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike, step: int):
        self.path = Path(path)
        keep = 0
        if self.path.exists():
            for row, end in _rows(self.path):
                if row["step"] > step:
                    break
                keep = end
        try:
            self._file = self.path.open("ab", buffering=0)  # nothing is left to fail when it is closed
            self._file.truncate(keep if step else 0)
        except OSError as error:
            raise ValueError(f"cannot write {self.path} ({error.strerror}); choose another --workdir") from error

    def write(self, step: int, **values: float | str) -> None:
        """Appends a line; NaN and infinity are refused with a ValueError."""
        line = (json.dumps({"step": step, **values}, allow_nan=False) + "\n").encode()
        with self._named():
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Returns once every line is on the disk, so that no checkpoint is ahead of its metrics."""
        with self._named():
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Puts the file's name into an OSError."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_lines(folder: str | os.PathLike, step: int, *names: str) -> list[JsonLines]:
    """Opens `metrics.jsonl` and `timings.jsonl` of a folder, or the files of these names, all or none.

    Args:
        folder: where they are.
        step: as of `JsonLines`.
        names: without their suffix.

    Returns:
        The files.

    Raises:
        ValueError: as `JsonLines`.
    """
    with contextlib.ExitStack() as stack:
        paths = [Path(folder) / f"{name}.jsonl" for name in names or ("metrics", "timings")]
        files = [stack.enter_context(JsonLines(path, step)) for path in paths]
        stack.pop_all()
    return files


def _rows(path: Path):
    """Yields each row of a file and the offset where it ends; a torn last line ends the iteration."""
    end = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not line.endswith(b"\n") or type(row["step"]) is not int:
                raise ValueError("torn")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            if number == len(lines):
                return
            raise ValueError(
                f"line {number} of {path} is damaged, expected a JSON object with a step; restore the file, or choose "
                "another --workdir"
            ) from None
        end += len(line)
        yield row, end


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a file that `JsonLines` wrote.

    Args:
        path: the file.

    Returns:
        Its rows, in order; without the last line if that is torn.

    Raises:
        ValueError: a line before the last is damaged.
    """
    return [row for row, _ in _rows(Path(path))]


def series(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Returns (step, value) of the rows whose `key` is a finite number, so that nothing else is ever computed with."""
    found = [(row["step"], row[key]) for row in rows if type(row.get(key)) in (int, float)]
    return [(step, float(value)) for step, value in found if abs(value) < LARGEST]


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces a file in one step: after a kill it holds the old text or the new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Replaces a file in one step; see `write_text`."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Replaces a JSON file in one step; see `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_curves(metrics: str | os.PathLike, path: str | os.PathLike, *, title: str = "", **keywords: Any) -> None:
    """Draws training and validation curves over steps.

    Args:
        metrics: the file of metrics, written by `JsonLines`.
        path: the picture to write.
        title: one line over it.
        keywords: of `hyperjax.plotting.plot_curves`: keys of the curves, and what they show.
    """
    from hyperjax import plotting

    figure, axes = plotting.subplots(title=title)
    plotting.plot_curves(axes, read_lines(metrics), **keywords)
    plotting.save(figure, path)
