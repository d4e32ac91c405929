"""Windows over one split: contiguous streams to train on, and every character exactly once to evaluate on.

N characters, B streams, L window length, S stream length, n number of evaluation windows, T their length.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

PADDING_INPUT = -1


class Streams:
    """B contiguous streams of one split, for truncated back-propagation through time.

    Stream b is `ids[b * S : (b + 1) * S + 1]` with S = (N - 1) // B; its windows of L characters follow each other,
    so that a recurrent state carried from window to window always continues its own text. An epoch has S // L
    windows. What a step sees depends on its number alone: a run that resumes needs no iterator state.

    Args:
        ids: the split, [N] integers.
        batch: number of streams B.
        length: window length L.

    Raises:
        ValueError: `ids` is not one-dimensional, B or L is below 1, or B * L + 1 exceeds N.
    """

    def __init__(self, ids, batch: int, length: int):
        self.ids = _checked(ids, batch, length)
        self.batch, self.length = int(batch), int(length)
        size = len(self.ids)
        if batch * length + 1 > size:
            raise ValueError(
                f"batch {batch} x length {length} needs {batch * length + 1} characters, but the split has {size}; "
                "lower the batch or the length"
            )
        self.stream_length = (size - 1) // self.batch
        self.steps_per_epoch = self.stream_length // self.length
        self._starts = np.arange(self.batch)[:, None] * self.stream_length + np.arange(self.length + 1)[None, :]

    def window(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns the window of a training step.

        Args:
            step: number of the step, from 0, over all epochs.
            rows: the streams to read, where several processes read one part each.

        Returns:
            `inputs` and `targets`, [B, L] int32, the targets one character ahead; and `reset`, a boolean scalar,
            true when the window opens an epoch, where the caller zeroes the recurrent state.

        Raises:
            ValueError: `step` is negative.
        """
        step = int(step)
        if step < 0:
            raise ValueError(f"step is {step}, expected 0 or more")
        within_epoch = step % self.steps_per_epoch
        ids = self.ids[self._starts[rows] + within_epoch * self.length].astype(np.int32, copy=False)
        reset = np.bool_(within_epoch == 0)
        return {"inputs": ids[:, :-1].copy(), "targets": ids[:, 1:].copy(), "reset": reset}

    def on_device(self, rows: slice = slice(None)) -> Array:
        """Returns streams on the device, [B, n * L + 1] uint8 (int32 if ids need it), for `window_at`."""
        width = self.steps_per_epoch * self.length + 1
        small = self.ids.min() >= 0 and self.ids.max() < 256
        streams = np.lib.stride_tricks.sliding_window_view(self.ids, width)[:: self.stream_length][: self.batch][rows]
        return jnp.asarray(streams.astype(np.uint8 if small else np.int32))


def window_at(streams: Array, step: Array, length: int) -> dict[str, Array]:
    """The window of a training step under `jit`: that of `Streams.window`, cut on the device.

    Args:
        streams: [B, n * L + 1], of `Streams.on_device`.
        step: number of the step, scalar integer.
        length: window length L.

    Returns:
        As `Streams.window`.
    """
    within_epoch = step % ((streams.shape[1] - 1) // length)
    ids = jax.lax.dynamic_slice_in_dim(streams, within_epoch * length, length + 1, axis=1).astype(jnp.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "reset": within_epoch == 0}


def evaluation_windows(ids, batch: int, length: int) -> dict[str, np.ndarray]:
    """Cuts a split into windows that hold each of its characters as a target exactly once.

    The split is padded at its end to B streams of n * T characters, with n the fewest windows of at most L characters
    that hold a stream, and T as short as they allow. The input of the very first target is -1, which the model reads
    as the zero vector; the first input of stream b is the last target of stream b - 1, so an evaluator that carries
    the state from stream to stream reads the split as one sequence. The batch is lowered to N if the split is shorter.

    Args:
        ids: the split, [N] integers.
        batch: number of streams B.
        length: largest window length L.

    Returns:
        `inputs` and `targets`, [n, B, T] int32, and `mask`, [n, B, T] bool: false on the padding after the end of the
        split, where inputs are -1 and targets 0.

    Raises:
        ValueError: `ids` is empty or not one-dimensional, or B or L is below 1.
    """
    ids = _checked(ids, batch, length)
    size = len(ids)
    if size == 0:
        raise ValueError("the split to evaluate is empty, expected at least one character; use a longer text")
    batch = min(int(batch), size)
    stream = -(-size // batch)
    windows = -(-stream // int(length))
    width = -(-stream // windows)
    total = batch * windows * width

    def cut(values: np.ndarray, padding) -> np.ndarray:
        padded = np.full(total, padding, values.dtype)
        padded[:size] = values
        return np.ascontiguousarray(padded.reshape(batch, windows, width).transpose(1, 0, 2))

    targets = ids.astype(np.int32)
    inputs = np.concatenate([np.array([PADDING_INPUT], np.int32), targets[:-1]])
    return {
        "inputs": cut(inputs, PADDING_INPUT),
        "targets": cut(targets, 0),
        "mask": cut(np.ones(size, np.bool_), False),
    }


def _checked(ids, batch: int, length: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise ValueError(f"ids has shape {ids.shape} and dtype {ids.dtype}, expected one dimension of integers")
    for name, value in (("batch", batch), ("length", length)):
        if value < 1 or value != int(value):
            raise ValueError(f"{name} is {value}, expected an integer of at least 1")
    return ids
