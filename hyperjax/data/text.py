"""Text corpora by name or path: the Python help topics, Penn Treebank, text8, enwik8, or any UTF-8 file."""

import collections
import os
import platform

import numpy as np

from hyperjax.data import ptb, sources
from hyperjax.data.corpus import CHUNK, UNKNOWN, Corpus, code_points, split_90_5_5, symbol_ids
from hyperjax.data.download import user_path

__all__ = ["Corpus", "file_corpus", "load_corpus", "ptb_corpus", "pydoc_corpus", "wikipedia_corpus"]

NAMES = ("pydoc", "ptb", "text8", "enwik8")
SHORTEST = 20
WIKIPEDIA_SIZES = (90_000_000, 5_000_000, 5_000_000)
TEXT8_SYMBOLS = tuple(" abcdefghijklmnopqrstuvwxyz")


def load_corpus(name: str = "pydoc", data_dir: str | os.PathLike | None = None) -> Corpus:
    """Loads a corpus.

    Args:
        name: `pydoc` (always there), `ptb`, `text8`, `enwik8`, or the path of a UTF-8 file: a name that holds a path
            separator, ends in `.txt` or is that of a file.
        data_dir: where the files of `ptb`, `text8` or `enwik8` are: their folder, or an archive of them. Without it
            they come from `TFDS_DATA_DIR` (default `~/tensorflow_datasets`), or are downloaded to there.

    Returns:
        The corpus; its `notes` are for the user of the run.

    Raises:
        ValueError: the name is unknown, or the data is missing, damaged, or not what it should be.
    """
    name = os.fspath(name)
    if name == "ptb":
        return ptb_corpus(data_dir)
    if name in ("text8", "enwik8"):
        return wikipedia_corpus(name, data_dir)
    is_path = name.endswith(".txt") or any(sep in name for sep in (os.sep, os.altsep) if sep) or os.path.exists(name)
    if name != "pydoc" and not is_path:
        raise ValueError(f"corpus {name!r} is unknown: expected one of {', '.join(NAMES)}, or the path of a text file")
    if data_dir is not None:
        raise ValueError(f"data_dir {os.fspath(data_dir)!r} is for ptb, text8 and enwik8, not for {name!r}; drop it")
    return pydoc_corpus() if name == "pydoc" else file_corpus(name)


def pydoc_corpus() -> Corpus:
    """Returns the help topics of this Python, in alphabetical order, split 90/5/5 by position."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("this Python lacks pydoc_data; install the full standard library or give a file") from error
    text = "\n".join(topics[key] for key in sorted(topics))
    origin = f"the help topics of Python {platform.python_version()} ({len(text):,} characters; versions differ)"
    return _from_text("pydoc", text, (origin,))


def file_corpus(path: str | os.PathLike) -> Corpus:
    """Reads a UTF-8 file, split 90/5/5 by position; a byte-order mark is removed and Windows line ends become newlines.

    Args:
        path: the file.

    Returns:
        The corpus, named after the file.

    Raises:
        ValueError: the file is missing, a folder, unreadable, empty, not UTF-8, or too short to split.
    """
    path = user_path(path)
    raw = sources.read_file(path)
    if not raw:
        raise ValueError(f"{path} is empty, expected UTF-8 text of at least {SHORTEST} characters; give another file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise ValueError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {error.start}; convert the file") from error
    notes = []
    if text.startswith("\ufeff"):
        text = text[1:]
        notes.append("removed the byte-order mark")
    if line_ends := text.count("\r\n"):
        text = text.replace("\r\n", "\n")
        notes.append(f"turned {line_ends:,} Windows line ends into newlines")
    if len(text) < SHORTEST:
        raise ValueError(
            f"{path} has {len(text)} characters, too short to split 90/5/5: expected at least {SHORTEST}; "
            "give a longer text"
        )
    return _from_text(path.name, text, (f"{path} ({len(text):,} characters)", *notes))


def ptb_corpus(data_dir: str | os.PathLike | None = None, source: ptb.Source = ptb.PTB) -> Corpus:
    """Reads the characters of the Penn Treebank (Mikolov's preparation, 50 symbols).

    Args:
        data_dir: a folder with the three word-level files, or a zip or tar archive of them.
        source: files, digests and sizes to expect.

    Returns:
        The corpus.

    Raises:
        ValueError: as `builders.ptb_chars.load_texts`.

    Reference:
        Mikolov et al., "Subword language modeling with neural networks" (2012), for the split.
    """
    from hyperjax.data.builders import ptb_chars

    texts, folder = ptb_chars.load_texts(data_dir, source)
    symbols = tuple(sorted(set(texts["train"])))
    train, valid, test = (symbol_ids(code_points(texts[split]), symbols) for split in ("train", "valid", "test"))
    return Corpus("ptb", train, valid, test, symbols, (f"Penn Treebank, Mikolov's preparation, from {folder}",))


def wikipedia_corpus(
    name: str, data_dir: str | os.PathLike | None = None, sizes: tuple[int, int, int] = WIKIPEDIA_SIZES
) -> Corpus:
    """Reads text8 (27 symbols) or enwik8 (the bytes that occur), split 90M/5M/5M by position.

    Args:
        name: `text8` or `enwik8`.
        data_dir: the file, its zip, or the folder of either.
        sizes: bytes of the train, valid and test split.

    Returns:
        The corpus.

    Raises:
        ValueError: the file is missing, damaged, of the wrong size, or (text8) holds another character.

    Reference:
        Mahoney, "Large text compression benchmark", mattmahoney.net/dc/textdata.html.
    """
    total = sum(sizes)
    place, raw = sources.read_named(name, data_dir, total, f"http://mattmahoney.net/dc/{name}.zip")
    if len(raw) != total:
        raise ValueError(f"{name} in {place} has {len(raw):,} bytes, expected {total:,}; get the whole file again")
    values = np.frombuffer(raw, np.uint8)
    symbols = TEXT8_SYMBOLS if name == "text8" else _bytes_in(values)
    ids = symbol_ids(values, symbols)
    if ids.min() < 0:
        where = int(np.argmin(ids))
        raise ValueError(f"{place} is not text8: byte {raw[where : where + 1]!r} at offset {where}; get the file again")
    train, valid, test = np.split(ids, np.cumsum(sizes)[:2])
    return Corpus(name, train, valid, test, symbols, (f"{name} from {place}",), byte_level=name == "enwik8")


def _bytes_in(values: np.ndarray) -> tuple[str, ...]:
    """Returns the distinct bytes of [N] uint8 values in ascending order, as latin-1 characters."""
    present = np.zeros(256, np.bool_)
    for start in range(0, len(values), CHUNK):
        present |= np.bincount(values[start : start + CHUNK], minlength=256) > 0
    return tuple(map(chr, np.flatnonzero(present)))


def _from_text(name: str, text: str, notes: tuple[str, ...]) -> Corpus:
    """Splits a text 90/5/5; its symbols are those of train and, always, `UNKNOWN`: held-out text cannot change them."""
    valid_at, test_at = split_90_5_5(len(text))
    symbols = tuple(sorted(set(text[:valid_at]) | {UNKNOWN}))
    unseen = collections.Counter(text[valid_at:])
    for symbol in symbols:
        unseen.pop(symbol, None)
    if unseen:
        kinds = " ".join(repr(symbol) for symbol, _ in unseen.most_common(8)) + (" ..." if len(unseen) > 8 else "")
        notes += (f"{unseen.total():,} held-out characters ({kinds}) are not in train: read as the unknown symbol",)
    train, valid, test = np.split(symbol_ids(code_points(text), symbols), [valid_at, test_at])
    return Corpus(name, train, valid, test, symbols, notes)
