"""The Penn Treebank: made from files or archives, kept as ArrayRecord, read back whole or refused in one line."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from hyperjax.data import load_corpus, ptb
from hyperjax.data.text import ptb_corpus

WORDS = {
    "ptb.train.txt": b" mr. <unk> is chairman of N \n the plant \n  \n" * 40,
    "ptb.valid.txt": b" the chairman \n",
    "ptb.test.txt": b" a plant \n is the N",
}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def made_source(words):
    splits = {}
    for split in ("train", "valid", "test"):
        name = f"ptb.{split}.txt"
        text = "".join(line.strip(" ") + "\n" for line in words[name].decode().splitlines())
        splits[split] = ptb.Split(name, sha256(words[name]), len(text), sha256(text.encode()))
    n_symbols = len(set(words["ptb.train.txt"].decode()))
    return ptb.Source(splits, n_symbols, "http://localhost/simple-examples.tgz")


SOURCE = made_source(WORDS)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "root"))
    return tmp_path / "root"


@pytest.fixture
def words(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    for name, content in WORDS.items():
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def refused(message, data_dir=None, source=SOURCE):
    with pytest.raises(ValueError, match=message) as caught:
        ptb_corpus(data_dir, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prepared(root):
    return root / "ptb_chars" / "1.0.0"


def test_characters_have_no_outer_spaces_and_whole_lines():
    assert ptb.characters(b" a b \n\n  c") == b"a b\n\nc\n"
    assert ptb.characters(b"\ta\n") == b"\ta\n"  # spaces only


def test_the_real_source_is_the_published_one():
    assert [split.length for split in ptb.PTB.splits.values()] == [5_017_482, 393_042, 442_423]
    assert ptb.PTB.n_symbols == 50
    assert all(len(split.sha256) == len(split.characters_sha256) == 64 for split in ptb.PTB.splits.values())


def test_prepared_once_and_read_back_without_the_files(root, words, capfd):
    corpus = ptb_corpus(words, SOURCE)
    assert capfd.readouterr() == ("", "")
    assert corpus.decode(corpus.train) == "mr. <unk> is chairman of N\nthe plant\n\n" * 40
    assert corpus.decode(corpus.valid) == "the chairman\n"
    assert corpus.decode(corpus.test) == "a plant\nis the N\n"
    assert corpus.train.dtype == np.int32
    assert corpus.symbols == tuple(sorted(set(corpus.decode(corpus.train))))
    assert any(str(prepared(root)) in note for note in corpus.notes)
    assert len(list(prepared(root).glob("*.array_record-*"))) == 3
    before = {path: path.stat().st_mtime_ns for path in prepared(root).iterdir()}
    shutil.rmtree(words)
    again = ptb_corpus(None, SOURCE)
    assert again.fingerprint == corpus.fingerprint
    assert {path: path.stat().st_mtime_ns for path in prepared(root).iterdir()} == before
    assert "tensorflow" not in sys.modules


def test_every_layout_gives_the_same_corpus(root, tmp_path, words):
    nested = {f"./simple-examples/data/{name}": content for name, content in WORDS.items()}
    decoys = {"__MACOSX/._ptb.train.txt": b"x", "simple-examples/README": b"x"}
    write_zip(tmp_path / "a.zip", decoys | nested)
    write_tar(tmp_path / "simple-examples.tgz", decoys | nested)
    write_tar(tmp_path / "a.tar", WORDS, "w")
    shutil.copytree(words, tmp_path / "unpacked" / "simple-examples" / "data")
    places = [words, tmp_path / "a.zip", tmp_path / "simple-examples.tgz", tmp_path / "a.tar", tmp_path / "unpacked"]
    fingerprints = set()
    for place in [*places, tmp_path]:  # the last holds the archive
        shutil.rmtree(root, ignore_errors=True)
        fingerprints.add(ptb_corpus(place, SOURCE).fingerprint)
    assert len(fingerprints) == 1


def test_nothing_is_extracted_where_an_archive_says(root, tmp_path):
    hostile = {f"../../escaped/{name}": content for name, content in WORDS.items()}
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_tar(tmp_path / "deep" / "er" / "a.tgz", hostile)
    ptb_corpus(tmp_path / "deep" / "er" / "a.tgz", SOURCE)
    assert not list(tmp_path.rglob("*ptb.train.txt"))
    assert not list(tmp_path.rglob("escaped"))


def test_wrong_digest_names_both(root, words):
    (words / "ptb.valid.txt").write_bytes(b"other text\n")
    message = refused("ptb.valid.txt from .* has SHA-256", words)
    assert sha256(b"other text\n") in message
    assert SOURCE.splits["valid"].sha256 in message
    assert not root.exists()


def test_the_public_name_checks_the_published_digests(root, words):
    with pytest.raises(ValueError, match=f"ptb.train.txt .* expected {ptb.PTB.splits['train'].sha256}"):
        load_corpus("ptb", words)


def test_given_files_are_checked_even_if_a_copy_is_there(root, words):
    ptb_corpus(words, SOURCE)
    (words / "ptb.test.txt").write_bytes(b"other\n")
    refused("ptb.test.txt from .* has SHA-256", words)


def test_missing_and_damaged_input(root, tmp_path, words):
    refused("nowhere does not exist; give the folder of ptb.train.txt", tmp_path / "nowhere")
    refused("holds no ptb.train.txt and no ptb.valid.txt and no ptb.test.txt", tmp_path)
    write_zip(tmp_path / "part.zip", {"ptb.train.txt": WORDS["ptb.train.txt"]})
    refused("part.zip holds no ptb.valid.txt and no ptb.test.txt", tmp_path / "part.zip")
    write_zip(tmp_path / "whole.zip", WORDS)
    write_tar(tmp_path / "whole.tgz", WORDS)
    for name in ("whole.zip", "whole.tgz"):
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
        refused(f"{name} is damaged or no zip or tar archive", tmp_path / name)
    (tmp_path / "noise.tgz").write_bytes(bytes(range(256)) * 9)
    refused("noise.tgz is damaged or no zip or tar archive", tmp_path / "noise.tgz")
    (words / "ptb.valid.txt").unlink()
    refused("words holds no ptb.valid.txt; give the folder", words)
    assert not root.exists()


def test_a_member_that_is_too_large_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(ptb, "MEMBER_LIMIT", 1000)
    write_zip(tmp_path / "bomb.zip", WORDS | {"ptb.train.txt": bytes(1 << 24)})
    tracemalloc.start()
    refused("ptb.train.txt in .*bomb.zip has over 1,000 bytes", tmp_path / "bomb.zip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no record", "no info", "half info"])
def test_a_corrupted_copy_says_how_to_rebuild(root, words, damage):
    ptb_corpus(words, SOURCE)
    record = next(path for path in prepared(root).iterdir() if "train.array_record" in path.name)
    info = prepared(root) / "dataset_info.json"
    raw = record.read_bytes()
    if damage == "flipped":
        record.write_bytes(raw[:150] + bytes([raw[150] ^ 1]) + raw[151:])
    elif damage == "truncated":
        record.write_bytes(raw[:100])
    elif damage == "half info":
        info.write_bytes(info.read_bytes()[:100])
    else:
        (record if damage == "no record" else info).unlink()
    kept = sorted(path.name for path in prepared(root).iterdir())
    message = refused("cannot read .*rebuild it")
    assert f"move {prepared(root)} away" in message
    assert sorted(path.name for path in prepared(root).iterdir()) == kept
    prepared(root).rename(root / "aside")
    assert ptb_corpus(words, SOURCE).decode([0]) == "\n"


def test_a_sound_copy_of_another_text_is_found_out(root, words, tmp_path):
    other = WORDS | {"ptb.test.txt": b" a plant \n is the M"}
    write_zip(tmp_path / "other.zip", other)
    ptb_corpus(tmp_path / "other.zip", made_source(other))
    refused("the test split in .* has 17 characters with SHA-256 .*, expected 17 with .*rebuild it")


def test_symbols_are_counted(root, words):
    wrong = ptb.Source(SOURCE.splits, SOURCE.n_symbols + 1, SOURCE.url)
    refused(f"has {SOURCE.n_symbols} symbols, expected {SOURCE.n_symbols + 1}", words, wrong)


def test_leftovers_of_an_interruption_do_no_harm(root, words):
    leftover = root / "ptb_chars" / "incomplete.ABCDEF_1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"half")
    prepared(root).mkdir()
    assert ptb_corpus(words, SOURCE).decode([0]) == "\n"
    assert (leftover / "half").read_bytes() == b"half"


def test_killed_while_preparing_then_run_again(root, words):
    code = (
        "import sys, time; from hyperjax.data.builders.ptb_chars import PtbChars\n"
        "def stop(self, text):\n"
        "    yield 0, {'text': text}\n"
        "    print('writing', file=sys.__stdout__, flush=True); time.sleep(60)\n"
        "PtbChars._generate_examples = stop\n"
        f"builder = PtbChars(data_dir={str(root)!r}, file_format='array_record', texts={{'train': b'x'}})\n"
        "builder.download_and_prepare()\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as p:
        assert any(b"writing" in line for line in p.stdout)
        p.send_signal(signal.SIGKILL)
    assert list((root / "ptb_chars").glob("incomplete.*"))
    assert not prepared(root).exists()
    assert ptb_corpus(words, SOURCE).decode([0]) == "\n"


def test_another_process_that_finishes_first_is_believed(root, words, monkeypatch):
    from hyperjax.data.builders import ptb_chars

    real = ptb_chars.PtbChars.download_and_prepare

    def slower(self, **kwargs):
        monkeypatch.setattr(ptb_chars.PtbChars, "download_and_prepare", real)
        ptb_corpus(words, SOURCE)
        raise OSError("the folder is not empty")

    monkeypatch.setattr(ptb_chars.PtbChars, "download_and_prepare", slower)
    assert ptb_corpus(words, SOURCE).decode([0]) == "\n"


def test_a_place_that_cannot_be_written(root, words):
    root.write_bytes(b"a file")
    refused("cannot prepare .*; set TFDS_DATA_DIR to a folder that can be written", words)
    assert root.read_bytes() == b"a file"


def test_without_a_copy_the_public_archive_is_fetched(root, tmp_path, monkeypatch):
    asked = []

    def download(url, advice):
        asked.append(url)
        write_tar(tmp_path / "fetched.tgz", WORDS)
        return tmp_path / "fetched.tgz"

    monkeypatch.setattr(ptb, "download", download)
    assert ptb_corpus(None, SOURCE).fingerprint == ptb_corpus(None, SOURCE).fingerprint
    assert asked == [SOURCE.url]


def test_the_builder_alone_fetches_the_public_archive(root, monkeypatch):
    from hyperjax.data.builders import ptb_chars

    monkeypatch.setattr(ptb_chars, "checked_texts", lambda data_dir: {"train": b"a\n", "test": b"b\n"})
    builder = ptb_chars.PtbChars(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    assert builder.as_data_source(split="test")[0]["text"] == b"b\n"
