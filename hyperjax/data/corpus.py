"""A character corpus: three splits of integer ids and the symbols that they stand for.

N characters, V symbols.
"""

import dataclasses
import functools
import hashlib
import json

import numpy as np

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Text as integers, split into train, valid and test.

    A corpus whose `symbols` hold `UNKNOWN` (U+FFFD) reads every character outside of its vocabulary as that symbol;
    any other corpus refuses such characters. A byte-level corpus (enwik8) encodes the UTF-8 bytes of a text, and its
    symbols are those bytes as latin-1 characters.

    Args:
        name: short name of the corpus.
        train: ids of the training split, [N] int32.
        valid: ids of the validation split, [N] int32.
        test: ids of the test split, [N] int32.
        symbols: one character per id; its length V is the vocabulary size.
        notes: what a run must tell its user about this text, a sentence each.
        byte_level: whether a symbol is a byte of UTF-8 text rather than a character.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    symbols: tuple[str, ...]
    notes: tuple[str, ...] = ()
    byte_level: bool = False

    def encode(self, text: str) -> np.ndarray:
        """Turns text into ids.

        Args:
            text: any text.

        Returns:
            [N] int32 ids, one per character (one per UTF-8 byte if `byte_level`).

        Raises:
            ValueError: a character is outside of the vocabulary and the corpus has no unknown symbol.
        """
        points = (
            np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8) if self.byte_level else code_points(text)
        )
        ids = symbol_ids(points, self.symbols)
        unseen = np.flatnonzero(ids < 0)
        if unseen.size:
            where, what = int(unseen[0]), "byte" if self.byte_level else "character"
            raise ValueError(
                f"{what} {chr(points[where])!r} at position {where} is not among the {len(self.symbols)} symbols of "
                f"{self.name!r}, which has no unknown symbol; remove or replace it"
            )
        return ids

    def decode(self, ids) -> str:
        """Turns ids back into text; bytes that are not valid UTF-8 become U+FFFD.

        Args:
            ids: integers in [0, V), [N].

        Returns:
            The text.

        Raises:
            ValueError: an id is outside of [0, V).
        """
        ids = np.asarray(ids).reshape(-1)
        outside = ids[(ids < 0) | (ids >= len(self.symbols))]
        if outside.size:
            raise ValueError(f"id {outside[0]} is outside of the vocabulary: expected 0 to {len(self.symbols) - 1}")
        text = "".join(self.symbols[i] for i in ids.tolist())
        return text.encode("latin-1").decode("utf-8", "replace") if self.byte_level else text

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the symbols and the three splits: equal if and only if two runs see the same text."""
        splits = (self.train, self.valid, self.test)
        head = json.dumps([list(self.symbols), [len(split) for split in splits], self.byte_level])
        digest = hashlib.sha256(head.encode())
        for split in splits:
            digest.update(np.ascontiguousarray(split, "<i4").data)
        return digest.hexdigest()[:16]


def code_points(text: str) -> np.ndarray:
    """Returns the Unicode code point of every character of `text`, [N] uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def symbol_ids(points: np.ndarray, symbols: tuple[str, ...]) -> np.ndarray:
    """Looks code points (or bytes) up in a vocabulary.

    Args:
        points: code points or bytes, [N] unsigned integers.
        symbols: the vocabulary, V characters; if `UNKNOWN` is among them, it stands for whatever is not.

    Returns:
        [N] int32 ids; -1 where a code point is outside of a vocabulary without `UNKNOWN`.
    """
    known = np.array([ord(symbol) for symbol in symbols])
    missing = symbols.index(UNKNOWN) if UNKNOWN in symbols else -1
    size = 1 + max(int(known.max(initial=0)), int(points.max(initial=0)))
    table = np.full(size, missing, np.int32)
    table[known] = np.arange(len(symbols), dtype=np.int32)
    ids = np.empty(len(points), np.int32)
    for start in range(0, len(points), CHUNK):  # indexing widens its indices to 64 bits, so a chunk at a time
        ids[start : start + CHUNK] = table[points[start : start + CHUNK]]
    return ids


def split_90_5_5(size: int) -> tuple[int, int]:
    """Returns where the validation and the test split of a text of `size` characters begin."""
    return size * 90 // 100, size * 95 // 100
