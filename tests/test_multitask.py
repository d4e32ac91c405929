"""Data of several tasks: what the synthetic tasks are, what the digits are labelled, and what a batch holds."""

import dataclasses
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from hyperjax.data import (
    Batches,
    RowBatches,
    TaskData,
    TaskSplit,
    digit_tasks,
    load_images,
    multi_mnist,
    synthetic_regression,
)
from hyperjax.data.multitask import draw_sinusoids
from hyperjax.routing.tasks import Binary, MultiClass, Regression

SMALL = {"features": 12, "rows": (400, 20, 30)}
SPLIT = TaskSplit({"x": np.arange(20.0).reshape(10, 2)}, {"up": np.arange(10) % 2, "size": np.arange(10.0)})
TASKS = {"up": Binary(), "size": Regression()}


def encode(features):
    return features["x"].astype(np.float32)


def tiny(**changes):
    return TaskData(**{"name": "tiny", "train": SPLIT, "valid": SPLIT, "test": SPLIT, "tasks": TASKS} | changes)


@pytest.mark.parametrize("p", [-1, -0.3, 0, 0.5, 0.9, 1])
def test_the_weights_have_the_cosine_asked_for(p):
    (w1, w2), alpha, beta = draw_sinusoids(p, features=7, count=5, scale=3.0, seed=2)
    assert w1 @ w2 / np.linalg.norm(w1) / np.linalg.norm(w2) == pytest.approx(p, abs=1e-12)
    np.testing.assert_allclose([np.linalg.norm(w1), np.linalg.norm(w2)], 3, rtol=1e-12)
    assert alpha.shape == beta.shape == (5,)
    assert (3 * alpha >= 1).all()
    assert (3 * alpha <= 3).all()
    assert (beta >= 0).all()
    assert (beta <= 2 * math.pi).all()


def test_the_labels_without_noise_by_hand():
    data = synthetic_regression(0.4, noise=0, seed=5, **SMALL)
    weights, alpha, beta = draw_sinusoids(0.4, features=12, seed=5)
    for split in (data.train, data.valid, data.test):
        for task, w in zip(("first", "second"), weights, strict=True):
            expected = []
            for x in split.features["x"].astype(np.float64):
                wx = math.fsum(w * x)
                expected.append(wx + sum(math.sin(a * wx + b) for a, b in zip(alpha, beta, strict=True)))
            np.testing.assert_allclose(split.labels[task], expected, rtol=1e-5, atol=1e-6)
    linear = synthetic_regression(0.4, noise=0, sinusoids=0, seed=5, **SMALL)
    fit = np.linalg.lstsq(linear.train.features["x"], linear.train.labels["second"], rcond=None)[0]
    np.testing.assert_allclose(linear.test.features["x"] @ fit, linear.test.labels["second"], atol=1e-4)


def test_the_noise_is_a_variance_and_each_task_has_its_own():
    sizes = {"features": 3, "rows": (20_000, 2, 2)}
    clean, noisy = (synthetic_regression(1, noise=noise, **sizes).train.labels for noise in (0, 0.01))
    np.testing.assert_allclose(clean["first"], clean["second"], atol=1e-6)
    first, second = (noisy[task] - clean[task] for task in ("first", "second"))
    np.testing.assert_allclose([first.var(), second.var()], 0.01, rtol=0.05)
    assert abs(np.corrcoef([first, second])[0, 1]) < 0.03


def test_the_labels_correlate_more_as_the_weights_do():
    drawn = [synthetic_regression(p, features=12, rows=(4000, 2, 2)) for p in (0, 0.5, 0.9, 1)]
    found = [np.corrcoef(list(data.train.labels.values()))[0, 1] for data in drawn]
    assert found == sorted(found)
    assert abs(found[0]) < 0.1
    assert found[-1] > 0.95
    assert f"weights correlate 0.9, labels {found[2]:.3f}" in drawn[2].notes[0]
    for data in drawn[1:]:
        np.testing.assert_array_equal(data.train.features["x"], drawn[0].train.features["x"])
        np.testing.assert_array_equal(data.train.labels["first"], drawn[0].train.labels["first"])


def test_a_linear_model_leaves_much_of_the_variance():
    shares = []
    for seed in range(7):
        split = synthetic_regression(0.5, features=2, rows=(2000, 2, 2), seed=seed).train
        inputs = np.column_stack([split.features["x"], np.ones(split.rows)])
        residual = np.linalg.lstsq(inputs, split.labels["first"], rcond=None)[1][0] / split.rows
        shares.append(residual / split.labels["first"].var())
    assert np.median(shares) > 0.25


def test_the_seed_fixes_each_split_by_itself():
    data = synthetic_regression(0.5, **SMALL)
    assert synthetic_regression(0.5, **SMALL).fingerprint == data.fingerprint
    assert synthetic_regression(0.5, seed=1, **SMALL).fingerprint != data.fingerprint
    longer = synthetic_regression(0.5, features=12, rows=(500, 20, 30))
    np.testing.assert_array_equal(longer.test.features["x"], data.test.features["x"])
    np.testing.assert_array_equal(longer.test.labels["second"], data.test.labels["second"])
    assert not np.isin(data.valid.features["x"], data.test.features["x"]).any()
    assert data.width == 12
    np.testing.assert_array_equal(jax.jit(data.encode)(data.test.features), data.test.features["x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correlation": 1.01}, r"correlation is 1\.01, expected -1 to 1, the cosine of the tasks' weights"),
        ({"correlation": float("nan")}, r"correlation is nan, expected -1 to 1"),
        ({"features": 1}, r"features is 1, expected an integer of at least 2"),
        ({"sinusoids": -1}, r"sinusoids is -1, expected an integer of at least 0"),
        ({"seed": -1}, r"seed is -1, expected an integer of at least 0"),
        ({"scale": 0}, r"scale is 0, expected a finite number above 0, such as 1"),
        ({"alpha": (3, 1)}, r"alpha is \(3, 1\), expected a range of frequencies from 0 up"),
        ({"noise": -0.1}, r"noise is -0\.1, expected a variance"),
        ({"rows": (10, 10)}, r"rows are \(10, 10\), expected three integers of at least 2: train, valid, test"),
        ({"rows": (10, 1, 5)}, r"rows are \(10, 1, 5\), expected three integers of at least 2"),
    ],
)
def test_synthetic_tasks_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        synthetic_regression(**{"correlation": 0.5} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": TASKS | {"odd": Binary()}}, r"train split of 'tiny': task 'odd' has no labels and so no loss"),
        (
            {"valid": TaskSplit(SPLIT.features, SPLIT.labels | {"up": np.arange(10)})},
            r"valid split of 'tiny': .* 2, e",
        ),
        (
            {"test": TaskSplit({"x": np.zeros((9, 2))}, SPLIT.labels)},
            r"test split of 'tiny' has x 9, up 10, size 10, expected features and labels of as many rows; leave none",
        ),
        ({"test": TaskSplit({}, SPLIT.labels)}, r"test split of 'tiny' has no features, expected"),
    ],
)
def test_data_that_does_not_belong_together(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(encode=encode, **changes)


def test_width_and_fingerprint():
    data = tiny(encode=lambda features: features["x"].repeat(3, axis=1))
    assert data.width == 6
    assert tiny(encode=encode, notes=("a",)).fingerprint == data.fingerprint
    assert tiny(encode=encode, tasks=TASKS | {"up": MultiClass(2)}).fingerprint != data.fingerprint
    for split in ("train", "valid", "test"):
        for part, name in (("features", "x"), ("labels", "up"), ("labels", "size")):
            arrays = dict(getattr(SPLIT, part))
            arrays[name] = arrays[name].copy()
            arrays[name].flat[-1] = 0
            other = dataclasses.replace(data, **{split: SPLIT._replace(**{part: arrays})})
            assert other.fingerprint != data.fingerprint


def test_batches_of_rows():
    batches, again = RowBatches(SPLIT, 4, 7), RowBatches(SPLIT, 4, 7)
    assert (batches.batch, batches.seed, batches.steps_per_epoch) == (4, 7, 2)
    walked = [batches.batch_at(step) for step in range(6)]
    for step in (5, 0, np.int64(3)):
        found = again.batch_at(step)
        assert {kind: list(arrays) for kind, arrays in found.items()} == {"features": ["x"], "labels": ["up", "size"]}
        for kind, arrays in found.items():
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, walked[int(step)][kind][name])
    for epoch in range(3):
        seen = np.concatenate([batch["labels"]["size"] for batch in walked[2 * epoch : 2 * epoch + 2]])
        np.testing.assert_array_equal(seen, np.random.default_rng((7, epoch)).permutation(10)[:8])
    for batch in walked:
        np.testing.assert_array_equal(batch["features"]["x"][:, 0], 2 * batch["labels"]["size"])
        np.testing.assert_array_equal(batch["labels"]["up"], batch["labels"]["size"] % 2)


def test_rows_and_images_come_in_one_order():
    images = Batches(np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1), np.arange(10), 3, 5)
    batches = RowBatches(SPLIT, 3, 5)
    for step in range(7):
        np.testing.assert_array_equal(images.batch_at(step)["labels"], batches.batch_at(step)["labels"]["size"])


@pytest.mark.parametrize(
    ("split", "batch", "seed", "message"),
    [
        (SPLIT, 11, 0, r"batch 11 exceeds the 10 rows of the split; lower the batch"),
        (SPLIT, 0, 0, r"batch is 0, expected an integer of at least 1"),
        (SPLIT, 2, -1, r"seed is -1, expected an integer of at least 0"),
        (SPLIT._replace(features={"x": np.zeros((3, 2))}), 2, 0, r"split has x 3, up 10, size 10, expected features"),
    ],
)
def test_batches_that_cannot_be(split, batch, seed, message):
    with pytest.raises(ValueError, match=message):
        RowBatches(split, batch, seed)
    with pytest.raises(ValueError, match="step is -1, expected 0 or more"):
        RowBatches(SPLIT, 4).batch_at(-1)


def test_digit_tasks():
    data, images = digit_tasks(valid=0.2), load_images("digits", valid=0.2)
    assert data.tasks == {"class": MultiClass(10), "parity": Binary(), "at_least_5": Binary(), "loop": Binary()}
    digit = data.test.labels["class"]
    np.testing.assert_array_equal(digit, images.test.labels)
    table = {"parity": [0, 1] * 5, "at_least_5": [0] * 5 + [1] * 5, "loop": [1, 0, 0, 0, 0, 0, 1, 0, 1, 1]}
    for task, by_digit in table.items():
        np.testing.assert_array_equal(data.test.labels[task], np.array(by_digit)[digit])
    inputs = jax.jit(data.encode)(data.test.features)
    np.testing.assert_array_equal(inputs, images.floats(images.test).reshape(360, 64))
    assert (data.width, inputs.dtype, data.valid.rows) == (64, np.float32, 287)
    assert digit_tasks(valid=0).valid.rows == 0


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An `.npz` whose image number i of 40 is an L-shaped 6x6 digit of brightness 10 + i; 10 more are the test."""
    pixels = np.zeros((50, 6, 6), np.uint8)
    pixels[:, :, 1] = pixels[:, 5] = (10 + np.arange(50, dtype=np.uint8))[:, None]
    labels = np.arange(50) % 10
    path = tmp_path_factory.mktemp("images") / "ells.npz"
    arrays = {"train_images": pixels[:40], "test_images": pixels[40:]}
    np.savez(path, **arrays, train_labels=labels[:40], test_labels=labels[40:])
    return path


def test_multi_mnist_by_hand(file):
    data, images = multi_mnist(file, valid=0.25, seed=3, canvas=8), load_images("mnist", file, valid=0.25)
    assert data.tasks == {"top_left": MultiClass(10), "bottom_right": MultiClass(10)}
    assert (data.name, data.width) == ("multi_ells", 64)
    for name, size in (("train", 30), ("valid", 10), ("test", 10)):
        split, source = getattr(data, name), getattr(images, name)
        pixels = split.features["pixels"]
        assert pixels.shape == (size, 8, 8, 1)
        assert pixels.dtype == np.uint8
        # The brightness of an L names its image; it is seen alone at the top left and at the bottom right.
        number = {int(image.max()): i for i, image in enumerate(source.images)}
        left, right = ([number[int(value)] for value in pixels[:, i, j, 0]] for i, j in ((0, 1), (7, 7)))
        assert sorted(left) == list(range(size))
        assert all(a != b for a, b in zip(left, right, strict=True))
        np.testing.assert_array_equal(split.labels["top_left"], source.labels[left])
        np.testing.assert_array_equal(split.labels["bottom_right"], source.labels[right])
        one, two = (
            np.pad(source.images[part], ((0, 0), pad, pad, (0, 0))) for part, pad in ((left, (0, 2)), (right, (2, 0)))
        )
        np.testing.assert_array_equal(pixels, np.maximum(one, two))
        np.testing.assert_allclose(data.encode(split.features), pixels.reshape(size, 64) / 255.0, rtol=1e-6)
    assert "fixed by seed 3 (30 train, 10 valid, 10 test)" in data.notes[-1]


def test_the_pairs_are_fixed_by_the_seed(file):
    data = multi_mnist(file, valid=0.25, canvas=8)
    assert multi_mnist(file, valid=0.25, canvas=8).fingerprint == data.fingerprint
    assert multi_mnist(file, valid=0.25, canvas=8, seed=1).fingerprint != data.fingerprint
    fewer = multi_mnist(file, valid=0.25, canvas=8, train_size=7)
    assert fewer.train.rows == 7
    np.testing.assert_array_equal(fewer.test.features["pixels"], data.test.features["pixels"])
    assert multi_mnist(file, valid=0).train.features["pixels"].shape == (40, 36, 36, 1)
    assert multi_mnist(file, valid=0).valid.rows == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"seed is -1, expected an integer of at least 0"),
        ({"canvas": 5}, r"canvas is 5, expected an integer of at least 6, the size of the images"),
        ({"train_size": 31}, r"train_size is 31, expected 1 to 30, the number of training images; or None"),
        ({"train_size": 0}, r"train_size is 0, expected 1 to 30"),
        ({"valid": 0.025}, r"the valid split has 1 image, expected 2 or more to overlay, or none; change valid"),
        ({"valid": 1}, r"valid is 1, expected a fraction in \[0, 1\)"),
        ({"data_file": "none.npz"}, r"none\.npz does not exist; give the path"),
    ],
)
def test_multi_mnist_that_cannot_be(file, changes, message):
    with pytest.raises(ValueError, match=message):
        multi_mnist(**{"data_file": file, "valid": 0.25} | changes)


def test_the_import_loads_no_heavy_library():
    code = "import sys, hyperjax.data; print([m for m in ('sklearn', 'tensorflow_datasets', 'scipy.ndimage', 'PIL') "
    code += "if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
