"""Character language modelling: LSTMs and HyperLSTMs on real text (Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106).

    python experiments/char_lm.py --preset quick                     # this Python's help texts, a few minutes on a CPU
    python experiments/char_lm.py --preset cpu --model ln_lstm       # Penn Treebank, 1M parameters, an hour or two
    python experiments/char_lm.py --preset paper --model hyper_lstm  # Table 3, for an accelerator
    python experiments/char_lm.py --preset reduced --model lstm      # its rows at a quarter of their width, on a CPU
    python experiments/char_lm.py --preset wikipedia --corpus text8 --data-dir DIR  # or enwik8, as in Table 4

Give every model a --workdir of its own. The same command again resumes a run, or prints the summary of a finished one.
"""

import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from hyperjax import training
from hyperjax.data import Corpus, Streams, evaluation_windows, load_corpus, window_at
from hyperjax.recurrent import CELLS, PAPER_MODELS, LanguageModel, generate

# Units that give every model the same number of parameters within 1 %: 350,000 on pydoc, 1,000,000 on PTB.
UNITS = {
    "quick": {"lstm": 237, "ln_lstm": 236, "hyper_rnn": 474, "hyper_lstm": 213, "ln_hyper_lstm": 212},
    "cpu": {"lstm": 469, "ln_lstm": 468, "hyper_rnn": 911, "hyper_lstm": 427, "ln_hyper_lstm": 426},
}

# HyperLSTMs on enwik8 at the paper's widths, with a baseline; what it leaves open is as in Table 3.
WIKIPEDIA: dict[str, dict[str, Any]] = {
    "ln_lstm": {"cell": "ln_lstm", "units": 1800},
    "ln_hyper_lstm": {"cell": "ln_hyper_lstm", "units": 1800},
    "ln_hyper_lstm_2048": {"cell": "ln_hyper_lstm", "units": 2048},
}

# A run may resume with other values of these.
FREE = ("workdir", "data_dir", "save_minutes", "keep_checkpoints", "part_mib")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run; --preset and --model choose the defaults of the others."""

    preset: str = "quick"  # quick, cpu, reduced, paper or wikipedia
    model: str = "ln_hyper_lstm"  # lstm ln_lstm hyper_rnn hyper_lstm ln_hyper_lstm, or a row of Table 3 or 4
    workdir: str | None = None  # where the run is kept; None is runs/char_lm-PRESET
    corpus: str = "pydoc"  # pydoc, ptb, text8, enwik8, or the path of a UTF-8 file
    data_dir: str | None = None  # folder or archive with the corpus, for those that have to be downloaded
    units: int = 0  # width of the recurrent layers
    layers: int = 1  # number of recurrent layers
    hyper_units: int = 128  # width of the hyper cell
    embedding: int = 4  # N_z, width of the embeddings between hyper cell and main cell
    keep: float = 0.9  # probability of keeping a unit in dropout (input, output, recurrent); 1 is no dropout
    batch: int = 128  # number of text streams trained on in parallel
    length: int = 100  # steps of truncated back-propagation; the state is carried over
    epochs: float = 1.0  # passes over the training text
    steps: int | None = None  # number of updates; overrides epochs
    learning_rate: float = 1e-3  # of Adam
    clip: float = 1.0  # largest global norm of the gradient
    decay: float = 0.0  # final fraction of the run over which the learning rate falls to 0 along a cosine
    eval_every: int = 400  # steps between two validations, each followed by a checkpoint
    eval_batch: int = 64  # streams in evaluation; changes its speed, not its result
    log_every: int = 20  # steps between two lines of metrics
    steps_per_call: int = 1  # steps that the device makes without the host, the text on it; divides the two above
    save_minutes: float = 5.0  # longest time between two checkpoints
    keep_checkpoints: int = 2  # how many of the newest checkpoints to keep, beside the best
    part_mib: int | None = None  # largest file of a checkpoint in MiB, for runs whose checkpoints have to travel
    prime_length: int = 100  # characters of the validation text that the sample at the end goes on from
    sample_length: int = 600  # characters of text to generate
    seed: int = 0  # of initialization, dropout and sampling
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; parameters and state stay float32
    remat_chunk: int | None = None  # recompute the forward pass in chunks of so many steps: less memory, more time


def defaults(preset: str = "quick", model: str = "ln_hyper_lstm") -> Config:
    """The defaults of a preset and a model."""
    _one_of("preset", preset, ("quick", "cpu", "reduced", "paper", "wikipedia"))
    if preset == "wikipedia":
        _one_of("model", model, WIKIPEDIA, " of --preset wikipedia")
        big: dict[str, Any] = {"hyper_units": 256, "embedding": 64, "length": 250, "epochs": 20, "eval_every": 2800}
        return Config(preset, model, corpus="enwik8", units=WIKIPEDIA[model]["units"], **big, steps_per_call=20)
    if preset in ("paper", "reduced"):
        _one_of("model", model, PAPER_MODELS, f" of --preset {preset}")
        row = {name: value for name, value in PAPER_MODELS[model].items() if name != "cell"}
        if preset == "paper":
            return Config(preset, model, corpus="ptb", **row, epochs=100, steps_per_call=20)
        row |= {"units": round(row["units"] * 0.256), "hyper_units": 32, "keep": 1.0}
        recipe: dict[str, Any] = {"learning_rate": 2e-3, "decay": 0.5, "batch": 32, "epochs": 5, "eval_every": 1567}
        return Config(preset, model, corpus="ptb", **row, **recipe)
    _one_of("model", model, CELLS, f" of --preset {preset}")
    if preset == "cpu":
        sizes: dict[str, Any] = {"units": UNITS["cpu"][model], "hyper_units": 64}
        return Config(
            preset,
            model,
            corpus="ptb",
            **sizes,
            learning_rate=2e-3,
            keep=1.0,
            batch=32,
            epochs=3,
            eval_every=784,
            decay=0.5,
        )
    fast: dict[str, Any] = {
        "units": UNITS["quick"][model],
        "hyper_units": 32,
        "learning_rate": 5e-3,
        "decay": 0.6,
        "keep": 1.0,
        "batch": 32,
        "length": 64,
    }
    return Config(preset, model, **fast, epochs=4, eval_every=200, sample_length=400)


def check(config: Config) -> None:
    """Raises ValueError for a field that makes no sense."""
    whole: tuple[str, ...]
    whole = ("units", "layers", "hyper_units", "embedding", "batch", "length", "eval_every", "eval_batch", "log_every")
    whole += ("keep_checkpoints", "prime_length", "sample_length", "steps", "remat_chunk", "part_mib", "steps_per_call")
    for name in whole:
        value = getattr(config, name)
        _expect(value is None or value >= 1, name, value, "a whole number of at least 1")
    for name in ("eval_every", "log_every"):
        value, each = getattr(config, name), config.steps_per_call
        _expect(value % each == 0, name, value, f"a multiple of --steps-per-call, {each}")
    for name in ("learning_rate", "clip", "epochs", "save_minutes"):
        value = getattr(config, name)
        _expect(0 < value < math.inf, name, value, "a positive number")
    _expect(0 <= config.seed < 2**32, "seed", config.seed, "a whole number from 0 to 2**32 - 1")
    _expect(0 < config.keep <= 1, "keep", config.keep, "a probability in (0, 1]; 1 is no dropout")
    _expect(0 <= config.decay <= 1, "decay", config.decay, "a fraction in [0, 1]; 0 is no decay")


def make_model(config: Config, vocabulary: int) -> LanguageModel:
    """The language model of a configuration."""
    rows = {"paper": PAPER_MODELS, "reduced": PAPER_MODELS, "wikipedia": WIKIPEDIA}.get(config.preset, {})
    cell = rows[config.model]["cell"] if rows else config.model
    sizes = {name: getattr(config, name) for name in ("units", "layers", "hyper_units", "embedding", "keep")}
    dtype = None if config.dtype == "float32" else config.dtype
    return LanguageModel(cell=cell, vocabulary=vocabulary, **sizes, dtype=dtype, remat_chunk=config.remat_chunk)


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam on gradients clipped by their global norm."""
    rate = training.schedule(config.learning_rate, steps, config.decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate))


def make_create(config: Config, model: LanguageModel, optimizer: Any) -> Callable[[jax.Array], training.TrainState]:
    """Returns create(key): the state that training starts from."""

    def create(key):
        params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return training.TrainState.create(params, optimizer, model.initialize_carry(config.batch))

    return create


def make_loss(model: LanguageModel) -> training.state.LossFn:
    """The loss of a window: mean cross entropy in nats, with the state carried over from the last one."""

    def loss_fn(params, carry, batch, key):
        carry = jax.tree.map(lambda c: jnp.where(batch["reset"], jnp.zeros_like(c), c), carry)
        out: Any = model.apply({"params": params}, batch["inputs"], carry, deterministic=False, rngs={"dropout": key})
        loss = optax.softmax_cross_entropy_with_integer_labels(out["logits"], batch["targets"]).mean()
        return loss, (out["carry"], {"bpc": loss / math.log(2)})

    return loss_fn


def make_advance(config: Config, loss: training.state.LossFn, optimizer: Any, streams: Streams) -> tuple[Any, Any]:
    """The step and what it reads: a window from the host, or the text on the device for several steps a call."""
    if config.steps_per_call == 1:
        return training.make_step(loss, optimizer), streams.window
    on_device = streams.on_device()
    window = partial(window_at, length=config.length)
    return training.make_steps(loss, optimizer, window), lambda step: on_device


def make_bpc(model: LanguageModel) -> Callable[[Any, Mapping[str, Any]], float]:
    """Returns bpc(params, windows): the exact bits per character of a split."""

    def predict(params, inputs, carry):
        out: Any = model.apply({"params": params}, inputs, carry, deterministic=True)
        return out["logits"], out["carry"]

    evaluate = training.make_evaluate(predict)
    return lambda params, w: evaluate(params, model.initialize_carry(w["inputs"].shape[1]), w).bpc


def run(config: Config, corpus: Corpus, streams: Streams, workdir: training.Workdir, started: float) -> dict[str, Any]:
    """Trains, or goes on training; returns the summary."""
    model = make_model(config, len(corpus.symbols))
    steps = config.steps or math.ceil(config.epochs * streams.steps_per_epoch)
    init_key, train_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
    optimizer = make_optimizer(config, steps)
    create = make_create(config, model, optimizer)
    checkpoints: training.Checkpoints[training.TrainState] = training.Checkpoints(
        workdir.path / "checkpoints", config.keep_checkpoints, config.part_mib
    )
    text = {"corpus": corpus.name, "fingerprint": corpus.fingerprint}
    with training.bad_input(__file__):  # nothing is compiled in here
        if (checkpoints.meta() or text)["fingerprint"] != text["fingerprint"]:
            raise ValueError(f"the text of {corpus.name} has changed since this run began; choose another --workdir")
        restored = checkpoints.restore(jax.eval_shape(create, init_key))
        resumed = restored[1] if restored else {}
        metrics = training.JsonLines(workdir.path / "metrics.jsonl", resumed.get("step", 0))
        timings = training.JsonLines(workdir.path / "timings.jsonl", resumed.get("step", 0))
    state = restored[0] if restored else jax.jit(create)(init_key)
    training.say("\n".join([describe(config, corpus, state.params, steps), *corpus.notes, *checkpoints.notes]))
    print(f"resuming after step {int(state.step):,} of {steps:,}" if restored else f"starting in {workdir.path}")

    advance = make_advance(config, make_loss(model), optimizer, streams)
    bpc = make_bpc(model)
    cut = {
        name: evaluation_windows(getattr(corpus, name), config.eval_batch, config.length) for name in ("valid", "test")
    }
    title = f"{config.model} on {corpus.name}, {training.count(state.params):,} parameters"
    with contextlib.ExitStack() as stack:
        for each in (checkpoints, metrics, timings):
            stack.enter_context(each)
        stack.callback(training.plot_curves, metrics.path, workdir.path / "curves.png", title=title)
        state = training.fit(
            state,
            *advance,
            train_key,
            steps=steps,
            per_call=config.steps_per_call,
            checkpoints=checkpoints,
            metrics=metrics,
            timings=timings,
            validate=lambda state: {"valid_bpc": bpc(state.params, cut["valid"])},
            best="valid_bpc",
            eval_every=config.eval_every,
            log_every=config.log_every,
            items=config.batch * config.length,
            meta=text,
            resumed=resumed,
            started=started,
            save_minutes=config.save_minutes,
        )

    try:
        best = checkpoints.restore_best(state)
    except ValueError as error:
        print(f"warning: {error}; the summary is of the last state", file=sys.stderr)
        best = state
    prime = corpus.valid[: config.prime_length]
    drawn = generate(model, best.params, prime, config.sample_length, sample_key)
    sample = corpus.decode([*prime, *drawn])
    (workdir.path / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    training.say(f"\nThe model goes on from the first {len(prime)} characters:\n\n{sample}\n")
    speeds = [row["chars_per_second"] for row in training.read_lines(timings.path) if "chars_per_second" in row]
    return {
        "model": config.model,
        "corpus": corpus.name,
        "valid_bpc": checkpoints.best[1] if checkpoints.best else None,
        "test_bpc": bpc(best.params, cut["test"]),
        "best_step": int(best.step),
        "steps": steps,
        "chars_per_second": round(statistics.median(speeds)) if speeds else None,
        **training.environment(__file__, best.params, config.seed, training.seconds(resumed, started)),
    }


def describe(config: Config, corpus: Corpus, params: Any, steps: int) -> str:
    """What the run is about to do."""
    sizes = f"{len(corpus.train):,} / {len(corpus.valid):,} / {len(corpus.test):,} characters"
    epochs = steps * config.batch * config.length / len(corpus.train)
    return (
        f"model   {config.model}: {config.layers} x {config.units} units, {training.count(params):,} parameters\n"
        f"data    {corpus.name}: {sizes}, {len(corpus.symbols)} symbols\n"
        f"run     {steps:,} steps of {config.batch} x {config.length} characters, {epochs:.3g} epochs\n"
        f"device  {training.device()}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the command line's arguments; by default those of the process.

    Returns:
        The exit status; 2 for bad input, 1 for a loss that is not finite, 130 or 143 for a run that was interrupted.
    """
    started = time.perf_counter()
    config = training.parse(defaults, argv=argv, description=__doc__, prog="char_lm.py")
    with training.bad_input(__file__):
        check(config)
        workdir = training.Workdir(config.workdir or f"runs/char_lm-{config.preset}", config, FREE)
        if workdir.summary is None:
            corpus = load_corpus(config.corpus, config.data_dir)
            streams = Streams(corpus.train, config.batch, config.length)
            workdir.open()
    if workdir.summary is not None:
        print(f"{workdir.path} holds a finished run; choose another --workdir to train again")
    else:
        with workdir, training.stopping():
            workdir.finish(run(config, corpus, streams, workdir, started))
    training.print_summary(workdir.summary or {})
    return 0


def _one_of(name: str, value: str, choices, where: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one{where} of {', '.join(choices)}")


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
