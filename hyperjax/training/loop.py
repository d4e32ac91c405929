"""The training loop: steps, a progress bar, validation, checkpoints, and clean ways to stop."""

import contextlib
import errno
import functools
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
import tqdm

from hyperjax.training.checkpoint import Checkpoints, NotSaved
from hyperjax.training.metrics import JsonLines
from hyperjax.training.state import TrainState

Array = jax.Array
NON_FINITE_EXIT = 1
NOT_WRITTEN_EXIT = 1
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)


class NonFinite(Exception):
    """The loss, its gradient or a validation value is NaN or infinite; the message says where and what to try."""


class Interrupted(Exception):
    """The run was asked to stop, and saved.

    Attributes:
        code: exit status: 0 for SIGTERM, which is how a machine is taken away, and 130 for SIGINT.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Terminated(KeyboardInterrupt):
    """SIGTERM; whatever lets KeyboardInterrupt through lets this through."""


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Turns what stops a run into a line, the command that resumes it, and an exit status.

    0 after SIGTERM, 130 after Ctrl-C, 1 for `NonFinite` and where the disk is full or cannot be written.
    """
    resume = f"to resume: {shlex.join(['python', *sys.argv])}"
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = functools.partial(_unless_of_tensorstore, sys.unraisablehook)
        if threading.current_thread() is threading.main_thread():
            stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _terminate))
        try:
            yield
        except Interrupted as error:
            _leave(error.code, f"{error}\n{resume}")
        except KeyboardInterrupt as error:
            code = 0 if isinstance(error, Terminated) else 128 + signal.SIGINT
            _leave(code, f"stopped between two checkpoints\n{resume}")
        except NonFinite as error:
            _leave(NON_FINITE_EXIT, f"error: {error}")
        except OSError as error:
            first = _first_not_saved(error)
            if isinstance(first, NotSaved):
                what = str(first)
            elif first.errno in NOT_WRITTEN:
                what = f"cannot write {first.filename or 'a file of the run'} ({first.strerror})"
            else:
                raise
            _leave(NOT_WRITTEN_EXIT, f"error: {what}; make room, or make it writable, and go on\n{resume}")


def _unless_of_tensorstore(hook: Callable[[Any], Any], unraisable: Any) -> None:
    """Leaves out what TensorStore's threads print, many times, after a write that failed and is reported elsewhere."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


def _leave(code: int, text: str) -> NoReturn:
    print(f"\n{text}", file=sys.stderr)
    raise SystemExit(code) from None


def _terminate(_number: int, _frame: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the next one acts at once
    raise Terminated


def _first_not_saved(error: BaseException) -> Any:
    """The `NotSaved` behind an error, or the error: closing files on a full disk fails again, in other words."""
    each: BaseException | None = error
    while each is not None and not isinstance(each, NotSaved):
        each = each.__context__
    return error if each is None else each


def seconds(resumed: dict[str, Any], started: float) -> float:
    """How long a run has taken: its earlier processes up to the checkpoint, and this one since `started`."""
    return resumed.get("seconds", 0.0) + time.perf_counter() - started


def fit(
    state: TrainState,
    step: Callable[..., tuple[TrainState, dict[str, Array]]],
    batch_at: Callable[[int], Any],
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
    max_skipped: int = 10,
) -> TrainState:
    """Trains until `steps` updates are made.

    A checkpoint is written after each validation, every `save_minutes`, on SIGINT and SIGTERM, and at the end; never
    of a state that came out of a step whose loss or gradient was not finite. `metrics` gets what a rerun repeats to
    the bit, wherever it was interrupted: the mean of each step's metrics every `log_every` steps, and what `validate`
    returns. `timings` gets the clock. A signal ends a validation, too: resuming makes it again.

    Where `step` skips updates that are not finite, each is a line of `metrics` (`skipped`: why), is left out of the
    means, and counts towards `max_skipped`.

    Args:
        state: where to start, new or restored; its buffers are donated.
        step: as `make_step` builds it, or `make_steps` for `per_call` above 1; its metrics hold `loss` and `grad_norm`.
        batch_at: step number -> batch, a function of the number alone, so that it needs no state of its own.
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
        max_skipped: how many updates of the whole run may be skipped.

    Returns:
        The last state.

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
    unread: dict[str, Array] | None = None  # metrics of the newest step, still being computed
    timer = _Timer()

    def read(last_step: int) -> None:
        nonlocal unread, skipped
        if unread is not None:
            columns = {name: np.asarray(value).reshape(-1).tolist() for name, value in unread.items()}
            unread = None
            new = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            for n, row in enumerate(new, last_step - len(new) + 1):
                if row.pop("skipped", 0):
                    skipped += 1
                    why = ", ".join(f"{name} is {row[name]}" for name in ("loss", "grad_norm") if _bad(row[name]))
                    if skipped > max_skipped:
                        raise NonFinite(_not_finite(f"{why} at step {n:,}, after {skipped - 1} skipped", checkpoints))
                    metrics.write(n, skipped=why)
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

    with _signals() as received, _bar(steps, at, unit) as bar:
        while at < steps or due:
            if not due:
                count = min(per_call - at % per_call, steps - at)
                state, new = step(state, batch_at(at), key, *((count,) if per_call > 1 else ()))
                read(at)  # one call behind, so that the device never waits for Python
                unread, at = new, at + count
                timer.tick(count)
                bar.update(count)
            due = False
            log, evaluate = at % log_every == 0 or at == steps, at % eval_every == 0 or at == steps
            save_now = time.perf_counter() - timer.saved > 60 * save_minutes
            stop = received[0] if received else None  # looked at once: a signal may come at any moment
            if log or evaluate or save_now or stop:
                read(at)
            before = list(rows)
            if log:
                line = {name: math.fsum(row[name] for row in rows) / len(rows) for name in (rows or [{}])[0]}
                rows.clear()
                if line:
                    metrics.write(at, **line)
                speed = timer.lap(items)
                timings.write(
                    at, seconds=seconds(resumed, started), **({} if speed is None else {f"{unit}_per_second": speed})
                )
                shown = {name: f"{value:.3f}" for name, value in line.items() if name != "grad_norm"}
                bar.set_postfix({**shown, **({} if speed is None else {f"{unit}/s": f"{speed:,.0f}"})}, refresh=False)
            if evaluate:
                timer.pause()
                values = received.call(validate, state)
                if values is None:  # as if its lines were not yet written: resuming writes them and validates
                    save(step=at - 1, rows=before)
                    _interrupt(received[0], at, steps, checkpoints)
                for name, value in values.items():
                    _check(name, value, at, checkpoints)
                metrics.write(at, **values)
                bar.write(f"step {at:,}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
                save(values[best])
            elif save_now or stop:
                save()
            if stop and at < steps:
                _interrupt(stop, at, steps, checkpoints)
    if saved < at:
        save()
    checkpoints.wait()
    if received:  # in the last step or validation: what the caller does next would not hear of it
        _interrupt(received[0], at, steps, checkpoints)
    return state


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
    return f"{what}; {good}; in a new --workdir try a lower learning rate, a lower clip, or float32"


def _bar(steps: int, at: int, unit: str) -> Any:
    live = sys.stderr.isatty()
    return tqdm.tqdm(
        total=steps, initial=at, unit="step", dynamic_ncols=live, mininterval=0.2 if live else 15.0, smoothing=0.1
    )


class _Received(list[int]):
    """Signals received."""

    inside = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns function(*arguments), or None if a signal has come before, or comes meanwhile and ends it."""
        if self:
            return None
        try:
            self.inside = True
            result = function(*arguments)
            self.inside = False
            return result
        except _Ended:
            self.inside = False
            return None


class _Ended(KeyboardInterrupt):
    """A signal came within `_Received.call`."""


@contextlib.contextmanager
def _signals() -> Iterator[_Received]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one acts at once."""
    received = _Received()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        print("\nstopping when the step now running is done; again to stop at once", file=sys.stderr)
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if received.inside:
            raise _Ended

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
