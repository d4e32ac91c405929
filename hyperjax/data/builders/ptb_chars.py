"""The characters of the Penn Treebank as a TFDS dataset: prepared once to ArrayRecord, read back without TensorFlow."""

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import tensorflow_datasets as tfds

from hyperjax.data.download import data_root, one_line
from hyperjax.data.ptb import PTB, Source, checked_texts


class PtbChars(tfds.core.GeneratorBasedBuilder):
    """Penn Treebank, Mikolov's preparation, as characters: one example per split, which holds its whole text.

    Args:
        texts: the characters by split, as UTF-8, to prepare the dataset from; by default those of the public archive.
        **kwargs: what `tfds.core.DatasetBuilder` takes: `data_dir`, `file_format`, ...
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, texts: Mapping[str, bytes] | None = None, **kwargs):
        self._texts = texts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Penn Treebank, Mikolov's preparation, as characters; one example per split.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # it cannot open an archive without TensorFlow
        texts = checked_texts(None) if self._texts is None else self._texts
        return {name: self._generate_examples(text) for name, text in texts.items()}

    def _generate_examples(self, text: bytes):
        yield 0, {"text": text}


def load_texts(data_dir: str | os.PathLike | None = None, source: Source = PTB) -> tuple[dict[str, str], str]:
    """Reads the three splits from the prepared copy, which is made first if there is none.

    The copy is made from `data_dir`, or else from the public archive. A `data_dir` that is given is checked even if
    there is a copy already.

    Args:
        data_dir: a folder with the three word-level files, or a zip or tar archive of them.
        source: files, digests and sizes to expect.

    Returns:
        The text by split, and the folder of the prepared copy.

    Raises:
        ValueError: a file is missing, damaged or not the expected one, nothing can be downloaded, the prepared copy
            is not what it should be, or the folder for it cannot be written.
    """
    folder = data_root() / PtbChars.name / str(PtbChars.VERSION)
    with contextlib.suppress(OSError):
        folder.rmdir()  # TFDS takes an empty folder for a prepared one; rmdir removes no other
    prepared = os.path.exists(folder)
    if data_dir is not None or not prepared:
        texts = checked_texts(data_dir, source)
        if not prepared:
            _prepare(folder, texts)
    return _read_prepared(folder, source), os.fspath(folder)


def _prepare(folder: Path, texts: Mapping[str, bytes]) -> None:
    """Writes the dataset beside its final place and moves it there: an interruption leaves nothing that looks whole."""
    root = folder.parent.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        builder = PtbChars(data_dir=root, file_format="array_record", texts=texts)
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        silent = io.StringIO()  # TFDS speaks of downloads and draws a bar per split, for one second of work
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            builder.download_and_prepare(download_config=config)
    except Exception as error:
        if not os.path.exists(folder):  # else another process has finished first
            advice = "set TFDS_DATA_DIR to a folder that can be written"
            raise ValueError(f"cannot prepare {folder} ({one_line(error)}); {advice}") from error


def _read_prepared(folder: Path, source: Source) -> dict[str, str]:
    texts: dict[str, str] = {}
    try:
        builder = PtbChars(data_dir=folder.parent.parent, file_format="array_record")
        for name in source.splits:
            texts[name] = builder.as_data_source(split=name)[0]["text"].decode()
    except Exception as error:  # TFDS and ArrayRecord raise whatever their parsers do
        raise ValueError(f"cannot read {folder} ({one_line(error)}); {_rebuild(folder)}") from error
    for name, split in source.splits.items():
        digest = hashlib.sha256(texts[name].encode()).hexdigest()
        if (len(texts[name]), digest) != (split.length, split.characters_sha256):
            raise ValueError(
                f"the {name} split in {folder} has {len(texts[name])} characters with SHA-256 {digest[:12]}, "
                f"expected {split.length} with {split.characters_sha256[:12]}; {_rebuild(folder)}"
            )
    n_symbols = len(set(texts["train"]))
    if n_symbols != source.n_symbols:
        raise ValueError(f"{folder} has {n_symbols} symbols, expected {source.n_symbols}; {_rebuild(folder)}")
    return texts


def _rebuild(folder: Path) -> str:
    return f"move {folder} away and run again (with --data-dir, or a network) to rebuild it"
