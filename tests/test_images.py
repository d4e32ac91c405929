"""Images are read, split, batched and turned into tasks: each image once, nothing changed unasked."""

import dataclasses
import functools
import gzip
import http.server
import io
import tarfile
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperjax.data import (
    Batches,
    Images,
    Split,
    load_images,
    normalise,
    pad_crop_flip,
    permute_labels,
    permute_pixels,
    rotate,
    select_classes,
)
from hyperjax.data import images as module

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 6, 5, 3)).astype(np.uint8)
LABELS = np.tile(np.arange(4), 10)


def arrays(**changes):
    """Returns the arrays of a tiny file, some of them changed; None drops one."""
    found = dict(zip(module.KEYS, (PIXELS, LABELS, PIXELS[:8], LABELS[:8]), strict=True)) | changes
    return {key: value for key, value in found.items() if value is not None}


def write(path, **changes):
    np.savez(path, **arrays(**changes))
    return path


def rows(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


def test_digits(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    splits = (digits.train, digits.valid, digits.test)
    assert [split.images.shape for split in splits] == [(n, 8, 8, 1) for n in (1293, 144, 360)]
    assert all(split.images.dtype == np.uint8 and split.labels.dtype == np.int32 for split in splits)
    assert (digits.name, digits.classes, digits.peak) == ("digits", 10, 16.0)
    assert max(split.images.max() for split in splits) == 16
    together = rows(*(np.concatenate(part) for part in zip(*splits, strict=True)))
    assert together == rows(source.images[..., None].astype(np.uint8), source.target)
    assert all(set(split.labels.tolist()) == set(range(10)) for split in splits)
    assert "scikit-learn (1,293 train, 144 valid, 360 test; 10 classes)" in digits.notes[0]


def test_the_test_split_and_the_order_are_fixed(digits):
    again, without = load_images("digits"), load_images("digits", valid=0)
    assert again.fingerprint == digits.fingerprint != without.fingerprint
    np.testing.assert_array_equal(without.test.images, digits.test.images)
    assert without.valid.images.shape == (0, 8, 8, 1)
    assert without.valid.labels.shape == (0,)
    np.testing.assert_array_equal(without.train.images, np.concatenate([digits.train.images, digits.valid.images]))


def test_the_fingerprint_sees_every_array(digits):
    for split in ("train", "valid", "test"):
        for part in ("images", "labels"):
            changed = getattr(getattr(digits, split), part).copy()
            changed.flat[-1] += 1
            other = dataclasses.replace(digits, **{split: getattr(digits, split)._replace(**{part: changed})})
            assert other.fingerprint != digits.fingerprint
    assert dataclasses.replace(digits, peak=255.0).fingerprint != digits.fingerprint
    assert dataclasses.replace(digits, notes=()).fingerprint == digits.fingerprint


@pytest.mark.parametrize("gray", [False, True])
def test_a_file(tmp_path, gray):
    pixels = PIXELS[..., 0] if gray else PIXELS
    path = write(tmp_path / "tiny.npz", train_images=pixels, test_images=pixels[:8], train_labels=LABELS.astype("u1"))
    found = load_images("mnist", path, valid=0.25)
    expected = pixels.reshape(40, 6, 5, -1)
    assert (found.name, found.classes, found.peak) == ("tiny", 4, 255.0)
    assert str(path) in found.notes[0]
    assert len(found.valid.labels) == 10
    np.testing.assert_array_equal(found.test.images, expected[:8])
    np.testing.assert_array_equal(found.test.labels, LABELS[:8])
    both = zip(found.train, found.valid, strict=True)
    assert rows(*(np.concatenate(part) for part in both)) == rows(expected, LABELS)
    assert load_images("cifar10", str(path), valid=0.25).fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": None, "test_images": None}, r"holds no train_labels and no test_images; give an \.npz of"),
        ({"train_images": PIXELS[0, 0]}, r"train images have shape \(5, 3\) and dtype uint8, expected \[N, H, W\] or"),
        ({"test_images": PIXELS[:8] / 255}, r"test images have shape .* dtype float64, expected .* of uint8; convert"),
        ({"train_labels": LABELS[:, None]}, r"train labels have shape \(40, 1\) and dtype int64, expected \[N\] int"),
        ({"train_labels": LABELS * 1.0}, r"train labels have shape \(40,\) and dtype float64, expected \[N\] integers"),
        (
            {"train_labels": LABELS[1:]},
            r"there are 40 train images and 39 train labels, expected as many of each; leave",
        ),
        ({"test_images": PIXELS[:0], "test_labels": LABELS[:0]}, r"test images have shape \(0, .*at least one image"),
        ({"train_labels": LABELS - 1}, r"train labels range from -1 to 2, expected 0 to at most 9999; renumber"),
        ({"train_labels": LABELS + 10**9}, r"train labels range from 1000000000 to 1000000003, expected 0 to at most"),
        ({"test_labels": LABELS[:8] + 1}, r"test_labels of .* hold 4, expected 0 to 3 as in train; number the"),
        ({"test_images": PIXELS[:8, 1:]}, r"are \(6, 5, 3\) in train and \(5, 5, 3\) in test, expected one shape"),
        ({"train_labels": np.array([None] * 40)}, r"tiny\.npz is damaged \(Object arrays.*\); give an \.npz of"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, changes, message):
    path = write(tmp_path / "tiny.npz", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_images("mnist", path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_archive(tmp_path):
    whole = write(tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", PIXELS)
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[200] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    for name, message in [
        ("none.npz", "none.npz does not exist; give the path"),
        ("", "is a folder, expected a file"),
        ("array.npy", r"array\.npy is no \.npz archive; give one of train_images"),
        ("short.npz", r"short\.npz is damaged \("),
        ("flipped.npz", r"flipped\.npz is damaged \("),
    ]:
        with pytest.raises(ValueError, match=message):
            load_images("mnist", tmp_path / name)


def test_what_cannot_be_asked_for(tmp_path):
    path = write(tmp_path / "tiny.npz")
    with pytest.raises(ValueError, match=r"images 'svhn' are unknown: expected one of digits, mnist, cifar10; or pass"):
        load_images("svhn", path)
    for valid in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"valid is {valid}, expected a fraction in \[0, 1\)"):
            load_images("digits", valid=valid)
    with pytest.raises(ValueError, match=r"valid 0\.01 makes 0 of 40 training images; change it, or pass 0"):
        load_images("mnist", path, valid=0.01)
    with pytest.raises(ValueError, match=r"valid 0\.99 makes 40 of 40 training images"):
        load_images("mnist", path, valid=0.99)


def test_statistics_and_normalisation(digits):
    floats = digits.floats(digits.train)
    assert floats.dtype == np.float32
    assert (floats.min(), floats.max()) == (0, 1)
    mean, std = digits.channel_statistics()
    assert mean.shape == std.shape == (1,)
    np.testing.assert_allclose([mean[0], std[0]], [floats.mean(), floats.std()], rtol=1e-5)
    result = normalise(digits.train.images, digits.peak, mean, std)
    assert result.dtype == np.float32
    np.testing.assert_allclose([result.mean(), result.std()], [0, 1], atol=1e-5)

    colours = Split(PIXELS, LABELS.astype(np.int32))
    three = Images("three", colours, Split(PIXELS[:0], LABELS[:0]), colours, 4)
    mean, std = three.channel_statistics(three.test)
    np.testing.assert_allclose(mean, (PIXELS / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, (PIXELS / 255).std((0, 1, 2)), rtol=1e-6)
    with pytest.raises(ValueError, match="the split of 'three' has no images, so no statistics"):
        three.channel_statistics(three.valid)
    with pytest.raises(ValueError, match=r"std is .*, expected values above 0"):
        normalise(PIXELS, 255.0, mean, np.zeros(3))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_image_at_most_once(batch, seed, epoch):
    numbered = np.arange(40, dtype=np.float32).reshape(40, 1, 1, 1)
    batches = Batches(numbered, np.arange(40), batch, seed)
    assert batches.steps_per_epoch == 40 // batch
    start = epoch * batches.steps_per_epoch
    seen = [batches.batch_at(start + step) for step in range(batches.steps_per_epoch)]
    labels = np.concatenate([found["labels"] for found in seen])
    assert len(labels) == len(set(labels.tolist())) == 40 - 40 % batch
    np.testing.assert_array_equal(np.concatenate([found["images"] for found in seen]).ravel(), labels)
    order = np.random.default_rng((seed, epoch)).permutation(40)
    np.testing.assert_array_equal(labels, order[: len(labels)])


def test_a_batch_depends_on_seed_and_step_alone():
    first, second = (Batches(PIXELS, LABELS, 12, 7, pad_crop_flip) for _ in range(2))
    walked = [first.batch_at(step) for step in range(9)]
    assert walked[0]["images"].dtype == np.uint8
    assert walked[0]["labels"].dtype == np.int32
    for step in (8, 0, 5, np.int64(3)):
        for key, value in second.batch_at(step).items():
            np.testing.assert_array_equal(value, walked[int(step)][key])
    plain, other = Batches(PIXELS, LABELS, 40, 7), Batches(PIXELS, LABELS, 40, 8)
    assert (plain.batch_at(0)["images"] != plain.batch_at(1)["images"]).any()
    assert (plain.batch_at(0)["images"] != other.batch_at(0)["images"]).any()


def test_augmentation_changes_from_step_to_step_and_never_the_data():
    drawn = []

    def augment(rng, images):
        drawn.append(rng.random())
        images[:] = 0
        return images

    pixels = PIXELS.copy()
    batches = Batches(pixels, LABELS, 20, augment=augment)
    assert not any(batches.batch_at(step)["images"].any() for step in range(6))
    assert len(set(drawn)) == 6
    np.testing.assert_array_equal(pixels, PIXELS)


@pytest.mark.parametrize(
    ("images", "labels", "batch", "seed", "message"),
    [
        (PIXELS, LABELS, 41, 0, r"batch 41 exceeds the 40 images of the split; lower the batch"),
        (PIXELS, LABELS, 0, 0, r"batch is 0, expected an integer of at least 1"),
        (PIXELS, LABELS, 2.5, 0, r"batch is 2\.5, expected an integer of at least 1"),
        (PIXELS, LABELS, 4, -1, r"seed is -1, expected an integer of at least 0"),
        (PIXELS, LABELS[:3], 1, 0, r"there are 40 batched images and 3 batched labels, expected as many"),
        (PIXELS[:0], LABELS[:0], 1, 0, r"expected at least one image"),
        (PIXELS, LABELS / 2, 1, 0, r"batched labels have shape \(40,\) and dtype float64"),
    ],
)
def test_batches_that_cannot_be(images, labels, batch, seed, message):
    with pytest.raises(ValueError, match=message):
        Batches(images, labels, batch, seed)


def test_a_step_below_zero():
    with pytest.raises(ValueError, match="step is -1, expected 0 or more"):
        Batches(PIXELS, LABELS, 4).batch_at(-1)


def test_pad_crop_flip_yields_every_crop_and_its_mirror_image():
    image = RNG.integers(1, 256, (1, 4, 3, 2)).astype(np.uint8)
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    crops = [padded[i : i + 4, j : j + 3] for i in range(3) for j in range(3)]
    expected = {crop.tobytes() for crop in crops} | {crop[:, ::-1].tobytes() for crop in crops}
    found = pad_crop_flip(np.random.default_rng(0), np.repeat(image, 600, axis=0), pad=1)
    assert found.shape == (600, 4, 3, 2)
    assert found.dtype == np.uint8
    values, counts = np.unique([crop.tobytes().hex() for crop in found], return_counts=True)
    assert {bytes.fromhex(value) for value in values} == expected
    assert counts.min() > 600 / len(expected) / 2
    with pytest.raises(ValueError, match="pad is -1, expected 0 or more"):
        pad_crop_flip(np.random.default_rng(0), image, -1)


def test_permute_pixels():
    np.testing.assert_array_equal(permute_pixels(PIXELS, 0), PIXELS)
    found = permute_pixels(PIXELS, 3)
    assert found.dtype == np.uint8
    assert (found != PIXELS).any()
    # One order for all images and channels: number the pixels, permute them, and look them up.
    order = permute_pixels(np.arange(30).reshape(1, 6, 5, 1), 3).ravel()
    assert sorted(order.tolist()) == list(range(30))
    np.testing.assert_array_equal(found, PIXELS.reshape(40, 30, 3)[:, order].reshape(PIXELS.shape))
    assert (permute_pixels(PIXELS, 4) != found).any()
    assert permute_pixels(PIXELS[:0], 3).shape == (0, 6, 5, 3)
    with pytest.raises(ValueError, match="seed is -2, expected 0 or more"):
        permute_pixels(PIXELS, -2)


@pytest.mark.parametrize("change", [functools.partial(permute_pixels, seed=1), functools.partial(rotate, degrees=5)])
def test_tasks_need_images_of_rank_four(change):
    with pytest.raises(ValueError, match=r"images have shape \(6, 5, 3\), expected \[N, H, W, C\]; reshape them"):
        change(PIXELS[0])


def test_permute_labels():
    np.testing.assert_array_equal(permute_labels(LABELS, 4, 0), LABELS)
    names = permute_labels(np.arange(10), 10, 5)
    assert names.dtype == np.int32
    assert sorted(names.tolist()) == list(range(10))
    assert names.tolist() != list(range(10))
    np.testing.assert_array_equal(permute_labels(LABELS, 10, 5), names[LABELS])
    with pytest.raises(ValueError, match="label 3 is outside of the classes: expected 0 to 2; raise classes"):
        permute_labels(LABELS, 3, 1)
    with pytest.raises(ValueError, match="labels have dtype float64, expected integers"):
        permute_labels(LABELS * 1.0, 4, 1)


def test_rotation():
    square = RNG.integers(0, 256, (3, 7, 7, 2)).astype(np.uint8)
    for turns in range(-1, 5):
        found = rotate(square, 90.0 * turns)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.rot90(square, turns, (1, 2)))
    # Bilinear interpolation is exact on a plane; at 45 degrees one pixel to the right is the diagonal of half a pixel.
    y, x = np.mgrid[-3:4, -3:4].astype(np.float32)
    found = rotate(x[None, ..., None], 45)[0, ..., 0]
    np.testing.assert_allclose(found[2:5, 2:5], ((x - y) / np.sqrt(2))[2:5, 2:5], atol=1e-6)
    assert found.dtype == np.float32
    assert rotate(np.full((1, 7, 7, 1), 200, np.uint8), 45)[0, 0, 0, 0] == 0
    assert rotate(square[:0], 30).shape == (0, 7, 7, 2)


def test_select_classes():
    found = select_classes(Split(PIXELS, LABELS), [3, 1])
    expected = [i for i in range(40) if LABELS[i] in (1, 3)]
    np.testing.assert_array_equal(found.images, PIXELS[expected])
    assert found.labels.tolist() == [{3: 0, 1: 1}[int(LABELS[i])] for i in expected]
    assert found.labels.dtype == np.int32
    for classes, message in [
        ([], r"classes are \[\], expected one or more, each once"),
        ([1, 1], r"classes are \[1, 1\], expected one or more, each once"),
        ([1, 4], r"class 4 has no images in the split, which holds \[0, 1, 2, 3\]; select among those"),
    ]:
        with pytest.raises(ValueError, match=message):
            select_classes(Split(PIXELS, LABELS), classes)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, silently."""

    def log_message(self, *args):
        pass


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Serves the folder `source` to a TFDS without data of its own; yields that folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        local = {name: tuple(f"{url}/{found.rsplit('/')[-1]}" for found in urls) for name, urls in module.URLS.items()}
        monkeypatch.setattr(module, "URLS", local)
        yield folder
        server.shutdown()
        thread.join()


def test_the_downloads_are_those_whose_digests_tfds_knows():
    import tensorflow_datasets as tfds

    for name, urls in module.URLS.items():
        assert set(urls) == set(tfds.builder_cls(name).url_infos)


def test_mnist_is_prepared_once_without_tensorflow(source, tmp_path):
    pixels = RNG.integers(0, 256, (30, 28, 28)).astype(np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    for name, part in (("train", slice(20)), ("t10k", slice(20, 30))):
        (source / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels[part].tobytes()))
        (source / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels[part].tobytes()))
    (tmp_path / "tfds" / "mnist" / "3.0.1").mkdir(parents=True)
    found = load_images("mnist", valid=0)
    assert rows(*found.train) == rows(pixels[:20, ..., None], labels[:20])
    assert rows(*found.test) == rows(pixels[20:, ..., None], labels[20:])
    assert (found.name, found.classes, found.train.images.shape) == ("mnist", 10, (20, 28, 28, 1))
    for path in source.iterdir():
        path.unlink()
    assert load_images("mnist", valid=0).fingerprint == found.fingerprint

    record = next((tmp_path / "tfds" / "mnist").glob("*/*train*"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot read .*mnist.*; move .* away and run again to rebuild it, or pass"):
        load_images("mnist")


def test_cifar10_is_prepared_without_tensorflow(source):
    pixels = RNG.integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 2
    stored = np.concatenate([labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(12, -1)], axis=1)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    with tarfile.open(source / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for i, name in enumerate(names):
            content = stored[2 * i : 2 * i + 2].tobytes()
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    found = load_images("cifar10", valid=0.2)
    together = (np.concatenate(part) for part in zip(found.train, found.valid, strict=True))
    assert rows(*together) == rows(pixels[:10], labels[:10])
    assert rows(*found.test) == rows(pixels[10:], labels[10:])
    assert (len(found.valid.labels), found.train.images.shape[1:]) == (2, (32, 32, 3))


def test_a_broken_download_leaves_nothing_that_looks_prepared(source, tmp_path):
    (source / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"cannot prepare .*cifar10.*; try again, .*, or pass --data-file"
        ) as caught:
            load_images("cifar10")
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "tfds" / "cifar10").glob("*/*.json"))


def test_without_a_network_the_message_comes_at_once(source):
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot reach http.*404.*; pass --data-file with an \.npz of train_images"):
        load_images("mnist")
    assert time.monotonic() - started < 5
