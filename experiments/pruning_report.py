"""What dynamic_pruning.py finds out about a trained network: quality, operations by input, and time.

B samples, L positions, G groups of positions, U units of a layer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pruning_methods import CAPACITY, Plain, router_share, served
from text_tasks import Task

from hyperjax import pruning
from hyperjax.pruning import Experts, MixtureOfDepths, costs
from hyperjax.timing import compiled, in_turn
from hyperjax.transformer import Config, Decoder, Gates

SIZE = 32  # samples evaluated together, and batch of the larger measurement
SINGLES = 8  # samples that latency at batch 1 is the mean of
SIZES = ((1, SINGLES), (SIZE, 1))
TOKENS = 64  # tokens decoded in a measurement


class Found(NamedTuple):
    """What an evaluation finds.

    Attributes:
        quality: mean of the samples' figures; lower is better.
        share: of the dense network's operations, routers included.
        flops: operations per token of each input.
        openness: by kind of unit, how often each is open for each group, [G, layers, U].
    """

    quality: float
    share: float
    flops: np.ndarray
    openness: dict[str, np.ndarray]


class Trained(NamedTuple):
    """A network after its training.

    Attributes:
        label: method and budget.
        name: the method.
        seed: of its training.
        model: the module.
        params: its parameters.
        found: what its test found.
    """

    label: str
    name: str
    seed: int
    model: Any
    params: Any
    found: Found


def make_evaluate(name: str, model: Any, task: Task, dense: Config) -> Callable[[Any, str], Found]:
    """Builds what evaluates a network as it is served: gates that are deterministic, and causal in a decoder.

    Args:
        name: the method's.
        model: its network.
        task: what it learned.
        dense: the network whose operations are the measure.

    Returns:
        (params, split) -> what was found; compiled once, however often it is called.
    """

    @jax.jit
    def step(params: Any, batch: Any, groups: jax.Array) -> Any:
        options = {} if task.causal else {"mask": batch["mask"]}
        if isinstance(model, Experts):
            options["capacity"] = CAPACITY
        out = model.apply({"params": params}, batch["tokens"], **options)
        flops = operations(name, model, out["gates"], batch["mask"], task, dense)
        there = jax.nn.one_hot(groups, len(task.groups)) * batch["mask"][..., None]
        sums = {kind: jnp.einsum("nblu,blg->gnu", g, there) for kind, g in expanded(out["gates"], groups.shape).items()}
        return task.figures(out["logits"], batch), flops, sums, there.sum((0, 1))

    def evaluate(params: Any, split: str) -> Found:
        parts = []
        for batch, count in task.batches(split, SIZE):
            weights = {**batch, "mask": batch["mask"] & (np.arange(SIZE) < count)[:, None]}
            figures, flops, sums, seen = jax.tree.map(np.asarray, step(params, weights, task.group_of(batch)))
            parts.append((figures[:count], flops[:, :count], batch["mask"][:count].sum(-1), sums, seen))
        figures, lengths = (np.concatenate([part[i] for part in parts]) for i in (0, 2))
        flops, whole = np.concatenate([part[1] for part in parts], 1)
        flops = flops + (0.0 if isinstance(model, Plain) else router_share(params, dense, task, name)) * whole
        seen = np.maximum(sum(part[4] for part in parts), 1)[:, None, None]
        openness = {kind: sum(part[3][kind] for part in parts) / seen for kind in parts[0][3]}
        return Found(float(figures.mean()), float(flops.sum() / whole.sum()), flops / lengths, openness)

    return evaluate


def operations(name: str, model: Any, gates: Gates, mask: jax.Array, task: Task, dense: Config) -> jax.Array:
    """Operations of each sample, [2, B]: of the network as it is served, without routers, and of the dense one."""
    samples, length = mask.shape
    if isinstance(model, Experts):  # all places are computed
        places = model.places((samples, length), CAPACITY) / mask.size
        opened = Gates(blocks=jnp.full((dense.layers, 1), places))
    else:
        opened = jax.tree.map(lambda gate: (gate > 0).astype(jnp.float32), gates)
    own = model.config if isinstance(model, Plain) else dense
    return jnp.stack([total(own, opened, mask, task.causal, name == "token"), total(dense, Gates(), mask, task.causal)])


def total(sized: Config, opened: Gates, mask: jax.Array, causal: bool, all_keys: bool = False) -> jax.Array:
    """Operations that open gates leave of each sample, [B].

    A sample of n of L positions costs as much as one of length n would: scores as n squared, all else as n.
    """
    samples, length = mask.shape
    part, whole = mask.mean(-1), costs(sized, length, causal=causal)
    none = (0.0,) * len(whole.layer)
    along = whole._replace(scores=none)
    square = whole._replace(fixed=0.0, attention=none, unit=none, layer=none)
    linear, scores = (pruning.share(some, opened, mask, all_keys=all_keys) * some.total for some in (along, square))
    return jnp.broadcast_to(linear * part + scores * part**2, (samples,))


def expanded(gates: Gates, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """Which gates are open, by kind, [layers, B, L, U], whatever axes they came with."""

    def spread(gate: Any, positions: bool) -> jax.Array:
        gate = gate if not positions else gate[..., None]
        missing = 4 - gate.ndim
        gate = gate.reshape(gate.shape[:1] + (1,) * missing + gate.shape[1:]) if gate.ndim == 2 else gate
        gate = gate[:, :, None] if gate.ndim == 3 else gate
        return jnp.broadcast_to(gate > 0, (gate.shape[0], *shape, gate.shape[-1])).astype(jnp.float32)

    found = {}
    for kind in ("heads", "blocks"):
        if getattr(gates, kind) is not None:
            found[kind] = spread(getattr(gates, kind), False)
    for kind in ("layer", "tokens"):
        if getattr(gates, kind) is not None:
            found["layers"] = spread(getattr(gates, kind), True)
    return found


def compute_by_position(model: Any, params: Any, tokens: np.ndarray, task: Task, dense: Config) -> np.ndarray:
    """The share of the dense network's operations that each position takes, [B, L]; its mean is what gates leave."""
    whole, all_keys = costs(dense, tokens.shape[1], causal=task.causal), getattr(model, "per", None) == "token"

    def position(gates: dict[str, jax.Array], keys: jax.Array) -> jax.Array:
        scores = tuple(cost * part for cost, part in zip(whole.scores, keys, strict=True))
        now = whole._replace(scores=scores)
        layer = {"layer": gates["layers"][..., 0]} if "layers" in gates else {}
        part = Gates(**{kind: gate for kind, gate in gates.items() if kind != "layers"}, **layer)
        return pruning.share(now, part, all_keys=all_keys) * now.total / whole.total

    @jax.jit
    def run(params: Any, tokens: Any) -> jax.Array:
        gates = expanded(model.apply({"params": params}, tokens)["gates"], tokens.shape)
        attended = gates["layers"][..., 0].mean(2) if "layers" in gates else jnp.ones((dense.layers, len(tokens)))
        along = jax.vmap(position, in_axes=(1, None), axis_size=tokens.shape[1])  # over positions, of one sample
        return jax.vmap(along, in_axes=(1, 1))(gates, attended)

    return np.asarray(run(params, tokens))


def measure(trained: Sequence[Trained], task: Task, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Times the forward pass of all networks in turn, at batch 1 and 32, and decoding where there is any.

    Args:
        trained: the networks, of any seeds.
        task: whose test inputs are used.
        repeats: rounds.

    Returns:
        By label: `ms_b1`, `ms_b32`, `tokens_per_second` at batch 32, `decode_ms` of one token at batch 1; for each seed
        the median. What only masks is left out: it takes as long as the dense network, and more.
    """
    batch = next(iter(task.batches("test", SIZE)))[0]
    inputs = {
        size: [(batch["tokens"][i : i + size], batch["mask"][i : i + size]) for i in range(n)] for size, n in SIZES
    }
    runs: dict[tuple[str, str, int], Callable[[], Any]] = {}
    programs: dict[Any, Any] = {}

    def program(key: tuple[str, str], function: Callable[..., Any], needed: Any, *one: Any) -> Any:
        """The compiled function; seeds whose parameters have the same shapes share one."""
        shapes = (*key, str(jax.tree.map(jnp.shape, needed)))
        if shapes not in programs:
            programs[shapes] = compiled(function, needed, *one)
        return programs[shapes]

    for each in trained:
        needed, run, saves = served(each.name, each.model, {"params": each.params}, task)
        for size, several in inputs.items() if saves or each.name == "dense" else ():
            what = f"ms_b{size}"
            call = program((each.label, what), run, needed, *several[0])
            runs[each.label, what, each.seed] = partial(_all, call, needed, several)
        decode = decoder(each.name, each.model, {"params": each.params}, task) if task.causal else None
        if decode is not None:
            tokens = batch["tokens"][:1, :TOKENS]
            call = program((each.label, "decode_ms"), decode[1], decode[0], tokens)
            runs[each.label, "decode_ms", each.seed] = partial(call, decode[0], tokens)
    found: dict[str, dict[str, list[float]]] = {each.label: {} for each in trained}
    steps = {"decode_ms": min(TOKENS, task.length), "ms_b1": SINGLES}
    for (label, what, _), seconds in in_turn(runs, repeats).items():
        found[label].setdefault(what, []).append(1e3 * float(np.median(seconds)) / steps.get(what, 1))
    for times in found.values():
        if f"ms_b{SIZE}" in times:
            times["tokens_per_second"] = [1e3 * float(batch["mask"].sum()) / ms for ms in times[f"ms_b{SIZE}"]]
    return found


def _all(call: Callable[..., Any], needed: Any, inputs: list[Any]) -> list[Any]:
    return [call(needed, *each) for each in inputs]


def decoder(name: str, model: Any, variables: Any, task: Task) -> Any:
    """What decodes a text of [1, n] tokens one by one, at batch 1, or None where nothing is skipped."""
    skips = isinstance(model, MixtureOfDepths) or name == "layers"
    if getattr(model, "seed", None) is not None or not (skips or isinstance(model, Plain) or name == "static"):
        return None
    if skips:
        config, needed = model.config, variables

        def step(variables: Any, token: Any, cache: Any) -> Any:
            logits, cache, _ = pruning.skip_decode(model, variables, token, cache)
            return logits, cache
    else:
        if name == "static":
            small = pruning.compact(model, variables)
            plain: Any = small.model
            needed = small.variables
        else:
            plain, needed = Decoder(model.config), {"params": variables["params"]["model"]}
        config = plain.config

        def step(variables: Any, token: Any, cache: Any) -> Any:
            out = plain.apply(variables, token, cache=cache)
            return out["logits"][:, -1], out["cache"]

    def run(variables: Any, tokens: Any) -> Any:
        cache = Decoder(config).initialize_cache(1, tokens.shape[1])

        def body(cache: Any, token: Any) -> Any:
            logits, cache = step(variables, token[None, None], cache)
            return cache, logits[0]

        return jax.lax.scan(body, cache, tokens[0])[1]

    return needed, run
