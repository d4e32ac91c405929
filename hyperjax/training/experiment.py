"""The frame of an experiment script: its command line, its workdir, and what every summary holds."""

import argparse
import contextlib
import dataclasses
import difflib
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import tyro

from hyperjax.training import processes
from hyperjax.training.mesh import FitConfig, Layout
from hyperjax.training.metrics import write_json

Config = TypeVar("Config")
PACKAGE = Path(__file__).resolve().parents[1]
WHERE = {field.name for field in dataclasses.fields(FitConfig)}  # where a run runs, which may change when it resumes


def fail(message: object) -> NoReturn:
    """Prints one line to stderr and exits with status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def bad_input(*scripts: str) -> Iterator[None]:
    """Turns a ValueError that our own code raises into its line and exit status 2.

    A ValueError from within a library keeps its traceback: that is a bug, not bad input.

    Args:
        *scripts: `__file__` of the experiment, and of its modules whose errors are lines too.
    """
    try:
        yield
    except ValueError as error:
        origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if origin not in {Path(script).resolve() for script in scripts} and PACKAGE not in origin.parents:
            raise
        fail(error)


def parse(
    defaults: Callable[..., Config],
    chooses: Sequence[str] = ("preset", "model"),
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    prog: str | None = None,
) -> Config:
    """Parses a command line into a frozen dataclass whose defaults depend on the preset.

    Args:
        defaults: keyword arguments named in `chooses`, those given on the command line -> the config with all
            defaults; raises ValueError for a value it does not know.
        chooses: fields that choose the defaults of the others.
        argv: arguments; by default those of the process.
        description: first lines of `--help`.
        prog: name in `--help`.

    Returns:
        The config. An unknown field or a bad value prints one line and exits with status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in chooses:
        pre.add_argument(f"--{name}")
    try:
        chosen = vars(pre.parse_known_args(argv)[0])
    except argparse.ArgumentError as error:
        fail(f"{error.argument_name} needs a value; --help lists every field")
    try:
        default = defaults(**{name: value for name, value in chosen.items() if value is not None})
    except ValueError as error:
        fail(error)
    fields = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(default)}  # type: ignore[arg-type]
    for argument in argv:
        name = argument.split("=")[0].replace("_", "-")
        if re.fullmatch(r"--[A-Za-z][\w-]*", name) and name not in fields | {"--help"}:
            near = difflib.get_close_matches(name, sorted(fields), 1)
            hint = f"did you mean {near[0]}? " if near else ""
            fail(f"{name} is not a field of this experiment; {hint}--help lists all of them")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                type(default),
                default=default,
                args=argv,
                prog=prog,
                description=description,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    lines = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    fail((" ".join(lines[:rule]) or text).rstrip(".") + "; --help lists every field")


class Workdir:
    """A run's folder: one process at a time, one configuration for life.

    Making the object only reads; `open` creates, locks and writes. Of a run's several processes the first does so; the
    others write to a scratch folder that `close` removes.

    Args:
        path: the folder; need not exist.
        config: the run's configuration.
        free: fields that may differ when a run resumes; they do not change its results.
        layout: how the run is laid out over devices; see `lay_out`.

    Raises:
        ValueError: the folder holds a run with another configuration, or one that cannot be read.

    Attributes:
        path: the folder; after `open`, a scratch folder in all but the first of several processes.
        shared: the folder itself in all of them, where they keep their checkpoints together.
        summary: the summary of the finished run in it, or None.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: Any,
        free: Sequence[str] = ("workdir", "data_dir"),
        layout: Layout | None = None,
    ):
        self.layout = layout
        self.path = Path(path).expanduser()
        self.shared = self.path
        left_out = {"workdir", *WHERE} - {"mesh"}
        self.config = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
        self.fields = dataclasses.fields(config)
        self.free = {*free, *WHERE}
        self._scratch: str | None = None
        self._lock: Any = None
        self._compare()
        summary = self.path / "summary.json"
        self.summary: dict[str, Any] | None = _read_json(summary) if os.path.exists(summary) else None

    def open(self) -> "Workdir":
        """Creates and locks the folder and writes `config.json`.

        The lock is the kernel's, and goes when its process goes: a killed run leaves none behind.

        Raises:
            ValueError: the folder cannot be written, or another run is using it.
        """
        problem: ValueError | None = None
        try:
            if processes.is_main():
                self._claim()
        except ValueError as error:
            problem = error
        (failed,) = processes.agree(int(problem is not None))
        if problem is not None:
            raise problem
        if failed:
            raise ValueError(f"process 0 cannot use {self.path}; see what it says")
        if not processes.is_main():
            self._scratch = tempfile.mkdtemp()
            shutil.copytree(
                self.shared, self._scratch, ignore=shutil.ignore_patterns("checkpoints", "damaged"), dirs_exist_ok=True
            )
            self.path = Path(self._scratch)
        processes.meet("workdir")
        return self

    def _claim(self) -> None:
        lock = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.open("a+")
        except OSError as error:
            raise ValueError(f"cannot write in {self.path} ({error.strerror}); choose another --workdir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self.close()
            raise ValueError(
                f"{self.path} is in use by process {holder}; wait until it ends, or choose another --workdir"
            ) from error
        except OSError as error:
            self.close()
            raise ValueError(f"cannot lock {lock} ({error.strerror}); choose a --workdir on another disk") from error
        self._compare()  # the process that held the lock a moment ago may have started another run
        try:
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
            if not os.path.exists(self.path / "config.json"):
                write_json(self.path / "config.json", self.config)
        except OSError as error:
            self.close()
            raise ValueError(f"cannot write in {self.path} ({error.strerror}); choose another --workdir") from error

    def close(self) -> None:
        """Releases the lock."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self._lock is not None:
            with contextlib.suppress(OSError):  # what is still to be written of its number, on a full disk
                self._lock.close()
            self._lock = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json`, which marks the run as finished."""
        write_json(self.path / "summary.json", summary)
        self.summary = summary

    def _compare(self) -> None:
        path = self.path / "config.json"
        if not os.path.exists(path):  # unlike Path.exists, this raises for no path at all
            if os.path.exists(self.shared / "checkpoints"):
                raise ValueError(f"{self.path} holds checkpoints but no config.json; choose another --workdir")
            return
        added = {field.name: field.default for field in self.fields if field.default is not dataclasses.MISSING}
        old, new = added | _read_json(path), json.loads(json.dumps(self.config))  # a field added later had its default
        changed = [
            f"{name} {old.get(name)!r} -> {new.get(name)!r}"
            for name in dict.fromkeys([*old, *new])
            if name not in self.free and old.get(name) != new.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {', '.join(changed)}; use the old values to "
                "resume it, or choose another --workdir"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read, expected a JSON object; restore it or choose another --workdir"
        ) from error
    return value


def environment(script: str, params: Any, seed: int, seconds: float) -> dict[str, Any]:
    """What the summary of every experiment holds.

    Args:
        script: the experiment's `__file__`.
        params: the model's parameters; an array that stands in several places counts once as unique.
        seed: the run's seed.
        seconds: how long the run took.

    Returns:
        A flat dict: params, params_unique, seconds, device, jax_version, git_commit, seed.
    """
    return {
        "params": count(params),
        "params_unique": count({id(leaf): leaf for leaf in jax.tree.leaves(params)}),
        "seconds": round(seconds, 2),
        "device": device(),
        "jax_version": jax.__version__,
        "git_commit": git_commit(Path(script).resolve().parent),
        "seed": seed,
    }


def count(params: Any) -> int:
    """The number of scalars in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def device(layout: Layout | None = None) -> str:
    """Names the accelerators that JAX sees, the CPU cores, and how a run is laid out over them."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = f"{cores} CPU core{'' if cores == 1 else 's'}"
    if devices[0].platform != "cpu" or layout is not None:
        host = f"{len(devices)} x {devices[0].device_kind}, {host}"
    if layout is None:
        return host
    number = jax.process_count()
    return f"{host}; mesh {layout}, {number} process{'' if number == 1 else 'es'}"


def git_commit(folder: Path) -> str | None:
    """The commit that a folder is at, with `+` if tracked files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def writable(out: str) -> Path:
    """Where `--out` is, with `~` expanded.

    Raises:
        ValueError: it is a folder, or in none that exists and can be written.
    """
    path = Path(out).expanduser()
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out is {out}, expected a file in a folder that exists and can be written")
    return path


def say(text: str) -> None:
    """Prints to stdout, whatever its encoding; a reader such as `head` may leave early."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_summary(summary: dict[str, Any]) -> None:
    """Prints a summary, a line per key."""
    width = max(map(len, summary), default=0)
    for name, value in summary.items():
        say(f"  {name:<{width}}  {value:,}" if isinstance(value, int | float) else f"  {name:<{width}}  {value}")
