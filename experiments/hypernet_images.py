"""A convolutional network whose kernels a static hypernetwork makes (Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106).

    python experiments/hypernet_images.py --preset quick                           # 8x8 digits, a minute on a CPU
    python experiments/hypernet_images.py --preset cpu --model hyper               # MNIST, Table 7
    python experiments/hypernet_images.py --preset paper --model hyper --width 2   # CIFAR-10, Table 2, an accelerator

`--model plain` trains the same network with kernels learned directly. Give every run a --workdir of its own. The same
command again resumes a run, or prints the summary of a finished one. The summary is of the last state: no checkpoint is
chosen by its validation error, which is there to choose recipes by.

B batch, H W rows and columns, C channels, h w size of a kernel.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax import paramtree, training
from hyperjax.data import Batches, Images, Split, load_images, pad_crop_flip
from hyperjax.hypernet import ConvTiles, HyperNetwork, Learned
from hyperjax.hypernet.image_models import ConvNet, WideResNet

FREE = ("workdir", "data_file", "save_minutes", "keep_checkpoints")  # a run may resume with other values of these


@dataclasses.dataclass(frozen=True)
class Config(training.FitConfig):
    """Settings of a run; --preset chooses the defaults of the others."""

    preset: str = "quick"  # quick, cpu or paper
    model: str = "hyper"  # hyper: a hypernetwork makes the kernels; plain: they are learned directly
    workdir: str | None = None  # where the run is kept; None is runs/hypernet_images-PRESET-MODEL
    data: str = "digits"  # digits, mnist or cifar10
    data_file: str | None = None  # an .npz to read instead: train_images, train_labels, test_images, test_labels
    valid: float = 0.1  # fraction of the training images that are not trained on; to choose a recipe by
    depth: int = 0  # layers of a Wide ResNet, 6 n + 4; 0 is the network of two convolutions
    width: int = 1  # Wide ResNet: its groups have 16, 32 and 64 times as many channels
    features: int = 16  # two convolutions: channels of both
    kernel: int = 3  # two convolutions: height and width of their kernels
    generated: str = "^conv2/kernel$"  # regular expression for the paths of the kernels that are generated
    tile: int = 16  # channels in and out of a basic kernel
    embedding: int = 4  # N_z, width of the embedding of a basic kernel
    hidden: int = 4  # d, width of the hypernetwork's hidden layer, for each input channel
    batch: int = 32  # images in a step
    augment: Literal["none", "shift", "flip"] = "shift"  # shift: crop the padded image at random; flip: and mirror it
    pad: int = 1  # pixels of padding, black, on each side
    epochs: float = 40.0  # passes over the training images
    steps: int | None = None  # number of updates; overrides epochs
    rates: tuple[float, ...] = (5e-3,)  # learning rates of Adam, one after the other
    until: tuple[int, ...] = ()  # the step at which each rate but the last ends
    decay: float = 1.0  # final fraction of the last rate's steps over which it falls to 0 along a cosine
    l2: float = 0.0  # c in c/2 times the sum of squares of the kernels named by --generated
    eval_every: int = 80  # steps between two validations, each followed by a checkpoint
    eval_batch: int = 250  # images in a step of evaluation; changes its speed, not its result
    log_every: int = 20  # steps between two lines of metrics
    save_minutes: float = 5.0  # longest time between two checkpoints
    keep_checkpoints: int = 2  # how many of the newest checkpoints to keep, beside the best
    seed: int = 0  # of initialization, order of the images and augmentation


def defaults(preset: str = "quick", model: str = "hyper") -> Config:
    """The defaults of a preset and a model; the models share everything."""
    _expect(preset in ("quick", "cpu", "paper"), "preset", preset, "quick, cpu or paper")
    _expect(model in ("hyper", "plain"), "model", model, "hyper or plain")
    if preset == "quick":
        return Config(preset, model)
    if preset == "cpu":
        recipe: dict[str, Any] = {"batch": 64, "augment": "shift", "pad": 2, "epochs": 10, "rates": (1e-3,)}
        return Config(preset, model, data="mnist", kernel=7, **recipe, eval_every=843)
    tiles: dict[str, Any] = {"generated": "^group.*/conv", "embedding": 64, "hidden": 64}
    stairs: dict[str, Any] = {"rates": (2e-3, 1e-3, 2e-4, 5e-5), "until": (168_000, 336_000, 504_000), "decay": 0.0}
    recipe = {"batch": 128, "augment": "flip", "pad": 4, "steps": 672_000, "l2": 5e-6, "eval_every": 1755}
    return Config(preset, model, data="cifar10", depth=40, **tiles, **stairs, **recipe, log_every=100)


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    whole = ("width", "features", "kernel", "tile", "embedding", "hidden", "batch", "steps", "eval_every", "eval_batch")
    for name in (*whole, "log_every", "keep_checkpoints"):
        value = getattr(config, name)
        _expect(value is None or value >= 1, name, value, "a whole number of at least 1")
    for name in ("epochs", "save_minutes"):
        value = getattr(config, name)
        _expect(0 < value < math.inf, name, value, "a positive number")
    for name in ("depth", "pad", "l2"):
        value = getattr(config, name)
        _expect(0 <= value < math.inf, name, value, "a number of at least 0")
    _expect(0 < config.valid < 1, "valid", config.valid, "a fraction in (0, 1)")
    positive = bool(config.rates) and all(0 < rate < math.inf for rate in config.rates)
    _expect(positive, "rates", config.rates, "positive numbers")
    rising = [0, *config.until] == sorted({0, *config.until}) and len(config.until) == len(config.rates) - 1
    _expect(rising, "until", config.until, "the rising steps at which each rate but the last ends")
    _expect(0 <= config.decay <= 1, "decay", config.decay, "a fraction in [0, 1]; 0 is no decay")
    _expect(0 <= config.seed < 2**32, "seed", config.seed, "a whole number from 0 to 2**32 - 1")


def make_model(config: Config, data: Images) -> Any:
    """What is trained: the main network, or a static hypernetwork that makes its kernels. Nothing is computed."""
    if config.depth:
        net: Any = WideResNet(config.depth, config.width, data.classes)
    else:
        net = ConvNet(data.classes, config.features, config.kernel)
    tiles = ConvTiles(tile=config.tile, embedding=config.embedding, hidden=config.hidden)
    example = np.zeros((1, *data.train.images.shape[1:]), np.float32)
    rules = [(config.generated, tiles)]
    hyper = HyperNetwork.from_target(
        net, example, embedding_dim=config.embedding, num_embeddings=0, generator=Learned(), rules=rules
    )
    return hyper if config.model == "hyper" else net  # planned in either case, which checks --generated


def kernels(config: Config, model: Any, params: Any) -> tuple[dict[str, Any], Any]:
    """The kernels [h, w, in, out] named by --generated, by path, and all of the main network's parameters."""
    tree = model.generate({"params": params}) if hasattr(model, "generate") else params
    leaves = paramtree.structure(tree).flatten(tree)
    return {path: leaves[path] for path in paramtree.select(config.generated, list(leaves))}, tree


def count_params(config: Config, model: Any, params: Any) -> dict[str, int]:
    """Counts, without computing: the main network, its kernels named by --generated, what makes them."""
    chosen, whole = map(training.count, jax.eval_shape(functools.partial(kernels, config, model), params))
    # All other parameters are learned as they are, so the rest is the hypernetwork, its embeddings included.
    made = training.count(params) - (whole - chosen) if isinstance(model, HyperNetwork) else 0
    return {"main": whole, "kernels": chosen, "hypernetwork": made, "trained": training.count(params)}


def make_schedule(config: Config, steps: int) -> optax.Schedule:
    """Step number -> learning rate: --rates one after the other, the last falling to 0."""
    last = max(1, steps - sum(config.until[-1:]))
    parts = [optax.constant_schedule(rate) for rate in config.rates[:-1]]
    return optax.join_schedules([*parts, training.schedule(config.rates[-1], last, config.decay)], list(config.until))


def make_apply(model: Any, data: Images) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns apply(params, carry, images, train) -> (logits, new carry); uint8 images are normalised on the device."""
    mean, std = (each.reshape(1, 1, 1, -1) for each in data.channel_statistics())

    def apply(params, carry, images, train):
        x = (images.astype(jnp.float32) / data.peak - mean) / jnp.maximum(std, 1e-6)
        return model.apply({"params": params, **carry}, x, train=train, mutable=list(carry))

    return apply


def make_create(model: Any, optimizer: Any, data: Images) -> Callable[[jax.Array], training.TrainState]:
    """Returns create(key): the state that training starts from, with BatchNorm's statistics as its carry."""

    def create(key):
        variables = model.init(key, jnp.zeros((1, *data.train.images.shape[1:])))
        carry = {name: value for name, value in variables.items() if name != "params"}
        return training.TrainState.create(variables["params"], optimizer, carry)

    return create


def make_loss(config: Config, model: Any, data: Images) -> training.state.LossFn:
    """The loss of a batch: mean cross entropy in nats, and L2 on the kernels."""
    apply = make_apply(model, data)

    def loss_fn(params, carry, batch, key):
        logits, carry = apply(params, carry, batch["images"], True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
        if config.l2:
            loss += config.l2 / 2 * sum(jnp.sum(k**2) for k in kernels(config, model, params)[0].values())
        return loss, (carry, {"error": 100 * jnp.mean(logits.argmax(-1) != batch["labels"])})

    return loss_fn


def make_error(config: Config, model: Any, data: Images) -> Callable[[training.TrainState, Split], float]:
    """Returns error(state, split): the percentage of a split's images that are taken for another class."""
    apply = make_apply(model, data)
    predict = jax.jit(lambda params, carry, images: apply(params, carry, images, False)[0].argmax(-1))

    def error(state: training.TrainState, split: Split) -> float:
        wrong = 0
        for start in range(0, len(split.labels), config.eval_batch):
            images, labels = (part[start : start + config.eval_batch] for part in split)
            short = [(0, config.eval_batch - len(labels))] + [(0, 0)] * 3  # one shape for all, compiled once
            predicted = np.asarray(predict(state.params, state.carry, np.pad(images, short)))
            wrong += int(np.sum(predicted[: len(labels)] != labels))
        return 100 * wrong / len(split.labels)

    return error


def random_shift(rng: np.random.Generator, images: np.ndarray, pad: int) -> np.ndarray:
    """Pads images [B, H, W, C] with black and crops each at random to its old size."""
    size, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, (2, size, 1))
    rows, columns = top + np.arange(height), left + np.arange(width)
    return padded[np.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]


def make_batches(config: Config, data: Images) -> Batches:
    """Shuffled batches of training images, uint8, with augmentation."""
    change = {"none": None, "shift": random_shift, "flip": pad_crop_flip}[config.augment]
    augment = functools.partial(change, pad=config.pad) if change else None
    return Batches(*data.train, config.batch, config.seed, augment)


def run(config: Config, data: Images, batches: Batches, workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains, or goes on training; returns the summary."""
    steps = config.steps or math.ceil(config.epochs * batches.steps_per_epoch)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    checkpoints: Any = training.Checkpoints(workdir.shared / "checkpoints", config.keep_checkpoints)
    optimizer = optax.adam(make_schedule(config, steps))
    images = {"data": data.name, "fingerprint": data.fingerprint}
    with training.bad_input(__file__):  # nothing is compiled in here
        model = make_model(config, data)
        create = make_create(model, optimizer, data)
        if (checkpoints.meta() or images)["fingerprint"] != images["fingerprint"]:
            raise ValueError(f"the images of {data.name} have changed since this run began; choose another --workdir")
        restored = checkpoints.restore(jax.eval_shape(create, init_key))
        resumed = restored[1] if restored else {}
        metrics, timings = training.open_lines(workdir.path, resumed.get("step", 0))
    state = restored[0] if restored else jax.jit(create)(init_key)
    counts = count_params(config, model, state.params)
    made = f"made by a hypernetwork of {counts['hypernetwork']:,}" if config.model == "hyper" else "learned directly"
    made = f"{counts['kernels']:,} weights {made}"
    training.say("\n".join([describe(config, data, counts, made, steps, workdir.layout), *checkpoints.notes]))
    print(f"resuming after step {int(state.step):,} of {steps:,}" if restored else f"starting in {workdir.path}")

    error = make_error(config, model, data)
    curves = {"train": "error", "valid": "valid_error", "label": "error (%)"}
    curves["title"] = f"{config.model} on {data.name}, {counts['trained']:,} parameters"
    kept = {"checkpoints": checkpoints, "metrics": metrics, "timings": timings, "meta": images, "resumed": resumed}
    with checkpoints, metrics, timings, contextlib.ExitStack() as stack:
        stack.callback(training.save_curves, metrics.path, workdir.path / "curves.png", **curves)
        state = training.fit(
            state,
            training.make_step(make_loss(config, model, data), optimizer, workdir.layout, non_finite=config.non_finite),
            batches.batch_at,
            train_key,
            steps=steps,
            validate=lambda state: {"valid_error": error(state, data.valid)},
            best="valid_error",
            items=config.batch,
            unit="images",
            started=started,
            layout=workdir.layout,
            profile=config.profile,
            max_skipped=config.max_skipped,
            **kept,
            **{name: getattr(config, name) for name in ("eval_every", "log_every", "save_minutes")},
        )

    drawn, _ = kernels(config, model, state.params)
    draw(drawn, workdir.path / "kernels.png", f"{data.name}: {made}")
    return {
        "model": config.model,
        "data": data.name,
        "valid_error": error(state, data.valid),
        "test_error": error(state, data.test),
        "steps": steps,
        **{f"params_{name}": counts[name] for name in ("main", "kernels", "hypernetwork")},
        **training.environment(__file__, state.params, config.seed, training.seconds(resumed, started)),
    }


def draw(made: Mapping[str, Any], path: Path, title: str, most: int = 3) -> None:
    """Draws the first kernel, the last, and some between, at most 16 channels of each."""
    from hyperjax import plotting

    names = list(made)
    names = [names[i] for i in sorted({round(i) for i in np.linspace(0, len(names) - 1, most)})]
    figure, panels = plotting.subplots(1, len(names), (5.4 * len(names) + 0.6, 5.3), title, squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        plotting.plot_kernel(axes, made[name])
        axes.set_title(f"{name}, {' x '.join(map(str, np.shape(made[name])))}", fontsize=9)
        figure.colorbar(axes.images[0], ax=axes, shrink=0.7, label="weight", extend="both")
    plotting.save(figure, path)


def describe(
    config: Config, data: Images, counts: Mapping[str, int], made: str, steps: int, layout: training.Layout | None
) -> str:
    """What the run is about to do."""
    net = f"Wide ResNet {config.depth}-{config.width}" if config.depth else "two convolutions and a linear layer"
    epochs = f"{steps * config.batch / len(data.train.labels):.3g} epochs"
    return (
        f"model   {config.model}: {net}, {counts['main']:,} parameters alone\n"
        f"kernels {config.generated}: {made}; {counts['trained']:,} parameters are trained\n"
        f"data    {data.name}: {' '.join(data.notes)}\n"
        f"run     {steps:,} steps of {config.batch} images, {epochs}, augmentation: {config.augment}\n"
        f"device  {training.device(layout)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment with these arguments, by default those of the process.

    Returns 0, or exits: 2 for bad input, 1 for a loss that is not finite or a full disk, 130 for Ctrl-C.
    """
    started = time.perf_counter()
    config = training.parse(defaults, argv=argv, description=__doc__, prog="hypernet_images.py")
    with training.bad_input(__file__):
        check(config)
        layout = training.lay_out(config, batch=config.batch, in_place="generators_")
        place = config.workdir or f"runs/hypernet_images-{config.preset}-{config.model}"
        workdir = training.Workdir(place, config, FREE, layout)
        if workdir.summary is None:
            data = load_images(config.data, config.data_file, config.valid)
            batches = make_batches(config, data)
            make_model(config, data)
            workdir.open()
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to train again")
    else:
        with workdir, training.stopping():
            workdir.finish(run(config, data, batches, workdir, started))
    training.print_summary(workdir.summary or {})
    return 0


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
