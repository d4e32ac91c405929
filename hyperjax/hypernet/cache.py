"""`WeightCache`: generated weights, kept by task id or by z for as long as the variables they were generated from."""

import dataclasses
import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from hyperjax.hypernet import conditions
from hyperjax.hypernet.network import HyperNetwork
from hyperjax.paramtree import path_string

Array = jax.Array
INSIDE_JIT = "the cache was asked inside jit, where values are not known; use hyper.generate there"


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """What a cache has done since it was made or cleared.

    Attributes:
        hits: calls answered without generating, also those that waited for another thread to generate the same.
        misses: all other calls; hits + misses is the number of calls.
        evictions: sets of weights put out to make room.
        entries: sets of weights that are kept.
        bytes: their size; never more than the cache's `max_bytes`.
        generate_seconds: spent generating, summed over threads; it includes compiling, the first time.
        total_seconds: spent in `get`, generating included, summed over threads.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0
    generate_seconds: float = 0.0
    total_seconds: float = 0.0

    @property
    def generate_share(self) -> float:
        """Share of the time in `get` that was spent generating, 0 to 1."""
        return self.generate_seconds / self.total_seconds if self.total_seconds else 0.0


class Entry(NamedTuple):
    """A set of weights; its containers are built anew for each caller, who may change them."""

    leaves: tuple[Array, ...]
    treedef: Any
    bytes: int


class Version(NamedTuple):
    """The variables of one moment, known by the identity of their arrays."""

    refs: tuple[weakref.ref, ...]
    token: object

    def alive(self) -> bool:
        """Whether anyone could still ask for it: its arrays exist and have not been donated."""
        leaves = [ref() for ref in self.refs]
        return not any(leaf is None or leaf.is_deleted() for leaf in leaves)

    def holds(self, leaves: list[Any]) -> bool:
        """Whether it is these arrays, not others that have got the ids of dead ones, and none is donated."""
        return self.alive() and all(ref() is leaf for ref, leaf in zip(self.refs, leaves, strict=True))


class WeightCache:
    """Keeps what a hypernetwork generates, within a bound in bytes; what was used longest ago goes first.

        cache = WeightCache(hyper, max_bytes=2**28)
        params = cache.get(variables, task_id=3)  # generated the first time, then kept
        params = cache.get(variables, z=z)

    Weights are kept by the variables that they come from, so those of other variables are never returned. JAX arrays
    do not change, so variables are the same if their arrays are the same objects; NumPy arrays can change in place, and
    are refused. The cache does not keep variables alive: it holds weak references, and the weights of variables that
    were dropped or donated go as soon as others appear or room is needed. Any number of variables may take turns, and
    share the bound.

    z is rounded to a grid, and the weights are those of the grid's point: the same for every z that rounds to it,
    whichever came first. They are `hyper.generate`'s for a z at most resolution / 2 away in each coordinate.

    Several threads may use it. Threads that miss the same weights at the same time generate them once. The weights are
    shared by all callers: do not donate them. If that happens nevertheless, they are generated again.

    Args:
        hyper: the hypernetwork.
        max_bytes: of weights kept. A set of weights that is larger is returned, and not kept.
        resolution: the grid's spacing. Coordinates of a trained z are about 1.

    Raises:
        ValueError: hyper is no HyperNetwork, or a number is out of range.
    """

    def __init__(self, hyper: HyperNetwork, *, max_bytes: int = 2**30, resolution: float = 1e-3):
        if not isinstance(hyper, HyperNetwork):
            raise ValueError(f"hyper is {type(hyper).__name__}, expected a HyperNetwork")
        if not isinstance(max_bytes, (int, np.integer)) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes!r}, expected a whole number of at least 1")
        if not isinstance(resolution, (int, float, np.number)) or not 0 < resolution < math.inf:
            raise ValueError(f"resolution is {resolution!r}, expected a number above 0, as 1e-3")
        self.hyper, self.max_bytes, self.resolution = hyper, int(max_bytes), float(resolution)

        def generate(variables: Any, traced: Array | None, z: Array | None, task: int | None) -> Any:
            return hyper.generate(variables, task_id=task if traced is None else traced, z=z)

        self._jitted = jax.jit(generate, static_argnums=3)
        self._lock = threading.Lock()  # guards all below; never held while generating
        self.clear()

    def clear(self) -> None:
        """Drops all weights and starts the statistics anew; what is being generated meanwhile is not kept."""
        with self._lock:
            self._versions: dict[Hashable, Version] = {}
            self._entries: OrderedDict[tuple, Entry] = OrderedDict()
            self._pending: dict[tuple, Future[Entry]] = {}
            self._stats = CacheStats()

    def stats(self) -> CacheStats:
        """Returns the statistics of this moment; weights of variables that are gone are dropped before."""
        with self._lock:
            self._sweep()
            return self._stats

    def get(self, variables: Any, *, task_id: Any = None, z: Any = None) -> Any:
        """Returns `hyper.generate(variables, task_id=task_id, z=z)`, kept or generated, and ready.

        Args:
            variables: of the hypernetwork; its leaves are JAX arrays.
            task_id: index of one task.
            z: one embedding [E], rounded to the cache's resolution. Beside it, `task_id` only chooses what is kept per
                task.

        Returns:
            A pytree of the target's own structure.

        Raises:
            ValueError: a batch of tasks or embeddings, a z that is not finite, variables that are not JAX arrays or
                were donated, a call inside `jit`, or what `hyper.generate` refuses.
        """
        start = time.perf_counter()
        task, point, cell = self._where(task_id, z)
        with self._lock:
            key = (self._token(variables), task, cell)
            entry = self._find(key)
            if entry:
                self._count(hits=1, total_seconds=time.perf_counter() - start)
                return jax.tree.unflatten(entry.treedef, entry.leaves)
            others = self._pending.get(key)
            mine: Future[Entry] = self._pending.setdefault(key, Future())
        make = (key, mine, start, variables, task, point)
        entry = self._wait(others, start) if others else self._generate(*make)
        return jax.tree.unflatten(entry.treedef, entry.leaves)

    def _where(self, task_id: Any, z: Any) -> tuple[int | None, np.ndarray | None, Hashable]:
        """Returns the task, the point of the grid and its key."""
        if isinstance(task_id, jax.core.Tracer) or isinstance(z, jax.core.Tracer):
            raise ValueError(INSIDE_JIT)
        tasks = self.hyper.num_embeddings
        task = conditions.check_task(task_id, tasks)
        if task is None and tasks == 1:
            task = 0
        if task is not None and not isinstance(task, int):
            raise ValueError(f"task_id has shape {task.shape}, expected one whole number; ask for one task at a time")
        if z is None:
            return task, None, None
        given = np.asarray(conditions.check_z(z, self.hyper.embedding_dim))
        if given.ndim != 1:
            raise ValueError(
                f"z has shape {given.shape}, expected [{given.shape[-1]}]; ask for one embedding at a time"
            )
        if not np.isfinite(given).all():
            raise ValueError(f"z has {given[~np.isfinite(given)][0]} among its numbers, expected finite ones")
        cell = np.rint(given.astype(np.float64) / self.resolution) + 0.0  # -0 becomes 0
        return task, (cell * self.resolution).astype(given.dtype), (given.dtype.str, cell.tobytes())

    def _wait(self, others: "Future[Entry]", start: float) -> Entry:
        hit = False
        try:
            entry = others.result()
            hit = True
            return entry
        finally:
            with self._lock:
                self._count(hits=int(hit), misses=int(not hit), total_seconds=time.perf_counter() - start)

    def _generate(self, key: tuple, mine: "Future[Entry]", start: float, variables: Any, task: Any, z: Any) -> Entry:
        begun = time.perf_counter()
        try:
            # One compilation serves all tasks, unless they have targets of their own.
            static = task is None or len(self.hyper.targets) > 1
            tree = self._jitted(variables, None if static else np.int32(task), z, task if static else None)
            leaves, treedef = jax.tree.flatten(jax.block_until_ready(tree))
            entry = Entry(tuple(leaves), treedef, sum(leaf.nbytes for leaf in leaves))
        except BaseException as error:
            self._finish(key, start, begun)
            mine.set_exception(error)
            raise
        self._finish(key, start, begun, entry)
        mine.set_result(entry)
        return entry

    def _finish(self, key: tuple, start: float, begun: float, entry: Entry | None = None) -> None:
        with self._lock:
            now = time.perf_counter()
            self._count(misses=1, generate_seconds=now - begun, total_seconds=now - start)
            if self._pending.pop(key, None) and entry:  # None if the cache was cleared meanwhile
                self._keep(key, entry)

    def _token(self, variables: Any) -> object:
        """Returns what stands for these variables in keys, and for no others, ever."""
        leaves, treedef = jax.tree.flatten(variables)
        identity = (treedef, tuple(map(id, leaves)))
        version = self._versions.get(identity)
        if not version or not version.holds(leaves):
            _check(variables)
            self._versions.pop(identity, None)
            self._sweep()
            version = self._versions[identity] = Version(tuple(map(weakref.ref, leaves)), object())
        return version.token

    def _sweep(self) -> None:
        """Drops versions that are gone, and their weights."""
        self._versions = {identity: version for identity, version in self._versions.items() if version.alive()}
        tokens = {version.token for version in self._versions.values()}
        for key in [key for key in self._entries if key[0] not in tokens]:
            self._drop(key)

    def _find(self, key: tuple) -> Entry | None:
        entry = self._entries.get(key)
        if entry and any(leaf.is_deleted() for leaf in entry.leaves):
            self._drop(key)
            return None
        if entry:
            self._entries.move_to_end(key)
        return entry

    def _keep(self, key: tuple, entry: Entry) -> None:
        if entry.bytes > self.max_bytes:
            return
        if self._stats.bytes + entry.bytes > self.max_bytes:
            self._sweep()
        while self._stats.bytes + entry.bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))
            self._count(evictions=1)
        self._entries[key] = entry
        self._count(entries=1, bytes=entry.bytes)

    def _drop(self, key: tuple) -> None:
        self._count(entries=-1, bytes=-self._entries.pop(key).bytes)

    def _count(self, **more: float) -> None:
        counted = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = dataclasses.replace(self._stats, **counted)


def _check(variables: Any) -> None:
    for keys, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(INSIDE_JIT)
        if not isinstance(leaf, jax.Array):
            raise ValueError(
                f"variables has a {type(leaf).__name__} at {path_string(keys)}, which may change unseen; "
                "convert once, and keep: variables = jax.tree.map(jnp.array, variables)"
            )
        if leaf.is_deleted():
            raise ValueError(
                f"variables has a donated array at {path_string(keys)}; give what the donating step returned"
            )
