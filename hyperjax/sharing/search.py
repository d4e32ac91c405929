"""Which layers should share: groups of least cost, by dynamic programming or by greedy merging.

A cost is a function of a group, a tuple of layers in rising order; groups of one layer cost nothing.

    cost = medoid(1 - cka_matrix(layer_features(out)))
    layer_map = contiguous(cost, layers=12, groups=4)

L layers, G groups.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from hyperjax.sharing.layer_maps import LayerMap

Group = tuple[int, ...]
Cost = Callable[[Group], float]


def medoid(distances: np.ndarray) -> Cost:
    """Distances [L, L] of a group's layers from the one of them that is nearest to all: what *selecting* it costs.

    Raises:
        ValueError: the distances are no square matrix of finite numbers.
    """
    d = _square(distances)
    return lambda group: float(d[np.ix_(group, group)].sum(0).min())


def mean_pair(distances: np.ndarray) -> Cost:
    """A group's size times the mean distance between its layers.

    Raises:
        ValueError: the distances are no square matrix of finite numbers.
    """
    d = _square(distances)
    return lambda group: float(d[np.ix_(group, group)].sum()) / max(1, len(group) - 1)


def residual(layers: Sequence[np.ndarray]) -> Cost:
    """sum_l |W_l - mean|^2 of a group: what *averaging* its weights leaves; layers as flat arrays [P]."""
    gram = np.stack([np.asarray(layer, np.float64).ravel() for layer in layers])
    gram = gram @ gram.T

    def cost(group: Group) -> float:
        part = gram[np.ix_(group, group)]
        return max(0.0, float(np.trace(part) - part.sum() / len(group)))

    return cost


def measured(evaluate: Callable[[LayerMap], float], layers: int) -> Cost:
    """The loss with that group alone sharing, less the loss with no sharing: `evaluate` gets a layer map.

    Args:
        evaluate: layer map -> loss.
        layers: L.
    """
    base = functools.cache(lambda: float(evaluate(tuple(range(layers)))))

    @functools.cache
    def cost(group: Group) -> float:
        if len(group) == 1:
            return 0.0
        return float(evaluate(tuple(group[0] if l in group else l for l in range(layers)))) - base()

    return cost


def total(cost: Cost, layer_map: LayerMap) -> float:
    """The cost of a whole map: the sum over its groups."""
    return sum(cost(group) for group in groups_of(layer_map))


def contiguous(cost: Cost, layers: int, groups: int, private: Sequence[int] = ()) -> LayerMap:
    """The groups of neighbours of least cost, exactly: D(k, j) = min_i D(k - 1, i) + C(i .. j - 1), in O(L^2 G).

    Args:
        cost: of a group.
        layers: L.
        groups: G; with a cost that falls with size, still as many.
        private: layers that share with none, as (0, L - 1).

    Returns:
        The map; a group's number is its first layer's.

    Raises:
        ValueError: there are more groups than layers or fewer than private layers leave, or a private layer is unknown.
    """
    _check(layers, groups, private, True)
    alone, price = set(private), functools.cache(lambda i, j: float(cost(tuple(range(i, j)))))
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for k in range(1, groups + 1):
        for j in range(k, layers + 1):
            options = [
                (best[k - 1, i][0] + price(i, j), i)
                for i in range(k - 1, j)
                if (k - 1, i) in best and (j - i == 1 or not alone.intersection(range(i, j)))
            ]
            if options:
                best[k, j] = min(options)
    starts, j = [], layers
    for k in range(groups, 0, -1):
        j = best[k, j][1]
        starts.append(j)
    return tuple(max(start for start in starts if start <= l) for l in range(layers))


def greedy(cost: Cost, layers: int, groups: int, private: Sequence[int] = (), neighbours: bool = False) -> LayerMap:
    """Merges the two groups whose union costs least more, until G are left; groups may skip layers.

    Args:
        cost, layers, groups, private: as of `contiguous`.
        neighbours: merge only groups of neighbouring layers.

    Returns:
        The map; a group's number is its first layer's.

    Raises:
        ValueError: there are more groups than layers or fewer than private layers leave, or a private layer is unknown.
    """
    _check(layers, groups, private, neighbours)
    found: list[Group] = [(l,) for l in range(layers)]
    while len(found) > groups:
        pairs = [
            (a, b)
            for n, a in enumerate(found)
            for b in (found[n + 1 : n + 2] if neighbours else found[n + 1 :])
            if not set(private).intersection(a + b)
        ]
        a, b = min(pairs, key=lambda pair: cost(_union(*pair)) - cost(pair[0]) - cost(pair[1]))
        found = sorted([group for group in found if group not in (a, b)] + [_union(a, b)])
    first = {l: group[0] for group in found for l in group}
    return tuple(first[l] for l in range(layers))


def most_sets(count: Callable[[int], int], layers: int, budget: int) -> int:
    """The largest number of sets of weights with which a network keeps to a budget.

    Args:
        count: number of sets, 1 to L -> number of the network's unique parameters, rising.
        layers: L.
        budget: number of parameters.

    Returns:
        The number, 1 to L.

    Raises:
        ValueError: the budget is below the smallest possible, one set.
    """
    fitting = [sets for sets in range(1, layers + 1) if count(sets) <= budget]
    if not fitting:
        raise ValueError(
            f"the budget is {budget:,} parameters, below {count(1):,}, the smallest possible: one set of weights"
        )
    return max(fitting)


def groups_of(layer_map: LayerMap) -> list[Group]:
    """The groups, each a tuple of layers."""
    return [tuple(l for l, number in enumerate(layer_map) if number == n) for n in dict.fromkeys(layer_map)]


def _union(a: Group, b: Group) -> Group:
    return tuple(sorted(a + b))


def _square(distances: np.ndarray) -> np.ndarray:
    d = np.asarray(distances, np.float64)
    if d.ndim != 2 or d.shape[0] != d.shape[1] or not np.isfinite(d).all():
        raise ValueError(f"distances have shape {d.shape}, expected [layers, layers] of finite numbers")
    return d


def _check(layers: int, groups: int, private: Sequence[int], neighbours: bool) -> None:
    wrong = next((l for l in private if not 0 <= l < layers), None)
    if wrong is not None:
        raise ValueError(f"private layer {wrong} is not among 0 to {layers - 1}")
    own = set(private)
    runs = sum(l not in own and (l == 0 or l - 1 in own) for l in range(layers))
    least = len(own) + (runs if neighbours else min(1, layers - len(own)))
    if not least <= groups <= layers:
        raise ValueError(f"{groups} groups of {layers} layers with {len(own)} private, expected {least} to {layers}")
