"""What export.py takes out of a run: the network as it is served, the network as it was trained, and their inputs."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import char_lm
import char_lm_runs
import dynamic_pruning
import fewshot_adaptation
import hypernet_images
import jax
import jax.numpy as jnp
import multitask_snr
import numpy as np
import pruning_methods
import routing_models
import text_tasks
from pruning_training import sizes

from hyperjax import pruning, routing, training
from hyperjax.hypernet import HyperNetwork

MODULES = (char_lm, multitask_snr, hypernet_images, fewshot_adaptation, dynamic_pruning)
READERS = (*MODULES, char_lm_runs, pruning_methods, routing_models, text_tasks)
FILES = (__file__, *(str(module.__file__) for module in READERS))  # whose ValueErrors are lines
BY_BATCH = {"sequence": "has a width for each sample of a batch"}
BY_BATCH |= dict.fromkeys(("experts", "random_experts", "expert_choice"), "has places for the tokens of a batch")


class Served(NamedTuple):
    """A network taken out of its run.

    Attributes:
        title: what it is.
        run: what is exported, a function of arrays.
        params: what it computes with.
        trained: the same by the network as it was trained, with its gates or its hypernetwork: a function of its
            variables and the arrays; None: as `run`.
        inputs: batch size -> arrays to call them with, by name.
        free: of `hyperjax.serving.export`.
        variables: of `trained`.
    """

    title: str
    run: Callable[..., Any]
    params: Any
    trained: Callable[..., Any] | None
    inputs: Callable[[int], dict[str, Any]]
    free: Any = ("batch",)
    variables: Any = None


def open_run(
    workdir: Path,
    function: str | None = None,
    task: int | None = None,
    data_dir: str | None = None,
    fixed: bool = False,
) -> Served:
    """Opens a run of one of the scripts; of dynamic_pruning.py, the folder of one of its networks.

    Args:
        workdir: the folder.
        function: `step` or `sequence`, of a language model.
        task: whose network, of a hypernetwork of tasks.
        data_dir: where the run's corpus or data file is, if no longer where it was.
        fixed: whether the batch will have a fixed size.

    Raises:
        ValueError: there is no such run, it has no checkpoint yet, or what is asked for does not fit it.
    """
    within = workdir.parent if not (workdir / "config.json").exists() else workdir
    module = _script(within)
    if module is char_lm:
        _only(module, task=task)
        return _language_model(workdir, function or "sequence", data_dir)
    config = training.read_config(within / "config.json", module.Config)
    module.check(config)
    if module is fewshot_adaptation:
        _only(module, function=function, data_dir=data_dir)
        return _few_shot(config, workdir, task or 0)
    _only(module, function=function, task=task)
    if module is dynamic_pruning:
        return _transformer(dataclasses.replace(config, data_dir=data_dir or config.data_dir), workdir, within, fixed)
    config = dataclasses.replace(config, data_file=data_dir or config.data_file)
    return (_routing if module is multitask_snr else _images)(config, workdir)


def _script(folder: Path) -> ModuleType:
    """The script that a configuration is of, by its fields."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{folder} holds no config.json that can be read; give the --workdir of a run") from None
    names = {module: {field.name for field in dataclasses.fields(module.Config)} for module in MODULES}
    for module, fields in names.items():  # which may have got fields since
        if isinstance(found, dict) and "seed" in found and set(found) <= fields:
            return module
    known = ", ".join(f"{module.__name__}.py" for module in MODULES)
    raise ValueError(f"{folder} holds a run of another script, expected one of {known}; give its --workdir")


def _only(module: ModuleType, **options: Any) -> None:
    """Refuses options that a script's runs have no use for."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, but runs of {module.__name__}.py have no such choice; drop it"
            )


def _restore(folder: Path, mark: str | None, best: bool = False) -> dict[str, Any]:
    """The state in a checkpoint of a run; `mark` is the fingerprint of its data."""
    checkpoints: training.Checkpoints[Any] = training.Checkpoints(folder / "checkpoints")
    state, meta = checkpoints.restore_raw(best)
    char_lm_runs.tell(*checkpoints.notes)
    if mark is not None and meta.get("fingerprint") != mark:
        raise ValueError(f"the data of {folder} has changed since this run began; restore it")
    return jax.tree.map(jnp.asarray, state)


def _language_model(workdir: Path, function: str, data_dir: str | None) -> Served:
    if function not in ("step", "sequence"):
        raise ValueError(f"--function is {function!r}, expected step or sequence")
    run = char_lm_runs.open_run(workdir, data_dir)
    params, step = run.restore()
    model, rng = run.model, np.random.default_rng(0)

    def sequence(tokens, carry):
        out: Any = model.apply({"params": params}, tokens, carry)
        return out["logits"], out["carry"]

    def one(token, carry):
        logits, carry = sequence(token[:, None], carry)
        return logits[:, 0], carry

    def inputs(batch):
        shape = (batch,) if function == "step" else (batch, run.config.length)
        tokens = rng.integers(0, len(run.corpus.symbols), shape).astype(np.int32)
        return {"tokens": tokens, "carry": model.initialize_carry(batch)}

    title = f"{run.config.model} on {run.corpus.name}, checkpoint {step:,}, one {function}"
    if function == "step":
        return Served(title, one, params, None, inputs)
    return Served(title, sequence, params, None, inputs, [("batch", "length"), ("batch",)])


def _few_shot(config: Any, workdir: Path, task: int) -> Served:
    if not 0 <= task < config.train_tasks:
        raise ValueError(f"--task is {task}, expected one of the tasks trained on, 0 to {config.train_tasks - 1}")
    family = fewshot_adaptation.make_family(config)
    hyper, state = fewshot_adaptation.make_hyper(config, family), _restore(workdir, None, best=True)
    variables = {**fewshot_adaptation.initial(config, family, hyper), "params": state["params"]}
    network = hyper.generate(variables, task_id=task)
    width = family.example.shape[1]
    return Served(
        f"task {task} of {config.tasks}, checkpoint {int(state['step']):,}",
        lambda x: family.model.apply({"params": network}, x),
        network,
        lambda variables, x: hyper.apply(variables, x, task_id=task),
        lambda batch: {"x": np.random.default_rng(0).standard_normal((batch, width)).astype(np.float32)},
        variables=variables,
    )


def _images(config: Any, workdir: Path) -> Served:
    data = hypernet_images.load_images(config.data, config.data_file, config.valid)
    state = _restore(workdir, data.fingerprint)
    model = hypernet_images.make_model(config, data)
    carry, params = state["carry"], state["params"]
    apply = hypernet_images.make_apply(model, data)
    run, network = apply, params
    if isinstance(model, HyperNetwork):
        network = hypernet_images.kernels(config, model, params)[1]
        plain = hypernet_images.make_model(dataclasses.replace(config, model="plain"), data)
        run = hypernet_images.make_apply(plain, data)
    title = f"{config.model} on {data.name}, checkpoint {int(state['step']):,}, images as bytes"
    images = data.test.images
    return Served(
        title,
        lambda x: run(network, carry, x, False)[0],
        network,
        (lambda params, x: apply(params, carry, x, False)[0]) if isinstance(model, HyperNetwork) else None,
        lambda batch: {"images": np.resize(images, (batch, *images.shape[1:]))},
        variables=params,
    )


def _routing(config: Any, workdir: Path) -> Served:
    options = {"group": config.group, "correlation": config.correlation, "seed": config.seed}
    data = routing_models.load(config.data, config.data_file, config.test_file, **options)
    state = _restore(workdir, data.fingerprint)
    model, variables = multitask_snr.make_model(config, data), {"params": state["params"]["network"]}

    def trained(variables, *arrays):
        return model.apply(variables, data.encode(dict(zip(names, arrays, strict=True))))[0]

    def inputs(batch):
        return {name: np.resize(array, (batch, *array.shape[1:])) for name, array in data.test.features.items()}

    title = f"{config.model} on {data.name}, checkpoint {int(state['step']):,}"
    names = list(data.test.features)
    if not isinstance(model, routing.SNR) or model.gates is None or model.per == "sample":
        return Served(title, partial(trained, variables), variables, None, inputs)
    if lost := routing.lost_tasks(model, variables):
        raise ValueError(f"no path is left to {', '.join(lost)} in {workdir}; train again with a lower --l0")
    small = routing.compact(model, variables)

    def run(*arrays):
        return small.model.apply(small.variables, data.encode(dict(zip(names, arrays, strict=True))))[0]

    return Served(f"{title}, compact", run, small.variables, trained, inputs, variables=variables)


def _transformer(config: Any, folder: Path, within: Path, fixed: bool) -> Served:
    kept = sorted(path.parent.name for path in within.glob("*/checkpoints"))
    if folder == within:
        raise ValueError(f"{folder} holds several networks; give one of {', '.join(kept) or '... none yet'} in it")
    method, _, rest = folder.name.rpartition("-seed")
    name, _, percent = method.rpartition("_")
    name, budget = (name, float(percent) / 100) if percent.replace(".", "").isdigit() else (method, 1.0)
    if name not in pruning_methods.METHODS or not rest.isdigit():
        raise ValueError(f"{folder.name} is none of the networks in {within}: {', '.join(kept)}")
    if name in BY_BATCH and not fixed:
        raise ValueError(f"{folder.name} {BY_BATCH[name]}; fix its size with --batch")
    task = text_tasks.load(config, int(rest))
    model = pruning_methods.build(name, sizes(config, task), task, budget, int(rest), config.blocks)
    state = _restore(folder, task.fingerprint)
    variables = {"params": state["params"]["network"]}
    needed, run, _ = pruning_methods.served(name, model, variables, task)
    example = task.batch_at(0)

    def inputs(batch):
        arrays = {"tokens": example["tokens"]} | ({} if task.causal else {"mask": example["mask"]})
        return {key: np.resize(array, (batch, *array.shape[1:])) for key, array in arrays.items()}

    def served(tokens, mask=None):
        return run(needed, tokens, mask)

    def trained(variables, tokens, mask=None):
        out: Any = model.apply(variables, tokens, **({} if mask is None else {"mask": mask}))
        return out["logits"]

    compacted = isinstance(model, pruning.Gated) and model.per == "static"
    title = f"{folder.name} on {task.name}, checkpoint {int(state['step']):,}" + (", compact" if compacted else "")
    return Served(title, served, needed, trained if compacted else None, inputs, variables=variables)
