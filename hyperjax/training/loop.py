"""The training loop: steps, a progress bar, validation and checkpoints."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
import tqdm

from hyperjax.training import processes
from hyperjax.training.board import Board
from hyperjax.training.checkpoint import Checkpoints
from hyperjax.training.interrupts import Interrupted, NonFinite, signals
from hyperjax.training.mesh import Layout
from hyperjax.training.metrics import JsonLines
from hyperjax.training.profiling import WARM_UP, Profile
from hyperjax.training.state import TrainState

Array = jax.Array


def seconds(resumed: dict[str, Any], started: float) -> float:
    """How long a run has taken: its earlier processes up to the checkpoint, and this one since `started`.

    Args:
        resumed: the `meta` of the checkpoint it goes on from, {} of none.
        started: `time.perf_counter()` at the start of this process.
    """
    return resumed.get("seconds", 0.0) + time.perf_counter() - started


def fit(
    state: TrainState,
    step: Callable[..., tuple[TrainState, dict[str, Array]]],
    batch_at: Callable[..., Any],
    key: Array,
    *,
    steps: int,
    per_call: int = 1,
    checkpoints: Checkpoints[TrainState],
    metrics: JsonLines,
    timings: JsonLines,
    validate: Callable[[TrainState], dict[str, float]],
    best: str,
    eval_every: int,
    log_every: int,
    items: int,
    unit: str = "chars",
    meta: dict[str, Any] | None = None,
    resumed: dict[str, Any] | None = None,
    started: float | None = None,
    save_minutes: float = 5.0,
    layout: Layout | None = None,
    max_skipped: int = 10,
    profile: int = 0,
) -> TrainState:
    """Trains until `steps` updates are made.

    A checkpoint is written after each validation, every `save_minutes`, on SIGINT and SIGTERM, and at the end;
    never of a state that came out of a step whose loss or gradient was not finite. `metrics` gets what a rerun
    repeats to the bit, wherever it was interrupted: the mean of each step's metrics every `log_every` steps, and
    what `validate` returns. `timings` gets the clock; where TensorBoard is installed, it gets both. A signal ends a
    validation, too: resuming makes it again.

    Where `step` skips updates that are not finite, each is a line of `metrics` (`skipped`: why), is left out of the
    means, and counts towards `max_skipped`. One that overflowed in float16 is left out of the means alone.

    Args:
        state: where to start, new or restored; its buffers are donated.
        step: as `make_step` builds it, or `make_steps` for `per_call` above 1; its metrics hold `loss` and `grad_norm`.
        batch_at: step number -> batch, a function of the number alone, so that it needs no state of its own. With a
            `layout` it takes a slice too, and reads only those rows of the batch.
        key: PRNG key of the run.
        steps: number of updates, those before `state` included.
        per_call: how many updates a call of `step` makes. Calls end at multiples of it, so a resumed run makes those of
            the run uninterrupted; signals are heard, and checkpoints written, between calls.
        checkpoints, metrics, timings: where to write.
        validate: state -> named values; called every `eval_every` steps and after the last.
        best: the name among them by which the best checkpoint is chosen; lower is better.
        eval_every, log_every: in steps.
        items: how many units of data a step reads, for the speed.
        unit: their name.
        meta: JSON that each checkpoint carries beside the loop's own.
        resumed: the `meta` of the checkpoint that `state` comes from.
        started: `time.perf_counter()` when the clock of this process began; now by default.
        save_minutes: longest time between two checkpoints.
        layout: how state and batches lie on several devices; None for one. `validate` gets a state on one device, and
            runs in every process. Several processes hear signals, and save by the clock, when they log.
        max_skipped: how many updates of the whole run may be skipped.
        profile: how many calls of `step` to record, after the first few: a trace in `profile/` beside `metrics`, and a
            table of the operations that took longest. None are recorded for 0.

    Returns:
        The last state, on one device.

    Raises:
        NonFinite: a loss, gradient norm or validation value is NaN or infinite; where `step` skips, more than
            `max_skipped` of them.
        NotSaved: a checkpoint could not be written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        ValueError: `per_call` is below 1, or does not divide `eval_every` and `log_every`.
    """
    _check_calls(per_call, eval_every=eval_every, log_every=log_every)
    resumed = resumed or {}
    started = time.perf_counter() if started is None else started
    rows: list[dict[str, float]] = list(resumed.get("rows", ()))  # metrics of the steps since the last line
    at = int(state.step)
    saved = at  # the newest step that a checkpoint holds
    skipped = int(resumed.get("skipped", 0))
    due = int(resumed.get("step", at)) < at  # a signal ended the validation of this step
    left_out = str(resumed.get("left_out", ""))  # why its update was skipped, if it was
    unread: dict[str, Array] | None = None  # metrics of the newest step, still being computed
    timer = _Timer()
    local: Callable[[TrainState], TrainState] = (lambda state: state) if layout is None else layout.local
    state = state if layout is None else layout.place(state)
    several = processes.several()
    in_turn = several and jax.default_backend() == "cpu"  # where two collectives at once block each other

    def read(last_step: int) -> None:
        nonlocal unread, skipped, left_out
        if unread is not None:
            left_out = ""
            columns = {name: np.asarray(value).reshape(-1).tolist() for name, value in unread.items()}
            unread = None
            new = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            for n, row in enumerate(new, last_step - len(new) + 1):
                if row.pop("overflowed", 0):
                    continue
                if row.pop("skipped", 0):
                    skipped += 1
                    why = ", ".join(f"{name} is {row[name]}" for name in ("loss", "grad_norm") if _bad(row[name]))
                    if skipped > max_skipped:
                        raise NonFinite(_not_finite(f"{why} at step {n:,}, after {skipped - 1} skipped", checkpoints))
                    metrics.write(n, skipped=why)
                    left_out = why if n == last_step else ""
                    bar.write(f"step {n:,}: {why}: update skipped, {skipped} of at most {max_skipped}")
                    continue
                for name in ("loss", "grad_norm"):
                    _check(name, row[name], n, checkpoints)
                rows.append(row)

    def save(value: float | None = None, **instead: Any) -> None:
        nonlocal saved
        timer.pause()
        for lines in (metrics, timings):
            lines.sync()
        own = {"step": at, "rows": list(rows), "seconds": seconds(resumed, started), "skipped": skipped}
        checkpoints.save(at, state, {**(meta or {}), **own, **instead}, value)
        saved = at
        timer.saved = time.perf_counter()

    folder = metrics.path.parent
    recorded = Profile(folder / "profile", profile) if profile else None
    call = recorded.call if recorded else (lambda function, *arguments: function(*arguments))
    if due and left_out:
        metrics.write(at, skipped=left_out)
    with (
        recorded or contextlib.nullcontext(),
        signals() as received,
        _bar(steps, at, unit) as bar,
        Board(folder / "tensorboard") as board,
    ):
        while at < steps or due:
            if not due:
                count = min(per_call - at % per_call, steps - at)
                batch = batch_at(at) if layout is None else layout.join(batch_at(at, layout.rows))
                state, new = call(step, state, batch, key, *((count,) if per_call > 1 else ()))
                if in_turn:
                    jax.block_until_ready((state, new))
                read(at)  # one call behind, so that the device never waits for Python
                unread, at = new, at + count
                timer.tick(count)
                bar.update(count)
            due = False
            log, evaluate = at % log_every == 0 or at == steps, at % eval_every == 0 or at == steps
            save_now: int = time.perf_counter() - timer.saved > 60 * save_minutes
            stop = received[0] if received else 0  # looked at once: a signal may come at any moment
            if several:
                save_now, stop = processes.agree(save_now, stop) if log or evaluate else (False, 0)
            if log or evaluate or save_now or stop:
                read(at)
            before = list(rows)
            if log:
                line = {name: math.fsum(row[name] for row in rows) / len(rows) for name in (rows or [{}])[0]}
                rows.clear()
                if line:
                    metrics.write(at, **line)
                    board.write(at, line)
                speed = timer.lap(items)
                clock = {} if speed is None else {f"{unit}_per_second": speed}
                timings.write(at, seconds=seconds(resumed, started), **clock)
                board.write(at, clock)
                shown = {name: f"{value:.3f}" for name, value in line.items() if name != "grad_norm"}
                bar.set_postfix({**shown, **({} if speed is None else {f"{unit}/s": f"{speed:,.0f}"})}, refresh=False)
            if evaluate:
                timer.pause()
                here = local(state)
                values = validate(here) if several else received.call(validate, here)
                if values is None:  # as if its lines were not yet written: resuming writes them and validates
                    save(step=at - 1, rows=before, left_out=left_out)
                    _interrupt(received[0], at, steps, checkpoints)
                for name, value in values.items():
                    _check(name, value, at, checkpoints)
                metrics.write(at, **values)
                board.write(at, values)
                bar.write(f"step {at:,}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
                save(values[best])
            elif save_now or stop:
                save()
            if stop and at < steps:
                _interrupt(stop, at, steps, checkpoints)
    if recorded:
        print(recorded.report or f"not profiled: the run made no more than {WARM_UP} calls")
    if saved < at:
        save()
    checkpoints.wait()
    (stop,) = processes.agree(received[0] if received else 0)
    if stop:  # in the last step or validation: what the caller does next would not hear of it
        _interrupt(stop, at, steps, checkpoints)
    return local(state)


def _check_calls(per_call: int, **intervals: int) -> None:
    """Raises ValueError unless calls of `per_call` steps end wherever one of the intervals does."""
    if per_call < 1:
        raise ValueError(f"per_call is {per_call}, expected 1 step or more")
    for name, value in intervals.items():
        if value % per_call:
            raise ValueError(f"{name} is {value}, expected a multiple of the {per_call} steps of per_call")


def _interrupt(number: int, at: int, steps: int, checkpoints: Checkpoints) -> NoReturn:
    checkpoints.wait()
    name = signal.Signals(number).name
    code = 0 if number == signal.SIGTERM else 128 + number
    raise Interrupted(f"{name}: saved step {at:,} of {steps:,} in {checkpoints.directory}", code)


class _Timer:
    """Measures the steps alone: neither compilation nor validation nor saving."""

    def __init__(self) -> None:
        self.saved = time.perf_counter()
        self._since: float | None = None  # None: the step now running is not measured
        self._steps, self._seconds = 0, 0.0

    def tick(self, count: int) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self._steps, self._seconds = self._steps + count, self._seconds + now - self._since
        self._since = now

    def pause(self) -> None:
        self._since = None

    def lap(self, items: int) -> float | None:
        """Returns items per second since the last lap, or None if no step was measured."""
        speed = items * self._steps / self._seconds if self._seconds > 0 else None
        self._steps, self._seconds = 0, 0.0
        return speed


def _check(name: str, value: float, step: int, checkpoints: Checkpoints) -> None:
    if _bad(value):
        raise NonFinite(_not_finite(f"{name} is {value} at step {step:,}", checkpoints))


def _bad(value: float) -> bool:
    return not math.isfinite(value)


def _not_finite(what: str, checkpoints: Checkpoints) -> str:
    steps = checkpoints.steps()
    good = "no checkpoint was written before it"
    if steps:
        good = f"the last good checkpoint is step {steps[-1]:,} in {checkpoints.directory}"
    hope = "go on with --non-finite skip, or in a new --workdir try a lower learning rate, a lower clip, or float32"
    return f"{what}; {good}; {hope}"


def _bar(steps: int, at: int, unit: str) -> Any:
    live = sys.stderr.isatty()
    return tqdm.tqdm(
        total=steps,
        initial=at,
        unit="step",
        dynamic_ncols=live,
        mininterval=0.2 if live else 15.0,
        smoothing=0.1,
        disable=not processes.is_main(),
    )
