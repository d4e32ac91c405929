"""A trace of some training steps, for Perfetto or XProf, and the operations in it that took the most time."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hyperjax.training import programs

NOT_OF_THE_MODEL = ("", "while", "body", "closed_call", "cond", "checkpoint")
WARM_UP = 3  # calls before the trace: the first compiles


class Cost(NamedTuple):
    """What an operation of a program took in a trace.

    Attributes:
        name: of the operation in the program.
        seconds: on all devices and threads together, without the operations within it.
        calls: how often it ran.
    """

    name: str
    seconds: float
    calls: int


class Profile:
    """Records some calls of a function, none before it is warm; the table is of them alone.

        with Profile(folder, calls=10) as profile:
            for batch in batches:
                state = profile.call(step, state, batch)
        print(profile.report)

    Args:
        folder: where the trace is put: open `perfetto_trace.json.gz` in Perfetto, or the folder in XProf.
        calls: how many to record, after three to warm up.

    Raises:
        ValueError: `calls` is below 1.

    Attributes:
        report: once they are recorded, the ten dearest operations as text; None until then.
    """

    def __init__(self, folder: Path, calls: int):
        if calls < 1:
            raise ValueError(f"calls is {calls}, expected 1 or more")
        self.folder, self.calls, self.made = folder, calls, 0
        self._module, self._tracing = "", False
        self._names: dict[str, str] = {}
        self.report: str | None = None

    def call(self, function: Any, *arguments: Any) -> Any:
        """Returns function(*arguments); `function` is jitted."""
        self.made += 1
        if self.made <= WARM_UP or self.report is not None:
            return function(*arguments)
        if not self._tracing:
            self._module, self._names = operation_names(function.lower(*arguments).compile().as_text())
            jax.block_until_ready(arguments)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
            self._tracing = True
        result = jax.block_until_ready(function(*arguments))
        if self.made == WARM_UP + self.calls:
            self.finish()
        return result

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Ends the trace, if calls are being recorded; with fewer of them than were asked for."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            newest = max(self.folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
            found = costs(newest, self._module)
            self.report = table(found, self._names, self.made - WARM_UP) + f"\ntrace   {newest.parent}"


def costs(path: Path, module: str) -> list[Cost]:
    """The operations of a program in a trace, the dearest first.

    Args:
        path: of an `.xplane.pb`.
        module: name of the program, such as `jit_step`.
    """
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for name, own in _own_times(line, module):
                seconds[name] = seconds.get(name, 0.0) + own / 1e9
                calls[name] = calls.get(name, 0) + 1
    found = [Cost(name, seconds[name], calls[name]) for name in seconds]
    return sorted(found, key=lambda cost: -cost.seconds)


def _own_times(line: Any, module: str) -> Iterator[tuple[str, float]]:
    """Each operation of a thread or stream, and its nanoseconds less those of the operations within it."""
    events = []
    for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" in stats and stats.get("hlo_module") == module:
            events.append((event.start_ns, -event.duration_ns, str(stats["hlo_op"])))
    open_: list[list[Any]] = []  # name, end, own time
    for start, minus, name in sorted(events):
        while open_ and start >= open_[-1][1]:
            name_of, _, own = open_.pop()
            yield name_of, own
        if open_:
            open_[-1][2] += minus
        open_.append([name, start - minus, -minus])
    yield from ((name, own) for name, _, own in open_)


def operation_names(text: str) -> tuple[str, dict[str, str]]:
    """The name of a program, and where in the model each of its operations comes from.

    Args:
        text: `compiled.as_text()`.
    """
    names: dict[str, str] = {}
    module = re.match(r"HloModule ([^,\s]+)", text)
    for operation, _ in programs.operations(text):
        if (found := re.search(r'op_name="([^"]*)"', operation.rest)) is not None:
            names[operation.name] = _shortened(found.group(1))
    return module.group(1) if module else "", names


def _shortened(path: str) -> str:
    """`jit(step)/transpose(jvp(Model))/layer_0/while/body/dot_general` -> `Model/layer_0/dot_general, back`."""
    back = "transpose(" in path
    parts = [re.sub(r"^(?:\w+\()+|\)+$", "", part) for part in path.split("/")[1:]]
    kept = [part for part in parts if part not in NOT_OF_THE_MODEL and not part.startswith("branch_")]
    return "/".join(kept) + (", back" if back else "")


def table(found: list[Cost], names: dict[str, str], steps: int, most: int = 10) -> str:
    """The dearest operations as text.

    Args:
        found: of `costs`.
        names: of `operation_names`.
        steps: how many steps they are of.
        most: how many to show.
    """
    total = sum(cost.seconds for cost in found) or 1.0
    lines = [f"the {min(most, len(found))} dearest of {len(found)} operations, on all threads and devices together:"]
    lines.append(f"{'share':>7}{'ms/call':>10}{'runs/call':>11}  operation")
    for cost in found[:most]:
        where = f"{cost.name}: {names[cost.name]}" if names.get(cost.name) else cost.name
        share, each = 100 * cost.seconds / total, 1e3 * cost.seconds / steps
        lines.append(f"{share:>6.1f}%{each:>10.3f}{cost.calls / steps:>11.1f}  {where}")
    return "\n".join(lines)
