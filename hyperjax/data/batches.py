"""Shuffled batches of images, augmentation, and the tasks made from a set of images.

N images, H rows, W columns, C channels, B batch, K classes.
"""

from collections.abc import Callable, Sequence

import numpy as np

from hyperjax.data.images import Split, checked_split


class EpochOrder:
    """Which rows a step sees: an epoch holds each at most once, and leaves the last N mod B of its order out.

    Args:
        rows: number of rows N.
        batch: batch size B.
        seed: 0 or more; fixes the order of every epoch.
        what: what the rows are called in errors.

    Raises:
        ValueError: B is below 1 or above N, or the seed is negative.
    """

    def __init__(self, rows: int, batch: int, seed: int = 0, what: str = "rows"):
        for name, value, least in (("batch", batch, 1), ("seed", seed, 0)):
            if value != int(value) or value < least:
                raise ValueError(f"{name} is {value}, expected an integer of at least {least}")
        if batch > rows:
            raise ValueError(f"batch {batch} exceeds the {rows} {what} of the split; lower the batch")
        self.rows, self.batch, self.seed = rows, int(batch), int(seed)
        self.steps_per_epoch = rows // self.batch
        self._epoch = (-1, np.empty(0, np.int64))

    def rows_at(self, step: int) -> np.ndarray:
        """Returns the numbers of the rows of a training step, [B], counted from 0; steps count over all epochs."""
        step = int(step)
        if step < 0:
            raise ValueError(f"step is {step}, expected 0 or more")
        epoch, within = divmod(step, self.steps_per_epoch)
        cached, order = self._epoch
        if cached != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            self._epoch = (epoch, order)
        return order[within * self.batch : (within + 1) * self.batch]


class Batches:
    """Shuffled minibatches. An epoch holds each image at most once: the last N mod B of its order are left out.

    What a step sees depends on the seed and its number alone: a run that resumes needs no iterator state.

    Args:
        images: [N, H, W, C] uint8 or float32.
        labels: [N] integers.
        batch: batch size B.
        seed: 0 or more; fixes the order of every epoch, and the augmentation of every step.
        augment: changes a batch of images, [B, H, W, C], given a generator of its own, such as `pad_crop_flip`.

    Raises:
        ValueError: images and labels do not belong together, B is below 1 or above N, or the seed is negative.
    """

    def __init__(
        self,
        images,
        labels,
        batch: int,
        seed: int = 0,
        augment: Callable[[np.random.Generator, np.ndarray], np.ndarray] | None = None,
    ):
        self.images, self.labels = checked_split(images, labels, "batched")
        self.order, self.augment = EpochOrder(len(self.labels), batch, seed, "images"), augment
        self.batch, self.seed, self.steps_per_epoch = self.order.batch, self.order.seed, self.order.steps_per_epoch

    def batch_at(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns the batch of a training step.

        Args:
            step: number of the step, from 0, over all epochs.
            rows: those of the batch to return, where several processes read one part each.

        Returns:
            `images`, [B, H, W, C] of the given type unless `augment` changes it, and `labels`, [B] int32.

        Raises:
            ValueError: `step` is negative.
        """
        index = self.order.rows_at(step)
        if self.augment is None:
            return {"images": self.images[index[rows]], "labels": self.labels[index[rows]]}
        # The third number keeps this generator apart from the one that orders epoch number `step`. It draws for all.
        images = self.augment(np.random.default_rng((self.seed, int(step), 1)), self.images[index])
        return {"images": images[rows], "labels": self.labels[index[rows]]}


def pad_crop_flip(rng: np.random.Generator, images: np.ndarray, pad: int = 4) -> np.ndarray:
    """Pads images with zeros, crops each at random to its old size, and mirrors each with probability 1/2.

    Args:
        rng: what the crops and mirrorings are drawn from.
        images: [B, H, W, C].
        pad: pixels on each side.

    Returns:
        [B, H, W, C] of the same type.

    Raises:
        ValueError: `pad` is negative, or the images are not [B, H, W, C].

    Reference:
        He et al., "Deep residual learning for image recognition" (2015), section 4.2.
    """
    if pad < 0:
        raise ValueError(f"pad is {pad}, expected 0 or more")
    size, *shape = _shape(images)
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, (2, size))
    crops = np.lib.stride_tricks.sliding_window_view(padded, shape, axis=(1, 2, 3))[np.arange(size), top, left, 0]
    mirrored = rng.random(size) < 0.5
    crops[mirrored] = crops[mirrored, :, ::-1]
    return crops


def permute_pixels(images: np.ndarray, seed: int) -> np.ndarray:
    """Puts the pixels of every image into one other order, that of a permuted task; channels stay together.

    Args:
        images: [N, H, W, C].
        seed: 0 or more; fixes the order. Seed 0 changes nothing.

    Returns:
        [N, H, W, C] of the same type.

    Raises:
        ValueError: the seed is negative, or the images are not [N, H, W, C].

    Reference:
        Goodfellow et al., "An empirical investigation of catastrophic forgetting" (2013), section 4.
    """
    size, height, width, channels = _shape(images)
    order = _order(height * width, seed)
    return images.reshape(size, height * width, channels)[:, order].reshape(images.shape)


def permute_labels(labels: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Gives the classes other numbers.

    Args:
        labels: [N] integers in [0, K).
        classes: number of classes K.
        seed: 0 or more; fixes the numbers. Seed 0 changes nothing.

    Returns:
        [N] int32.

    Raises:
        ValueError: a label is outside of [0, K), the labels are no integers, or the seed is negative.
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels have dtype {labels.dtype}, expected integers; convert them")
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.size:
        raise ValueError(f"label {outside[0]} is outside of the classes: expected 0 to {classes - 1}; raise classes")
    return _order(classes, seed).astype(np.int32)[labels]


def _shape(images: np.ndarray) -> tuple[int, ...]:
    if images.ndim != 4:
        raise ValueError(f"images have shape {images.shape}, expected [N, H, W, C]; reshape them")
    return images.shape


def _order(size: int, seed: int) -> np.ndarray:
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more")
    return np.random.default_rng(seed).permutation(size) if seed else np.arange(size)


def rotate(images: np.ndarray, degrees: float) -> np.ndarray:
    """Turns images about their centres, with bilinear interpolation and black outside.

    Args:
        images: [N, H, W, C] uint8 or float32.
        degrees: the angle, counter-clockwise.

    Returns:
        [N, H, W, C] of the same type.

    Raises:
        ValueError: the images are not [N, H, W, C].
    """
    from scipy import ndimage

    _shape(images)
    turned = ndimage.rotate(images.astype(np.float32), degrees, axes=(2, 1), reshape=False, order=1, prefilter=False)
    return np.rint(turned).astype(images.dtype) if np.issubdtype(images.dtype, np.integer) else turned


def select_classes(split: Split, classes: Sequence[int]) -> Split:
    """Takes the images of some classes, as a task of its own.

    Args:
        split: images and labels.
        classes: the k classes to take; their labels become 0 to k - 1, in this order.

    Returns:
        The images of those classes, in their old order.

    Raises:
        ValueError: no class is given, one is given twice, or one has no images in the split.
    """
    wanted = np.asarray(classes)
    if wanted.ndim != 1 or wanted.size == 0 or len(np.unique(wanted)) != wanted.size:
        raise ValueError(f"classes are {wanted.tolist()}, expected one or more, each once")
    found = split.labels[:, None] == wanted
    missing = wanted[~found.any(axis=0)]
    if missing.size:
        held = np.unique(split.labels).tolist()
        raise ValueError(f"class {missing[0]} has no images in the split, which holds {held}; select among those")
    chosen = found.any(axis=1)
    return Split(split.images[chosen], found[chosen].argmax(axis=1).astype(np.int32))
