"""Updates that are not finite: left out, counted, and looked at again."""

import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import OPTIMIZER, STEP, STEPS, batch_at, fresh_state, loss_fn, run

from hyperjax.training import Checkpoints, NonFinite, TrainState, examine, make_step, make_steps, stopping


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


SKIP = make_step(loss_fn, OPTIMIZER, non_finite="skip")
SKIP_2 = make_steps(loss_fn, OPTIMIZER, lambda data, step: data[step], non_finite="skip")
BAD = (3, 10, 16)


def bad_batch_at(step):
    return batch_at(step) * (np.nan if step in BAD else 1)


@pytest.mark.parametrize("per_call", [1, 2])
def test_skipped_updates_leave_the_state_and_are_counted(tmp_path, per_call):
    data = jnp.stack([bad_batch_at(step) for step in range(STEPS)])
    several = {"batches": lambda _: data, "step": SKIP_2, "per_call": 2}
    options = several if per_call == 2 else {"batches": bad_batch_at, "step": SKIP}
    whole = tmp_path / "whole"
    whole.mkdir()
    lines, state = run(whole, max_skipped=3, **options)
    want = TrainState.create({"w": jnp.zeros(4)}, OPTIMIZER, jnp.zeros(4))
    for step in range(STEPS):  # as if there were no such batches, but for the number that draws the noise
        if step in BAD:
            want = want.replace(step=want.step + 1)
        else:
            want, _ = STEP(want, batch_at(step), jax.random.key(5))
    assert int(state.step) == STEPS
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    skipped = {row["step"]: row["skipped"] for row in rows if "skipped" in row}
    assert skipped == dict.fromkeys([step + 1 for step in BAD], "loss is nan, grad_norm is nan")
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)

    cut, crashed = tmp_path / "cut", []
    cut.mkdir()
    source = options.pop("batches")

    def crash(step):
        if step == 12 and not crashed:
            crashed.append(step)
            raise ConnectionError("crash")
        return source(step)

    with pytest.raises(ConnectionError):
        run(cut, crash, max_skipped=3, save_minutes=0, **options)
    again, resumed = run(cut, crash, max_skipped=3, **options)
    assert again == lines
    np.testing.assert_array_equal(resumed.params["w"], state.params["w"])


def test_a_run_that_stopped_at_what_is_not_finite_can_go_on_skipping_it(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    lines, _ = run(whole, bad_batch_at, step=SKIP)
    with pytest.raises(NonFinite, match=r"loss is nan at step 4; .*; go on with --non-finite skip, or in a new"):
        run(stopped, bad_batch_at)
    assert run(stopped, bad_batch_at, step=SKIP)[0] == lines


def test_the_line_of_a_skipped_update_outlives_a_validation_that_was_ended(tmp_path):
    def batches(step):
        return batch_at(step) * (np.nan if step == 9 else 1)

    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    lines, _ = run(whole, batches, step=SKIP)
    assert b'{"step": 10, "skipped": "loss is nan' in lines

    def validate(state):
        if int(state.step) == 10 and len(calls) < 2:
            calls.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return {"valid_bpc": float(state.params["w"].sum())}

    calls = []
    for _ in range(2):
        with pytest.raises(SystemExit), stopping():
            run(torn, batches, validate, step=SKIP)
    assert run(torn, batches, validate, step=SKIP)[0] == lines


def test_more_skipped_updates_than_allowed_stop_the_run_wherever_it_was_resumed(tmp_path):
    def crash(step):
        if step == 12:
            raise ConnectionError("crash")
        return bad_batch_at(step)

    with pytest.raises(ConnectionError):
        run(tmp_path, crash, step=SKIP, max_skipped=2)
    for _ in range(2):
        with pytest.raises(
            NonFinite, match=r"loss is nan, grad_norm is nan at step 17, after 2 skipped; the last good"
        ):
            run(tmp_path, bad_batch_at, step=SKIP, max_skipped=2)
    assert np.isfinite(Checkpoints(tmp_path / "checkpoints").restore(fresh_state())[0].params["w"]).all()


def test_skipping_changes_nothing_where_all_is_finite(uninterrupted, tmp_path):
    lines, _ = run(tmp_path, step=SKIP)
    one, other = (list(map(json.loads, each.splitlines())) for each in (lines, uninterrupted[0]))
    assert [list(row) for row in one] == [list(row) for row in other]
    for first, second in zip(one, other, strict=True):
        assert first == pytest.approx(second, rel=1e-5)


def test_only_stop_and_skip_are_known():
    with pytest.raises(ValueError, match="non_finite is 'ignore', expected stop or skip"):
        make_step(loss_fn, OPTIMIZER, non_finite="ignore")


def test_a_step_is_replayed_from_the_checkpoint_before_it(tmp_path):
    with pytest.raises(NonFinite, match="at step 17, after 2 skipped"):
        run(tmp_path, bad_batch_at, step=SKIP, max_skipped=2, save_minutes=0)
    state, _ = Checkpoints(tmp_path / "checkpoints").restore(fresh_state(), before=17)
    assert int(state.step) == 16
    found = examine(loss_fn, state, bad_batch_at(16), jax.random.key(5))
    assert np.isnan(found.loss)
    assert np.isnan(found.norms["w"])
    assert found.not_finite == {"batch": [""], "params": [], "carry": [], "gradient": ["w"], "new carry": [""]}
    good = examine(loss_fn, state, batch_at(16), jax.random.key(5))
    _, metrics = make_step(loss_fn, OPTIMIZER)(state, batch_at(16), jax.random.key(5))
    assert good.loss == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert good.grad_norm == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    assert not any(good.not_finite.values())
