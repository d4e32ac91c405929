"""Files a user has: read whole, or member by member out of an archive, with errors of one line."""

import contextlib
import functools
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import IO

from hyperjax.data.download import data_root, download, download_folder, one_line, user_path

ARCHIVE_NAMES = (".zip", ".tgz", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz")
ARCHIVE_STARTS = (b"PK\x03\x04", b"\x1f\x8b")
# What the readers of the standard library raise on bytes that are not what they claim to be.
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    MemoryError,
    UnicodeDecodeError,
)


def read_file(path: Path, limit: int | None = None) -> bytes:
    """Reads a file.

    Args:
        path: the file.
        limit: the most bytes it may have.

    Returns:
        Its contents.

    Raises:
        ValueError: there is no such file, it is a folder, cannot be read, or is larger than `limit`.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, expected a file; give the path of a file in it")
    try:
        size = path.stat().st_size
        if limit is not None and size > limit:
            raise ValueError(f"{path} has {size:,} bytes, expected at most {limit:,}; give the right file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; give the path of an existing file") from error
    except OSError as error:
        raise ValueError(f"cannot read {path} ({one_line(error)}); check its permissions") from error


def read_members(path: Path, names: Sequence[str], limit: int) -> dict[str, bytes]:
    """Reads files out of a zip or tar archive, at any depth, writing nothing to disk.

    Args:
        path: the archive.
        names: base names of the members to read; of several members with one name the first counts.
        limit: the most bytes that a member may have.

    Returns:
        The contents by name.

    Raises:
        ValueError: the archive is damaged, lacks a member, or a member is larger than `limit`.
    """
    found: dict[str, bytes] = {}
    try:
        with contextlib.closing(_members(path)) as members:
            for member, open_member in members:
                name = member.rsplit("/", 1)[-1]
                if name not in names or name in found:
                    continue
                with open_member() as stream:
                    found[name] = stream.read(limit + 1)
                if len(found) == len(names):
                    break
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or no zip or tar archive ({one_line(error)}); get it again") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} holds no {' and no '.join(missing)}; give the whole archive or the files' folder")
    for name, content in found.items():
        if len(content) > limit:
            raise ValueError(f"{name} in {path} has over {limit:,} bytes, expected at most that; give the right file")
    return found


def _members(path: Path) -> Generator[tuple[str, Callable[[], IO[bytes]]], None, None]:
    """Yields the name of each regular file in an archive, and a function that opens it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, functools.partial(archive.open, info)
    else:
        with tarfile.open(path, "r:*") as tar:
            for entry in tar:
                if entry.isreg():
                    yield entry.name, functools.partial(_open_entry, tar, entry)


def _open_entry(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(entry)
    if stream is None:
        raise tarfile.ReadError(f"cannot open {entry.name}")
    return stream


def read_named(name: str, data_dir: str | os.PathLike | None, limit: int, url: str) -> tuple[Path, bytes]:
    """Reads one big file, or the member of that name in its archive.

    Args:
        name: name of the file; its zip is `name`.zip.
        data_dir: the file, its archive, or the folder of either; by default the data folders, else the network.
        limit: the most bytes it may have.
        url: where the zip is.

    Returns:
        The path that was read, and the contents.

    Raises:
        ValueError: the file is nowhere, or cannot be read.
    """
    if data_dir is None:
        path = _first_file([data_root(), data_root() / name, download_folder()], name)
        path = path or download(url, f"pass --data-dir with {name} or {name}.zip, from {url}")
    else:
        given = user_path(data_dir)
        path = given if os.path.isfile(given) else _first_file([given], name)
        if path is None:
            raise ValueError(f"{given} is not and does not hold {name} or {name}.zip; give the file or its folder")
    if _is_archive(path):
        return path, read_members(path, [name], limit)[name]
    return path, read_file(path, limit)


def _first_file(folders: Sequence[Path], name: str) -> Path | None:
    candidates = [folder / file for folder in folders for file in (name, f"{name}.zip")]
    return next((path for path in candidates if os.path.isfile(path)), None)


def _is_archive(path: Path) -> bool:
    if path.name.lower().endswith(ARCHIVE_NAMES):
        return True
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(4).startswith(ARCHIVE_STARTS)
    return False
