"""The networks of share_layers.py: how each is made, from scratch or from a trained teacher.

L layers, U sets of layers' weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from text_tasks import Characters

from hyperjax import paramtree, sharing
from hyperjax.pruning import costs
from hyperjax.sharing import LowRank, Maps, Mixture, Scale, search
from hyperjax.transformer import Config, Decoder

Array = jax.Array
PLAIN = ("unshared", "shallow", "wide")
MAPS = ("groups", "cycle", "cycle_reverse", "middle_cycle", "random", "all", "attention", "ffn")
SEARCHED = ("cka", "weights", "aligned", "loss", "greedy")
SCRATCH = (*PLAIN, *MAPS, "mixture", "replanned")
CONVERTED = tuple(
    f"to_{name}"
    for name in ("unshared", "shallow", "groups", "cycle", "stepwise", "random", *SEARCHED, "lora", "scale")
)
ROWS = (*SCRATCH, *CONVERTED)


class Row(NamedTuple):
    """A network to train.

    Attributes:
        name: of the row.
        net: what is trained: with `init(key, tokens)` and `apply(variables, tokens)`.
        sized: the Transformer that it computes, for its operations.
        layer_map: which layers share, of the map that is not private; None of networks without any.
        transfer: from the teacher's parameters to its first ones; None of a network from scratch.
        softly: maps that the teacher is drawn to first, by a soft tie; None: by none.
        replans: whether its map is chosen anew in training.
    """

    name: str
    net: Any
    sized: Config
    layer_map: tuple[int, ...] | None = None
    transfer: Callable[[Any], Any] | None = None
    softly: Maps | None = None
    replans: bool = False


def scratch(name: str, config: Any, sizes: Config, seed: int) -> Row:
    """A network that learns from nothing."""
    layers, sets = sizes.layers, config.sets
    if name == "unshared":
        return Row(name, Decoder(sizes), sizes)
    if name in ("shallow", "wide"):
        small = dataclasses.replace(sizes, layers=sets)
        small = widened(small, costs(sizes, config.length).total, config.length) if name == "wide" else small
        return Row(name, Decoder(small), small)
    if name == "mixture":
        return Row(name, Mixture(sizes, bases=sets, prompt=config.prompt), sizes)
    if name == "replanned":
        return tied_row(name, sizes, sharing.groups(layers, sets), config)
    maps = maps_of(name, layers, sets, seed)
    shared = maps.on(sizes)
    return Row(name, Decoder(shared), shared, maps.ffn or maps.attention)


def converted(name: str, config: Any, sizes: Config, seed: int, task: Characters, teacher: Any, example: Any) -> Row:
    """A network that begins as a teacher's parameters, which `teacher` holds."""
    kind, layers, sets = name.removeprefix("to_"), sizes.layers, config.sets
    model = Decoder(sizes)
    if kind == "unshared":
        return Row(name, model, sizes, None, lambda params: params)
    if kind == "shallow":
        small = dataclasses.replace(sizes, layers=sets)
        chosen = sharing.stepwise(layers, sets)
        return Row(name, Decoder(small), small, None, lambda params: keep(params, chosen))
    if kind == "lora":
        layer_map = sharing.all_shared(layers)
    elif kind in (*SEARCHED, "scale"):
        layer_map = searched("loss" if kind == "scale" else kind, config, model, task, teacher)
    else:
        layer_map = maps_of("cycle" if kind == "stepwise" else kind, layers, sets, seed).ffn or ()
    maps, how = Maps.same(layer_map), "stepwise" if kind == "stepwise" else config.transfer
    through: Any = Scale() if kind == "scale" else None
    if kind == "lora":
        through = LowRank(fitting_rank(model, sets, example))
    tied = sharing.tie(model, sharing.layer_ties(maps, through), example)

    def transfer(params: Any) -> Any:
        return sharing.convert(model, params, maps, example, transfer=how, through=through)[1]

    soft = through is None and how == "mean"  # of layers that are taken as they are, none need come nearer
    return Row(name, tied, sizes, layer_map, transfer, maps if soft else None)


def tied_row(name: str, sizes: Config, layer_map: tuple[int, ...], config: Any) -> Row:
    """A network whose map changes in training."""
    example = jnp.zeros((config.batch, config.length), jnp.int32)
    tied = sharing.tie(Decoder(sizes), sharing.layer_ties(Maps.same(layer_map)), example)
    return Row(name, tied, sizes, layer_map, replans=True)


def replanned(row: Row, config: Any, task: Characters, params: Any, opt_state: Any) -> tuple[Row, Any, Any]:
    """The row with the map that the features of its layers ask for now, and its parameters and optimiser under it."""
    whole, tokens = row.net.untie({"params": params})["params"], task.batch_at(10**6)["tokens"]
    cost = search.medoid(1 - cka_of(row.net.module, whole, tokens))
    new = tied_row(row.name, row.sized, search.contiguous(cost, row.sized.layers, config.sets), config)
    return new, *sharing.replan(row.net, new.net, params, opt_state)


def fitting_rank(model: Decoder, sets: int, example: Any) -> int:
    """The rank of residuals with which one set for all layers is as large as so many sets without, or a little less."""
    layers = model.config.layers

    def count(number: int, rank: int | None) -> int:
        through = None if rank is None else LowRank(rank)
        maps = Maps.same(sharing.groups(layers, number))
        return unique(sharing.tie(model, sharing.layer_ties(maps, through), example), example)

    each = count(1, 2) - count(1, 1)
    return max(1, 1 + (count(sets, None) - count(1, 1)) // each)


def maps_of(name: str, layers: int, sets: int, seed: int) -> Maps:
    """The maps of a name, with as many sets of weights; of `all`, `attention` and `ffn`, one set of what is shared."""
    one = sharing.all_shared(layers)
    if name in ("all", "attention", "ffn"):
        return Maps(None if name == "ffn" else one, None if name == "attention" else one)
    if name == "groups":
        return Maps.same(sharing.groups(layers, sets))
    if name == "random":
        return Maps.same(random_map(layers, sets, seed))
    if name == "middle_cycle":
        if sets < 3 or (layers - 2) % (sets - 2):
            raise ValueError(
                f"--sets is {sets}, expected 3 or more with {layers - 2} divisible by sets - 2, for middle_cycle"
            )
        return Maps.same(sharing.middle_cycle(layers, (layers - 2) // (sets - 2)))
    if layers % sets:
        raise ValueError(f"--sets is {sets}, expected a divisor of --layers, {layers}, for {name}")
    return Maps.same({"cycle": sharing.cycle, "cycle_reverse": sharing.cycle_reverse}[name](layers, layers // sets))


def random_map(layers: int, sets: int, seed: int) -> tuple[int, ...]:
    """A map drawn evenly from those with so many sets."""
    rng = np.random.default_rng(seed)
    while len(set(found := rng.integers(0, sets, layers).tolist())) < sets:
        pass
    return sharing.canonical(tuple(found))


def searched(kind: str, config: Any, model: Decoder, task: Characters, params: Any) -> tuple[int, ...]:
    """The map that a search finds for a teacher: contiguous groups, or any by `greedy`."""
    layers, sets = model.config.layers, config.sets
    batch = task.batch_at(10**6)  # from the training text; of no step
    if kind in ("weights", "aligned"):
        blocks = [sharing.layers_of(params, part) for part in ("attention", "ffn")]
        d = sum(np.square(sharing.weight_distances(found, aligned=kind == "aligned")) for found in blocks)
        return search.contiguous(search.mean_pair(d), layers, sets)
    if kind == "cka":
        return search.contiguous(search.medoid(1 - cka_of(model, params, batch["tokens"])), layers, sets)

    @jax.jit
    def loss(params: Any) -> Array:
        return task.loss(logits_of(model, params, batch["tokens"]), batch)

    def evaluate(layer_map: tuple[int, ...]) -> float:
        tied, shared = sharing.convert(model, params, Maps.same(layer_map), batch["tokens"], transfer=config.transfer)
        return float(loss(tied.expand(shared)))

    cost = search.measured(evaluate, layers)
    return search.greedy(cost, layers, sets) if kind == "greedy" else search.contiguous(cost, layers, sets)


def cka_of(model: Decoder, params: Any, tokens: Any) -> np.ndarray:
    """CKA between the states after the layers, [L, L]."""
    out = jax.jit(model.apply)({"params": params}, tokens)
    return sharing.cka_matrix(sharing.layer_features(out))


def keep(params: Any, chosen: tuple[int, ...]) -> Any:
    """Parameters of the Transformer that has those layers alone."""
    stack = {}
    for new, old in enumerate(chosen):
        for name, value in params["stack"].items():
            kind, _, number = name.rpartition("_")
            if number == str(old):
                stack[f"{kind}_{new}"] = value
    return {**params, "stack": stack}


def widened(small: Config, wanted: float, length: int) -> Config:
    """The same number of layers, as wide as so many operations allow."""
    ratio = small.ffn_by_layer[0] // small.width
    heads = int(small.heads) if not isinstance(small.heads, tuple) else small.heads[0]
    widths = range(small.width, 8 * small.width, 2 * heads)
    shapes = [dataclasses.replace(small, width=width, ffn=ratio * width) for width in widths]
    return min(shapes, key=lambda sized: abs(costs(sized, length).total - wanted))


def unique(net: Any, example: Any) -> int:
    """Number of parameters that exist."""
    return paramtree.count(jax.eval_shape(net.init, jax.random.key(0), example)["params"])


def logits_of(net: Any, params: Any, tokens: Any) -> Array:
    """Of any row's network, [B, positions, V]."""
    return net.apply({"params": params}, jnp.asarray(tokens))["logits"]
