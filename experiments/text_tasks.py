"""What Transformers learn in experiments: characters of a text, or the class of passages of any length.

B samples, L positions, V outputs, G groups of positions.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperjax.data import Corpus, TextBatches, TextClasses, load_corpus, text_classes

Array = jax.Array
Batch = dict[str, np.ndarray]
DATA = ("pydoc", "ptb", "topic", "shuffled", "corpus")
KINDS = ("letter", "digit", "space", "line end", "other")


@dataclasses.dataclass(frozen=True)
class Characters:
    """The next character, from windows of a text; quality is bits per character after the first `prompt`.

    Every network is judged on the same characters, each with `prompt` to `length` characters before it.
    """

    corpus: Corpus
    length: int
    prompt: int
    batch: int
    seed: int
    most: int  # windows of a split to evaluate at most; from its beginning
    causal = True
    outputs = None
    unit = "bpc"

    def __post_init__(self) -> None:
        shortest = min(len(getattr(self.corpus, name)) for name in ("train", "valid", "test"))
        if self.length + 1 > shortest:
            raise ValueError(f"--length is {self.length}, expected below {shortest}, the shortest split of the text")

    @property
    def vocabulary(self) -> int:
        return len(self.corpus.symbols)

    @property
    def usual_length(self) -> int:
        """Length that costs are fitted at."""
        return self.length

    def taken(self, most: int) -> float:
        """Share of the positions that a layer computes if it takes at most so many of a sample."""
        return min(1.0, most / self.length)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of positions: kinds of characters."""
        return KINDS

    @property
    def name(self) -> str:
        return self.corpus.name

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @property
    def notes(self) -> tuple[str, ...]:
        sizes = " / ".join(f"{len(getattr(self.corpus, name)):,}" for name in ("train", "valid", "test"))
        return (*self.corpus.notes, f"{sizes} characters, {self.vocabulary} symbols")

    def batch_at(self, step: int, rows: slice = slice(None)) -> Batch:
        """Windows from anywhere in the training text, or some rows of them."""
        starts = np.random.default_rng((self.seed, step)).integers(0, len(self.corpus.train) - self.length, self.batch)
        return self._windows(self.corpus.train, starts[rows])

    def batches(self, split: str, size: int) -> Iterator[tuple[Batch, int]]:
        """A split in windows that overlap by the prompt, `size` at a time, and how many of them count."""
        ids = getattr(self.corpus, split)
        starts = np.arange(0, len(ids) - self.length, self.length - self.prompt)[: self.most]
        for at in range(0, len(starts), size):
            part = starts[at : at + size]
            yield self._windows(ids, np.pad(part, (0, size - len(part)))), len(part)

    def losses(self, logits: Array, batch: Any) -> Array:
        """Nats of each character, [B, L]."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])

    def loss(self, logits: Array, batch: Any) -> Array:
        """To train on."""
        return self.losses(logits, batch).mean()

    def figures(self, logits: Array, batch: Any) -> Array:
        """The quality of each sample, [B]; lower is better."""
        return self.losses(logits, batch)[:, self.prompt :].mean(-1) / jnp.log(2.0)

    def group_of(self, batch: Batch) -> np.ndarray:
        """The group of each position, [B, L]."""
        kinds = np.array([_kind(symbol) for symbol in self.corpus.symbols])
        return kinds[batch["tokens"]]

    def _windows(self, ids: np.ndarray, starts: np.ndarray) -> Batch:
        cut = np.asarray(ids)[starts[:, None] + np.arange(self.length + 1)[None]].astype(np.int32)
        return {"tokens": cut[:, :-1], "targets": cut[:, 1:], "mask": np.ones(cut[:, 1:].shape, bool)}


@dataclasses.dataclass(frozen=True)
class Passages:
    """The class of a passage of any length; quality is the share of wrong answers."""

    data: TextClasses
    length: int
    batch: int
    seed: int
    most: int
    prompt = 0
    causal = False
    unit = "error"

    @property
    def vocabulary(self) -> int:
        return len(self.data.symbols)

    @property
    def outputs(self) -> int:
        return len(self.data.classes)

    @property
    def usual_length(self) -> int:
        """Length that costs are fitted at: the mean."""
        return round(float(self.data.train.lengths.mean()))

    def taken(self, most: int) -> float:
        """Share of the positions that a layer computes if it takes at most so many of a sample."""
        lengths = self.data.train.lengths
        return float(np.minimum(lengths, most).sum() / lengths.sum())

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of positions: the classes."""
        return tuple(self.data.classes)

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self.data.notes)

    def batch_at(self, step: int, rows: slice = slice(None)) -> Batch:
        """A batch of the training passages, or some rows of it."""
        return self._with_mask(TextBatches(self.data.train, self.batch, self.seed).batch_at(step, rows))

    def batches(self, split: str, size: int) -> Iterator[tuple[Batch, int]]:
        """A split, `size` passages at a time, and how many of them count."""
        part = getattr(self.data, split)
        total = min(self.most, len(part.labels))
        for at in range(0, total, size):
            rows = np.arange(at, at + size)
            count = int((rows < total).sum())
            rows = np.where(rows < total, rows, 0)
            found = {"tokens": part.tokens[rows], "lengths": part.lengths[rows], "labels": part.labels[rows]}
            yield self._with_mask(found), count

    def loss(self, logits: Array, batch: Any) -> Array:
        """To train on."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    def figures(self, logits: Array, batch: Any) -> Array:
        """The quality of each sample, [B]; lower is better."""
        return (logits.argmax(-1) != batch["labels"]).astype(jnp.float32)

    def group_of(self, batch: Batch) -> np.ndarray:
        """The group of each position, [B, L]."""
        return np.broadcast_to(batch["labels"][:, None], batch["tokens"].shape)

    def _with_mask(self, batch: Any) -> Batch:
        tokens = np.asarray(batch["tokens"], np.int32)
        mask = np.arange(tokens.shape[1])[None] < np.asarray(batch["lengths"])[:, None]
        return {"tokens": tokens, "mask": mask, "labels": np.asarray(batch["labels"], np.int32)}


Task = Characters | Passages


def load(config: Any, seed: int) -> Task:
    """The task of an experiment's configuration."""
    if config.data in ("pydoc", "ptb"):
        corpus = load_corpus(config.data, config.data_dir)
        return Characters(corpus, config.length, config.prompt, config.batch, seed, config.eval_windows)
    if config.data == "corpus":
        other = load_corpus("ptb", config.data_dir)
        classes = text_classes(load_corpus("pydoc"), "corpus", other, length=config.length)
    else:
        classes = text_classes(load_corpus("pydoc"), config.data, length=config.length)
    return Passages(classes, config.length, config.batch, seed, config.eval_windows)


def _kind(symbol: str) -> int:
    tests = (symbol.isalpha(), symbol.isdigit(), symbol == " ", symbol == "\n", True)
    return tests.index(True)
