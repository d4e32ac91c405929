"""How benchmarks time things: compiled ahead, and in turn, so that ratios hold although the machine's speed drifts."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


def compiled(function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    """Compiles a function for arguments like these.

    Args:
        function: to be compiled.
        arguments: of which shapes and dtypes count.
        donate: numbers of the arguments whose memory the results may take.

    Returns:
        The compiled function, which takes such arguments and nothing else.
    """
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


def in_turn(runs: Mapping[Name, Callable[[], Any]], repeats: int) -> dict[Name, list[float]]:
    """Times runs in rounds; a turn is one untimed run, which warms up the caches, and two timed ones.

    Args:
        runs: what to time, by name; results that are JAX arrays are waited for.
        repeats: number of rounds.

    Returns:
        Seconds of each timed run, by name, 2 x repeats of them.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            jax.block_until_ready(run())
            for _ in range(2):
                start = time.perf_counter()
                jax.block_until_ready(run())
                seconds[name].append(time.perf_counter() - start)
    return seconds
