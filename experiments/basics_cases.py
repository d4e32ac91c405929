"""The six cases of share_basics.py: in each a network, what of it is tied, and what it learns.

B samples, L positions, H rows, W columns, C channels, N nodes, F features.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from basics_graphs import Graph, karate
from text_tasks import Characters

from hyperjax.data import TextBatches, load_corpus, load_images, text_classes
from hyperjax.data.batches import Batches
from hyperjax.distillation import distillation
from hyperjax.sharing import Tie
from hyperjax.transformer import Config, Decoder

Array = jax.Array
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a case.

    Attributes:
        ties: what is tied.
        loss: (apply, batch) -> scalar, where apply(inputs) computes the network.
        quality: (apply) -> number, of the test.
        trained: regular expression, which fits the beginnings of the paths of what is trained; the rest stays fixed.
        after: variant that is trained before, and whose parameters this one starts from; None: from its seed.
    """

    ties: list[Tie]
    loss: Callable[[Any, Batch], Array]
    quality: Callable[[Any], float]
    trained: str = ""
    after: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with and without ties, and what it learns.

    Attributes:
        module: the network.
        variants: by name; the untied one comes last.
        example: an input of the network.
        batch_at: number of a step -> batch.
        unit: "accuracy", higher is better; or "bpc", lower is.
        two_rates: whether parameters that "tied" shares have a learning rate of their own, tied or not.
    """

    module: nn.Module
    variants: dict[str, Variant]
    example: Any
    batch_at: Callable[[int], Batch]
    unit: str = "accuracy"
    two_rates: bool = False


def tied_and_untied(ties: list[Tie], *learned: Any) -> dict[str, Variant]:
    """The two variants of most cases."""
    return {"tied": Variant(ties, *learned), "untied": Variant([], *learned)}


def cross_entropy(logits: Array, labels: Any) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: Any, labels: np.ndarray) -> float:
    return float((np.asarray(logits).argmax(-1) == labels).mean())


class DeepConv(nn.Module):
    """A stem that halves the size, three equal residual convolutions, and a head."""

    channels: int = 16

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        x = nn.relu(nn.Conv(self.channels, (3, 3), strides=2, name="stem")(x_BHWC))
        for n in range(3):
            x = x + nn.relu(nn.Conv(self.channels, (3, 3), name=f"conv_{n}")(x))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


def conv(batch: int, seed: int, _: Any = None) -> Case:
    """One convolution at three depths, on 8x8 digits."""
    ties = [Tie(r"conv_[12]/(.*)", to=r"conv_0/\1")]
    return digits(DeepConv(), ties, batch, seed, lambda images: images)


class RowReader(nn.Module):
    """LSTMs one above the other, which read an image row by row."""

    units: int = 32
    layers: int = 3

    @nn.compact
    def __call__(self, x_BHW: Array) -> Array:
        x = nn.Dense(self.units, name="input")(x_BHW)  # to the cells' width, so that all have equal shapes
        for n in range(self.layers):
            x = nn.RNN(nn.OptimizedLSTMCell(self.units, name=f"layer_{n}"))(x)
        return nn.Dense(10, name="head")(x[:, -1])


def lstm(batch: int, seed: int, _: Any = None) -> Case:
    """One LSTM cell across time, as always, and across three layers, on digits row by row."""
    ties = [Tie(r"layer_[12]/(.*)", to=r"layer_0/\1")]
    return digits(RowReader(), ties, batch, seed, lambda images: images[..., 0])


def digits(module: nn.Module, ties: list[Tie], batch: int, seed: int, shaped: Callable[[Any], Any]) -> Case:
    """A network that tells the embedded digits apart."""
    images = load_images("digits")
    batches = Batches(images.floats(images.train), images.train.labels, batch, seed)
    test, labels = shaped(images.floats(images.test)), images.test.labels
    return Case(
        module,
        tied_and_untied(
            ties,
            lambda apply, batch: cross_entropy(apply(shaped(batch["images"])), batch["labels"]),
            lambda apply: accuracy(apply(test), labels),
        ),
        shaped(images.floats(images.train)[:2]),
        batches.batch_at,
    )


def embedding(batch: int, seed: int, _: Any = None) -> Case:
    """Input and output embeddings of a language model, on characters of the help texts.

    Both start with variance 1 / width, so the shared one needs no start of its own (`sharing.xavier`).
    """
    task = Characters(load_corpus("pydoc"), 64, 16, batch, seed, 128)
    model = Decoder(Config(task.vocabulary, layers=2, width=48, heads=4, ffn=96))
    ties = [Tie("output/kernel", to="embedding/embedding", through=jnp.transpose)]

    def bpc(apply: Any) -> float:
        found = [
            np.asarray(task.figures(apply(batch["tokens"])["logits"], batch))[:n]
            for batch, n in task.batches("test", 32)
        ]
        return float(np.concatenate(found).mean())

    return Case(
        model,
        tied_and_untied(ties, lambda apply, batch: task.loss(apply(batch["tokens"])["logits"], batch), bpc),
        task.batch_at(0)["tokens"],
        task.batch_at,
        "bpc",
    )


class TextTasks(nn.Module):
    """A small network for each task, on characters: embedding, convolution over five, mean, head."""

    vocabulary: int
    classes: dict[str, int]
    width: int = 32

    @nn.compact
    def __call__(self, inputs: dict[str, tuple[Array, Array]]) -> dict[str, Array]:
        out = {}
        for name, classes in self.classes.items():
            tokens, lengths = inputs[name]
            x_BLD = nn.Embed(self.vocabulary, self.width, name=f"embed_{name}")(tokens)
            x_BLD = nn.relu(nn.Conv(self.width, (5,), name=f"conv_{name}")(x_BLD))
            there = jnp.arange(tokens.shape[1])[None, :, None] < lengths[:, None, None]
            mean = jnp.where(there, x_BLD, 0).sum(1) / lengths[:, None]
            out[name] = nn.Dense(classes, name=f"head_{name}")(mean)
        return out


def tasks(batch: int, seed: int, _: Any = None) -> Case:
    """Two tasks, of five and three classes, on one embedding and convolution: which subject, and how it is shuffled.

    What they share moves at a rate of its own: two losses pull at it, and the heads have but one each.
    """
    made = {
        name: text_classes(load_corpus("pydoc"), name, length=64, per_class=(400, 50, 100))
        for name in ("topic", "shuffled")
    }
    symbols = sorted({symbol for data in made.values() for symbol in data.symbols})
    number = {  # the same number for a symbol in both tasks
        name: np.array([symbols.index(symbol) for symbol in data.symbols], np.int32) for name, data in made.items()
    }
    batches = {name: TextBatches(data.train, batch, seed) for name, data in made.items()}

    def inputs(splits: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {
            name: (number[name][part["tokens"]], part["lengths"].astype(np.float32)) for name, part in splits.items()
        }

    def batch_at(step: int) -> Batch:
        drawn = {name: each.batch_at(step) for name, each in batches.items()}
        return {"inputs": inputs(drawn), "labels": {name: part["labels"] for name, part in drawn.items()}}

    tests = {name: data.test._asdict() for name, data in made.items()}

    def loss(apply: Any, batch: Batch) -> Array:
        return sum(
            (cross_entropy(logits, batch["labels"][name]) for name, logits in apply(batch["inputs"]).items()),
            jnp.zeros(()),
        )

    def quality(apply: Any) -> float:
        return float(np.mean([accuracy(out, tests[name]["labels"]) for name, out in apply(inputs(tests)).items()]))

    model = TextTasks(len(symbols), {name: len(data.classes) for name, data in made.items()})
    ties = [Tie(r"(embed|conv)_shuffled/(.*)", to=r"\1_topic/\2")]
    return Case(model, tied_and_untied(ties, loss, quality), batch_at(0)["inputs"], batch_at, two_rates=True)


class TeacherAndStudent(nn.Module):
    """Two convolutional networks, of which the second is narrower."""

    teacher: tuple[int, int] = (16, 32)
    student: tuple[int, int] = (8, 16)

    @nn.compact
    def __call__(self, x_BHWC: Array) -> tuple[Array, Array]:
        logits = []
        for name, widths in (("teacher", self.teacher), ("student", self.student)):
            x = x_BHWC
            for n, width in enumerate(widths):
                x = nn.relu(nn.Conv(width, (3, 3), strides=2, name=f"{name}_{n}")(x))
            logits.append(nn.Dense(10, name=f"{name}_head")(x.reshape(len(x), -1)))
        return logits[0], logits[1]


def student(batch: int, seed: int, _: Any = None) -> Case:
    """A student half of whose channels are its trained teacher's, and that learns the teacher's answers too.

    The teacher is trained first and stays as it is; `own` is the same student with all channels its own.
    """

    def lent(part: Any) -> Callable[[Array], Array]:
        return lambda w: jax.lax.stop_gradient(w[part])  # the teacher stays as it is

    first, second = np.s_[..., :4], np.s_[:, :, :4, :8]
    ties = [
        Tie("student_0/kernel", to="teacher_0/kernel", through=lent(first), part=first),
        Tie("student_0/bias", to="teacher_0/bias", through=lent(np.s_[:4]), part=np.s_[:4]),
        Tie("student_1/kernel", to="teacher_1/kernel", through=lent(second), part=second),
    ]
    case = digits(TeacherAndStudent(), [], batch, seed, lambda images: images)
    images = load_images("digits")
    test, labels = images.floats(images.test), images.test.labels

    def alone(apply: Any, batch: Batch) -> Array:
        return cross_entropy(apply(batch["images"])[0], batch["labels"])

    def taught(apply: Any, batch: Batch) -> Array:
        teacher, student = apply(batch["images"])
        return cross_entropy(student, batch["labels"]) + distillation(student, teacher).mean()

    def student_accuracy(apply: Any) -> float:
        return accuracy(apply(test)[1], labels)

    variants = {
        "teacher": Variant([], alone, lambda apply: accuracy(apply(test)[0], labels), "teacher"),
        "borrowing": Variant(ties, taught, student_accuracy, "student", after="teacher"),
        "own": Variant([], taught, student_accuracy, "student", after="teacher"),
    }
    return dataclasses.replace(case, variants=variants)


class GraphNet(nn.Module):
    """Graph convolutions x <- relu(A x W): no weight knows the number of nodes.

    Reference: Kipf, Welling, "Semi-Supervised Classification with Graph Convolutional Networks" (2017), equation 2.
    """

    classes: int
    width: int = 16
    layers: int = 3

    @nn.compact
    def __call__(self, graph: tuple[Array, Array]) -> Array:
        a_NN, x = graph
        x = nn.Dense(self.width, name="input")(x)
        for n in range(self.layers):
            x = x + nn.relu(nn.Dense(self.width, name=f"layer_{n}")(a_NN @ x))
        return nn.Dense(self.classes, name="head")(a_NN @ x)


def graph(batch: int, seed: int, given: Graph | None = None) -> Case:
    """A graph convolution at three depths: of few nodes the labels are told, and it tells those of the others."""
    data = karate(seed) if given is None else given
    inputs = (jnp.asarray(data.normalized()), jnp.asarray(data.features))
    step = {"inputs": inputs, "known": np.flatnonzero(data.train)}  # the same each time: the whole graph

    def loss(apply: Any, batch: Batch) -> Array:
        return cross_entropy(apply(batch["inputs"])[batch["known"]], data.labels[data.train])

    def quality(apply: Any) -> float:
        return accuracy(np.asarray(apply(inputs))[~data.train], data.labels[~data.train])

    module = GraphNet(int(data.labels.max()) + 1)
    ties = [Tie(r"layer_[12]/(.*)", to=r"layer_0/\1")]
    return Case(module, tied_and_untied(ties, loss, quality), inputs, lambda _: step)


CASES: dict[str, Callable[..., Case]] = {
    "conv": conv,
    "lstm": lstm,
    "embedding": embedding,
    "tasks": tasks,
    "student": student,
    "graph": graph,
}
VARIANTS = dict.fromkeys(CASES, ("tied", "untied")) | {"student": ("teacher", "borrowing", "own")}
