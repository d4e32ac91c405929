"""The Penn Treebank's word-level files: what they must be, where they come from, the characters made of them."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from hyperjax.data.download import download, user_path
from hyperjax.data.sources import read_file, read_members

MEMBER_LIMIT = 1 << 26


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: its word-level file and the characters made of it.

    Args:
        file: base name of the word-level file.
        sha256: hex digest of that file.
        length: number of characters.
        characters_sha256: hex digest of the characters, as UTF-8.
    """

    file: str
    sha256: str
    length: int
    characters_sha256: str


@dataclasses.dataclass(frozen=True)
class Source:
    """What the dataset is made of and what must come out.

    Args:
        splits: the splits by name.
        n_symbols: number of distinct characters in the train split.
        url: the public archive.
    """

    splits: Mapping[str, Split]
    n_symbols: int
    url: str


PTB = Source(
    splits={
        "train": Split(
            "ptb.train.txt",
            "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            5_017_482,
            "5145926136ee9aef6f359b267ac09cc8a920879cd71725de17c490dd111d2998",
        ),
        "valid": Split(
            "ptb.valid.txt",
            "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            393_042,
            "fadf6277290823f881b7bf39b84e88536c87a859cd629dcfd1d2dfdef06097cf",
        ),
        "test": Split(
            "ptb.test.txt",
            "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
            442_423,
            "c2f8c16a611595d31da5acdb7a61d50e7d5e95f6b9c05fceda5f5ddc4383e791",
        ),
    },
    n_symbols=50,
    url="http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
)


def characters(words: bytes) -> bytes:
    """Turns a word-level file into characters: each line without its outer spaces, ended by one newline."""
    lines = words.removesuffix(b"\n").split(b"\n")
    return b"".join(line.strip(b" ") + b"\n" for line in lines)


def checked_texts(data_dir: str | os.PathLike | None, source: Source = PTB) -> dict[str, bytes]:
    """Reads the word-level files, checks their digests and turns them into characters.

    Args:
        data_dir: a folder with the three files, or with the public archive, or a zip or tar archive of them; by
            default the public archive is downloaded.
        source: files, digests and sizes to expect.

    Returns:
        The characters by split, as UTF-8.

    Raises:
        ValueError: a file is missing or damaged, is not the expected one, or cannot be downloaded.
    """
    names = [split.file for split in source.splits.values()]
    wanted = f"the folder of {', '.join(names)}, or a zip or tgz of them"
    place = download(source.url, f"pass --data-dir with {wanted}") if data_dir is None else user_path(data_dir)
    if not os.path.exists(place):
        raise ValueError(f"{place} does not exist; give {wanted}")
    contents = _read_folder(place, names, source) if os.path.isdir(place) else read_members(place, names, MEMBER_LIMIT)
    texts = {}
    for name, split in source.splits.items():
        digest = hashlib.sha256(contents[split.file]).hexdigest()
        if digest != split.sha256:
            raise ValueError(
                f"{split.file} from {place} has SHA-256 {digest}, expected {split.sha256}; "
                f"take the file from {source.url}, unchanged"
            )
        texts[name] = characters(contents[split.file])
    return texts


def _read_folder(folder: Path, names: list[str], source: Source) -> dict[str, bytes]:
    """Reads the files from a folder, from where the unpacked archive has them, or from the archive in that folder."""
    places = (folder, folder / "data", folder / "simple-examples" / "data")
    place = next((place for place in places if any(os.path.isfile(place / name) for name in names)), folder)
    missing = [name for name in names if not os.path.isfile(place / name)]
    archive = folder / source.url.rsplit("/", 1)[-1]
    if len(missing) == len(names) and os.path.isfile(archive):
        return read_members(archive, names, MEMBER_LIMIT)
    if missing:
        raise ValueError(f"{place} holds no {' and no '.join(missing)}; give the folder of {', '.join(names)}")
    return {name: read_file(place / name, MEMBER_LIMIT) for name in names}
