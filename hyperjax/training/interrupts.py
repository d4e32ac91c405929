"""What ends a run before its last step: a signal, a number that is not finite, a disk that is full."""

import contextlib
import errno
import functools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from hyperjax.training.checkpoint import NotSaved

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

    Raises:
        SystemExit: with that status.
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


class Received(list[int]):
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
        except Ended:
            self.inside = False
            return None


class Ended(KeyboardInterrupt):
    """A signal came within `Received.call`."""


@contextlib.contextmanager
def signals() -> Iterator[Received]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one acts at once."""
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # not by print, which a print that it interrupts would refuse
            os.write(2, b"\nstopping when the step now running is done; again to stop at once\n")
        if received.inside:
            raise Ended

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
