"""Text classification: what passages are, what tells the classes apart, what is held out, and what a batch holds."""

import numpy as np
import pytest

from hyperjax.data import UNKNOWN, Corpus, TextBatches, load_corpus, text_classes
from hyperjax.data.corpus import code_points, symbol_ids
from hyperjax.data.text_classes import TextSplit

SMALL = {"length": 64, "shortest": 8, "per_class": (60, 12, 10)}
SPLITS = ("train", "valid", "test")


def made_up(name, letters, seed, paragraphs=(60, 30, 30)):
    """A corpus of paragraphs of made-up words, of which each split repeats the first of train."""
    rng = np.random.default_rng(seed)

    def paragraph():
        words = ["".join(rng.choice(list(letters), rng.integers(2, 9))) for _ in range(30)]
        return " ".join(words[:15]) + "\n " + " ".join(words[15:])

    first = paragraph()
    texts = ["\n\n".join([first, *(paragraph() for _ in range(count))]) for count in paragraphs]
    symbols = tuple(sorted(set("".join(texts)) | {UNKNOWN}))
    ids = [symbol_ids(code_points(text), symbols) for text in texts]
    return Corpus(name, *ids, symbols, (f"{name} is made up",)), first


CORPUS, FIRST = made_up("first", "abcdefghij", 1)
OTHER, _ = made_up("other", "ABCdefghiNopq<>é1", 2)


def passages(data, split):
    part = getattr(data, split)
    rows = zip(part.tokens.tolist(), part.lengths.tolist(), strict=True)
    return ["".join(data.symbols[token] for token in row[:length]) for row, length in rows]


def words_of(corpus, split):
    return corpus.decode(getattr(corpus, split)).split()


@pytest.fixture(scope="module")
def made():
    return {
        "topic": text_classes(load_corpus("pydoc"), **SMALL),
        "shuffled": text_classes(CORPUS, "shuffled", **SMALL),
        "corpus": text_classes(CORPUS, "corpus", OTHER, **SMALL),
    }


@pytest.mark.parametrize("kind", ["topic", "shuffled", "corpus"])
def test_shapes_types_and_padding(made, kind):
    data = made[kind]
    for split, count in zip(SPLITS, SMALL["per_class"], strict=True):
        tokens, lengths, labels = getattr(data, split)
        assert tokens.shape == (count * len(data.classes), 64)
        assert (tokens.dtype, lengths.dtype, labels.dtype) == (np.uint8, np.int32, np.int32)
        assert np.bincount(labels).tolist() == [count] * len(data.classes)
        assert lengths.min() >= 8
        assert lengths.max() <= 64
        np.testing.assert_array_equal(tokens != 0, np.arange(64) < lengths[:, None])
        assert tokens.max() < len(data.symbols)
        assert not any(part != " ".join(part.split()) for part in passages(data, split))
    assert data.symbols[0] == "\0"
    assert len(set(data.symbols)) == len(data.symbols)
    assert data.name.endswith(f"-{kind}")


@pytest.mark.parametrize("kind", ["topic", "shuffled", "corpus"])
def test_lengths_are_log_uniform_and_alike_in_every_class(made, kind):
    data = made[kind]
    logs = np.log(data.train.lengths)
    below = np.mean(data.train.lengths <= 22)  # the middle of 8 and 64 on a log scale
    assert 0.4 < below < 0.75
    by_class = [logs[data.train.labels == label].mean() for label in range(len(data.classes))]
    assert np.ptp(by_class) < 0.1


@pytest.mark.parametrize("kind", ["topic", "shuffled", "corpus"])
def test_the_order_of_the_rows_does_not_tell_the_class(made, kind):
    labels = made[kind].train.labels
    assert np.count_nonzero(np.diff(labels)) > len(labels) // 3


def letters(word):
    return word[:1], "".join(sorted(word[1:-1])), word[1:][-1:]


@pytest.mark.parametrize("split", SPLITS)
def test_shuffled_passages_against_the_text(made, split):
    data, words = made["shuffled"], words_of(CORPUS, split)
    assert data.classes == ("genuine", "words shuffled", "letters shuffled")
    for passage, label in zip(passages(data, split)[:30], getattr(data, split).labels[:30], strict=True):
        parts = passage.split(" ")
        runs = [words[i : i + len(parts)] for i in range(len(words) - len(parts) + 1)]
        assert (parts in runs) == (label == 0)
        assert (sorted(parts) in map(sorted, runs)) == (label != 2)
        assert ([*map(letters, parts)] in [[*map(letters, run)] for run in runs]) == (label != 1)


def test_passages_of_two_corpora_are_letters_of_their_own_split():
    data = text_classes(CORPUS, "corpus", OTHER, **SMALL)
    assert data.classes == ("first", "other")
    assert data.notes[1:] == ("first is made up", "other is made up")
    assert set("".join(data.symbols[1:])) <= set(" abcdefghijnopqé" + UNKNOWN)
    for split in SPLITS:
        text = " ".join(words_of(CORPUS, split))
        for passage, label in zip(passages(data, split), getattr(data, split).labels, strict=True):
            assert (passage in text) == (label == 0)


def test_the_marks_of_the_treebank_are_left_out():
    texts = [
        "Mr <unk> paid N dollars to New York and others for N years.",
        "for N pears he paid <unk> dollars in all of the cases",
        "N <unk> cents is the price of what there is",
    ]
    symbols = tuple(sorted(set("".join(texts))))
    tiny = Corpus("tiny", *(symbol_ids(code_points(text), symbols) for text in texts), symbols)
    sizes = {"length": 20, "shortest": 10, "per_class": (1, 1, 1)}
    seen = ""
    for seed in range(20):
        seen += " ".join(passages(text_classes(tiny, "corpus", CORPUS, seed=seed, **sizes), "train")) + " "
    assert "mr paid dollars" in seen
    assert "unk" not in seen
    assert " n " not in seen


def test_topics_come_from_their_own_help_topics(made):
    from pydoc_data.topics import topics

    data = made["topic"]
    compound, formats = (" ".join(topics[key].split()) for key in ("compound", "formatstrings"))
    statements, literals = (data.classes.index(name) for name in ("statements", "literals and formats"))
    for text, label in ((compound, statements), (formats, literals)):
        rows = zip(passages(data, "train"), data.train.labels.tolist(), strict=True)
        labels = [found for passage, found in rows if len(passage) > 24 and passage in text]
        assert labels.count(label) == len(labels) > 5


@pytest.mark.parametrize("kind", ["topic", "shuffled", "corpus"])
def test_no_passage_is_drawn_twice(made, kind):
    drawn = [passage for split in SPLITS for passage in passages(made[kind], split)]
    assert len(set(drawn)) == len(drawn)


def test_splits_of_topics_do_not_overlap():
    data = text_classes(load_corpus("pydoc"), length=128, shortest=30, per_class=(1200, 30, 30))
    train, valid, test = ({p[i : i + 30] for p in passages(data, s) for i in range(len(p) - 29)} for s in SPLITS)
    half = [{p[i : i + 30] for p in passages(data, "train")[k::2] for i in range(len(p) - 29)} for k in (0, 1)]
    assert len(half[0] & half[1]) > 0.3 * len(half[0])  # the test would see it if they did
    assert len(valid & (train | test)) < 0.1 * len(valid)  # what the topics themselves repeat
    assert len(test & (train | valid)) < 0.1 * len(test)


def test_a_repeated_paragraph_is_in_one_split_only():
    train, valid, test = (
        passages(text_classes(CORPUS, "shuffled", length=64, shortest=30, per_class=(300, 30, 60)), split)
        for split in SPLITS
    )
    first = " ".join(FIRST.split())
    assert not any(passage in first for passage in train + valid)
    assert any(passage in first for passage in test)


def test_the_seed_fixes_all_and_train_does_not_change_what_is_held_out(made):
    again = text_classes(CORPUS, "shuffled", **SMALL)
    assert again.fingerprint == made["shuffled"].fingerprint
    assert text_classes(CORPUS, "shuffled", seed=1, **SMALL).fingerprint != again.fingerprint
    shorter = text_classes(CORPUS, "shuffled", **SMALL | {"per_class": (5.0, 12, 10), "length": np.float64(64)})
    assert shorter.fingerprint != again.fingerprint
    for split in ("valid", "test"):
        for one, two in zip(getattr(again, split), getattr(shorter, split), strict=True):
            np.testing.assert_array_equal(one, two)
    assert shorter.symbols == again.symbols


def test_a_batch_depends_on_the_step_alone(made):
    split = made["corpus"].train
    batches, again = TextBatches(split, 50, seed=3), TextBatches(split, 50, seed=3)
    late = batches.batch_at(7)
    batches.batch_at(0)
    for name, array in again.batch_at(7).items():
        np.testing.assert_array_equal(array, late[name])
    assert list(late) == ["tokens", "lengths", "labels"]
    assert batches.steps_per_epoch == 2
    epoch = np.concatenate([batches.batch_at(step)["tokens"] for step in (2, 3)])
    assert len(np.unique(epoch, axis=0)) == 100
    rows = {row.tobytes(): (length, label) for row, length, label in zip(*split, strict=True)}
    for row, length, label in zip(*late.values(), strict=True):
        assert rows[row.tobytes()] == (length, label)
    assert (TextBatches(split, 50, seed=4).batch_at(0)["tokens"] != batches.batch_at(0)["tokens"]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "genre"}, "kind is 'genre', expected topic, shuffled or corpus"),
        ({"kind": "corpus"}, "kind 'corpus' has no other, expected a second, different corpus"),
        ({"kind": "corpus", "other": CORPUS}, "has corpus 'first' with other 'first', expected a second"),
        ({"kind": "shuffled", "other": OTHER}, "'shuffled' has corpus 'first' with other 'other'"),
        ({"kind": "topic"}, "kind 'topic' has corpus 'first', expected pydoc"),
        ({"length": 7}, "length is 7, expected an integer of at least 8"),
        ({"shortest": 3}, "shortest is 3, expected an integer of at least 4"),
        ({"length": 20.5}, "length is 20.5, expected an integer"),
        ({"seed": -1}, "seed is -1"),
        ({"per_class": (5, 5)}, r"per_class is \(5, 5\), expected integers of at least 1 for train, valid and test"),
        ({"per_class": (5, 0, 5)}, r"per_class is \(5, 0, 5\)"),
        ({"per_class": (10**5, 5, 5)}, "train text of 'genuine' has room for .* expected 100000; lower per_class"),
        ({"length": 10**6}, "test text of 'genuine' has room for .* lower per_class or length"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        text_classes(CORPUS, **{"kind": "shuffled", **SMALL, **changes})
    assert "\n" not in str(caught.value)


def test_padding_in_the_text_is_refused():
    symbols = ("\0", *CORPUS.symbols)
    holed = Corpus("holed", CORPUS.train + 1, CORPUS.valid + 1, np.append(CORPUS.test + 1, 0), symbols)
    with pytest.raises(ValueError, match=r"test text of 'genuine' holds .* it is the padding; remove it"):
        text_classes(holed, "shuffled", **SMALL)


def test_errors_of_batches(made):
    split = made["corpus"].test
    with pytest.raises(ValueError, match="batch 21 exceeds the 20 passages"):
        TextBatches(split, 21)
    with pytest.raises(ValueError, match=r"split has \[20, 19, 20\] rows, expected as many"):
        TextBatches(TextSplit(split.tokens, split.lengths[1:], split.labels), 5)
    with pytest.raises(ValueError, match="step is -1"):
        TextBatches(split, 5).batch_at(-1)
