"""Character language modelling: LSTMs and HyperLSTMs on real text (Ha, Dai, Le, "HyperNetworks", arXiv 1609.09106).

    python experiments/char_lm.py --preset quick                     # this Python's help texts, a few minutes on a CPU
    python experiments/char_lm.py --preset cpu --model ln_lstm       # Penn Treebank, 1M parameters, an hour or two
    python experiments/char_lm.py --preset paper --model hyper_lstm  # Table 3, for an accelerator
    python experiments/char_lm.py --preset reduced --model lstm      # its rows at a quarter of their width, on a CPU
    python experiments/char_lm.py --preset wikipedia --corpus text8 --data-dir DIR  # or enwik8, as in Table 4
    python experiments/char_lm.py --preset levers --model tied       # beyond the paper, one thing at a time, on a CPU
    python experiments/char_lm.py --preset beyond                    # or several at once, for an accelerator

Give every model a --workdir of its own. The same command again resumes a run, or prints the summary of a finished one.
"""

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import char_lm_presets
import jax
import jax.numpy as jnp
import optax
from char_lm_presets import FREE, WIKIPEDIA, Config, check, defaults

from hyperjax import Policy, training
from hyperjax.data import Corpus, Streams, evaluation_windows, load_corpus, window_at
from hyperjax.recurrent import PAPER_MODELS, LanguageModel, generate

# What a model of the library and a configuration call by the same name.
SHARED: tuple[str, ...] = (
    "units",
    "layers",
    "hyper_units",
    "embedding",
    "input_units",
    "tied",
    "skip",
    "gate_input",
    "keep",
)
SHARED += ("variational", "weight_keep", "remat_chunk")


def make_model(config: Config, vocabulary: int) -> LanguageModel:
    """The language model of a configuration."""
    rows = {"paper": PAPER_MODELS, "reduced": PAPER_MODELS, "wikipedia": WIKIPEDIA}.get(config.preset, {})
    cell = (
        rows[config.model]["cell"]
        if rows
        else "ln_hyper_lstm"
        if config.preset in ("levers", "beyond")
        else config.model
    )
    model = LanguageModel(cell, vocabulary, **{name: getattr(config, name) for name in SHARED})
    return model if config.dtype == "float32" else Policy.named(config.dtype).on(model)


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam, or AdamW, on gradients clipped by their global norm; it may keep the mean of the parameters."""
    rate = training.schedule(config.learning_rate, steps, config.decay, config.warmup)
    adam = optax.adam(rate)
    if config.weight_decay:
        adam = optax.adamw(rate, weight_decay=config.weight_decay, mask=training.matrices)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), adam)
    optimizer = training.average_params(optimizer, config.average) if config.average else optimizer
    return Policy.named(config.dtype).optimizer(optimizer)


def evaluated(state: training.TrainState) -> Any:
    """The parameters that a run is judged by: their mean where the optimizer keeps one."""
    return training.averaged_params(state.opt_state, state.params)


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


def make_advance(
    config: Config, loss: training.state.LossFn, optimizer: Any, streams: Streams, layout: training.Layout | None = None
) -> tuple[Any, Any]:
    """The step and what it reads: a window from the host, or the text on the device for several steps a call."""
    if config.steps_per_call == 1:
        return training.make_step(loss, optimizer, layout, non_finite=config.non_finite), streams.window
    text = streams.on_device() if layout is None else layout.join(streams.on_device(layout.rows))
    window = partial(window_at, length=config.length)
    return training.make_steps(
        loss, optimizer, window, layout, non_finite=config.non_finite
    ), lambda step, rows=None: text


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
        workdir.shared / "checkpoints", config.keep_checkpoints, config.part_mib
    )
    text = {"corpus": corpus.name, "fingerprint": corpus.fingerprint}
    with training.bad_input(__file__):  # nothing is compiled in here
        if (checkpoints.meta() or text)["fingerprint"] != text["fingerprint"]:
            raise ValueError(f"the text of {corpus.name} has changed since this run began; choose another --workdir")
        restored = checkpoints.restore(jax.eval_shape(create, init_key))
        resumed = restored[1] if restored else {}
        metrics, timings = training.open_lines(workdir.path, resumed.get("step", 0))
    state = restored[0] if restored else jax.jit(create)(init_key)
    training.say(
        "\n".join([describe(config, corpus, state.params, steps, workdir.layout), *corpus.notes, *checkpoints.notes])
    )
    print(f"resuming after step {int(state.step):,} of {steps:,}" if restored else f"starting in {workdir.path}")

    advance = make_advance(config, make_loss(model), optimizer, streams, workdir.layout)
    bpc = make_bpc(model)
    cut = {
        name: evaluation_windows(getattr(corpus, name), config.eval_batch, config.length) for name in ("valid", "test")
    }
    title = f"{config.model} on {corpus.name}, {training.count(state.params):,} parameters"
    with contextlib.ExitStack() as stack:
        for each in (checkpoints, metrics, timings):
            stack.enter_context(each)
        stack.callback(training.save_curves, metrics.path, workdir.path / "curves.png", title=title)
        state = training.fit(
            state,
            *advance,
            train_key,
            steps=steps,
            per_call=config.steps_per_call,
            checkpoints=checkpoints,
            metrics=metrics,
            timings=timings,
            validate=lambda state: {"valid_bpc": bpc(evaluated(state), cut["valid"])},
            best="valid_bpc",
            eval_every=config.eval_every,
            log_every=config.log_every,
            items=config.batch * config.length,
            meta=text,
            resumed=resumed,
            started=started,
            save_minutes=config.save_minutes,
            layout=workdir.layout,
            profile=config.profile,
            max_skipped=config.max_skipped,
        )

    try:
        best = checkpoints.restore_best(state)
    except ValueError as error:
        print(f"warning: {error}; the summary is of the last state", file=sys.stderr)
        best = state
    prime = corpus.valid[: config.prime_length]
    drawn = generate(model, evaluated(best), prime, config.sample_length, sample_key)
    sample = corpus.decode([*prime, *drawn])
    (workdir.path / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    training.say(f"\nThe model goes on from the first {len(prime)} characters:\n\n{sample}\n")
    speeds = [speed for _, speed in training.series(training.read_lines(timings.path), "chars_per_second")]
    return {
        "model": config.model,
        "corpus": corpus.name,
        "valid_bpc": checkpoints.best[1] if checkpoints.best else None,
        "test_bpc": bpc(evaluated(best), cut["test"]),
        "best_step": int(best.step),
        "steps": steps,
        "chars_per_second": round(statistics.median(speeds)) if speeds else None,
        **training.environment(__file__, best.params, config.seed, training.seconds(resumed, started)),
    }


def describe(config: Config, corpus: Corpus, params: Any, steps: int, layout: training.Layout | None = None) -> str:
    """What the run is about to do."""
    sizes = f"{len(corpus.train):,} / {len(corpus.valid):,} / {len(corpus.test):,} characters"
    epochs = steps * config.batch * config.length / len(corpus.train)
    return (
        f"model   {config.model}: {config.layers} x {config.units} units, {training.count(params):,} parameters\n"
        f"data    {corpus.name}: {sizes}, {len(corpus.symbols)} symbols\n"
        f"run     {steps:,} steps of {config.batch} x {config.length} characters, {epochs:.3g} epochs\n"
        f"device  {training.device(layout)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the command line's arguments; by default those of the process.

    Returns:
        The exit status; 2 for bad input, 1 for a loss that is not finite or a full disk, 130 for Ctrl-C.
    """
    started = time.perf_counter()
    config = training.parse(defaults, argv=argv, description=__doc__, prog="char_lm.py")
    with training.bad_input(__file__, char_lm_presets.__file__):
        check(config)
        make_model(config, vocabulary=1)  # raises for what does not go together
        layout = training.lay_out(config, batch=config.batch)
        workdir = training.Workdir(config.workdir or f"runs/char_lm-{config.preset}", config, FREE, layout)
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


if __name__ == "__main__":
    sys.exit(main())
