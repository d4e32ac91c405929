"""Tables: a strict reader of comma-separated text, and an encoder whose categories are aligned by name.

N rows, B rows of a batch, p columns of numbers, m columns of categories, d features.
"""

import dataclasses
import functools
import gzip
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.data.download import one_line, user_path
from hyperjax.data.sources import DAMAGED, read_file

CHUNK = 4096
SHOWN = 5
LONGEST = 60


class Column(NamedTuple):
    """A column of text, each value once: row n holds `names[codes[n]]`."""

    codes: np.ndarray
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The columns of a file.

    Args:
        path: where they are from; line n + 1 of the file is row n.
        columns: text by name of the column, N rows each.
    """

    path: Path
    columns: dict[str, Column]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).codes)

    def numbers(self, name: str, least: float = -math.inf) -> np.ndarray:
        """Reads a column as numbers.

        Args:
            name: the column.
            least: the smallest number that it may hold.

        Returns:
            [N] float64, finite.

        Raises:
            ValueError: a value is no finite number, or below `least`.
        """
        codes, names = self.columns[name]
        values = np.array([_number(text) for text in names])
        wrong = ~(values >= least)
        if wrong.any():
            expected = "a number" if least == -math.inf else f"a number of at least {least:g}"
            self._refuse(name, wrong, f"{expected}; correct the line, or remove a header")
        return values[codes]

    def flags(self, name: str, meaning: Mapping[str, bool]) -> np.ndarray:
        """Reads a column as a binary label.

        Args:
            name: the column.
            meaning: whether each value that the column may hold is a yes.

        Returns:
            [N] int32 of 0 and 1.

        Raises:
            ValueError: the column holds another value.
        """
        codes, names = self.columns[name]
        unknown = np.array([text not in meaning for text in names])
        if unknown.any():
            self._refuse(name, unknown, f"one of {', '.join(map(repr, meaning))}; correct the line")
        return np.array([meaning[text] for text in names], np.int32)[codes]

    def _refuse(self, name: str, wrong: np.ndarray, expected: str) -> None:
        """Raises for the first row whose value is among the wrong ones, a mask of the column's names."""
        codes, names = self.columns[name]
        row = int(np.argmax(wrong[codes]))
        found = names[codes[row]]
        found = found if len(found) <= LONGEST else found[: LONGEST - 3] + "..."
        raise ValueError(f"{self.path}, line {row + 1}: {name} is {found!r}, expected {expected}")


def read_table(path: str | os.PathLike, columns: Sequence[str]) -> Table:
    """Reads comma-separated UTF-8 text without header or quotes; the spaces around a value do not count.

    Args:
        path: the file, plain or gzip.
        columns: names of all the columns, in the order of the file.

    Returns:
        The table.

    Raises:
        ValueError: the file is missing, empty, damaged or no UTF-8, or a line has another number of columns.
    """
    path = user_path(path)
    raw = read_file(path)
    if raw.startswith(b"\x1f\x8b"):
        try:
            raw = gzip.decompress(raw)
        except DAMAGED as error:
            raise ValueError(f"{path} is a damaged gzip file ({one_line(error)}); get it again") from error
    if raw.startswith(b"PK\x03\x04") or b"\0" in raw:
        raise ValueError(f"{path} is an archive or no text, expected lines of {len(columns)} columns; unpack it first")
    try:
        lines = raw.decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise ValueError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {error.start}; convert the file") from error
    if lines == [""]:
        raise ValueError(f"{path} is empty, expected lines of {len(columns)} columns; give the whole file")
    known: list[dict[str, int]] = [{} for _ in columns]
    codes = np.empty((len(columns), len(lines)), np.int32)
    for start in range(0, len(lines), CHUNK):  # a chunk at a time: all the fields at once would take a gigabyte
        rows = [line.split(",") for line in lines[start : start + CHUNK]]
        for number, row in enumerate(rows, start + 1):
            if len(row) != len(columns):
                found = f"line {number} has {len(row)} columns, expected {len(columns)}"
                raise ValueError(f"{path}, {found} ({columns[0]} to {columns[-1]}); correct the line")
        for code, seen, fields in zip(codes, known, zip(*rows, strict=True), strict=True):
            code[start : start + len(rows)] = [seen.setdefault(field.strip(), len(seen)) for field in fields]
    named = zip(columns, codes, known, strict=True)
    return Table(path, {name: Column(code, tuple(seen)) for name, code, seen in named})


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The categories that a column may hold, by name; number 0 stands for every other one.

    Args:
        names: categories 1 to K.
    """

    names: tuple[str, ...]

    @classmethod
    def fit(cls, column: Column, rows: np.ndarray) -> "Vocabulary":
        """Returns the vocabulary of the values in some rows, in alphabetical order."""
        return cls(tuple(sorted(column.names[code] for code in np.unique(column.codes[rows]))))

    def __len__(self) -> int:
        return 1 + len(self.names)

    def ids(self, column: Column, rows: np.ndarray) -> np.ndarray:
        """Returns the numbers of the categories in some rows, [B] int32 in [0, K]."""
        index = {name: number for number, name in enumerate(self.names, 1)}
        return np.array([index.get(name, 0) for name in column.names], np.int32)[column.codes[rows]]


@dataclasses.dataclass(frozen=True, eq=False)
class TableEncoder:
    """Rows as features: p standardised numbers, then a one-hot vector for each column of categories.

    All that it knows is fitted on the training rows, so that no other rows can move a feature.

    Args:
        numeric: the p columns of numbers, and the mean and standard deviation of each.
        log: those of them that become log(1 + x) first.
        vocabularies: of the m columns of categories.
    """

    numeric: dict[str, tuple[float, float]]
    log: frozenset[str]
    vocabularies: dict[str, Vocabulary]

    @classmethod
    def fit(
        cls, table: Table, rows: np.ndarray, numeric: Sequence[str], categorical: Sequence[str], log: Sequence[str] = ()
    ) -> "TableEncoder":
        """Fits an encoder.

        Args:
            table: the table.
            rows: numbers of the training rows, [B], one or more.
            numeric: the columns of numbers. One that is constant in training is shifted and not scaled.
            categorical: the columns of categories.
            log: the heavy-tailed columns among `numeric`, of numbers of at least 0.

        Returns:
            The encoder.

        Raises:
            ValueError: a column of numbers holds anything else.
        """
        moments = {}
        for name in numeric:
            values = _values(table, name, log)[rows]
            # The deviation of equal numbers is not always 0 but may be a rounding error, which is no scale.
            moments[name] = (float(values.mean()), float(values.std()) if np.ptp(values) > 0 else 1.0)
        return cls(moments, frozenset(log), {name: Vocabulary.fit(table.columns[name], rows) for name in categorical})

    @functools.cached_property
    def width(self) -> int:
        """Number of features d."""
        return len(self.numeric) + sum(map(len, self.vocabularies.values()))

    def transform(self, table: Table, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Turns rows into compact arrays, on the host.

        Args:
            table: the training table, or another one of the same columns.
            rows: numbers of the rows, [B].

        Returns:
            `numbers`, [B, p] float32, standardised, and `ids`, [B, m] int32, the features that are 1.

        Raises:
            ValueError: a column of numbers holds anything else.
        """
        numbers = np.empty((len(rows), len(self.numeric)), np.float32)
        for place, (name, (mean, std)) in enumerate(self.numeric.items()):
            numbers[:, place] = (_values(table, name, self.log)[rows] - mean) / std
        ids, first = np.empty((len(rows), len(self.vocabularies)), np.int32), len(self.numeric)
        for place, (name, vocabulary) in enumerate(self.vocabularies.items()):
            ids[:, place] = first + vocabulary.ids(table.columns[name], rows)
            first += len(vocabulary)
        return {"numbers": numbers, "ids": ids}

    def encode(self, features: dict[str, jax.Array]) -> jax.Array:
        """Turns what `transform` returned, or a batch of it, into [B, d] float32, on the device."""
        numbers, ids = features["numbers"], features["ids"]
        x_Bd = jnp.zeros((ids.shape[0], self.width), jnp.float32).at[:, : len(self.numeric)].set(numbers)
        return x_Bd.at[jnp.arange(ids.shape[0])[:, None], ids].set(1.0, unique_indices=True)

    def unseen(self, table: Table, rows: np.ndarray) -> dict[str, str]:
        """Says, by column, how many rows hold categories that training did not, and which: "3 rows ('a', 'b')"."""
        found = {}
        for name, vocabulary in self.vocabularies.items():
            column = table.columns[name]
            unknown = np.flatnonzero(vocabulary.ids(column, rows) == 0)
            if unknown.size:
                kinds = sorted({column.names[code] for code in column.codes[rows][unknown]})
                shown = ", ".join(map(repr, kinds[:SHOWN])) + (", ..." if len(kinds) > SHOWN else "")
                found[name] = f"{unknown.size:,} row{'s'[: unknown.size > 1]} ({shown})"
        return found


def _values(table: Table, name: str, log: Sequence[str] | frozenset[str]) -> np.ndarray:
    return np.log1p(table.numbers(name, least=0)) if name in log else table.numbers(name)


def _number(text: str) -> float:
    """Returns the number that a text is, or NaN if it is no finite one."""
    try:
        value = math.nan if "_" in text else float(text)  # Python alone reads 1_000 as 1000
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
