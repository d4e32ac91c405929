"""The networks of dynamic_pruning.py: how each is made for a budget, trained, and served.

A budget is a share of the dense network's operations. `small` is a narrower dense network, `thin` one of full width
with fewer heads and hidden units; `random_X` is X with gates drawn at random instead of learned.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from text_tasks import Task

from hyperjax import paramtree, pruning, training
from hyperjax.pruning import Buckets, Experts, Gated, GumbelSigmoid, HardConcrete, MixtureOfDepths, TopK, costs
from hyperjax.transformer import Config, Decoder, Encoder, Gates

Array = jax.Array
OPEN = 0.9  # probability that a static gate is open at first
STEERED = ("static", "sequence", "layers", "token")  # a Lagrangian leads them to the budget; others keep a fixed number
RANDOM = ("random_static", "random_sequence", "random_mod", "random_experts")
METHODS = ("dense", "small", "thin", *STEERED, "mod", "experts", "expert_choice", *RANDOM)
CAPACITY = 1.25  # places of experts, over a balanced load: in training, when judged, counted and timed
RAMP = 0.1  # share of the steps over which the target of a Lagrangian falls from 1
BALANCE, Z, PREDICTOR = 1e-2, 1e-3, 1.0  # weights of the losses of routers


class Plain(nn.Module):
    """A Transformer without gates, called as the others are."""

    config: Config
    causal: bool = True

    def setup(self) -> None:
        self.model = (Decoder if self.causal else Encoder)(self.config)

    def __call__(
        self,
        tokens: Array,
        key: Array | None = None,
        *,
        mask: Array | None = None,
        temperature: Any = 1.0,
        settled: Any = False,
    ) -> dict[str, Any]:
        """What the Transformer returns, and a `share` of 1."""
        options: dict[str, Any] = {"key": key} if mask is None else {"key": key, "mask": mask}
        return {**self.model(tokens, **options), "gates": Gates(), "share": jnp.ones(()), "losses": {}}


def build(name: str, config: Config, task: Task, budget: float, seed: int, blocks: int) -> nn.Module:
    """The network of a method, as near to the budget as its sizes allow; steered ones get there in training."""
    common: dict[str, Any] = {"config": config, "causal": task.causal}
    random = seed if name.startswith("random") else None
    kind = name.removeprefix("random_")
    if kind in ("dense", "small", "thin"):
        fitted = {"small": narrower, "thin": thinner}.get(kind, lambda config, *_: config)
        return Plain(fitted(config, budget, task), task.causal)
    prompt: dict[str, Any] = {"prompt": task.prompt} if task.causal else {}
    whole = costs(config, task.usual_length, causal=task.causal)
    closed = Gates(heads=jnp.zeros((config.layers, whole.heads[0])), blocks=jnp.zeros((config.layers, 1)))
    if kind == "sequence":
        extra: dict[str, Any] = {} if random is None else {"seed": seed, "budget": budget}
        buckets = Buckets(**common, **prompt, **extra, blocks=blocks, after=0)  # from the embeddings
        return _reaching(name, budget, buckets.costs(task.length)[0], buckets)
    if kind == "layers":
        gated = Gated(**common, prune=("layers",), per="token", choice=GumbelSigmoid(start=0.9))
        return _reaching(name, budget, whole.fixed / whole.total, gated)
    if kind == "token":
        gated = Gated(**common, per="token", choice=GumbelSigmoid(start=0.9), blocks=blocks)
        return _reaching(name, budget, pruning.share(whole, closed, all_keys=True), gated)
    if kind == "static" and random is None:
        gated = Gated(**common, choice=HardConcrete(start=OPEN), blocks=blocks)
        return _reaching(name, budget, pruning.share(whole, closed), gated)

    def share(model: Any) -> float:
        """Of a network that keeps a fixed number, found from shapes alone."""
        if isinstance(model, MixtureOfDepths):
            part = task.taken(model.chosen(task.length))
            tokens = jnp.asarray([[[part if l in model.routed else 1.0]] for l in range(config.layers)])
            return float(pruning.share(whole, Gates(tokens=tokens))[0])
        heads, kept = whole.heads[0], 0.0
        if isinstance(model, Experts):
            shape = (1000, task.length)
            kept = model.places(shape, CAPACITY) / math.prod(shape)
        if isinstance(model, Gated) and isinstance(model.choice, TopK):
            heads, kept = model.choice.number(heads), model.choice.number(blocks) / blocks
        gates = Gates(heads=jnp.ones((config.layers, heads)), blocks=jnp.full((config.layers, 1), kept))
        return float(pruning.share(whole, gates))

    made: dict[str, Callable[[int], nn.Module]] = {
        "static": lambda n: Gated(**common, choice=TopK(n / blocks), blocks=blocks, seed=random),
        "mod": lambda n: MixtureOfDepths(**common, keep=n / task.length, seed=random),
        "mod_all": lambda n: MixtureOfDepths(**common, keep=n / task.length, every=1, seed=random),
        "experts": lambda n: Experts(**common, blocks=blocks, keep=n, capacity=CAPACITY, seed=random),
        "expert_choice": lambda n: Experts(**common, blocks=blocks, keep=n, routing="expert", seed=random),
    }
    numbers = range(1, (task.length if kind == "mod" else blocks) + 1)
    candidates = [made[kind](n) for n in numbers]
    best = min(candidates, key=lambda model: abs(share(model) - budget))
    if kind == "mod" and share(best) > budget + 0.02:  # every second layer is not enough
        candidates = [made["mod_all"](n) for n in numbers]
        best = min(candidates, key=lambda model: abs(share(model) - budget))
    if abs(share(best) - budget) > 0.05:
        low, high = share(candidates[0]), share(candidates[-1])
        raise ValueError(f"--budgets has {budget}, expected {low:.2f} to {high:.2f} for {name}, which prunes no more")
    return best


def narrower(config: Config, budget: float, task: Task) -> Config:
    """The dense network of a share of the operations, of the shape nearest to the original's."""
    heads, ratio = config.heads_by_layer[0], config.ffn_by_layer[0] / config.width
    widths = range(2 * heads, config.width + 1, 2 * heads)
    shapes = [dataclasses.replace(config, width=width, head_width=None) for width in widths]
    fits = _fitting("small", shapes, budget, task, config)
    return min(fits, key=lambda sized: abs(sized.ffn_by_layer[0] / sized.width - ratio))


def thinner(config: Config, budget: float, task: Task) -> Config:
    """The dense network of full width and a share of the operations, its heads and hidden units alike fewer."""
    whole, ffn, size = config.heads_by_layer[0], config.ffn_by_layer[0], config.head_size
    shapes = [dataclasses.replace(config, heads=heads, head_width=size) for heads in range(1, whole + 1)]
    fits = _fitting("thin", shapes, budget, task, config)
    return min(fits, key=lambda sized: abs(sized.heads_by_layer[0] / whole - sized.ffn_by_layer[0] / ffn))


def _fitting(name: str, shapes: list[Config], budget: float, task: Task, dense: Config) -> list[Config]:
    """Those of the shapes that hidden units, in steps of 4, bring to the budget."""

    def total(sized: Config) -> float:
        return costs(sized, task.usual_length, causal=task.causal).total

    found, wanted = [], budget * total(dense)
    for sized in shapes:
        four, eight = (total(dataclasses.replace(sized, ffn=ffn)) for ffn in (4, 8))
        units = 4 + 4 * round((wanted - four) / (eight - four))
        if units > 0:
            found.append(dataclasses.replace(sized, ffn=units))
    if not found:
        low = total(dataclasses.replace(shapes[0], ffn=4)) / total(dense)
        raise ValueError(f"--budgets has {budget}, expected {low:.3f} to 1 for {name}, which gets no smaller")
    return found


def _reaching(name: str, budget: float, least: Any, model: nn.Module) -> nn.Module:
    """The network, if a Lagrangian can lead it to the budget."""
    if budget < float(least):
        raise ValueError(f"--budgets has {budget}, expected {float(least):.3f} to 1 for {name}, which prunes no more")
    return model


def auxiliary(out: dict[str, Any]) -> Array:
    """The weighted losses of the routers."""
    weights = {"balance": BALANCE, "z": Z, "predictor": PREDICTOR}
    return sum((weights[name] * value for name, value in out["losses"].items()), jnp.zeros(()))


def router_share(network: Any, config: Config, task: Task, name: str) -> float:
    """What the routers themselves cost, as a share of the dense network's operations."""
    routers = {key: value for key, value in network.items() if key != "model"}
    positions = {"static": 0, "random_static": 0, "sequence": 1}.get(name, task.length)
    return 2 * paramtree.count(routers) * positions / costs(config, task.length, causal=task.causal).total


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """AdamW for the network; a faster Adam for static gates, until they settle; ascent for the multipliers."""
    kinds = {"logits": "gates", "linear": "multipliers", "quadratic": "multipliers"}

    def label(path: Any, _: Any) -> str:
        last = str(getattr(path[-1], "key", getattr(path[-1], "name", None)))
        return "thresholds" if last.startswith("threshold") else kinds.get(last, "network")

    warm = max(1, min(100, config.steps // 10))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warm, config.steps, 0.05 * config.learning_rate
    )
    network = optax.adamw(rate, b2=0.98, weight_decay=config.weight_decay)
    ramp = RAMP * config.steps  # while the target falls, gates lag behind it, which would wind the multipliers up
    moving = max(2, round((1 - config.settle) * config.steps))
    slowing = optax.cosine_decay_schedule(config.gate_rate, moving // 2, 0.1)
    gates = optax.join_schedules([optax.constant_schedule(config.gate_rate), slowing], [moving - moving // 2])
    return optax.partition(
        {
            "network": optax.chain(optax.clip_by_global_norm(config.clip), network),
            "gates": optax.adam(gates),
            "thresholds": optax.adam(training.schedule(config.gate_rate, config.steps, 0.5)),
            "multipliers": pruning.ascend(optax.sgd(lambda step: config.multiplier_rate * (step >= ramp))),
        },
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def served(name: str, model: Any, variables: Any, task: Task) -> tuple[Any, Callable[..., Array], bool]:
    """How a trained network answers: what it needs, a function (that, tokens, mask) -> logits, and whether it saves.

    The last is False where gates only multiply, as of a decoder whose tokens skip layers: decoding alone saves.
    """

    def plain(module: Any) -> Callable[..., Array]:
        def run(variables: Any, tokens: Array, mask: Array) -> Array:
            options = {} if task.causal else {"mask": mask}
            return module.apply(variables, tokens, **options)["logits"]

        return run

    if isinstance(model, Plain):
        return {"params": variables["params"]["model"]}, plain(type_of(task)(model.config)), name != "dense"
    if isinstance(model, Gated) and model.per == "static":
        small = pruning.compact(model, variables)
        return small.variables, plain(small.model), True
    if isinstance(model, Buckets) and model.seed is None:
        server = pruning.BucketServer(model, variables)

        def run(variables: Any, tokens: Array, mask: Array) -> Array:
            options = () if task.causal else (mask,)
            return (server if len(tokens) == 1 else server.each)(variables, tokens, *options)["logits"]

        return server.variables, run, True
    if isinstance(model, Experts):

        def dispatched(variables: Any, tokens: Array, mask: Array) -> Array:
            options = {} if task.causal else {"mask": mask}
            apply: Any = model.apply
            return apply(variables, tokens, capacity=CAPACITY, **options)["logits"]

        return variables, dispatched, True
    return variables, plain(model), isinstance(model, MixtureOfDepths) and not task.causal


def type_of(task: Task) -> Any:
    """The Transformer of a task."""
    return Decoder if task.causal else Encoder
