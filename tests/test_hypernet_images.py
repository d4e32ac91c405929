"""experiments/hypernet_images.py: two ways to one network, published counts, resuming, bad input in one line."""

import dataclasses
import json
import shutil
import signal

import hypernet_images as script
import jax
import numpy as np
import optax
import pytest

from hyperjax import training
from hyperjax.data import Batches, Images, Split, load_images
from hyperjax.hypernet.image_models import ConvNet, WideResNet
from hyperjax.paramtree import select

TINY = ["--features=8", "--embedding=3", "--hidden=3", "--tile=8", "--batch=16", "--log-every=7", "--eval-every=150"]
RUN = [*TINY, "--steps=450", "--rates=0.01", "--seed=2"]


def fake_images(side, channels, classes=10, size=20):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (size, side, side, channels), np.uint8)
    split = Split(pixels, np.arange(size, dtype=np.int32) % classes)
    return Images("fake", split, Split(pixels[:7], split.labels[:7]), split, classes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert script.main([*RUN, f"--workdir={workdir}"]) == 0
    return workdir


def test_a_run_leaves_what_it_should(finished, capsys):
    names = {path.name for path in finished.iterdir()}
    files = {"config.json", "metrics.jsonl", "timings.jsonl", "summary.json", "curves.png", "kernels.png"}
    assert names >= files | {"checkpoints"}
    summary = json.loads((finished / "summary.json").read_text())
    needed = "model data test_error steps params params_unique seconds device jax_version git_commit seed"
    assert set(needed.split()) <= summary.keys()
    assert not any(isinstance(value, dict | list) for value in summary.values())
    assert summary["params_kernels"] == 3 * 3 * 8 * 8
    assert summary["params_hypernetwork"] == 3 + 8 * (3 * 3 + 3) + 3 * 3 * 8 * (3 + 1)
    others = summary["params_main"] - summary["params_kernels"]
    assert summary["params"] == others + summary["params_hypernetwork"]
    rows = training.read_lines(finished / "metrics.jsonl")
    valid = {row["step"]: row["valid_error"] for row in rows if "valid_error" in row}
    assert list(valid) == [150, 300, 450]
    assert summary["valid_error"] == valid[450] < 40  # the last state's; chance is 90 %
    assert summary["test_error"] < 40
    capsys.readouterr()
    assert script.main([*RUN, f"--workdir={finished}"]) == 0
    assert "holds a finished run" in capsys.readouterr().out


def test_a_run_stopped_halfway_resumes_to_the_same_metrics(finished, tmp_path, monkeypatch, capsys):
    def stop_at_step_203(batches, step, original=Batches.batch_at):
        if step == 203:
            signal.raise_signal(signal.SIGINT)
        return original(batches, step)

    with monkeypatch.context() as patched:
        patched.setattr(Batches, "batch_at", stop_at_step_203)
        with pytest.raises(SystemExit) as stop:
            script.main([*RUN, f"--workdir={tmp_path}"])
    assert stop.value.code == 130
    assert not (tmp_path / "summary.json").exists()
    capsys.readouterr()
    assert script.main([*RUN, f"--workdir={tmp_path}"]) == 0
    assert "resuming after step 204 of 450" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_changed_images_are_refused(finished, tmp_path, capsys):
    workdir, images = tmp_path / "run", np.zeros((40, 8, 8), np.uint8)
    shutil.copytree(finished, workdir)
    (workdir / "summary.json").unlink()
    labels = np.arange(40) % 10
    np.savez(tmp_path / "new.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    line = refused(capsys, [*RUN, f"--workdir={workdir}", f"--data-file={tmp_path / 'new.npz'}"])
    assert "the images of new have changed since this run began; choose another --workdir" in line


def test_both_models_are_one_network_and_its_statistics_are_carried_on():
    settings = {"depth": 10, "generated": "^group1_block1/conv", "embedding": 3, "hidden": 2, "l2": 0.3}
    config, data = script.Config(**settings), fake_images(8, 3)
    batch = {"images": data.train.images[:6], "labels": data.train.labels[:6]}
    hyper, plain = (script.make_model(dataclasses.replace(config, model=model), data) for model in ("hyper", "plain"))
    state = jax.jit(script.make_create(hyper, optax.sgd(1.0), data))(jax.random.key(0))
    chosen, params = jax.jit(lambda params: script.kernels(config, hyper, params))(state.params)
    key = jax.random.key(1)
    loss, (carry, metrics) = jax.jit(script.make_loss(config, hyper, data))(state.params, state.carry, batch, key)
    without = script.make_loss(dataclasses.replace(config, l2=0.0), plain, data)
    start = {"batch_stats": state.carry["batch_stats"]["target"]}
    expected, (statistics, plain_metrics) = jax.jit(without)(params, start, batch, key)
    assert len(chosen) == 2
    penalty = 0.15 * sum(np.sum(np.square(kernel)) for kernel in chosen.values())
    assert penalty > 1
    assert float(loss) == pytest.approx(float(expected) + penalty, rel=1e-5)
    assert metrics.keys() == plain_metrics.keys() == {"error"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        carry["batch_stats"]["target"],
        statistics["batch_stats"],
    )
    assert np.abs(statistics["batch_stats"]["norm"]["mean"]).max() > 0


def test_the_error_counts_every_image_once_at_any_batch_size():
    config, data = script.Config(features=2, model="plain"), fake_images(8, 1, classes=3)
    model = script.make_model(config, data)
    state = jax.jit(script.make_create(model, optax.sgd(1.0), data))(jax.random.key(0))
    mean, std = data.channel_statistics()
    x = (data.test.images / np.float32(255) - mean) / std
    predicted = np.argmax(jax.jit(model.apply)({"params": state.params}, x), -1)
    wanted = 100 * np.mean(predicted != data.test.labels)
    assert 0 < wanted < 100
    for size in (7, 33):
        error = script.make_error(dataclasses.replace(config, eval_batch=size), model, data)
        assert error(state, data.test) == pytest.approx(wanted)


def sizes(config, data):
    model = script.make_model(config, data)
    create = script.make_create(model, optax.sgd(1.0), data)
    return script.count_params(config, model, jax.eval_shape(create, jax.random.key(0)).params)


def test_the_cpu_preset_is_the_papers_mnist():
    counts = {model: sizes(script.defaults("cpu", model), fake_images(28, 1)) for model in ("hyper", "plain")}
    assert counts["hyper"] == {"main": 21_210, "kernels": 12_544, "hypernetwork": 4_244, "trained": 12_910}
    assert counts["plain"] == {"main": 21_210, "kernels": 12_544, "hypernetwork": 0, "trained": 21_210}


def test_the_paper_preset_is_the_papers_cifar():
    config, data = script.defaults("paper"), fake_images(32, 3)
    assert (config.data, config.batch, config.steps, config.l2, config.augment, config.pad) == (
        *("cifar10", 128, 672_000, 5e-6, "flip", 4),
    )
    counts = sizes(config, data)
    assert counts == {"main": 563_930, "kernels": 557_568, "hypernetwork": 75_920 + 242 * 64, "trained": 97_770}


def test_presets_share_their_recipe_between_the_models():
    for preset in ("quick", "cpu", "paper"):
        assert script.defaults(preset, "plain") == dataclasses.replace(script.defaults(preset), model="plain")


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 2e-3), (167_999, 2e-3), (168_000, 1e-3), (335_999, 1e-3), (336_000, 2e-4), (504_000, 5e-5), (671_999, 5e-5)],
)
def test_the_learning_rates_of_the_paper(step, rate):
    config = script.defaults("paper")
    assert float(script.make_schedule(config, config.steps)(step)) == pytest.approx(rate)


def test_the_last_rate_may_fall_to_zero():
    config = script.Config(rates=(0.1, 0.01), until=(10,), decay=0.5)
    rates = [float(script.make_schedule(config, 30)(step)) for step in range(31)]
    np.testing.assert_allclose(rates[:20], [0.1] * 10 + [0.01] * 10, rtol=1e-6)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[30] == 0 < rates[29]


def test_a_shift_moves_each_image_as_a_whole_within_the_padding():
    images = np.zeros((200, 6, 7, 2), np.uint8)
    images[:, 2, 3] = (9, 5)
    moved = script.random_shift(np.random.default_rng(0), images, 2)
    assert moved.shape == images.shape
    image, row, column = np.nonzero(moved[..., 0])
    np.testing.assert_array_equal(image, np.arange(200))
    assert set(zip(row.tolist(), column.tolist(), strict=True)) == {(r, c) for r in range(5) for c in range(1, 6)}
    np.testing.assert_array_equal(moved[image, row, column], [(9, 5)] * 200)
    np.testing.assert_array_equal(script.random_shift(np.random.default_rng(0), images, 0), images)


@pytest.mark.parametrize(
    ("net", "pattern", "found"), [(ConvNet(), "^conv2/kernel$", 1), (WideResNet(), "^group.*/conv", 36)]
)
def test_the_patterns_of_the_presets(net, pattern, found):
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    assert len(select(pattern, list(script.paramtree.structure(params).flatten(params)))) == found
    assert pattern in {script.defaults("cpu").generated, script.defaults("paper").generated}


def refused(capsys, arguments):
    """Runs the script on bad input; returns its one line."""
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def nothing_compiled():
    """Fails the test if anything is compiled."""

    def compiled(name, *_, **__):
        assert "backend_compile" not in name, name

    jax.monitoring.register_event_duration_secs_listener(compiled)
    yield
    jax._src.monitoring.unregister_event_duration_listener(compiled)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset=huge"], "--preset is huge, expected quick, cpu or paper"),
        (["--model=both"], "--model is both, expected hyper or plain"),
        (["--data=faces"], "images 'faces' are unknown"),
        (["--data-file=absent.npz"], "absent.npz"),
        (["--features=0"], "--features is 0, expected a whole number of at least 1"),
        (["--pad=-1"], "--pad is -1, expected a number of at least 0"),
        (["--l2=nan"], "--l2 is nan, expected a number of at least 0"),
        (["--valid=0"], "--valid is 0.0, expected a fraction in (0, 1)"),
        (["--rates", "0.1", "0"], "--rates is (0.1, 0.0), expected positive numbers"),
        (["--rates", "0.1", "0.2"], "--until is (), expected the rising steps"),
        (["--rates", "3", "2", "1", "--until", "9", "9"], "--until is (9, 9), expected the rising steps"),
        (["--batch=2000"], "batch 2000 exceeds the 1293 images"),
        (["--generated=^conv3"], "'^conv3' selects none of the target's parameters: conv1/bias, conv1/kernel"),
        (["--model=plain", "--generated=("], "'(' is no regular expression"),
        (["--generated=head"], "head/bias has shape (10,), expected"),
        (["--depth=12"], "depth 12, width 1: expected a depth 6 n + 4"),
        (["--dept=40"], "did you mean --depth?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert line in refused(capsys, arguments)
    assert list(tmp_path.iterdir()) == []  # bad input leaves no workdir behind


def test_the_images_of_the_quick_preset_need_no_file():
    data = load_images(script.defaults().data)
    assert data.train.images.shape[1:] == (8, 8, 1)
