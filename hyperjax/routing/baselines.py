"""Multi-task networks to measure SNR against, from nothing shared to progressive layered extraction.

All are made with `tasks` (kinds by name) and `towers` (hidden widths of the towers, for all or by task) as keywords,
and called `outputs, info = model.apply(variables, x, key=None)`. No baseline samples anything: `key` is ignored.

`outputs` are logits [B, *task.shape] by task. `info` holds `experts`, outputs [E, B, W] by level ("level_0", ...),
`gates`, probabilities by the level that reads through them ("level_1", ..., "towers"), [B, E] by task where tasks do,
and `mixtures`, what each tower reads, [B, W] by task.

B samples, d features, T tasks (numbered by name, as `tower_widths` says), E experts, G gates, W width of an expert's
output.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperjax.routing.tasks import Task
from hyperjax.routing.towers import Experts, Tower, Widths, tower_widths

Array = jax.Array


class _Network(nn.Module, kw_only=True):
    """What they have in common: checked fields, and a tower for each task on its mixture, made of x by `body`."""

    tasks: Mapping[str, Task]
    towers: Widths = (16,)
    counts: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        tower_widths(self.towers, self.tasks)
        for field, value in vars(self).items():
            if field in ("bottom", "experts", "widths", "levels"):
                _check(field, (value,) if field == "experts" else value, self.counts)
        super().__post_init__()

    @nn.compact
    def __call__(self: Any, x: Array, key: Array | None = None) -> tuple[dict[str, Array], dict[str, Any]]:
        """Maps x [B, d] to outputs and info, as the module's first lines say; raises ValueError if x is no matrix."""
        if jnp.ndim(x) != 2:
            raise ValueError(f"x has shape {jnp.shape(x)}, expected [B, features]; flatten each sample")
        mixed, info = self.body(x)
        mixtures, widths = self.by_task(mixed), tower_widths(self.towers, self.tasks)
        outputs = {t: Tower(self.tasks[t], widths[t], name=f"tower_{t}")(mixtures[t]) for t in widths}
        return outputs, {**info, "mixtures": mixtures}

    def reader(self: Any, level: int) -> str:
        """Names what reads a level."""
        return "towers" if level == len(self.levels) - 1 else f"level_{level + 1}"

    def by_task(self, values: Any) -> dict[str, Any]:
        """Names values, one for each task, in the order that networks here number tasks in: sorted by name."""
        return dict(zip(tower_widths(self.towers, self.tasks), values, strict=True))


class SingleTask(_Network):
    """A network for each task: nothing is shared.

    Attributes:
        bottom: widths of the layers below the tower; each task has its own of these.

    Raises:
        ValueError: no width in `bottom`, a width below 1, or tasks and towers that do not fit.
    """

    bottom: Sequence[int]

    def body(self, x):
        """Returns what the towers read, [T, B, W], and info, of x [B, d]."""
        experts = Experts(len(self.tasks), self.bottom, name="bottom")(x)
        return experts, {"experts": {"level_0": experts}}


class SharedBottom(_Network):
    """Layers that all tasks share, and a tower for each task.

    Attributes:
        bottom: widths of the shared layers.

    Raises:
        ValueError: no width in `bottom`, a width below 1, or tasks and towers that do not fit.

    Reference:
        Caruana, "Multitask Learning", Machine Learning 28 (1997), section 2.
    """

    bottom: Sequence[int]

    def body(self, x):
        """Returns what the towers read, T times the same [B, W], and info, of x [B, d]."""
        experts = Experts(1, self.bottom, name="bottom")(x)
        return [experts[0]] * len(self.tasks), {"experts": {"level_0": experts}}


class CrossStitch(_Network):
    """A column of layers for each task; after each layer the columns are mixed by a learned matrix.

    The matrix starts with `stay` on its diagonal and the rest of each row's 1 spread evenly; `info` holds it as
    `stitches` [T, T], by the level that reads its results. The paper gives the matrices a learning rate 100 to 1000
    times that of the layers.

    Attributes:
        levels: width of each layer.
        stay: share of its own column that a task starts with, 0 to 1; all of it if there is but one task.

    Raises:
        ValueError: no level, `stay` outside [0, 1], a width below 1, or tasks and towers that do not fit.

    Reference:
        Misra et al., "Cross-stitch Networks for Multi-task Learning", CVPR 2016, eq. 1; `stay` is from section 5.
    """

    levels: Sequence[int]
    stay: float = 0.9

    def __post_init__(self):
        if not 0 <= self.stay <= 1:
            raise ValueError(f"stay is {self.stay}, expected 0 to 1; 0.9 starts near columns of their own")
        super().__post_init__()

    def body(self, x):
        """Returns what the towers read, [T, B, W], and info, of x [B, d]."""
        number = len(self.tasks)
        own = self.stay if number > 1 else 1.0
        start = np.eye(number) * own + (1 - np.eye(number)) * (1 - own) / max(number - 1, 1)
        info: dict[str, Any] = {"experts": {}, "stitches": {}}
        for l, width in enumerate(self.levels):
            experts = Experts(number, (width,), name=f"columns_{l}")(x)
            stitch = self.param(f"stitch_{l}", lambda _: jnp.asarray(start, jnp.float32))
            x = jnp.einsum("st,tbw->sbw", stitch, experts)
            info["experts"][f"level_{l}"], info["stitches"][self.reader(l)] = experts, stitch
        return x, info


class MMoE(_Network):
    """Multi-gate mixture of experts: every task mixes the same experts by a softmax gate of its own, read from x.

    Attributes:
        experts: how many.
        widths: widths of the layers of each.

    Raises:
        ValueError: no expert, no width, a width below 1, or tasks and towers that do not fit.

    Reference:
        Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018,
        eq. 6-7: f^k(x) = sum_i g^k(x)_i f_i(x), g^k(x) = softmax(W_k x).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> tasks = {"income": hj.routing.Binary(), "job": hj.routing.MultiClass(5)}
        >>> model, x = hj.MMoE(experts=3, widths=(8,), tasks=tasks), jnp.ones((4, 10))
        >>> variables = jax.jit(model.init)(jax.random.key(0), x)
        >>> outputs, info = jax.jit(model.apply)(variables, x)
        >>> {name: logits.shape for name, logits in outputs.items()}
        {'income': (4,), 'job': (4, 5)}
        >>> info["gates"]["towers"]["income"].sum(-1).round(3).tolist()  # over the three experts, for each sample
        [1.0, 1.0, 1.0, 1.0]
    """

    experts: int
    widths: Sequence[int]

    def body(self, x):
        """Returns what the towers read, [T, B, W], and info, of x [B, d]."""
        experts = Experts(self.experts, self.widths, name="experts")(x)
        gates = Gates(len(self.tasks), self.experts, name="gates")(x)
        return mix(gates, experts), {"experts": {"level_0": experts}, "gates": {"towers": self.by_task(gates)}}


class MultiLevelMMoE(_Network):
    """Levels of experts; each expert of a level has a softmax gate of its own over those below, and so has each task.

    All gates read x, as in one level. Those of the next level's experts are [E of that level, B, E] in `info`.

    Attributes:
        levels: (number of experts, width, ...) of each level.

    Raises:
        ValueError: no level, a level without widths, a number below 1, or tasks and towers that do not fit.

    Reference:
        Ma et al., "SNR: Sub-Network Routing for Flexible Parameter Sharing in Multi-Task Learning", AAAI 2019, the
        multi-level baseline.
    """

    levels: Sequence[Sequence[int]]
    counts = ("number of experts",)

    def body(self, x):
        """Returns what the towers read, [T, B, W], and info, of x [B, d]."""
        readers = [number for number, *_ in self.levels[1:]] + [len(self.tasks)]
        inputs = x
        info: dict[str, Any] = {"experts": {}, "gates": {}}
        for l, (number, *widths) in enumerate(self.levels):
            experts = Experts(number, widths, name=f"experts_{l}")(inputs)
            gates = Gates(readers[l], number, name=f"gates_{l}")(x)
            inputs = mix(gates, experts)
            info["experts"][f"level_{l}"], info["gates"][self.reader(l)] = experts, gates
        info["gates"]["towers"] = self.by_task(gates)
        return inputs, info


class PLE(_Network):
    """Progressive layered extraction: a task mixes experts of its own with shared ones; with one level it is CGC.

    A level's private experts and its task's gate read the task's mixture of the level below (x in the first); its
    shared experts and the shared gate, which mixes all experts of the level, read the shared mixture. The last level
    has no shared gate. A task's gate chooses among its own experts, then the shared ones. In `info`, `experts` are in
    the order of the tasks, the shared ones last; all `gates` are by task; `shared_gates` are [B, E], by level.

    Attributes:
        levels: (shared experts, experts of each task, width, ...) of each level.

    Raises:
        ValueError: no level, a level without widths, a number below 1, or tasks and towers that do not fit.

    Reference:
        Tang et al., "Progressive Layered Extraction (PLE)", RecSys 2020, eq. 1-4 (CGC) and 5-6.
    """

    levels: Sequence[Sequence[int]]
    counts = ("shared experts", "experts of each task")

    def body(self, x):
        """Returns what the towers read, [T, B, W], and info, of x [B, d]."""
        number = len(self.tasks)
        own_input, shared_input = x, x
        info: dict[str, Any] = {"experts": {}, "gates": {}, "shared_gates": {}}
        for l, (shared, private, *widths) in enumerate(self.levels):
            each = own_input if l == 0 else jnp.repeat(own_input, private, axis=0)
            own = Experts(number * private, widths, name=f"private_{l}")(each)
            common = Experts(shared, widths, name=f"shared_{l}")(shared_input)
            gates = Gates(number, private + shared, name=f"gates_{l}")(own_input)
            experts = jnp.concatenate([own, common])
            info["experts"][f"level_{l}"], info["gates"][self.reader(l)] = experts, self.by_task(gates)
            own_input = mix(gates[..., private:], common) + jnp.einsum(
                "tbp,tpbw->tbw", gates[..., :private].astype(own.dtype), own.reshape(number, private, *own.shape[1:])
            )
            if l < len(self.levels) - 1:
                gate = Gates(1, len(experts), name=f"shared_gate_{l}")(shared_input)
                info["shared_gates"][self.reader(l)], shared_input = gate[0], mix(gate, experts)[0]
        return own_input, info


class Gates(nn.Module):
    """G softmax gates, each over E choices, without biases; the softmax is in float32.

    Attributes:
        number: how many, G.
        choices: E.
    """

    number: int
    choices: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, d], the same for all, or [G, B, d], one for each, to probabilities [G, B, E] float32."""
        draw = nn.initializers.lecun_normal(batch_axis=0)
        kernel = self.param("kernel", draw, (self.number, x.shape[-1], self.choices))
        logits = jnp.einsum("bd,gde->gbe" if x.ndim == 2 else "gbd,gde->gbe", x, kernel)
        return nn.softmax(logits.astype(jnp.float32))


def mix(gates: Array, experts: Array) -> Array:
    """Returns the experts' outputs [E, B, W] weighted by each gate [G, B, E], [G, B, W] in the experts' dtype."""
    return jnp.einsum("gbe,ebw->gbw", gates.astype(experts.dtype), experts)


def _check(field: str, values: Any, counts: tuple[str, ...] = ()) -> None:
    form = f"one level or more, each ({', '.join(counts)}, width, ...)" if counts else "one width or more"
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{field} is {values!r}, expected {form}")
    for l, value in enumerate(values):
        if counts and (not isinstance(value, Sequence) or len(value) <= len(counts)):
            raise ValueError(f"level {l} is {value!r}, expected {form}")
        if counts:
            _check(f"level {l}", value)
        elif not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{field} has {value!r}, expected whole numbers of at least 1")
