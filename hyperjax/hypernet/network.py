"""`HyperNetwork`: a module whose output is that of a target network with generated parameters.

B batch of embeddings, E width of an embedding, T tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperjax.hypernet import conditions, per_sample
from hyperjax.hypernet.generators import Generator, Linear
from hyperjax.hypernet.maker import Maker, Part, Task
from hyperjax.hypernet.plan import Rule, needs_task, plan
from hyperjax.hypernet.target import Call, State, Target, as_target
from hyperjax.hypernet.ungenerated import lookup
from hyperjax.initializers import unit_rows

Array = jax.Array


class HyperNetwork(nn.Module):
    """A target network whose parameters are generated from an embedding; build it with `from_target`.

        hyper = HyperNetwork.from_target(model, x, embedding_dim=64, num_embeddings=32, generator=Chunked())
        variables = hyper.init(key, x, task_id=0)
        y = hyper.apply(variables, x, task_id=0)
        params = hyper.generate(variables, task_id=0)  # model.apply({"params": params}, x) is y

    Its variables are "params" (the table `embedding` [T, E], the generators', an encoder's), "frozen" (what no
    optimizer may see) and the target's own collections. Everything but `task_id`, `z` and `condition` is passed on to
    the target, and so are `mutable=` of `apply` and its `rngs=`, folded as for any submodule. Where each sample has
    weights of its own, "one set of weights" means one network: nothing then passes from sample to sample, except in a
    BatchNorm of the factored route (`per_sample.py`).

    Raises:
        ValueError: the variables hold a table of embeddings of another shape; see also `from_target` and `__call__`.

    Reference: Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import hyperjax as hj
        >>> model, x = nn.Dense(10), jnp.ones((2, 28))
        >>> hyper = hj.HyperNetwork.from_target(model, x, embedding_dim=8, num_embeddings=3)
        >>> variables = jax.jit(hyper.init)(jax.random.key(0), x, task_id=0)
        >>> hyper.apply(variables, x, task_id=2).shape
        (2, 10)
        >>> jax.tree.map(jnp.shape, hyper.generate(variables, task_id=2))
        {'bias': (10,), 'kernel': (28, 10)}
        >>> hyper.generate(variables, task_id=jnp.array([0, 2]))["kernel"].shape  # one kernel for each of two samples
        (2, 28, 10)
    """

    targets: tuple[Target, ...]
    generators: tuple[Generator, ...]
    uses: tuple[tuple[int, ...], ...]
    embedding_dim: int
    num_embeddings: int
    encoder: nn.Module | None = None
    per_task: tuple[str, ...] = ()
    dtype: Any = None
    remat: bool = False
    sample_block: int | None = None

    @classmethod
    def from_target(
        cls,
        target: Any,
        *inputs: Any,
        embedding_dim: int,
        num_embeddings: int | None = None,
        generator: Generator | None = None,
        rules: Sequence[Rule] = (),
        encoder: nn.Module | None = None,
        params: Any = None,
        init: Any = None,
        per_task: Sequence[str] = (),
        dtype: Any = None,
        remat: bool = False,
        sample_block: int | None = None,
        **keyword_inputs: Any,
    ) -> "HyperNetwork":
        """Plans a hypernetwork for any target; nothing is computed yet.

        Args:
            target: a Linen module, an nnx module, or a pure function (params, *inputs) -> outputs. A list of them gives
                each task a target of its own, for heads of different sizes; parameters of equal path, shape and dtype
                are then generated once, and `task_id` must be a Python int.
            *inputs, **keyword_inputs: example inputs of the target. They are not computed with.
            embedding_dim: E.
            num_embeddings: T, number of tasks; 1 by default, or one for each target. 0 is a static hypernetwork, whose
                generators have embeddings of their own (`ConvTiles`).
            generator: what generates the parameters that no rule selects; `Linear()` by default. Integers among them
                are frozen.
            rules: (regular expression searched for in the path, or predicate on the path; generator), e.g.
                `[("norm", Learned()), ("^head/", PerTask())]`. The first that fits counts.
            encoder: a Linen module; z is then encoder(condition), rescaled by a fixed number so that it starts with
                mean square 1, and there is no table of embeddings.
            params: values that the target's parameters start from, as those of a trained network: exactly so with
                `Scale`, `LowRank`, `Learned`, `PerTask`, `Frozen`, and nearly with `residual=True`; the other
                generators take over their spread. For a function, required, unless there is `init`.
            init: for a function, key -> parameters.
            per_task: the target's collections to keep for each task apart, as ("batch_stats",). Others are shared,
                also by several targets, if they are of the same shapes.
            dtype: of generated parameters, as jnp.bfloat16; by default that of the target's own. Generators compute
                in float32.
            remat: generate again in the backward pass instead of keeping the generators' intermediates: for those with
                deep or wide hidden layers. The parameters that the target itself keeps stay.
            sample_block: how many of a batch's own sets of weights may exist at once, where each sample has weights
                of its own; by default as many as fit 1 GiB.

        Returns:
            The hypernetwork, a Linen module.

        Raises:
            ValueError: a target without parameters or of an unknown kind, a pattern that selects nothing, a generator
                that cannot make what it should, or a number out of range.
        """
        own = {"task_id", "z", "condition"} & keyword_inputs.keys()
        if own:
            raise ValueError(f"the target's input {own.pop()!r} has a name that the hypernetwork uses; wrap the target")
        models = list(target) if isinstance(target, (list, tuple)) else [target]
        tasks = (len(models) if num_embeddings is None else num_embeddings) if models else 0
        conditions.check_sizes(embedding_dim, tasks, sample_block)
        if not models or (len(models) > 1 and len(models) != tasks):
            raise ValueError(f"there are {len(models)} targets for {tasks} tasks, expected one, or one for each task")
        targets = tuple(as_target(model, inputs, keyword_inputs, params, init) for model in models)
        generators, uses = plan(targets, generator or Linear(), rules, tasks)
        if not tasks and encoder is None:
            lacking = next((type(made).__name__ for made in generators if made.needs_z), None)
            if lacking:
                raise ValueError(f"{lacking} needs an embedding, but num_embeddings is 0 and there is no encoder")
        for name in per_task:
            known = sorted({collection for each in targets for collection in each.state})
            if name not in known or not tasks:
                raise ValueError(f"per_task names {name!r}, expected a collection of the target ({known}) and tasks")
        return cls(
            targets, generators, uses, embedding_dim, tasks, encoder, tuple(per_task), dtype, remat, sample_block
        )

    def setup(self) -> None:
        if self.num_embeddings and self.encoder is None:
            shape = (self.num_embeddings, self.embedding_dim)
            given = jnp.shape(self.get_variable("params", "embedding", jnp.zeros(shape)))
            if given != shape:
                raise ValueError(f"the variables hold a table of embeddings {given}, expected [T, E] = {shape}")
            self.embedding = self.param("embedding", unit_rows, shape)

    def __call__(self, *inputs: Any, task_id: Any = None, z: Any = None, condition: Any = None, **keywords: Any) -> Any:
        """Applies the target with generated parameters.

        Args:
            *inputs, **keywords: the target's.
            task_id: index of a task, or [B] of them: one for each sample.
            z: any embedding [E], or [B, E]: one set of weights for each sample. Beside it, `task_id` only chooses what
                is kept per task.
            condition: the encoder's input, a tuple for several; what comes out, [E] or [B, E], is z.

        Returns:
            The target's outputs. With a batch of embeddings every array among the inputs needs the leading axis B, and
            so have the outputs.

        Raises:
            ValueError: a task id out of range, a z of the wrong width, or not exactly one source of z. Inside `jit` the
                value of a task id is not known: one that is out of range gives NaN, never another task's weights.
        """
        start = self.is_initializing()
        if start:
            self._start(inputs, keywords, task_id, z, condition)
        z, task = self._embed(task_id, z, condition)
        index = self._target_index(task)
        target = self.targets[index]
        maker = self._maker(index)
        rngs = {} if start else {name: self.make_rng(name) for name in (self.scope.rngs if self.scope else {})}
        if start and self.scope:
            rngs = {"params": self.make_rng("params")}
        call = Call(inputs, keywords, rngs, True if start else self.scope.mutable if self.scope else False)
        kept = self._kept(index)
        pick = lambda task: self._pick_state(kept, task)  # noqa: E731
        batch = conditions.batch_size(z, task)
        if batch is None:
            y, changed = target.apply(maker.tree(maker.leaves(z, task)), pick(task), call)
        else:
            y, changed = per_sample.apply(maker, z, task, batch, pick, call, self.sample_block, start)
        for name, value in {} if start else changed.items():
            if name in self.per_task and len(self.targets) == 1:
                row = jnp.asarray(task)
                row = jnp.where(row < 0, self.num_embeddings, row)  # a negative index would count from the end
                value = jax.tree.map(lambda old, new: old.at[row].set(new, mode="drop"), kept[name], value)  # noqa: B023
            self.put_variable(name, self._slot(index, name), value)
        return y

    @nn.nowrap
    def generate(
        self,
        variables: Mapping[str, Any],
        *,
        task_id: Any = None,
        z: Any = None,
        condition: Any = None,
        rngs: Any = None,
    ) -> Any:
        """Returns the target's parameters as a plain pytree.

        Args:
            variables: of the hypernetwork.
            task_id, z, condition: as in `__call__`; for a batch every parameter has the leading axis B.
            rngs: for an encoder that needs them.

        Returns:
            A pytree of the target's own structure: `model.apply({"params": params}, x)`; nested dicts for nnx.

        Raises:
            ValueError: as `__call__`.
        """
        made: Any = self.apply(variables, task_id, z, condition, False, rngs=rngs, method=HyperNetwork._generate)
        return made[1]

    @nn.nowrap
    def materialize(
        self,
        variables: Mapping[str, Any],
        *,
        task_id: Any = None,
        z: Any = None,
        condition: Any = None,
        rngs: Any = None,
    ) -> Any:
        """Returns what the target alone runs with, for deployment.

        Args:
            variables, task_id, z, condition, rngs: as in `generate`, for one network.

        Returns:
            For Linen the variables, batch statistics included: `model.apply(materialized, x)`. For nnx a module of its
            own. For a function its parameters.

        Raises:
            ValueError: as `__call__`, or more than one network is asked for.
        """
        made: Any = self.apply(variables, task_id, z, condition, True, rngs=rngs, method=HyperNetwork._generate)
        target, params, state = made
        return target.variables(params, state)

    @nn.nowrap
    def specialize(
        self,
        variables: Mapping[str, Any],
        *,
        task_id: Any = None,
        z: Any = None,
        condition: Any = None,
        rngs: Any = None,
    ) -> Callable[..., Any]:
        """Returns one network as a pure function (*inputs, **inputs) -> outputs, whose weights are made already.

        Args:
            variables, task_id, z, condition, rngs: as in `generate`, for one network.

        Raises:
            ValueError: as `__call__`, or more than one network is asked for.
        """
        made: Any = self.apply(variables, task_id, z, condition, True, rngs=rngs, method=HyperNetwork._generate)
        target, params, state = made
        return lambda *inputs, **keywords: target.apply(params, state, Call(inputs, keywords, {}))[0]

    @nn.nowrap
    def embeddings(self, variables: Mapping[str, Any]) -> Array:
        """Returns the table of task embeddings [T, E].

        Raises:
            ValueError: there is no such table, but an encoder, or `num_embeddings=0`.
        """
        if "embedding" not in variables["params"]:
            raise ValueError("this hypernetwork has no table of embeddings: it has an encoder, or num_embeddings=0")
        return variables["params"]["embedding"]

    def _generate(self, task_id: Any, z: Any, condition: Any, single: bool) -> tuple[Target, Any, State]:
        z, task = self._embed(task_id, z, condition)
        index = self._target_index(task)
        maker, target = self._maker(index), self.targets[index]
        batch = conditions.batch_size(z, task)
        if batch is not None and single:
            raise ValueError("this makes one network; give one task_id, z [E] or one condition")
        leaves = maker.leaves(z, task)
        if batch is not None:
            for spec in target.structure.specs:
                if leaves[spec.path].ndim == len(spec.shape):
                    leaves[spec.path] = jnp.broadcast_to(leaves[spec.path], (batch, *spec.shape))
        kept = self._kept(index) if single else {}
        return target, maker.tree(leaves), self._pick_state(kept, task)

    def _start(self, inputs: Any, keywords: Any, task_id: Any, z: Any, condition: Any) -> None:
        """Makes the variables: every generator starts from what the target itself would have drawn."""
        if self.encoder is not None and condition is None:
            raise ValueError("the encoder has nothing to encode; give condition, so that its variables can be made")
        natives = []
        for index, target in enumerate(self.targets):
            params, state = target.init(self.make_rng("params"), inputs, keywords)
            natives.append(target.structure.flatten(params))
            for name in self.per_task if len(self.targets) == 1 else ():
                stack = lambda v: jnp.broadcast_to(v, (self.num_embeddings, *jnp.shape(v)))  # noqa: E731
                state[name] = jax.tree.map(stack, state[name])
            for name, value in state.items():
                self.put_variable(name, self._slot(index, name), value)
        z, _ = self._embed(task_id, z, condition)
        z = z if z is None or z.ndim == 1 else z[0]
        for number, generator in enumerate(self.generators):
            owner = next(i for i, used in enumerate(self.uses) if number in used)
            generator(z, 0, natives[owner])

    def _embed(self, task_id: Any, z: Any, condition: Any) -> tuple[Array | None, Task]:
        task = conditions.check_task(task_id, self.num_embeddings)
        if task is None and self.num_embeddings == 1:
            task = 0
        if z is not None:
            z = conditions.check_z(z, self.embedding_dim)
        conditions.check_sources(self.encoder is not None, self.num_embeddings, task is not None, z, condition)
        if z is None and self.encoder is not None:
            z = self._encode(condition)
        elif z is None and self.num_embeddings:
            z = lookup(self.embedding, task)  # type: ignore[arg-type]
        if task is None and (self.per_task or len(self.targets) > 1 or any(map(needs_task, self.generators))):
            raise ValueError("some parameters or statistics are kept per task; give task_id, beside z or condition")
        return z, task

    def _encode(self, condition: Any) -> Array:
        encoder: Any = self.encoder
        made = encoder(*condition) if isinstance(condition, tuple) else encoder(condition)
        z = conditions.check_z(made, self.embedding_dim, "the encoder's output")
        power = lambda: jnp.mean(jnp.square(jax.lax.stop_gradient(z)))  # noqa: E731
        if self.is_initializing() and not self.has_variable("frozen", "encoder_scale"):
            self.put_variable("frozen", "encoder_scale", jnp.where(power() > 0, jax.lax.rsqrt(power() + 1e-12), 1.0))
        return z * self.get_variable("frozen", "encoder_scale")

    def _target_index(self, task: Task) -> int:
        if len(self.targets) == 1:
            return 0
        if not isinstance(task, int):
            raise ValueError("the tasks have targets of their own, so task_id must be one Python int, fixed under jit")
        return task

    def _slot(self, index: int, collection: str) -> str:
        """Where a target's collection is kept: one place for all, unless they differ or each is to have its own."""
        shapes = {target.state.get(collection) for target in self.targets}
        shared = len(self.targets) == 1 or (len(shapes) == 1 and collection not in self.per_task)
        return "target" if shared else f"target_{index}"

    def _kept(self, index: int) -> State:
        kept: State = {name: self.get_variable(name, self._slot(index, name)) for name in self.targets[index].state}
        missing = next((name for name, value in kept.items() if value is None), None)
        if missing:
            raise ValueError(f"the variables lack {missing!r}, which the target needs; pass all that init returned")
        return kept

    def _maker(self, index: int) -> Maker:
        made = [self.generators[number] for number in self.uses[index]]
        own = None if len(self.targets) == 1 else index
        parts = [
            Part(g.clone(parent=None, name=None), g.variables, own if own is None else g.tasks.index(own)) for g in made
        ]
        return Maker(self.targets[index], tuple(parts), self.dtype, self.remat)

    def _pick_state(self, kept: State, task: Task) -> State:
        apart = self.per_task if len(self.targets) == 1 else ()
        return {
            name: jax.tree.map(lambda v: lookup(v, task), value) if name in apart else value  # type: ignore[arg-type]
            for name, value in kept.items()
        }
