"""Devices as a named grid: what each of them holds of a batch, of the parameters and of the optimizer's state.

    layout = training.lay_out(config, batch=config.batch)  # None unless --mesh data=4,model=2 is given
    step = training.make_step(loss_fn, optimizer, layout)
    state = training.fit(state, step, batch_at, key, layout=layout, ...)

Every device computes its part of each batch. Along `data` the parameters are repeated; along `model` large ones are
split, with the optimizer's state, and gathered for the length of a step, as in ZeRO (Rajbhandari et al., arXiv
1910.02054) and FSDP (Zhao et al., arXiv 2304.11277). Parameters that are read once a step by little, such as the heads
of a hypernetwork, need not be gathered: each device then computes its part of what they make.
"""

import dataclasses
import math
import re
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hyperjax.training import processes
from hyperjax.training.state import TrainState

Tree = TypeVar("Tree")
AXES = ("data", "model")
SIZE = re.compile(r"[1-9][0-9]{0,5}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """The fields with which every experiment says where it runs; its results do not depend on them."""

    mesh: str | None = None  # devices to train on, such as data=4 or data=4,model=2; None is one device
    coordinator: str | None = None  # HOST:PORT of process 0 in a run of several processes; clusters need no such fields
    num_processes: int | None = None  # how many processes that run has
    process_id: int | None = None  # which of them this is, from 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig(Devices):
    """The fields of every experiment that trains with `fit`: where, what is recorded, and what ends it."""

    profile: int = 0  # record so many steps, a few after the first: a trace, and the operations that took longest
    non_finite: Literal["stop", "skip"] = "stop"  # at a loss or gradient that is not finite; skip leaves its update out
    max_skipped: int = 10  # how many updates may be skipped before the run stops


def mesh_shape(text: str) -> dict[str, int]:
    """Reads `data=4,model=2`: the number of devices along each axis, 1 along one that is left out.

    Raises:
        ValueError: the text is not of this form.
    """
    parts = [part.strip().partition("=")[::2] for part in text.split(",")]
    sizes = dict(parts)
    if len(sizes) < len(parts) or not sizes.keys() <= {*AXES} or not all(map(SIZE.fullmatch, sizes.values())):
        raise ValueError(f"mesh is {text!r}, expected devices along axes, such as data=4 or data=4,model=2")
    return {name: int(sizes.get(name, 1)) for name in AXES}


def make_mesh(text: str, devices: list | None = None) -> Mesh:
    """The grid of devices that a text names; see `mesh_shape`.

    Args:
        text: such as `data=4,model=2`. Neighbours along `model`, which exchange parameters, are so in `devices`.
        devices: those to choose from, by default all of all processes.

    Returns:
        The mesh, with the axes `data` and `model`.

    Raises:
        ValueError: the text cannot be read, or names more devices than there are, or not those of all processes.
    """
    shape = mesh_shape(text)
    devices = jax.devices() if devices is None else devices
    size = math.prod(shape.values())
    if size > len(devices) or (processes.several() and size != len(devices)):
        raise ValueError(
            f"mesh is {text!r}, {size} devices, but there {'are' if len(devices) > 1 else 'is'} {len(devices)}; "
            "change --mesh (on CPUs XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of one)"
        )
    grid = np.asarray(devices[:size]).reshape(tuple(shape.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def lay_out(config: Devices, *, batch: int | None = None, in_place: str | None = None) -> "Layout | None":
    """Joins the processes of a run, and lays a training state out over their devices.

    To be called before anything else of JAX in a process.

    Args:
        config: where to run.
        batch: the number of rows in a batch, over all devices; None where none is split.
        in_place: as in `Layout`.

    Returns:
        The layout, or None for a single device.

    Raises:
        ValueError: a field of `config` makes no sense, they do not go together, the devices are not there, or the
            batch cannot be split.
    """
    if isinstance(config, FitConfig) and config.profile < 0:
        raise ValueError(f"--profile is {config.profile}, expected a number of steps to record, or 0")
    if isinstance(config, FitConfig) and config.max_skipped < 0:
        raise ValueError(f"--max-skipped is {config.max_skipped}, expected a whole number of at least 0")
    if config.mesh is not None:
        mesh_shape(config.mesh)
    several = processes.connect(config.coordinator, config.num_processes, config.process_id, config.mesh is not None)
    if config.mesh is None:
        if several:
            raise ValueError(f"mesh is None in a run of several processes; give --mesh data={jax.device_count()}")
        return None
    mesh = make_mesh(config.mesh)
    return Layout(mesh, mesh.size if batch is None else batch, in_place=in_place)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays of a training run lie on a mesh.

    Attributes:
        mesh: with the axes `data` and `model`.
        batch: the number of rows B; arrays [B, ...] of a batch or of a recurrent state are split over all devices.
        in_place: a regular expression; parameters whose path it is found in are not gathered in a step.
        at_least: smaller parameters are not split.

    Raises:
        ValueError: `batch` is not a multiple of the number of devices.
    """

    mesh: Mesh
    batch: int
    in_place: str | None = None
    at_least: int = 2**12

    def __post_init__(self):
        if self.batch % self.mesh.size:
            raise ValueError(
                f"batch is {self.batch}, expected a multiple of the {self.mesh.size} devices of the mesh; change either"
            )

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())

    @property
    def rows(self) -> slice:
        """The rows of a batch that this process holds."""
        each = self.batch // jax.process_count()
        return slice(jax.process_index() * each, (jax.process_index() + 1) * each)

    def shardings(self, state: TrainState) -> TrainState:
        """Where the leaves of a state lie: a carry by its rows, all that is large along its longest axis.

        Args:
            state: of arrays or of `jax.ShapeDtypeStruct`.
        """
        by_rows = jax.tree.map(lambda leaf: self._of_batch(leaf) or self._of_parameter(leaf), state.carry)
        rest = {name: getattr(state, name) for name in ("step", "params", "opt_state")}
        return TrainState(**jax.tree.map(self._of_parameter, rest), carry=by_rows)

    def put(self, tree: Tree) -> Tree:
        """Puts arrays of which every process has the whole on the devices: split if they have B rows, or repeated."""
        return jax.tree.map(lambda leaf: self._put(leaf, self._of_batch(leaf) or self._spec()), tree)

    def place(self, state: TrainState) -> TrainState:
        """Puts a state that every process holds whole where it belongs."""
        return jax.tree.map(self._put, state, self.shardings(state))

    def pin(self, state: TrainState, metrics: Tree) -> tuple[TrainState, Tree]:
        """Keeps a state where it belongs, and metrics where every process reads them; to be called under `jit`."""
        state = jax.lax.with_sharding_constraint(state, self.shardings(state))
        return state, jax.lax.with_sharding_constraint(metrics, self._spec())

    def gather(self, params: Tree) -> Tree:
        """The parameters whole on every device, but for those `in_place`; to be called under `jit`."""

        def whole(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if self.in_place is not None and re.search(self.in_place, name):
                return leaf
            return jax.lax.with_sharding_constraint(leaf, self._spec())

        return jax.tree_util.tree_map_with_path(whole, params)

    def join(self, part: Tree) -> Tree:
        """Puts a batch, of which every process has its own `rows` alone, on the devices: leaves [rows, ...] or scalars.

        Returns:
            The whole batch, [B, ...].
        """
        return jax.tree.map(lambda leaf: self._joined(leaf) if hasattr(leaf, "shape") else leaf, part)

    def local(self, tree: Tree) -> Tree:
        """Every leaf whole on the first device of this process, for what is not computed together."""
        if processes.several():
            jax.block_until_ready(tree)
            tree = jax.tree.map(lambda leaf: leaf if leaf.is_fully_addressable else _gathered(leaf), tree)
        return jax.device_put(tree, jax.local_devices()[0])

    def _spec(self, *axes: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def _of_batch(self, leaf: Any) -> NamedSharding | None:
        return self._spec(AXES) if leaf.shape[:1] == (self.batch,) else None

    def _of_parameter(self, leaf: Any) -> NamedSharding:
        shape, model = leaf.shape, self.mesh.shape["model"]
        axes = [n for n, size in enumerate(shape) if size % model == 0]
        if not axes or math.prod(shape) < self.at_least:
            return self._spec()
        longest = max(axes, key=lambda n: shape[n])
        return self._spec(*[None] * longest, "model")

    def _put(self, leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, jax.Array) and (leaf.sharding == sharding or not leaf.is_fully_addressable):
            return leaf
        if not processes.several():
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def _joined(self, part: Any) -> jax.Array:
        if not part.ndim or not processes.several() or not getattr(part, "is_fully_addressable", True):
            return self._put(part, self._spec(AXES) if part.ndim else self._spec())
        part = np.asarray(part)
        return jax.make_array_from_process_local_data(self._spec(AXES), part, (self.batch, *part.shape[1:]))


def _gathered(leaf: jax.Array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
