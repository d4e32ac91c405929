"""Dynamic evaluation: against its equations step by step, its limits, its use on a run, and bad input."""

import json

import char_lm
import dynamic_evaluation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import table3

from hyperjax.data import evaluation_windows
from hyperjax.recurrent import LanguageModel, dynamic_evaluate, gradient_rms
from hyperjax.training import make_evaluate

MODEL = LanguageModel("ln_lstm", 5, 6)
IDS = np.random.default_rng(0).integers(0, 5, 43)


def made():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@jax.jit
def value_and_gradient(params, inputs, targets, carry):
    def loss(params):
        out = MODEL.apply({"params": params}, inputs, carry)
        return optax.softmax_cross_entropy_with_integer_labels(out["logits"], targets).mean(), out["carry"]

    return jax.value_and_grad(loss, has_aux=True)(params)


def segments(ids, length):
    inputs = np.concatenate([[-1], ids[:-1]])
    return [(inputs[None, n : n + length], ids[None, n : n + length]) for n in range(0, len(ids), length)]


def test_values_are_the_equations():
    params, length, rate, decay, epsilon = made(), 4, 0.02, 0.3, 1e-3
    carry, squares = MODEL.initialize_carry(1), jax.tree.map(jnp.zeros_like, params)
    parts = segments(IDS[:40], length)
    for inputs, targets in parts:
        (_, carry), gradient = value_and_gradient(params, inputs, targets, carry)
        squares = jax.tree.map(lambda s, g: s + g**2, squares, gradient)
    rms = jax.tree.map(lambda s: np.sqrt(s / len(parts)), squares)
    windows = evaluation_windows(IDS[:40], 1, length)
    got = gradient_rms(MODEL, params, windows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got, rms)

    mean = np.concatenate([np.ravel(r) for r in jax.tree.leaves(rms)]).mean()
    carry, now, nats = MODEL.initialize_carry(1), params, 0.0
    for inputs, targets in segments(IDS, length):
        (loss, carry), gradient = value_and_gradient(now, inputs, targets, carry)
        nats += float(loss) * targets.size
        now = jax.tree.map(
            lambda p, g, r, p_0: p - rate * g / (r + epsilon) + np.minimum(decay * r / mean, 1) * (p_0 - p),
            *(now, gradient, rms, params),
        )
    windows = evaluation_windows(IDS, 1, length)  # 43 = 10 x 4 + 3: the last window is padded
    got = dynamic_evaluate(MODEL, params, rms, windows, rate=rate, decay=decay, epsilon=epsilon)
    assert got == pytest.approx(nats / len(IDS) / np.log(2), abs=1e-5)


def test_at_rate_zero_it_is_the_static_evaluation():
    params = made()
    windows = evaluation_windows(IDS, 1, 10)

    def predict(params, inputs, carry):
        out = MODEL.apply({"params": params}, inputs, carry)
        return out["logits"], out["carry"]

    static = make_evaluate(predict)(params, MODEL.initialize_carry(1), windows).bpc
    rms = gradient_rms(MODEL, params, windows)
    assert dynamic_evaluate(MODEL, params, rms, windows, rate=0.0) == pytest.approx(static, abs=1e-5)


def test_it_learns_a_text_that_repeats_itself():
    params, ids = made(), np.tile([0, 1, 2, 3, 4, 4, 2], 60)
    windows = evaluation_windows(ids, 1, 7)
    rms = gradient_rms(MODEL, params, windows)
    static, moved = (dynamic_evaluate(MODEL, params, rms, windows, rate=rate) for rate in (0.0, 0.01))
    held = dynamic_evaluate(MODEL, params, rms, windows, rate=0.01, decay=10.0)
    assert moved < 0.8 * static
    assert moved < held


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (2, {"rate": 0.1}, "the windows have 2 streams; cut them with a batch of 1"),
        (1, {"rate": -0.1}, "rate is -0.1"),
        (1, {"rate": 0.1, "decay": float("nan")}, "decay is nan"),
        (1, {"rate": 0.1, "epsilon": float("inf")}, "epsilon is inf"),
    ],
)
def test_bad_settings_are_named(batch, options, message):
    params = made()
    with pytest.raises(ValueError, match=message):
        dynamic_evaluate(MODEL, params, params, evaluation_windows(IDS, batch, 5), **options)


def test_windows_of_another_kind_are_named():
    with pytest.raises(ValueError, match="give inputs, targets, mask as evaluation_windows cuts them"):
        gradient_rms(MODEL, made(), {"inputs": np.zeros((3, 1, 4))})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic")
    text = folder / "text.txt"
    text.write_text("a short line\n" * 200)
    options = ["--model=lstm", "--units=8", "--batch=4", "--length=16", "--steps=30", "--eval-every=30"]
    options += ["--sample-length=5", "--log-every=30", "--learning-rate=0.01", f"--corpus={text}"]
    assert char_lm.main([*options, f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


def test_the_script_chooses_on_the_validation_text(trained, capsys):
    arguments = [str(trained), "--rates", "0.003", "1e30", "--decays", "0", "--tune=120"]
    assert dynamic_evaluation.main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((trained / "dynamic.json").read_text())
    summary = json.loads((trained / "summary.json").read_text())
    assert (found["rate"], found["decay"]) == (0.003, 0.0)
    for split in ("valid", "test"):
        assert found[f"static_{split}_bpc"] == pytest.approx(summary[f"{split}_bpc"], abs=1e-5)
        assert found[f"{split}_bpc"] < found[f"static_{split}_bpc"]
    assert "rate 1e+30, decay 0: " in printed
    assert f"test: {found['static_test_bpc']:.4f} bpc, dynamic {found['test_bpc']:.4f}" in printed


def test_the_table_has_it_in_a_column_of_its_own():
    run = {"command": "c", "config": {"preset": "reduced", "model": "lstm"}, "params": 5, "steps": 7}
    run |= {"valid_bpc": 1.5, "test_bpc": 1.4, "chars_per_second": 28_000, "device": "a chip"}
    lines = table3.table([run | {"dynamic_evaluation": {"test_bpc": 1.3}}]).splitlines()
    assert "| test bpc | test bpc, dynamic evaluation | in the paper" in lines[0]
    assert "| 1.500 | 1.400 | 1.300 | 1.347 | 1.312 | 2.99 | a chip |" in lines[2]
    assert "dynamic" not in table3.table([run])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--rates=-1"], "--rates is (-1.0,), expected one or more finite numbers of at least 0"),
        (["--decays=nan"], "--decays is (nan,), expected"),
        (["--length=0"], "--length is 0"),
        (["--tune=0"], "--tune is 0"),
    ],
)
def test_the_scripts_bad_input_is_named(trained, capsys, arguments, line):
    with pytest.raises(SystemExit) as stopped:
        dynamic_evaluation.main([str(trained), *arguments])
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        dynamic_evaluation.main([str(tmp_path)])
    assert "holds no run, for it has no config.json" in capsys.readouterr().err
