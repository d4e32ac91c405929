"""Settings of char_lm.py, the presets that choose their defaults, and what is wrong with them."""

import dataclasses
import math
from typing import Any, Literal

from hyperjax.recurrent import CELLS, PAPER_MODELS
from hyperjax.training import FitConfig

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

# What goes beyond the paper, one thing at a time, at a size that a CPU trains in minutes. Whatever needs a learned
# embedding or a second layer stands after the row that has only that.
LEVERS: dict[str, dict[str, Any]] = {
    "base": {},
    "embedding_16": {"embedding": 16},
    "dropout": {"keep": 0.95},
    "variational": {"keep": 0.95, "variational": True},
    "weight_dropout": {"weight_keep": 0.9},
    "adamw": {"weight_decay": 0.1, "warmup": 300, "decay": 1.0},
    "average": {"average": 0.999},
    "length_200": {"length": 200, "batch": 16},
    "learned_input": {"input_units": 64},
    "tied": {"input_units": 192, "tied": True},
    "gate_input": {"input_units": 64, "gate_input": True},
    "two_layers": {"layers": 2},
    "residual": {"layers": 2, "skip": "residual"},
    "highway": {"layers": 2, "skip": "highway"},
}

# What may go past Table 3 with no more parameters than its two-layer row (14,407,714): two layers, the wide embedding,
# and regularisation that 200 epochs need. For an accelerator; its settings are a start, and untried at this size.
BEYOND: dict[str, dict[str, Any]] = {
    "ln_hyper_lstm": {"units": 984, "layers": 2, "embedding": 16, "input_units": 128, "skip": "residual"},
}

# A run may resume with other values of these.
FREE = ("workdir", "data_dir", "save_minutes", "keep_checkpoints", "part_mib")


@dataclasses.dataclass(frozen=True)
class Config(FitConfig):
    """Settings of a run; --preset and --model choose the defaults of the others."""

    preset: str = "quick"  # quick, cpu, reduced, paper, wikipedia, levers or beyond
    model: str = (
        "ln_hyper_lstm"  # lstm ln_lstm hyper_rnn hyper_lstm ln_hyper_lstm, or a row of Table 3 or 4, or a lever
    )
    workdir: str | None = None  # where the run is kept; None is runs/char_lm-PRESET
    corpus: str = "pydoc"  # pydoc, ptb, text8, enwik8, or the path of a UTF-8 file
    data_dir: str | None = None  # folder or archive with the corpus, for those that have to be downloaded
    units: int = 0  # width of the recurrent layers
    layers: int = 1  # number of recurrent layers
    hyper_units: int = 128  # width of the hyper cell
    embedding: int = 4  # N_z, width of the embeddings between hyper cell and main cell
    input_units: int = 0  # width of a learned embedding of the symbols; 0 feeds them as one-hot vectors
    tied: bool = False  # read out with the transpose of that embedding
    skip: Literal["none", "residual", "highway"] = "none"  # around every layer but the first
    gate_input: bool = False  # the hyper cell also gates what the main cell reads; HyperLSTMs only
    keep: float = 0.9  # probability of keeping a unit in dropout (input, output, recurrent); 1 is no dropout
    variational: bool = False  # the same dropout masks at all time steps of a window
    weight_keep: float = 1.0  # probability of keeping an entry of the recurrent matrices; 1 is no weight dropout
    batch: int = 128  # number of text streams trained on in parallel
    length: int = 100  # steps of truncated back-propagation; the state is carried over
    epochs: float = 1.0  # passes over the training text
    steps: int | None = None  # number of updates; overrides epochs
    learning_rate: float = 1e-3  # of Adam
    clip: float = 1.0  # largest global norm of the gradient
    weight_decay: float = 0.0  # of AdamW, on matrices alone, each step times the learning rate; 0 is Adam
    warmup: int = 0  # steps over which the learning rate rises
    average: float = 0.0  # evaluate a moving average of the parameters that keeps so much of itself a step; 0 is none
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
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of matrix products; all else stays float32
    remat_chunk: int | None = None  # recompute the forward pass in chunks of so many steps: less memory, more time


def defaults(preset: str = "quick", model: str = "ln_hyper_lstm") -> Config:
    """The defaults of a preset and a model."""
    _one_of("preset", preset, ("quick", "cpu", "reduced", "paper", "wikipedia", "levers", "beyond"))
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
    if preset == "levers":
        _one_of("model", model, LEVERS, " of --preset levers")
        small: dict[str, Any] = {"units": 192, "hyper_units": 32, "keep": 1.0, "batch": 32, "epochs": 2}
        small |= {"learning_rate": 2e-3, "decay": 0.5, "eval_every": 1567}
        return Config(preset, model, corpus="ptb", **small | LEVERS[model])
    if preset == "beyond":
        _one_of("model", model, BEYOND, " of --preset beyond")
        dropped: dict[str, Any] = {"keep": 0.75, "variational": True, "weight_keep": 0.7}
        long: dict[str, Any] = {"length": 150, "epochs": 200, "steps_per_call": 20, "warmup": 1000, "decay": 1.0}
        long |= {"learning_rate": 2e-3, "weight_decay": 0.02, "average": 0.999}
        return Config(preset, model, corpus="ptb", **BEYOND[model], **dropped, **long)
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
    for name in ("keep", "weight_keep"):
        value = getattr(config, name)
        _expect(0 < value <= 1, name, value, "a probability in (0, 1]; 1 is no dropout")
    for name in ("input_units", "warmup"):
        _expect(getattr(config, name) >= 0, name, getattr(config, name), "a whole number of at least 0")
    _expect(0 <= config.weight_decay < math.inf, "weight_decay", config.weight_decay, "a number of at least 0")
    _expect(0 <= config.average < 1, "average", config.average, "a number in [0, 1); 0 is no average")
    _expect(config.input_units > 0 or not config.tied, "tied", config.tied, "--input-units of at least 1 with it")
    _expect(0 <= config.decay <= 1, "decay", config.decay, "a fraction in [0, 1]; 0 is no decay")


def _one_of(name: str, value: str, choices, where: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one{where} of {', '.join(choices)}")


def _expect(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")
