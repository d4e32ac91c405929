"""Text, archives, images, tables and weights of any content: data or one line, nothing else, and no file elsewhere."""

import dataclasses
import gzip
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import basics_graphs
import numpy as np
import pytest
from fuzz import answer, damaged, drawn, edited
from hypothesis import given
from hypothesis import strategies as st
from test_census import rows as census_rows

from hyperjax.data import Corpus, Images, load_corpus, load_images
from hyperjax.data.census import load_census
from hyperjax.data.sources import read_members
from hyperjax.data.text import wikipedia_corpus
from hyperjax.sharing import read_bert

BERT = Path(__file__).parent / "fixtures" / "tiny_bert"
MEMBERS = {"a.txt": b"some text " * 40, "b.txt": b"other text " * 40}


def zipped(method=zipfile.ZIP_DEFLATED, prefix="folder/"):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", method) as archive:
        for name, content in MEMBERS.items():
            archive.writestr(prefix + name, content)
    return raw.getvalue()


def tarred(mode="w:gz", prefix="folder/"):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as archive:
        for name, content in MEMBERS.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()


ARCHIVES = {".zip": zipped(), "-stored.zip": zipped(zipfile.ZIP_STORED), "-lzma.zip": zipped(zipfile.ZIP_LZMA)}
ARCHIVES |= {".tgz": tarred(), ".tar": tarred("w"), ".tar.xz": tarred("w:xz"), ".tar.bz2": tarred("w:bz2")}


@drawn()
@given(st.data())
def test_any_text_file_is_a_corpus_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("t") / "text.txt"
    text = st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    path.write_bytes(data.draw(text | damaged("naïve text of some length, in UTF-8. ".encode() * 9)))
    corpus = answer(load_corpus, str(path))
    if isinstance(corpus, Corpus):
        for split in (corpus.train, corpus.valid, corpus.test):
            np.testing.assert_array_equal(corpus.encode(corpus.decode(split)), split)


@drawn()
@given(st.data())
@pytest.mark.parametrize("ending", ARCHIVES)
def test_any_archive_gives_its_members_or_one_line(tmp_path_factory, ending, data):
    path = tmp_path_factory.mktemp("a") / f"archive{ending}"
    path.write_bytes(data.draw(damaged(ARCHIVES[ending])))
    found = answer(read_members, path, list(MEMBERS), 1000)
    assert isinstance(found, str) or all(len(content) <= 1000 for content in found.values())
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing is unpacked


@pytest.mark.parametrize("prefix", ["../../", "/", "C:\\"])
@pytest.mark.parametrize("make", [zipped, tarred])
def test_names_in_an_archive_do_not_choose_where_anything_is_written(tmp_path, make, prefix):
    path = tmp_path / "inner" / "archive"
    path.parent.mkdir()
    path.write_bytes(make(prefix=prefix + "x/"))
    assert read_members(path, list(MEMBERS), 1000) == MEMBERS
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_an_archive_are_no_members(tmp_path, kind):
    (tmp_path / "secret").write_text("secret")
    path = tmp_path / "archive.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = kind, str(tmp_path / "secret")
        archive.addfile(info)
    assert "holds no a.txt" in answer(read_members, path, ["a.txt"], 1000)


def test_a_member_that_unpacks_to_more_than_it_may_is_refused(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", bytes(50_000_000))
    assert "has over 1,000 bytes" in answer(read_members, path, ["a.txt"], 1000)


@drawn()
@given(st.data())
@pytest.mark.parametrize("name", ["text8", "enwik8"])
def test_any_wikipedia_file_is_a_corpus_or_one_line(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("w")
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr(name, b"a text of the same format " * 4)
    plain = data.draw(st.booleans())
    whole = b"a text of the same format " * 4 if plain else raw.getvalue()
    (folder / (name if plain else f"{name}.zip")).write_bytes(data.draw(damaged(whole)))
    found = answer(wikipedia_corpus, name, folder, (84, 10, 10))
    assert isinstance(found, str | Corpus)


def npz(**arrays):
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    return raw.getvalue()


def images():
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 20), ("test", 5)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 4, 4), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    return arrays


@drawn()
@given(st.data())
def test_any_npz_is_images_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("i") / "images.npz"
    path.write_bytes(data.draw(damaged(npz(**images()))))
    assert isinstance(answer(load_images, "digits", path), str | Images)


@drawn()
@given(st.data())
def test_arrays_of_any_shape_and_type_are_images_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("i") / "images.npz"
    arrays, name = images(), data.draw(st.sampled_from(sorted(images())))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
    dtype = data.draw(st.sampled_from(["u1", "i8", "f4", "f8", "c8", "b1", "S3", "M8[s]", "i4,f4"]))
    arrays[name] = np.zeros(shape, dtype)
    path.write_bytes(npz(**arrays))
    assert isinstance(answer(load_images, "digits", path), str | Images)


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_array_is_unpickled(tmp_path):
    path = tmp_path / "images.npz"
    trap = np.empty(1, object)
    trap[0] = Trap(tmp_path / "sprung")
    path.write_bytes(npz(**{**images(), "train_labels": trap}))
    assert "images.npz is damaged" in answer(load_images, "digits", path)
    path.write_bytes(npz(edges=trap, features=trap, labels=trap))
    assert "is no whole npz" in answer(basics_graphs.read_graph, path)
    assert not (tmp_path / "sprung").exists()


def test_an_array_that_claims_to_be_huge_is_one_line(tmp_path):
    path = tmp_path / "images.npz"
    raw = io.BytesIO()
    np.lib.format.write_array_header_1_0(raw, {"shape": (1 << 50,), "fortran_order": False, "descr": "|u1"})
    with zipfile.ZipFile(path, "w") as archive:
        for name in images():
            archive.writestr(f"{name}.npy", raw.getvalue() + b"some bytes")
    assert "images.npz is damaged" in answer(load_images, "digits", path)


@drawn()
@given(st.data())
def test_any_graph_file_is_a_graph_or_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("g")
    if data.draw(st.booleans()):
        edges, features = np.array([[0, 1], [1, 2], [2, 3]]), np.eye(4, dtype=np.float32)
        (folder / "g.npz").write_bytes(data.draw(damaged(npz(edges=edges, features=features, labels=np.arange(4) % 2))))
        answer(basics_graphs.read_graph, folder / "g.npz")
    else:
        rows = b"".join(b"p%d\t%d\t1\tclass%d\n" % (n, n % 2, n % 3) for n in range(9))
        cites = b"".join(b"p%d\tp%d\n" % (n, (n * 2) % 9) for n in range(9))
        (folder / "g.content").write_bytes(data.draw(damaged(rows)))
        (folder / "g.cites").write_bytes(data.draw(damaged(cites)))
        answer(basics_graphs.read_graph, folder / "g.content")


@drawn(0.5)
@given(st.data())
def test_any_table_is_a_census_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("c") / "census"
    raw = data.draw(damaged("\n".join(census_rows(20)).encode()))
    path.write_bytes(data.draw(st.sampled_from([raw, gzip.compress(raw)])) if data.draw(st.booleans()) else raw)
    answer(load_census, path)


@drawn()
@given(st.data())
def test_any_weights_and_config_are_a_bert_or_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("b")
    shutil.copytree(BERT, folder, dirs_exist_ok=True)
    if data.draw(st.booleans()):
        weights = folder / "model.safetensors"
        raw = weights.read_bytes()
        head = 8 + int.from_bytes(raw[:8], "little")
        damage = damaged(raw[:head]).map(lambda part: part + raw[head:]) if data.draw(st.booleans()) else damaged(raw)
        weights.write_bytes(data.draw(damage))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_bytes(data.draw(edited(config)))
    found = answer(read_bert, folder)
    assert isinstance(found, str) or dataclasses.is_dataclass(found[0])


@drawn()
@given(st.data())
def test_any_index_of_weights_is_a_bert_or_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("b")
    shutil.copytree(BERT, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "part.safetensors", "b": "../part.safetensors"}}
    (folder / "model.safetensors.index.json").write_bytes(data.draw(edited(index)))
    answer(read_bert, folder)
