"""Streams are contiguous and depend on the step alone; evaluation sees every character exactly once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hyperjax.data import Streams, evaluation_windows, window_at

IDS = np.random.default_rng(0).integers(0, 50, 1003).astype(np.int32)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (4, 10), (7, 13), (3, 334), (1, 1002), (1002, 1)])
def test_an_epoch_reads_each_stream_in_order(batch, length):
    streams = Streams(IDS, batch, length)
    windows = [streams.window(step) for step in range(streams.steps_per_epoch)]
    inputs = np.concatenate([window["inputs"] for window in windows], axis=1)
    targets = np.concatenate([window["targets"] for window in windows], axis=1)
    stride = (len(IDS) - 1) // batch
    assert streams.steps_per_epoch == stride // length
    for b in range(batch):
        stream = IDS[b * stride : (b + 1) * stride + 1]
        np.testing.assert_array_equal(inputs[b], stream[: inputs.shape[1]])
        np.testing.assert_array_equal(targets[b], stream[1 : targets.shape[1] + 1])
    assert windows[0]["inputs"].shape == (batch, length)
    assert windows[0]["inputs"].dtype == windows[0]["targets"].dtype == np.int32


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (4, 10), (7, 13), (3, 334), (1, 1002), (1002, 1)])
@pytest.mark.parametrize("offset", [0, 300])
def test_windows_cut_on_the_device_are_the_same(batch, length, offset):
    streams = Streams(IDS + offset, batch, length)
    on_device = streams.on_device()
    assert on_device.dtype == (np.int32 if offset else np.uint8)
    cut = jax.jit(partial(window_at, length=length))
    for step in {0, 1, streams.steps_per_epoch // 2, streams.steps_per_epoch - 1, streams.steps_per_epoch}:
        want, got = streams.window(step), cut(on_device, jnp.int32(step))
        assert want.keys() == got.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype
            np.testing.assert_array_equal(got[name], want[name])


def test_reset_opens_every_epoch_and_nothing_else():
    streams = Streams(IDS, 4, 30)
    resets = [streams.window(step)["reset"] for step in range(3 * streams.steps_per_epoch)]
    assert all(isinstance(reset, np.bool_) for reset in resets)
    assert np.flatnonzero(resets).tolist() == [0, streams.steps_per_epoch, 2 * streams.steps_per_epoch]


def test_a_window_depends_on_the_step_alone():
    first, second = Streams(IDS, 4, 30), Streams(IDS.tolist(), 4, 30)
    for step in range(20):
        first.window(step)
    for step in (19, 5, 5 + 3 * first.steps_per_epoch):
        for key, value in first.window(step).items():
            np.testing.assert_array_equal(value, second.window(np.int64(step))[key])
    np.testing.assert_array_equal(first.window(5)["inputs"], first.window(5 + first.steps_per_epoch)["inputs"])


def test_writing_into_a_window_changes_nothing_else():
    streams = Streams(IDS.copy(), 4, 30)
    window = streams.window(0)
    expected = window["targets"].copy()
    window["inputs"][:] = -7
    np.testing.assert_array_equal(window["targets"], expected)
    np.testing.assert_array_equal(streams.window(0)["inputs"][:, 1:], expected[:, :-1])


@pytest.mark.parametrize(
    ("ids", "batch", "length", "message"),
    [
        (IDS, 10, 101, r"batch 10 x length 101 needs 1011 characters, but the split has 1003; lower the batch"),
        (IDS[:1], 1, 1, r"needs 2 characters, but the split has 1;"),
        (IDS, 0, 5, r"batch is 0, expected an integer of at least 1"),
        (IDS, 5, -1, r"length is -1, expected an integer of at least 1"),
        (IDS, 2.5, 1, r"batch is 2.5, expected an integer"),
        (IDS.reshape(17, 59), 1, 1, r"shape \(17, 59\) and dtype int32, expected one dimension of integers"),
        (IDS.astype(np.float32), 1, 1, r"dtype float32, expected one dimension of integers"),
    ],
)
def test_bad_streams_are_refused_in_one_line(ids, batch, length, message):
    with pytest.raises(ValueError, match=message) as caught:
        Streams(ids, batch, length)
    assert "\n" not in str(caught.value)


def test_the_longest_window_that_fits_is_allowed():
    assert Streams(IDS, 2, 501).steps_per_epoch == 1
    with pytest.raises(ValueError, match="needs 1005 characters"):
        Streams(IDS, 2, 502)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step is -1, expected 0 or more"):
        Streams(IDS, 2, 5).window(-1)


@settings(derandomize=True, deadline=None)
@given(size=st.integers(1, 1003), batch=st.integers(1, 2000), length=st.integers(1, 5000))
@example(size=1, batch=1, length=1)
@example(size=1003, batch=64, length=10)
def test_evaluation_counts_every_character_once(size, batch, length):
    ids = IDS[:size]
    windows = evaluation_windows(ids, batch, length)
    inputs, targets, mask = (windows[key].transpose(1, 0, 2).reshape(-1) for key in ("inputs", "targets", "mask"))
    n, b, width = windows["mask"].shape
    assert windows["inputs"].shape == windows["targets"].shape == (n, b, width)
    assert windows["inputs"].dtype == windows["targets"].dtype == np.int32
    assert windows["mask"].dtype == np.bool_
    assert b == min(batch, size)
    assert width <= length
    assert n * width >= -(-size // b)
    # Streams laid end to end are the split, then nothing but padding.
    assert mask[:size].all()
    assert not mask[size:].any()
    np.testing.assert_array_equal(targets[:size], ids)
    np.testing.assert_array_equal(inputs[:size], np.concatenate([[-1], ids[:-1]]))
    assert (inputs[size:] == -1).all()
    assert (targets[size:] == 0).all()


@pytest.mark.parametrize(("batch", "length"), [(1, 100), (8, 100), (16, 7)])
def test_evaluation_pads_less_than_one_window_of_every_stream(batch, length):
    mask = evaluation_windows(IDS, batch, length)["mask"]
    n, _, width = mask.shape
    stream = -(-len(IDS) // batch)
    assert n == -(-stream // length)
    assert n * width - stream < n


def test_evaluation_refuses_an_empty_split():
    with pytest.raises(ValueError, match="the split to evaluate is empty"):
        evaluation_windows(IDS[:0], 4, 10)
    with pytest.raises(ValueError, match="length is 0"):
        evaluation_windows(IDS, 4, 0)
