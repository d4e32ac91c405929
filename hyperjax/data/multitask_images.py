"""Several tasks on one image: the 8x8 digits with four labels, and MultiMNIST, two digits overlaid.

N images, H rows, W columns, C channels, B batch.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.data.images import Split, load_images
from hyperjax.data.multitask import SPLITS, TaskData, TaskSplit
from hyperjax.routing.tasks import Binary, MultiClass, Task

LOOPS = (0, 6, 8, 9)


@dataclasses.dataclass(frozen=True)
class FlatPixels:
    """The feature `pixels`, [B, H, W, C], as [B, HWC] float32, black 0 and white 1.

    Args:
        peak: the pixel value of white.
    """

    peak: float

    def __call__(self, features: dict[str, jax.Array]) -> jax.Array:
        pixels = features["pixels"]
        return pixels.reshape(pixels.shape[0], -1).astype(jnp.float32) / self.peak


def digit_tasks(valid: float = 0.1) -> TaskData:
    """Loads the 8x8 digits of scikit-learn with four tasks.

    The tasks are the digit (`class`), whether it is odd (`parity`), whether it is 5 or more (`at_least_5`), and whether
    it is drawn with a closed loop (`loop`: 0, 6, 8 and 9; the 4 counts as open).

    Args:
        valid: fraction of the training images that become the validation split, as in `load_images`.

    Returns:
        The tasks; the feature `pixels` is [N, 8, 8, 1] uint8.

    Raises:
        ValueError: as `load_images`.
    """
    images = load_images("digits", valid=valid)
    tasks = {"class": MultiClass(10), "parity": Binary(), "at_least_5": Binary(), "loop": Binary()}

    def labelled(split: Split) -> TaskSplit:
        digit = split.labels
        flags = {"parity": digit % 2 == 1, "at_least_5": digit >= 5, "loop": np.isin(digit, LOOPS)}
        return TaskSplit({"pixels": split.images}, {"class": digit} | {k: v.astype(np.int32) for k, v in flags.items()})

    train, held, test = map(labelled, (images.train, images.valid, images.test))
    return TaskData("digit_tasks", train, held, test, tasks, FlatPixels(images.peak), images.notes)


def multi_mnist(
    data_file: str | os.PathLike | None,
    *,
    valid: float = 0.1,
    seed: int = 0,
    train_size: int | None = None,
    canvas: int = 36,
) -> TaskData:
    """Makes MultiMNIST, two digits on one canvas and a task for each, `top_left` and `bottom_right`.

    Every image of a split lies once in the top left corner, over another image of the same split in the bottom right
    one; where they overlap the brighter pixel counts. Unlike in Sabour et al. the digits are not shifted at random, and
    may be of one class.

    Args:
        data_file: an `.npz` as in `load_images`; None for the MNIST of `TFDS_DATA_DIR`.
        valid: fraction of the training images that become the validation split.
        seed: 0 or more; fixes the pairs.
        train_size: number of training pairs; None for one of each training image.
        canvas: height and width of the canvas; the corners of 28x28 images are 8 pixels apart on 36x36.

    Returns:
        The tasks; the feature `pixels` is [N, canvas, canvas, C], uint8 for uint8 images.

    Raises:
        ValueError: as `load_images`; the images exceed the canvas; `train_size` is below 1 or above the number of
            training images; a split has a single image; or the seed is negative.

    Reference:
        Sabour, Frosst, Hinton, "Dynamic routing between capsules" (2017), section 6; as two tasks: Sener, Koltun,
        "Multi-task learning as multi-objective optimization" (2018), section 5.1.
    """
    if seed != int(seed) or seed < 0:
        raise ValueError(f"seed is {seed}, expected an integer of at least 0")
    images = load_images("mnist", data_file, valid)
    largest = max(images.train.images.shape[1:3])
    if canvas != int(canvas) or canvas < largest:
        raise ValueError(f"canvas is {canvas}, expected an integer of at least {largest}, the size of the images")
    most = len(images.train.labels)
    if train_size is not None and (train_size != int(train_size) or not 1 <= train_size <= most):
        raise ValueError(f"train_size is {train_size}, expected 1 to {most}, the number of training images; or None")
    splits = {}
    for number, name in enumerate(SPLITS):
        split = getattr(images, name)
        pairs = train_size if name == "train" and train_size is not None else len(split.labels)
        splits[name] = _overlay(split, pairs, canvas, np.random.default_rng((seed, number, 1)), name)
    sizes = ", ".join(f"{split.rows:,} {name}" for name, split in splits.items())
    note = f"pairs of those digits on {canvas}x{canvas} pixels, fixed by seed {seed} ({sizes})"
    tasks: dict[str, Task] = {name: MultiClass(images.classes) for name in ("top_left", "bottom_right")}
    encode = FlatPixels(images.peak)
    return TaskData(f"multi_{images.name}", **splits, tasks=tasks, encode=encode, notes=(*images.notes, note))


def _overlay(split: Split, pairs: int, canvas: int, rng: np.random.Generator, name: str) -> TaskSplit:
    """Lays each of the first `pairs` images of a random order over another image of the split."""
    size, height, width, channels = split.images.shape
    if size == 1:
        raise ValueError(f"the {name} split has 1 image, expected 2 or more to overlay, or none; change valid")
    order = rng.permutation(size)[:pairs]
    partners = (order + rng.integers(1, max(size, 2), len(order))) % max(size, 1)
    pixels = np.zeros((len(order), canvas, canvas, channels), split.images.dtype)
    pixels[:, :height, :width] = split.images[order]
    corner = pixels[:, canvas - height :, canvas - width :]
    np.maximum(corner, split.images[partners], out=corner)
    return TaskSplit({"pixels": pixels}, {"top_left": split.labels[order], "bottom_right": split.labels[partners]})
