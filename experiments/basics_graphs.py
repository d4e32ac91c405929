"""Graphs for share_basics.py: the karate club, and citation graphs from files.

N nodes, E edges, F features.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hyperjax.data.download import one_line
from hyperjax.data.sources import DAMAGED

MEMBERS = 34
# Zachary, "An information flow model for conflict and fission in small groups" (1977): who met whom outside the club.
MEETINGS = {
    0: (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 17, 19, 21, 31),
    1: (2, 3, 7, 13, 17, 19, 21, 30),
    2: (3, 7, 8, 9, 13, 27, 28, 32),
    3: (7, 12, 13),
    4: (6, 10),
    5: (6, 10, 16),
    6: (16,),
    8: (30, 32, 33),
    9: (33,),
    13: (33,),
    14: (32, 33),
    15: (32, 33),
    18: (32, 33),
    19: (33,),
    20: (32, 33),
    22: (32, 33),
    23: (25, 27, 29, 32, 33),
    24: (25, 27, 31),
    25: (31,),
    26: (29, 33),
    27: (33,),
    28: (31, 33),
    29: (32, 33),
    30: (32, 33),
    31: (32, 33),
    32: (33,),
}
INSTRUCTOR = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 16, 17, 19, 21)  # whom they followed when the club split
KNOWN = (0, 1, 32, 33)  # members whose faction is told


class Graph(NamedTuple):
    """A graph with labelled nodes.

    Attributes:
        edges: [E, 2], numbers of nodes; direction does not count.
        features: [N, F] float32.
        labels: [N] int32.
        train: [N] bool, whose labels are told.
    """

    edges: np.ndarray
    features: np.ndarray
    labels: np.ndarray
    train: np.ndarray

    def normalized(self) -> np.ndarray:
        """D^-1/2 (A + I) D^-1/2, [N, N] float32."""
        a = np.eye(len(self.labels), dtype=np.float32)
        a[self.edges[:, 0], self.edges[:, 1]] = a[self.edges[:, 1], self.edges[:, 0]] = 1
        scale = 1 / np.sqrt(a.sum(1))
        return a * scale[:, None] * scale[None]


def karate(seed: int) -> Graph:
    """The karate club; features are random, so that only the graph tells members apart."""
    edges = np.array([(a, b) for a, others in MEETINGS.items() for b in others])
    features = np.random.default_rng(seed).normal(size=(MEMBERS, 16)).astype(np.float32)
    labels = np.array([0 if member in INSTRUCTOR else 1 for member in range(MEMBERS)], np.int32)
    return Graph(edges, features, labels, np.isin(np.arange(MEMBERS), KNOWN))


def read_graph(path: str | Path) -> Graph:
    """Reads a graph from an npz with `edges`, `features`, `labels` and, if wanted, `train_mask`, or from two texts.

    These are NAME.content, with a line of id, features and label for each node, and NAME.cites beside it, with two ids
    a line. Where no mask says whose labels are told, they are those of 20 nodes of each class, or of half of them.

    Raises:
        ValueError: there is no such file, or it is damaged, lacks something, or is no graph that can be learned from.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--data-file is {path}, expected a file: an .npz, or a .content with its .cites beside it")
    edges, features, labels, mask = _read_npz(path) if path.suffix == ".npz" else _read_content(path)
    nodes = len(labels) if labels.ndim == 1 else 0
    if nodes < 2 or features.ndim != 2 or len(features) != nodes or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path} has features {features.shape} and labels {labels.shape} of {labels.dtype}, expected [nodes, "
            "width] and [nodes] whole numbers"
        )
    if features.dtype.kind not in "fiub" or features.shape[1] < 1:
        raise ValueError(f"{path} has features {features.shape} of {features.dtype}, expected at least one real number")
    if not (np.abs(features) <= np.finfo(np.float32).max).all():
        raise ValueError(f"{path} has features that are not finite in float32; clean or rescale them")
    if labels.min() < 0 or labels.max() >= nodes or (labels == labels[0]).all():
        raise ValueError(
            f"{path} has labels from {labels.min()} to {labels.max()}, expected two classes or more, numbered from 0"
        )
    if edges.ndim != 2 or edges.shape[1] != 2 or not np.issubdtype(edges.dtype, np.integer):
        raise ValueError(f"{path} has edges {edges.shape} of {edges.dtype}, expected [edges, 2] whole numbers")
    if not len(edges):
        raise ValueError(
            f"{path} has no edges between its nodes, expected one or more; are the ids those of the nodes?"
        )
    if not 0 <= edges.min() <= edges.max() < nodes:
        raise ValueError(f"{path} has edges from node {edges.min()} to {edges.max()}, expected 0 to {nodes - 1}")
    if mask is None:
        mask = np.zeros(nodes, bool)
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            mask[members[: min(20, max(1, len(members) // 2))]] = True
    if mask.shape != (nodes,) or mask.dtype != bool or mask.all() or not mask.any():
        raise ValueError(
            f"{path} has a train_mask {mask.shape} of {mask.dtype}, expected bool [{nodes}], some True, some not"
        )
    return Graph(edges.astype(np.int64), features.astype(np.float32), labels.astype(np.int32), mask)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no whole npz; write it with numpy.savez")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            lacking = [name for name in ("edges", "features", "labels") if name not in file]
            wanted = ("edges", "features", "labels", "train_mask")
            found = {name: np.asarray(file[name]) for name in wanted if name in file}
    except (*DAMAGED, ValueError) as error:
        raise ValueError(f"{path} is no whole npz: {one_line(error)}") from None
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}, expected edges, features and labels")
    return found["edges"], found["features"], found["labels"], found.get("train_mask")


def _read_content(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, None]:
    cites = path.with_suffix(".cites")
    if path.suffix != ".content" or not cites.is_file():
        raise ValueError(f"--data-file is {path}, expected an .npz, or a .content with {cites.name} beside it")
    rows = [line.split("\t") for line in _lines(path)]
    if not rows or len({len(row) for row in rows}) > 1 or len(rows[0]) < 3:
        raise ValueError(f"{path} has lines of several lengths or too few fields, expected id, features, label by tabs")
    number = {row[0]: n for n, row in enumerate(rows)}
    if len(number) < len(rows):
        raise ValueError(f"{path} has {len(rows)} lines and {len(number)} ids, expected an id of its own for each line")
    classes = sorted({row[-1] for row in rows})
    try:
        features = np.array([row[1:-1] for row in rows], np.float32)
    except ValueError as error:
        raise ValueError(f"{path} has a feature that is no number: {error}") from None
    pairs = [line.split() for line in _lines(cites)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{cites} has a line without two ids")
    edges = [(number[a], number[b]) for a, b in pairs if a in number and b in number]  # Citeseer cites papers it lacks
    labels = np.array([classes.index(row[-1]) for row in rows])
    return np.array(edges, np.int64).reshape(-1, 2), features, labels, None


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start}); convert it") from None
