"""The step and the loop: what an interruption may not change, and how a run stops."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperjax.training import (
    Checkpoints,
    Interrupted,
    JsonLines,
    NonFinite,
    TrainState,
    fit,
    make_step,
    make_steps,
    read_lines,
    schedule,
    seconds,
    stopping,
)
from hyperjax.training.loop import _Timer

STEPS = 23
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule(0.1, STEPS, 0.5)))


def loss_fn(params, carry, batch, key):
    noise = jax.random.normal(key, batch.shape)
    loss = jnp.mean(jnp.square(params["w"] + carry + 0.1 * noise - batch))
    return loss, (0.5 * carry + batch, {"bpc": loss / jnp.log(2)})


STEP = make_step(loss_fn, OPTIMIZER)


def batch_at(step):
    return np.random.default_rng(step).normal(size=4).astype(np.float32)


def run(folder, batches=batch_at, validate=None, steps=STEPS, step=STEP, **options):
    """Runs or resumes as a script does; returns the bytes of its metrics."""
    state = TrainState.create({"w": jnp.zeros(4)}, OPTIMIZER, jnp.zeros(4))
    checkpoints = Checkpoints(folder / "checkpoints")
    restored = checkpoints.restore(state)
    state, resumed = restored if restored else (state, {})
    at = resumed.get("step", 0)
    with checkpoints, JsonLines(folder / "m", at) as metrics, JsonLines(folder / "t", at) as timings:
        state = fit(
            state,
            step,
            batches,
            jax.random.key(5),
            steps=steps,
            checkpoints=checkpoints,
            metrics=metrics,
            timings=timings,
            validate=validate or (lambda state: {"valid_bpc": float(state.params["w"].sum())}),
            best="valid_bpc",
            eval_every=10,
            log_every=4,
            items=4,
            resumed=resumed,
            **options,
        )
    return (folder / "m").read_bytes(), state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def test_the_step_folds_its_number_into_the_key():
    state = TrainState.create({"w": jnp.zeros(4)}, optax.sgd(0.0), jnp.zeros(4))
    step = make_step(lambda p, c, b, key: (jnp.sum(p["w"]), (c, {"drawn": jax.random.normal(key)})), optax.sgd(0.0))
    key, drawn = jax.random.key(3), []
    for _ in range(3):
        state, metrics = step(state, 0, key)
        drawn.append(float(metrics["drawn"]))
        assert float(metrics["grad_norm"]) == pytest.approx(2.0)
    assert drawn == [float(jax.random.normal(jax.random.fold_in(key, n))) for n in range(3)]
    assert int(state.step) == 3


def test_the_step_donates_its_state():
    state = TrainState.create({"w": jnp.zeros(4)}, OPTIMIZER, jnp.zeros(4))
    STEP(state, batch_at(0), jax.random.key(0))
    assert state.params["w"].is_deleted()


def test_the_schedule_is_constant_and_then_half_a_cosine():
    rate = schedule(0.2, 100, 0.4)
    values = [float(rate(step)) for step in (0, 59, 60, 80, 100)]
    np.testing.assert_allclose(values, [0.2, 0.2, 0.2, 0.1, 0.0], atol=1e-7)
    assert float(schedule(0.2, 100)(99)) == pytest.approx(0.2)


def test_metrics_hold_the_mean_of_the_steps_and_the_validation(uninterrupted, tmp_path):
    lines, state = uninterrupted
    (tmp_path / "m").write_bytes(lines)
    rows = read_lines(tmp_path / "m")
    assert [row["step"] for row in rows] == [4, 8, 10, 12, 16, 20, 20, 23, 23]
    assert int(state.step) == STEPS
    fresh, losses = TrainState.create({"w": jnp.zeros(4)}, OPTIMIZER, jnp.zeros(4)), []
    for n in range(4):
        fresh, metrics = STEP(fresh, batch_at(n), jax.random.key(5))
        losses.append(float(metrics["loss"]))
    assert rows[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert list(rows[2]) == ["step", "valid_bpc"]


@pytest.mark.parametrize("at", [1, 9, 10, 11, 22])
def test_a_crash_at_any_step_changes_no_metric(uninterrupted, tmp_path, at):
    def batches(step):
        if step == at and not (tmp_path / "crashed").exists():
            (tmp_path / "crashed").touch()
            raise ConnectionError("crash")
        return batch_at(step)

    with pytest.raises(ConnectionError):
        run(tmp_path, batches, save_minutes=0.0 if at == 11 else 5.0)
    lines, state = run(tmp_path, batches)
    assert lines == uninterrupted[0]
    np.testing.assert_array_equal(state.params["w"], uninterrupted[1].params["w"])


DATA = jnp.stack([batch_at(step) for step in range(STEPS)])
STEPS_2 = make_steps(loss_fn, OPTIMIZER, lambda data, step: data[step])


def several(folder, **options):
    """The same run, two steps a call."""
    folder.mkdir(exist_ok=True)
    return run(folder, options.pop("batches", lambda _: DATA), step=STEPS_2, per_call=2, **options)


def test_several_steps_a_call_are_the_same_steps(uninterrupted, tmp_path):
    metrics, state = several(tmp_path)
    assert int(state.step) == STEPS  # an odd number: the last call is shorter
    np.testing.assert_allclose(state.params["w"], uninterrupted[1].params["w"], rtol=1e-5)
    lines, want = (list(map(json.loads, m.splitlines())) for m in (metrics, uninterrupted[0]))
    assert [sorted(line) for line in lines] == [sorted(line) for line in want]
    for one, other in zip(lines, want, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("at", [0, 2, 8, 12, 22])
def test_a_crash_between_calls_changes_no_metric(tmp_path, at):
    def crash(step):
        if step == at:
            raise RuntimeError("crash")
        return DATA

    whole = several(tmp_path / "whole")[0]
    with pytest.raises(RuntimeError, match="crash"):
        several(tmp_path / "crashed", batches=crash, save_minutes=0)
    assert several(tmp_path / "crashed")[0] == whole


def test_the_speed_counts_every_step_of_a_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hyperjax.training.loop.time.perf_counter", lambda: now[0])
    timer = _Timer()
    timer.tick(20)  # compiles: not measured
    for seconds_later, count in ((2.0, 20), (0.5, 5)):
        now[0] += seconds_later
        timer.tick(count)
    assert timer.lap(items=6) == 6 * 25 / 2.5


def test_the_step_within_a_call_that_went_wrong_is_named(tmp_path):
    data = DATA.at[4].set(jnp.nan)
    with pytest.raises(NonFinite, match="loss is nan at step 5;"):
        several(tmp_path, batches=lambda _: data)


def test_calls_that_do_not_end_where_lines_do_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"log_every is 4, expected a multiple of the 3 steps|eval_every is 10"):
        run(tmp_path, step=STEPS_2, per_call=3)
    with pytest.raises(ValueError, match="per_call is 0"):
        run(tmp_path, per_call=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_resumes_there(uninterrupted, tmp_path, number, capsys):
    seen, before = [], signal.getsignal(signal.SIGINT)

    def batches(step):
        seen.append(step)
        if step == 6:
            os.kill(os.getpid(), number)
        return batch_at(step)

    with pytest.raises(SystemExit) as stop, stopping():
        run(tmp_path, batches)
    assert stop.value.code == (0 if number == signal.SIGTERM else 130)
    printed = capsys.readouterr().err
    assert f"{number.name}: saved step 7 of 23" in printed
    assert "to resume: python " in printed
    assert Checkpoints(tmp_path / "checkpoints").steps() == [7]
    lines, _ = run(tmp_path, lambda step: (seen.append(step), batch_at(step))[1])
    assert seen == list(range(STEPS))
    assert lines == uninterrupted[0]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_the_last_step_is_heard_too(uninterrupted, tmp_path, capsys):
    def batches(step):
        if step == STEPS - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return batch_at(step)

    with pytest.raises(SystemExit) as stop, stopping():
        run(tmp_path, batches)
    assert stop.value.code == 130
    assert f"saved step {STEPS} of {STEPS}" in capsys.readouterr().err
    assert run(tmp_path)[0] == uninterrupted[0]


@pytest.mark.parametrize("at", [10, 20, STEPS])  # 20 is also the step of a line of metrics, the last is both
def test_a_signal_ends_a_validation_and_resuming_makes_it_again(uninterrupted, tmp_path, at, capsys):
    def validate(state):
        if int(state.step) == at and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # a long validation
        return {"valid_bpc": float(state.params["w"].sum())}

    began = time.perf_counter()
    with pytest.raises(SystemExit) as stop, stopping():
        run(tmp_path, validate=validate)
    assert time.perf_counter() - began < 30
    assert stop.value.code == 0
    assert f"SIGTERM: saved step {at} of {STEPS}" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == at

    def batches(step):
        if step == at:
            raise RuntimeError("crash")
        return batch_at(step)

    if at < STEPS:  # resumed twice: killed after the validation that it makes first, before another checkpoint
        with pytest.raises(RuntimeError, match="crash"):
            run(tmp_path, batches)
    lines, state = run(tmp_path)
    assert lines == uninterrupted[0]
    np.testing.assert_array_equal(state.params["w"], uninterrupted[1].params["w"])
    best = Checkpoints(tmp_path / "checkpoints")
    best.restore(state)
    values = {row["step"]: row["valid_bpc"] for row in read_lines(tmp_path / "m") if "valid_bpc" in row}
    assert best.best == min(values.items(), key=lambda item: item[1])  # also that of a checkpoint valued afterwards


def test_a_second_signal_acts_at_once(tmp_path):
    code = (
        "import os, signal, sys, time, test_loop as t\n"
        "def batches(step):\n"
        "    if step == 3:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.1)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return t.batch_at(step)\n"
        "with t.stopping():\n"
        "    t.run(t.Path(sys.argv[1]), batches)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGTERM


def test_sigterm_outside_of_the_loop_exits_with_0_and_says_how_to_resume(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, stopping():
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 0
    assert "to resume: python " in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_between_checkpoints_still_says_how_to_resume(capsys):
    with pytest.raises(SystemExit) as stop, stopping():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert "to resume: python " in capsys.readouterr().err


@pytest.mark.parametrize(("bad_step", "last_good"), [(3, None), (10, 10), (16, 10)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, bad_step, last_good):
    def batches(step):
        return batch_at(step) * (np.nan if step == bad_step else 1)

    with pytest.raises(SystemExit) as stop, stopping():
        run(tmp_path, batches)
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"loss is nan at step {bad_step + 1};" in error
    assert (f"last good checkpoint is step {last_good}" if last_good else "no checkpoint was written") in error
    assert "learning rate" in error
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == ([last_good] if last_good else [])
    if last_good:
        assert np.isfinite(checkpoints.restore(jax.eval_shape(lambda: fresh_state()))[0].params["w"]).all()


def fresh_state():
    return TrainState.create({"w": jnp.zeros(4)}, OPTIMIZER, jnp.zeros(4))


def test_a_gradient_that_is_not_finite_is_noticed_before_a_save(tmp_path):
    @jax.custom_jvp
    def same(x):
        return x

    same.defjvp(lambda primals, tangents: (primals[0], tangents[0] * jnp.nan))
    step = make_step(lambda p, c, b, key: (jnp.sum(same(p["w"])), (c, {})), OPTIMIZER)
    state = fresh_state()
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        JsonLines(tmp_path / "m", 0) as lines,
        pytest.raises(NonFinite, match="grad_norm is nan at step 1"),
    ):
        fit(
            state,
            step,
            batch_at,
            jax.random.key(0),
            steps=1,
            checkpoints=checkpoints,
            metrics=lines,
            timings=lines,
            validate=lambda state: {"v": 0.0},
            best="v",
            eval_every=1,
            log_every=1,
            items=1,
        )
    assert Checkpoints(tmp_path / "c").steps() == []


def test_a_validation_value_that_is_not_finite_is_not_saved(tmp_path):
    with pytest.raises(NonFinite, match="valid_bpc is inf at step 10"):
        run(tmp_path, validate=lambda state: {"valid_bpc": float("inf")})
    assert Checkpoints(tmp_path / "checkpoints").steps() == []


def test_times_add_up_over_processes(tmp_path):
    def batches(step):
        if step == 15 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return batch_at(step)

    with pytest.raises(Interrupted):
        run(tmp_path, batches)
    run(tmp_path, batches)
    rows = read_lines(tmp_path / "t")
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 23]
    times = [row["seconds"] for row in rows]
    assert times == sorted(times)
    assert all(row["chars_per_second"] > 0 for row in rows)
    assert seconds({"seconds": 100.0}, 0.0) > seconds({}, 0.0) + 99


def test_a_finished_run_does_nothing_more(tmp_path, uninterrupted):
    run(tmp_path)

    def batches(step):
        raise AssertionError(f"step {step} ran again")

    assert run(tmp_path, batches)[0] == uninterrupted[0]
