"""Labelled images by name or file.

N images, H rows, W columns, C channels.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hyperjax.data.download import connect, data_root, one_line, user_path
from hyperjax.data.sources import DAMAGED, read_file, read_members

NAMES = ("digits", "mnist", "cifar10")
KEYS = ("train_images", "train_labels", "test_images", "test_labels")
ADVICE = f"pass --data-file with an .npz of {', '.join(KEYS)}"
# The files that TFDS prepares its `mnist` and `cifar10` from.
URLS = {
    "mnist": tuple(
        f"https://storage.googleapis.com/cvdf-datasets/mnist/{file}-ubyte.gz"
        for file in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
}
MOST_CLASSES = 10_000
DIGITS_TEST = 360
CHUNK = 1024


class Split(NamedTuple):
    """Images, [N, H, W, C] uint8 or float32, and their labels, [N] int32.

    Attributes:
        images: [N, H, W, C].
        labels: [N].
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, split into train, valid and test.

    Args:
        name: short name of the data.
        train: the training split.
        valid: the validation split, of no images if none was asked for.
        test: the test split.
        classes: number of classes K; labels are in [0, K).
        peak: the pixel value of white.
        notes: what a run must tell its user about these images, a sentence each.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    classes: int
    peak: float = 255.0
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the splits, `classes` and `peak`: equal if and only if two runs see the same data."""
        digest = hashlib.sha256(f"{self.classes} {float(self.peak)}".encode())
        for array in (*self.train, *self.valid, *self.test):
            digest.update(f"{array.shape} {array.dtype.str}".encode())
            digest.update(np.ascontiguousarray(array).data if array.size else b"")
        return digest.hexdigest()[:16]

    def floats(self, split: Split) -> np.ndarray:
        """Returns the images of a split as [N, H, W, C] float32, black 0 and white 1."""
        return split.images.astype(np.float32) / np.float32(self.peak)

    def channel_statistics(self, split: Split | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns mean and standard deviation of each channel of `floats(split)` (default: train), [C] float32.

        Raises:
            ValueError: the split has no images.
        """
        images = (self.train if split is None else split).images
        if len(images) == 0:
            raise ValueError(f"the split of {self.name!r} has no images, so no statistics; take the training split")
        pixels = images[..., 0].size
        starts = range(0, len(images), CHUNK)  # float64 of a whole training set would be a gigabyte
        mean = sum(images[i : i + CHUNK].sum(axis=(0, 1, 2), dtype=np.float64) for i in starts) / pixels
        variance = sum(np.square(images[i : i + CHUNK] - mean).sum(axis=(0, 1, 2)) for i in starts) / pixels
        return (mean / self.peak).astype(np.float32), (np.sqrt(variance) / self.peak).astype(np.float32)


def normalise(images: np.ndarray, peak: float, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Returns `(images / peak - mean) / std`.

    Args:
        images: [N, H, W, C].
        peak: the pixel value of white.
        mean: mean of each channel of `images / peak`, [C].
        std: their standard deviations, [C], above 0.

    Returns:
        [N, H, W, C] float32.

    Raises:
        ValueError: a standard deviation is not above 0.
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if not (std > 0).all():
        raise ValueError(f"std is {std}, expected values above 0; drop the channels that are constant")
    return (images.astype(np.float32) / np.float32(peak) - mean) / std


def load_images(name: str = "digits", data_file: str | os.PathLike | None = None, valid: float = 0.1) -> Images:
    """Loads labelled images.

    Args:
        name: `digits` (the 8x8 digits of scikit-learn, always there), or `mnist` or `cifar10`: from `TFDS_DATA_DIR`
            (default `~/tensorflow_datasets`), or downloaded to there.
        data_file: an `.npz` to read instead, whatever the name: `train_images` and `test_images`, [N, H, W] or
            [N, H, W, C] uint8, and `train_labels` and `test_labels`, [N] integers. The images are named after it.
        valid: fraction of the training images that become the validation split: the last ones, in a fixed order.

    Returns:
        The images; their `notes` are for the user of the run.

    Raises:
        ValueError: the name is unknown, `valid` is outside of [0, 1) or leaves a split empty, or the data is missing,
            damaged, or not what it should be.
    """
    if name not in NAMES:
        raise ValueError(f"images {name!r} are unknown: expected one of {', '.join(NAMES)}; or {ADVICE}")
    if not 0 <= valid < 1:
        raise ValueError(f"valid is {valid}, expected a fraction in [0, 1), such as 0.1")
    peak = 255.0
    if data_file is not None:
        path = user_path(data_file)
        name, origin, arrays = path.stem, os.fspath(path), _read_npz(path)
    elif name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        images, labels = digits.images.astype(np.uint8)[order, ..., None], digits.target[order]
        parts = [part for at in (slice(-DIGITS_TEST), slice(-DIGITS_TEST, None)) for part in (images[at], labels[at])]
        arrays = dict(zip(KEYS, parts, strict=True))
        peak, origin = 16.0, "the 8x8 digits of scikit-learn"
    else:
        origin, arrays = _read_tfds(name)
    train, test = (
        checked_split(arrays[f"{split}_images"], arrays[f"{split}_labels"], split) for split in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = f"{train.images.shape[1:]} in train and {test.images.shape[1:]} in test"
        raise ValueError(f"images of {origin} are {shapes}, expected one shape; give images of one size")
    classes = 1 + int(train.labels.max())
    if test.labels.max() >= classes:
        raise ValueError(
            f"test_labels of {origin} hold {test.labels.max()}, expected 0 to {classes - 1} as in train; "
            "number the classes from 0 and give each of them training images"
        )
    held_out = round(valid * len(train.labels))
    if held_out == len(train.labels) or (valid and not held_out):
        raise ValueError(f"valid {valid} makes {held_out} of {len(train.labels)} training images; change it, or pass 0")
    order = np.random.default_rng(1).permutation(len(train.labels))
    train, held = (Split(train.images[part], train.labels[part]) for part in np.split(order, [len(order) - held_out]))
    sizes = f"{len(train.labels):,} train, {held_out:,} valid, {len(test.labels):,} test"
    return Images(name, train, held, test, classes, peak, (f"{origin} ({sizes}; {classes} classes)",))


def checked_split(images, labels, split: str) -> Split:
    """Returns images [N, H, W, C] and labels [N] int32, or raises ValueError if they are no such thing."""
    images, labels = np.asarray(images), np.asarray(labels)
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        what = f"shape {images.shape} and dtype {images.dtype}"
        raise ValueError(f"{split} images have {what}, expected [N, H, W] or [N, H, W, C] of uint8; convert them")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        what = f"shape {labels.shape} and dtype {labels.dtype}"
        raise ValueError(f"{split} labels have {what}, expected [N] integers; convert them")
    if len(images) != len(labels):
        counts = f"{len(images)} {split} images and {len(labels)} {split} labels"
        raise ValueError(f"there are {counts}, expected as many of each; leave none out")
    if images.size == 0:
        raise ValueError(f"{split} images have shape {images.shape}, expected at least one image; give a whole split")
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"{split} labels range from {found}, expected 0 to at most {MOST_CLASSES - 1}; renumber them")
    return Split(images, labels.astype(np.int32))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    raw = read_file(path)
    if not raw.startswith(b"PK"):
        raise ValueError(f"{path} is no .npz archive; give one of {', '.join(KEYS)}")
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            found = {key: archive[key] for key in KEYS if key in archive}
    except (*DAMAGED, ValueError) as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}); give an .npz of {', '.join(KEYS)}") from error
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise ValueError(f"{path} holds no {' and no '.join(missing)}; give an .npz of {', '.join(KEYS)}")
    return found


def _read_tfds(name: str) -> tuple[str, dict[str, np.ndarray]]:
    """Reads `mnist` or `cifar10` from the copy that TFDS has prepared, which is made first if there is none."""
    import tensorflow_datasets as tfds
    from PIL import Image

    builder = tfds.builder_cls(name)
    folder = data_root() / name / str(builder.VERSION)
    with contextlib.suppress(OSError):
        folder.rmdir()  # TFDS takes an empty folder for a prepared one; rmdir removes no other
    if not os.path.exists(folder):
        _prepare(builder, folder)
    arrays = {}
    try:
        prepared = builder(data_dir=data_root(), file_format="array_record")
        for split in ("train", "test"):
            # Decoding here takes half the time of TFDS's decoder, which also asks for OpenCV on the terminal.
            source = prepared.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
            rows = source.__getitems__(list(range(len(source))))
            arrays[f"{split}_images"] = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows])
            arrays[f"{split}_labels"] = np.array([row["label"] for row in rows], np.int32)
    except Exception as error:  # TFDS, ArrayRecord and PIL raise whatever their parsers do
        advice = f"move {folder} away and run again to rebuild it, or {ADVICE}"
        raise ValueError(f"cannot read {folder} ({one_line(error)}); {advice}") from error
    return f"{name} from {folder}", arrays


def _prepare(builder: Any, folder: Path) -> None:
    """Downloads and prepares a dataset of TFDS without TensorFlow, which TFDS's own builder would parse it with."""
    import tensorflow_datasets as tfds
    from PIL import Image

    name, urls = builder.name, list(URLS[builder.name])
    connect(urls[0], ADVICE).close()  # TFDS tries for minutes

    class Prepared(builder, skip_registration=True):  # type: ignore[call-arg]
        url_infos = builder.url_infos  # the sizes and SHA-256 of the downloads

        def _split_generators(self, dl_manager):
            arrays = (_parse_mnist if name == "mnist" else _parse_cifar10)(dl_manager.download(urls))
            return {split: self._generate_examples(split, *arrays[split]) for split in ("train", "test")}

        def _generate_examples(self, split, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                example = {"image": Image.fromarray(image), "label": int(label)}
                yield i, example if name == "mnist" else example | {"id": f"{split}_{i:05d}"}

    Prepared.name = name
    try:
        data_root().mkdir(parents=True, exist_ok=True)
        local = Prepared(data_dir=data_root(), file_format="array_record")
        local.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception as error:
        if not os.path.exists(folder):  # else another process has finished first
            advice = f"try again, set TFDS_DATA_DIR to a folder that can be written, or {ADVICE}"
            raise ValueError(f"cannot prepare {folder} ({one_line(error)}); {advice}") from error


def _parse_mnist(paths: Sequence[Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns images [N, 28, 28] and labels [N] by split, of four IDX files."""
    train, train_labels, test, test_labels = (gzip.decompress(Path(path).read_bytes()) for path in paths)

    def arrays(images: bytes, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
        return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)

    return {"train": arrays(train, train_labels), "test": arrays(test, test_labels)}


def _parse_cifar10(paths: Sequence[Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns images [N, 32, 32, 3] and labels [N] by split, of the archive of rows of a label and 3 x 32 x 32."""
    names = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    members = read_members(Path(paths[0]), [*names["train"], *names["test"]], 1 << 26)
    rows = {
        split: np.frombuffer(b"".join(members[file] for file in files), np.uint8).reshape(-1, 3073)
        for split, files in names.items()
    }
    return {
        split: (np.ascontiguousarray(row[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), row[:, 0])
        for split, row in rows.items()
    }
