"""Digests of arrays: SHA-256 where one process holds them whole, sums that add up over parts where several do."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from hyperjax.training import processes

Words = npt.NDArray[np.uint64]
CHUNK = 2**18  # elements mixed at a time: what fits into a core's cache


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree with their paths, as `a/b/c`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in paths]


def digest(kind: str, tree: Any) -> str:
    """The digest of the arrays of a pytree; names, shapes and dtypes are not in it.

    Args:
        kind: `sha256`, of whole arrays; or `sums`, the same number however the arrays are split over devices and
            processes, which all must call it together.
        tree: of arrays; for `sha256` those of NumPy, or on devices of this process.
    """
    if kind == "sha256":
        found = hashlib.sha256()
        for _, leaf in leaves(tree):
            found.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        return found.hexdigest()
    totals = np.array([_sum_of_parts(leaf) for _, leaf in leaves(tree)], np.uint64)
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for _, leaf in leaves(tree)):
        totals = processes.gathered(totals.view(np.uint32)).view(np.uint64).sum(0, dtype=np.uint64)
    return hashlib.sha256(totals.astype("<u8").tobytes()).hexdigest()


def digest_json(value: Any) -> str:
    """The SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sum_of_parts(leaf: Any) -> int:
    """The sum, modulo 2**64, over the elements that this process holds and answers for."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        parts = [(np.asarray(s.data), s.index) for s in leaf.addressable_shards if s.replica_id == 0]
    else:
        parts = [(np.asarray(leaf), (slice(None),) * np.ndim(leaf))]
    return (
        sum(int(_mixed(*rows).sum(dtype=np.uint64)) for part in parts for rows in _rows(*part, np.shape(leaf))) % 2**64
    )


def _rows(
    part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some of a part's elements as unsigned integers, and where they stand in the whole array, again and again."""
    words = np.atleast_1d(np.ascontiguousarray(part)).view(f"u{part.dtype.itemsize}")
    strides = np.cumprod([1, *shape[:0:-1]])[::-1] if shape else np.ones(1, np.int64)
    starts = [cut.start or 0 for cut in index] or [0]
    inner = np.zeros((1,) * words.ndim, np.uint64)
    for axis in range(1, words.ndim):
        along = ((starts[axis] + np.arange(words.shape[axis])) * strides[axis]).astype(np.uint64)
        inner = inner + along.reshape(-1, *(1,) * (words.ndim - 1 - axis))
    each = max(1, CHUNK // max(1, words[:1].size))
    for at in range(0, len(words), each):
        rows = words[at : at + each]
        first = ((starts[0] + at + np.arange(len(rows))) * strides[0]).astype(np.uint64)
        yield rows.astype(np.uint64), inner + first.reshape(-1, *(1,) * (words.ndim - 1))


def _mixed(words: Words, places: Words) -> Words:
    """A number for every element and its place, by the finaliser of SplitMix64 (Steele, Lea, Flood, 2014).

    For one place it is one-to-one, so a change of a single element never goes unseen.
    """
    z: Words = words * np.uint64(0x9E3779B97F4A7C15) + places * np.uint64(0xD1B54A32D192ED03) + np.uint64(1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))
