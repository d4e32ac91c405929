"""Corpora: what they hold, what they tell their user, and one line for whatever is wrong with the input."""

import codecs
import http.server
import os
import platform
import re
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest

from hyperjax.data import UNKNOWN, Corpus, download, load_corpus, text

SENTENCE = "The quick brown fox jumps over the lazy dog.\n"
SIZES = (90, 5, 5)
TEXT8 = ("the quick brown fox " * 5).encode()


@pytest.fixture(autouse=True)
def _own_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "root"))


def written(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(message, *args, call=load_corpus, **kwargs):
    """Asserts that a call is refused with one line that matches, and returns the line."""
    with pytest.raises(ValueError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pydoc_is_all_there_and_says_its_python():
    from pydoc_data.topics import topics

    corpus = load_corpus()
    sizes = [len(split) for split in (corpus.train, corpus.valid, corpus.test)]
    whole = "".join(corpus.decode(split) for split in (corpus.train, corpus.valid, corpus.test))
    assert UNKNOWN not in whole
    assert whole == "\n".join(topics[key] for key in sorted(topics))
    assert sizes[0] == sum(sizes) * 90 // 100
    assert abs(sizes[1] - sizes[2]) <= 1
    assert any(f"Python {platform.python_version()}" in note for note in corpus.notes)
    assert corpus.train.dtype == corpus.valid.dtype == corpus.test.dtype == np.int32
    assert max(split.max() for split in (corpus.train, corpus.valid, corpus.test)) < len(corpus.symbols)


def test_pydoc_is_the_same_in_another_process():
    code = "from hyperjax.data import load_corpus; print(load_corpus().fingerprint)"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == load_corpus().fingerprint


def test_importing_the_data_wing_loads_no_heavy_library():
    heavy = "{'tensorflow_datasets', 'matplotlib', 'urllib.request'}"
    code = f"import sys, hyperjax.data; print({heavy} & set(sys.modules))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_a_file_is_split_by_position_and_round_trips(tmp_path):
    content = "naïve 文字 🙂\n" * 20
    corpus = load_corpus(written(tmp_path / "a.txt", content))
    assert [len(split) for split in (corpus.train, corpus.valid, corpus.test)] == [198, 11, 11]
    assert corpus.decode(np.concatenate([corpus.train, corpus.valid, corpus.test])) == content
    assert corpus.symbols == tuple(sorted({*content, UNKNOWN}))
    assert corpus.decode(corpus.encode("文🙂")) == "文🙂"
    assert len(corpus.notes) == 1  # nothing was changed, so nothing is said


def test_held_out_characters_are_one_counted_unknown_symbol(tmp_path):
    content = "ab\n" * 300 + "ab€é€" * 20
    corpus = load_corpus(written(tmp_path / "a.txt", content))
    unknown = corpus.symbols.index(UNKNOWN)
    held_out = np.concatenate([corpus.valid, corpus.test])
    assert len(corpus.train) + len(held_out) == len(content)
    assert (held_out == unknown).sum() == 60
    assert not (corpus.train == unknown).any()
    assert any("60 held-out characters ('€' 'é')" in note for note in corpus.notes)
    assert corpus.encode("a€").tolist() == [corpus.symbols.index("a"), unknown]


def test_the_vocabulary_does_not_depend_on_held_out_text(tmp_path):
    one = load_corpus(written(tmp_path / "1.txt", "ab\n" * 300 + "xyz" * 30))
    two = load_corpus(written(tmp_path / "2.txt", "ab\n" * 300 + "abb" * 30))
    assert one.symbols == two.symbols == ("\n", "a", "b", UNKNOWN)
    assert one.fingerprint != two.fingerprint


def test_windows_line_ends_and_byte_order_mark_are_handled_and_said(tmp_path):
    plain = load_corpus(written(tmp_path / "plain.txt", SENTENCE * 9))
    marked = written(tmp_path / "marked.txt", codecs.BOM_UTF8 + (SENTENCE * 9).replace("\n", "\r\n").encode())
    corpus = load_corpus(marked)
    assert corpus.fingerprint == plain.fingerprint
    assert any("9 Windows line ends" in note for note in corpus.notes)
    assert any("byte-order mark" in note for note in corpus.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, expected UTF-8 text"),
        (b"plain text, then \xe9 in latin-1, and more of it", "is not UTF-8: byte 0xe9 at offset 17; convert"),
        (SENTENCE.encode("utf-16"), "is not UTF-8: byte 0xff at offset 0"),
        (b"nineteen characters", "has 19 characters, too short to split 90/5/5: expected at least 20"),
        (codecs.BOM_UTF8, "has 0 characters, too short"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = written(tmp_path / "bad.txt", content)
    assert path in refused(message, path)


def test_the_shortest_text_has_no_empty_split(tmp_path):
    corpus = load_corpus(written(tmp_path / "a.txt", "abcdefghij" * 2))
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (18, 1, 1)


def test_bad_names_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("corpus 'wikitext' is unknown: expected one of pydoc, ptb, text8, enwik8", "wikitext")
    refused("no.txt does not exist", "no.txt")
    refused("does not exist", f".{os.sep}wikitext")
    refused("is a folder, expected a file", str(tmp_path))
    refused("is for ptb, text8 and enwik8, not for 'pydoc'", "pydoc", data_dir=tmp_path)
    written(tmp_path / "wikitext", SENTENCE)
    assert load_corpus("wikitext").name == "wikitext"


def test_encode_and_decode_name_what_is_outside():
    ids = np.zeros(3, np.int32)
    corpus = Corpus("letters", ids, ids, ids, symbols=("a", "b"))
    assert corpus.decode(corpus.encode("abba")) == "abba"
    assert corpus.encode("").shape == (0,)
    refused("character 'c' at position 2 is not among the 2 symbols of 'letters'", "abc", call=corpus.encode)
    refused("id 2 is outside of the vocabulary: expected 0 to 1", [0, 2], call=corpus.decode)
    refused("id -1 is outside", np.array([-1]), call=corpus.decode)


def test_the_fingerprint_tells_any_difference():
    ids = np.arange(6, dtype=np.int32) % 2

    def fingerprint(train=ids[:4], valid=ids[:2], symbols=("a", "b")):
        return Corpus("x", train, valid, ids[:2], symbols).fingerprint

    variants = [
        fingerprint(),
        fingerprint(train=1 - ids[:4]),
        fingerprint(symbols=("a", "c")),
        fingerprint(train=ids[:2], valid=ids[:4]),  # the same text, split elsewhere
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint() == fingerprint(train=ids[:4].astype(np.int64))


def test_text8_from_its_file_its_folder_and_its_zip(tmp_path):
    plain, zipped = tmp_path / "plain", tmp_path / "zipped"
    plain.mkdir()
    zipped.mkdir()
    file = written(plain / "text8", TEXT8)
    with zipfile.ZipFile(zipped / "text8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", TEXT8)
    places = (file, plain, zipped, zipped / "text8.zip")
    corpora = [text.wikipedia_corpus("text8", place, SIZES) for place in places]
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert len(corpora[0].symbols) == 27
    assert tuple(len(split) for split in (corpora[0].train, corpora[0].valid, corpora[0].test)) == SIZES
    assert corpora[0].decode(corpora[0].test) == TEXT8[95:].decode()
    refused("character 'T' at position 0", "The", call=corpora[0].encode)


def test_text8_is_found_among_the_prepared_data(tmp_path):
    (tmp_path / "root").mkdir()
    written(tmp_path / "root" / "text8", TEXT8)
    assert text.wikipedia_corpus("text8", None, SIZES).decode([1]) == "a"


def test_enwik8_is_bytes(tmp_path):
    raw = ("<page>naïve 文字</page>" * 5).encode()[:100]
    corpus = text.wikipedia_corpus("enwik8", written(tmp_path / "enwik8", raw), SIZES)
    assert corpus.symbols == tuple(chr(byte) for byte in sorted(set(raw)))
    ids = np.concatenate([corpus.train, corpus.valid, corpus.test])
    assert "".join(corpus.symbols[i] for i in ids).encode("latin-1") == raw
    assert len(corpus.encode("ï")) == 2
    assert corpus.decode(corpus.encode("naïve")) == "naïve"
    refused("byte 'Z' at position 0", "Z", call=corpus.encode)


def test_bad_wikipedia_files_are_refused(tmp_path):
    short = written(tmp_path / "text8", TEXT8)
    refused("text8 in .* has 100 bytes, expected 100,000,000; get the whole file", "text8", short)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(100_000_001)  # sparse
    refused("has 100,000,001 bytes, expected at most 100,000,000", "enwik8", tmp_path / "huge")
    refused("is not and does not hold enwik8 or enwik8.zip", "enwik8", tmp_path)
    written(tmp_path / "capital", TEXT8.replace(b"q", b"Q"))
    message = "is not text8: byte b'Q' at offset 4"
    refused(message, "text8", tmp_path / "capital", SIZES, call=text.wikipedia_corpus)
    written(tmp_path / "enwik8.zip", b"PK\x03\x04 and then nothing")
    refused("enwik8.zip is damaged or no zip or tar archive", "enwik8", tmp_path)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves whatever its server holds by path: a body, and how many bytes of it really come."""

    def do_GET(self):
        if self.path == "/slow.zip":
            self.server.released.wait(10)
        body, sent = self.server.files.get(self.path, (b"", 0))
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.released = {}, threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def test_download_keeps_a_whole_archive_and_asks_once(tmp_path, server):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text8", TEXT8)
    server.files["/a.zip"] = (path.read_bytes(), path.stat().st_size)
    target = download.download(f"{server.url}/a.zip", "advice")
    assert target.read_bytes() == path.read_bytes()
    server.files.clear()
    assert download.download(f"{server.url}/a.zip", "advice") == target
    assert os.listdir(target.parent) == ["a.zip"]


def test_a_download_that_fails_leaves_nothing(tmp_path, server):
    server.files |= {"/short.zip": (bytes(5000), 4000), "/page.zip": (b"<html>log in first</html>", 25)}
    for name, message in (
        ("gone.zip", r"cannot reach http.*gone.zip \(HTTP Error 404: Not Found\); advice"),
        ("short.zip", r"4000 of 5000 bytes came\); advice"),
        ("page.zip", r"what came is no archive\); advice"),
    ):
        refused(message, f"{server.url}/{name}", "advice", call=download.download)
    assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == []


def test_a_download_without_an_answer_gives_up_quickly(server, monkeypatch):
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.3)
    started = time.monotonic()
    refused("no answer from .* within 0.3 seconds; advice", f"{server.url}/slow.zip", "advice", call=download.download)
    assert time.monotonic() - started < 5
    server.released.set()


def test_without_a_network_the_message_names_the_way_out(monkeypatch):
    def unreachable(url, advice):
        raise ValueError(f"cannot reach {url}; {advice}")

    monkeypatch.setattr(download, "connect", unreachable)
    for name in ("ptb", "text8", "enwik8"):
        message = refused("cannot reach http://.*; pass --data-dir with", name)
        assert re.search({"ptb": "ptb.train.txt"}.get(name, f"{name}.zip"), message)


def test_download_into_a_folder_that_cannot_be_written(tmp_path, server):
    written(tmp_path / "root", b"a file where the folder should be")
    server.files["/a.zip"] = (b"PK\x05\x06" + bytes(18), 22)
    refused(r"cannot download .* to .*; advice", f"{server.url}/a.zip", "advice", call=download.download)
    assert (tmp_path / "root").read_bytes() == b"a file where the folder should be"
