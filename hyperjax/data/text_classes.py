"""Text classification made from character corpora: N passages of very different length, up to T, and difficulty."""

import dataclasses
import functools
import hashlib
import re
from typing import NamedTuple

import numpy as np

from hyperjax.data.batches import EpochOrder
from hyperjax.data.corpus import UNKNOWN, Corpus, code_points, symbol_ids
from hyperjax.data.text import pydoc_corpus

PADDING = "\0"
SPLITS = ("test", "valid", "train")  # in the order of drawing: what a corpus repeats is taken out of train
MOST = 1 << 23  # characters of a split that are read: enwik8 has more than passages need
WHITE = (ord("\n"), ord(" "))
SHUFFLED = ("genuine", "words shuffled", "letters shuffled")
TOPICS = {  # help topics by class, less those that another holds ("if" is in "compound") and a few small ones
    "statements": "compound assignment augassign assert import del raise return global nonlocal break continue pass",
    "expressions": "calls comparisons yield operator-summary lambda subscriptions slicings power shifting unary binary "
    "bitwise booleans dict lists exprlists attribute-references atom-identifiers atom-literals conversions await",
    "data model": "objects types specialnames",
    "built-in types": "typesseq typesmapping string-methods",
    "literals and formats": "formatstrings strings identifiers numbers integers floating imaginary",
}


class TextSplit(NamedTuple):
    """Tokens [N, T] (smallest unsigned type; 0, the padding, at the end), lengths [N] int32 and labels [N] int32."""

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TextClasses:
    """Passages with the class of each; `symbols` are the padding, the characters of train, and `UNKNOWN`.

    Attributes:
        name: short name of the data.
        symbols: numbered by their place.
        classes: their names, numbered by their place.
        train, valid, test: passages.
        notes: what was done that a reader of results should know.
    """

    name: str
    symbols: tuple[str, ...]
    classes: tuple[str, ...]
    train: TextSplit
    valid: TextSplit
    test: TextSplit
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of the symbols, the classes and the three splits."""
        digest = hashlib.sha256(repr((self.symbols, self.classes)).encode())
        for array in (*self.train, *self.valid, *self.test):
            digest.update(f"{array.shape} {array.dtype.str}".encode() + array.tobytes())
        return digest.hexdigest()[:16]


class TextBatches:
    """Shuffled minibatches of B passages: what a step sees depends on the seed and its number alone (`EpochOrder`).

    Args:
        split: passages, with as many rows in each array.
        batch: B.
        seed: of the order.

    Raises:
        ValueError: the arrays have different lengths, or fewer than 1 or more than all passages make a batch.
    """

    def __init__(self, split: TextSplit, batch: int, seed: int = 0):
        if len({len(array) for array in split}) > 1:
            raise ValueError(f"split has {[len(array) for array in split]} rows, expected as many of each array")
        self.split, self.order = split, EpochOrder(len(split.labels), batch, seed, "passages")
        self.batch, self.seed, self.steps_per_epoch = self.order.batch, self.order.seed, self.order.steps_per_epoch

    def batch_at(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns `tokens` [B, T], `lengths` [B] and `labels` [B] of a step, from 0; ValueError if it is negative.

        Only some rows of the batch, where several processes read one part each.
        """
        index = self.order.rows_at(step)[rows]
        return {name: array[index] for name, array in self.split._asdict().items()}


def text_classes(
    corpus: Corpus,
    kind: str = "topic",
    other: Corpus | None = None,
    *,
    length: int = 256,
    shortest: int = 16,
    per_class: tuple[int, int, int] = (2000, 200, 200),
    seed: int = 0,
) -> TextClasses:
    """Makes passages of whole words, of which the class is to be told: the shorter, the less they give away.

    Lengths are log-uniform in [shortest, T], the same for every class, less what the last word exceeds them by. All
    white space is one space. No passage is drawn twice, and of a paragraph that a corpus repeats one copy is used.

    Args:
        corpus: where passages come from.
        kind: `topic`: which subject of pydoc (`TOPICS`), each cut into stretches of about 20 T characters, of which
            80 % are train, 10 % valid and 10 % test. `shuffled`: whether the passage is as it was, has its words in
            another order, or the inner letters of its words (all but the first and last). `corpus`: which corpus, by
            the letters alone, in lower case: neither typography nor the `<unk>` and `N` of the Penn Treebank tell.
        other: the second corpus of `corpus`, whose splits, as those of `shuffled`, are the corpora's.
        length: T, characters of the longest passage.
        shortest: characters of the shortest passage, 4 to T.
        per_class: passages of each class in train, valid and test.
        seed: 0 or more; fixes all that is drawn. The held-out splits do not depend on the size of train.

    Returns:
        The passages.

    Raises:
        ValueError: an argument is out of its range or place, or a text is too short or holds the padding.
    """
    for what, value, least in (("shortest", shortest, 4), ("length", length, shortest), ("seed", seed, 0)):
        if value != int(value) or value < least:
            raise ValueError(f"{what} is {value}, expected an integer of at least {least}; raise it")
    if len(per_class) != 3 or any(size != int(size) or size < 1 for size in per_class):
        raise ValueError(f"per_class is {per_class}, expected integers of at least 1 for train, valid and test")
    length, shortest, seed = int(length), int(shortest), int(seed)
    texts = _texts(corpus, kind, other, length)
    symbols = (PADDING, *sorted(set().union(*texts["train"].values()) - {"\n"} | {UNKNOWN}))
    splits: dict[str, TextSplit] = {}
    taken: set[str] = set()
    for number, (split, count) in enumerate(zip(SPLITS, map(int, reversed(per_class)), strict=True)):
        rng = np.random.default_rng((seed, number, 1))  # (seed, n) alone orders epoch n of the batches of that seed
        share = (rng.permutation(count) + rng.random(count)) / count  # one in each of as many equal intervals
        wanted = (shortest * ((length + 1) / shortest) ** share).astype(int).tolist()
        passages: list[str] = []
        for label, (name, text) in enumerate(texts[split].items()):
            drawn = _draw(rng, text, wanted, shortest, taken, kind == "shuffled", f"{split} text of {name!r}")
            passages += (_shuffle(rng, passage, label) for passage in drawn) if kind == "shuffled" else drawn
        order = rng.permutation(len(passages))
        lengths = np.array([len(passages[i]) for i in order], np.int32)
        tokens = np.zeros((len(order), length), np.min_scalar_type(len(symbols) - 1))
        points = code_points("".join(passages[i] for i in order))
        tokens[np.arange(length) < lengths[:, None]] = symbol_ids(points, symbols)
        splits[split] = TextSplit(tokens, lengths, (order // count).astype(np.int32))
    classes = tuple(texts["train"])
    sizes = "/".join(f"{len(classes) * count:,}" for count in per_class)
    note = f"{kind} ({', '.join(classes)}): {sizes} passages that overlap, {shortest} to {length} characters"
    notes = (note, *corpus.notes, *(other.notes if other else ()))
    return TextClasses(f"{corpus.name}-{kind}", symbols, classes, **splits, notes=notes)


def _texts(corpus: Corpus, kind: str, other: Corpus | None, length: int) -> dict[str, dict[str, str]]:
    """Returns the text of each class by split: pieces with a newline after each."""
    if kind not in ("topic", "shuffled", "corpus"):
        raise ValueError(f"kind is {kind!r}, expected topic, shuffled or corpus; choose one of them")
    if (kind == "corpus") != (other is not None) or (other and other.name == corpus.name):
        found = f"corpus {corpus.name!r} with other {other.name!r}" if other else "no other"
        raise ValueError(f"kind {kind!r} has {found}, expected a second, different corpus for 'corpus' and none else")
    texts: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    seen: set[str] = set()
    if kind == "topic":
        if corpus.fingerprint != pydoc_corpus().fingerprint:
            raise ValueError(f"kind 'topic' has corpus {corpus.name!r}, expected pydoc; choose shuffled or corpus")
        from pydoc_data.topics import topics

        for name, keys in TOPICS.items():
            text = _tidy("\n\n".join(topics[key] for key in keys.split() if key in topics), seen)
            tenths = 10 * max(1, round(len(text) / (20 * length)))
            ends = [0, *((text + " ").find(" ", len(text) * tenth // tenths) for tenth in range(1, tenths + 1))]
            for split, first, last in zip(SPLITS, (9, 8, 0), (10, 9, 8), strict=True):
                pieces = (text[ends[tenth + first] : ends[tenth + last]] for tenth in range(0, tenths, 10))
                texts[split][name] = "".join(piece.strip() + "\n" for piece in pieces)
        return texts
    for split in SPLITS:
        for source in (corpus, other) if other else (corpus,):
            text = source.decode(getattr(source, split)[:MOST])
            if other:
                text = re.sub(r"[^\w\n]|[\d_]", " ", re.sub(r"<unk>|\bN\b", " ", text)).lower()
            text = _tidy(text, seen) + "\n"
            texts[split] |= {source.name: text} if other else dict.fromkeys(SHUFFLED, text)
    return texts


def _tidy(text: str, seen: set[str]) -> str:
    """Makes white space one space, and leaves out the paragraphs that are `seen`, to which it adds the others."""
    paragraphs = dict.fromkeys(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    kept = [paragraph for paragraph in paragraphs if paragraph not in seen]
    seen.update(kept)
    return " ".join(kept)


def _draw(rng, text: str, lengths: list[int], shortest: int, taken: set[str], shuffled: bool, what: str) -> list[str]:
    """Draws passages that are not `taken`, to which it adds them."""
    if PADDING in text:
        raise ValueError(f"{what} holds {PADDING!r}, expected none, for it is the padding; remove it from the text")
    passages: list[str] = []
    for start in rng.permutation(np.flatnonzero(np.isin(code_points("\n" + text[:-1]), WHITE))).tolist():
        end = start + lengths[len(passages)]
        if text.find("\n", start, end) >= 0:  # the piece ends: wait for a place, else long passages would be rarer
            continue
        passage = text[start : end + 1].replace("\n", " ").rpartition(" ")[0]
        words = passage.split(" ")
        plain = shuffled and (len(set(words)) == 1 or all(len(set(word[1:-1])) < 2 for word in words))
        if len(passage) >= shortest and passage not in taken and not plain:
            taken.add(passage)
            passages.append(passage)
            if len(passages) == len(lengths):
                return passages
    room = f"{what} has room for {len(passages)} passages among {len(text):,} characters"
    raise ValueError(f"{room}, expected {len(lengths)}; lower per_class or length, or give a longer text")


def _shuffle(rng: np.random.Generator, passage: str, label: int) -> str:
    words, changed = passage.split(" "), passage
    while label and changed == passage:
        if SHUFFLED[label] == "words shuffled":
            changed = " ".join(words[i] for i in rng.permutation(len(words)))
        else:
            inner = ["".join(rng.permutation(list(word[1:-1]))) for word in words]
            changed = " ".join(w[:1] + letters + w[1:][-1:] for w, letters in zip(words, inner, strict=True))
    return changed
