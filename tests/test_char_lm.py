"""experiments/char_lm.py: it trains, survives a kill, and says in one line what is wrong with its input."""

import dataclasses
import json
import os
import shutil
import zipfile
from functools import partial
from pathlib import Path

import char_lm
import jax
import jax.numpy as jnp
import pytest
from char_lm_presets import LEVERS
from test_language_model import COUNTS

from hyperjax.data import evaluation_windows, load_corpus
from hyperjax.data.text import wikipedia_corpus
from hyperjax.recurrent import CELLS, PAPER_MODELS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "char_lm.py"
TINY = [
    *("--model=lstm", "--units=8", "--keep=0.9", "--batch=4", "--length=16", "--eval-batch=32", "--learning-rate=0.01"),
    *("--steps=240", "--eval-every=60", "--log-every=7", "--sample-length=20", "--prime-length=10"),
]


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = [f"{n} green bottles, and {n * n % 97} are hanging on the wall." for n in range(400)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(corpus_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    arguments = [*TINY, f"--corpus={corpus_file}", f"--workdir={workdir}"]
    assert char_lm.main(arguments) == 0
    return workdir, arguments


def test_a_run_leaves_what_it_should(finished, capsys):
    workdir, arguments = finished
    names = {path.name for path in workdir.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "timings.jsonl",
        "summary.json",
        "curves.png",
        "sample.txt",
        "checkpoints",
    }
    summary = json.loads((workdir / "summary.json").read_text())
    needed = "valid_bpc test_bpc chars_per_second params params_unique seconds device jax_version git_commit seed"
    assert set(needed.split()) <= summary.keys()
    assert not any(isinstance(value, dict | list) for value in summary.values())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    valid = {row["step"]: row["valid_bpc"] for row in rows if "valid_bpc" in row}
    assert list(valid) == [60, 120, 180, 240]
    assert summary["valid_bpc"] == valid[summary["best_step"]] == min(valid.values())
    assert valid[240] < valid[60] < 6
    assert len((workdir / "sample.txt").read_text(encoding="utf-8")) == 31
    capsys.readouterr()
    assert char_lm.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "holds a finished run" in printed
    assert f"{summary['test_bpc']}" in printed


def test_several_steps_a_call_train_the_same(corpus_file, tmp_path):
    options = ["--steps=35", "--eval-every=20", "--log-every=10", f"--corpus={corpus_file}"]
    for each in (1, 10):
        assert (
            char_lm.main([*TINY[:-5], *options, f"--workdir={tmp_path / str(each)}", f"--steps-per-call={each}"]) == 0
        )
    one, ten = (
        [json.loads(line) for line in (tmp_path / each / "metrics.jsonl").read_text().splitlines()]
        for each in ("1", "10")
    )
    assert [row["step"] for row in one] == [row["step"] for row in ten] == [10, 20, 20, 30, 35, 35]
    for first, second in zip(one, ten, strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def test_values_edited_into_nonsense_are_not_drawn_or_averaged(finished, tmp_path):
    workdir, arguments = finished
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "summary.json").unlink()
    for name in ("metrics.jsonl", "timings.jsonl"):
        rows = [json.loads(line) for line in (copy / name).read_text().splitlines()]
        rows[0] = {key: ["nonsense"] if key != "step" else value for key, value in rows[0].items()}
        (copy / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert char_lm.main([*arguments, f"--workdir={copy}"]) == 0
    one, other = (json.loads((each / "summary.json").read_text()) for each in (workdir, copy))
    assert one["test_bpc"] == other["test_bpc"]


def test_evaluation_is_the_same_at_any_batch_size(corpus_file):
    corpus = load_corpus(str(corpus_file))
    config = char_lm.Config(model="hyper_lstm", units=12, hyper_units=4)
    model = char_lm.make_model(config, len(corpus.symbols))
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    bpc = char_lm.make_bpc(model)
    values = [bpc(params, evaluation_windows(corpus.valid, batch, 25)) for batch in (1, 7, 40)]
    assert max(values) - min(values) < 1e-5


def parameters(config, vocabulary):
    model = char_lm.make_model(config, vocabulary)
    tree = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("preset", "vocabulary", "budget"), [("quick", 104, 350_000), ("cpu", 50, 1_000_000)])
def test_models_of_a_preset_have_equal_parameters_and_recipes(preset, vocabulary, budget):
    configs = [char_lm.defaults(preset, model) for model in CELLS]
    assert [round(parameters(config, vocabulary) / budget, 2) for config in configs] == [1.0] * 5
    recipes = {(c.keep, c.batch, c.length, c.epochs, c.learning_rate, c.clip, c.decay, c.hyper_units) for c in configs}
    assert len(recipes) == 1


@pytest.mark.parametrize("row", PAPER_MODELS)
def test_the_paper_preset_is_the_papers(row):
    config = char_lm.defaults("paper", row)
    assert parameters(config, 50) == COUNTS[row]
    assert (config.corpus, config.batch, config.length, config.learning_rate, config.clip) == ("ptb", 128, 100, 1e-3, 1)
    assert config.decay == 0
    assert config.keep == {"ln_hyper_lstm_large": 0.85, "ln_hyper_lstm_2x": 0.8}.get(row, 0.9)


@pytest.mark.parametrize("row", PAPER_MODELS)
def test_the_reduced_preset_is_a_quarter_of_the_papers(row):
    whole, config = char_lm.defaults("paper", row), char_lm.defaults("reduced", row)
    assert config.units / whole.units == config.hyper_units / 125 == 0.256
    assert (config.layers, config.embedding, config.epochs) == (whole.layers, whole.embedding, 5)
    assert char_lm.make_model(config, 50).cell == PAPER_MODELS[row]["cell"]
    assert 1 / 16.5 < parameters(config, 50) / parameters(whole, 50) < 1 / 11


def test_every_lever_changes_one_thing():
    base = dataclasses.asdict(char_lm.defaults("levers", "base"))
    for name, options in LEVERS.items():
        config = char_lm.defaults("levers", name)
        char_lm.check(config)
        assert parameters(config, 50) > 0
        changed = {key for key, value in dataclasses.asdict(config).items() if value != base[key]} - {"model"}
        assert changed == set(options)
    assert len(LEVERS) == len({str(options) for options in LEVERS.values()}) == 14


def test_the_recipe_beyond_the_paper_has_no_more_parameters_than_its_largest_row():
    config = char_lm.defaults("beyond")
    char_lm.check(config)
    assert 14_300_000 < parameters(config, 50) <= 14_407_714
    with pytest.raises(ValueError, match="expected one of --preset beyond of ln_hyper_lstm"):
        char_lm.defaults("beyond", "lstm")


def test_everything_beyond_the_paper_at_once_resumes_to_the_same_run(corpus_file, tmp_path, capsys):
    options = ["--preset=levers", "--model=highway", f"--corpus={corpus_file}", "--units=8", "--hyper-units=4"]
    options += ["--input-units=6", "--tied", "--gate-input", "--keep=0.9", "--variational", "--weight-keep=0.9"]
    options += ["--weight-decay=0.1", "--warmup=3", "--decay=1", "--average=0.9", "--batch=4", "--length=10"]
    options += ["--steps=8", "--eval-every=4", "--log-every=1", "--sample-length=5", "--eval-batch=4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert char_lm.main([*options, f"--workdir={whole}"]) == 0
    shutil.copytree(whole, cut)
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "8")
    capsys.readouterr()
    assert char_lm.main([*options, f"--workdir={cut}"]) == 0
    assert "resuming after step 4 of 8" in capsys.readouterr().out
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    first, second = (json.loads((each / "summary.json").read_text()) for each in (whole, cut))
    assert first["test_bpc"] == second["test_bpc"]


@pytest.mark.parametrize(("row", "units"), [("ln_lstm", 1800), ("ln_hyper_lstm", 1800), ("ln_hyper_lstm_2048", 2048)])
def test_the_wikipedia_preset_is_the_papers(row, units):
    config = char_lm.defaults("wikipedia", row)
    assert (config.corpus, config.units, config.length, config.layers) == ("enwik8", units, 250, 1)
    assert (config.hyper_units, config.embedding, config.learning_rate, config.clip) == (256, 64, 1e-3, 1)


@pytest.mark.parametrize("name", ["text8", "enwik8"])
def test_the_wikipedia_preset_trains_on_a_small_file_of_the_same_format(name, tmp_path, monkeypatch, capsys):
    text = b"a text of the same format " * 400 if name == "text8" else "<page>naïve 文字</page>\n".encode() * 400
    (tmp_path / name).write_bytes(text[:9000])
    load = partial(wikipedia_corpus, sizes=(8000, 500, 500))
    monkeypatch.setattr(char_lm, "load_corpus", load)
    small = ["--units=8", "--hyper-units=4", "--embedding=2", "--batch=4", "--steps=3", "--sample-length=5"]
    arguments = ["--preset=wikipedia", f"--corpus={name}", f"--data-dir={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    assert char_lm.main([*arguments, *small]) == 0
    assert f"{name}: 8,000 / 500 / 500 characters" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["corpus"], summary["steps"]) == (name, 3)
    assert 0 < summary["test_bpc"] < 8


def refused(capsys, *arguments):
    """Runs the script on bad input; returns its one line."""
    with pytest.raises(SystemExit) as stop:
        char_lm.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Fails the test if anything is compiled."""

    def compiled(name, *_, **__):
        assert "backend_compile" not in name, name

    before = jax._src.monitoring.get_event_duration_listeners()
    jax.monitoring.register_event_duration_secs_listener(compiled)
    yield
    jax._src.monitoring.unregister_event_duration_listener(compiled)
    assert jax._src.monitoring.get_event_duration_listeners() == before


@pytest.mark.usefixtures("nothing_compiled")
class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (
                ["--preset=huge"],
                "preset is 'huge', expected one of quick, cpu, reduced, paper, wikipedia, levers, beyond",
            ),
            (["--model=gru"], "model is 'gru', expected one of --preset quick of lstm, ln_lstm, hyper_rnn"),
            (["--preset=paper", "--model=hyper_rnn"], "lstm_2x1000"),
            (["--unitz=3"], "--unitz is not a field of this experiment; did you mean --units?"),
            (["--learning-rate=-0.1"], "--learning-rate is -0.1, expected a positive number"),
            (["--learning-rate=nan"], "--learning-rate is nan, expected"),
            (["--keep=0"], "--keep is 0.0, expected a probability in (0, 1]"),
            (["--keep=1.01"], "--keep is 1.01, expected a probability in (0, 1]"),
            (["--decay=2"], "--decay is 2.0, expected a fraction"),
            (["--batch=0"], "--batch is 0, expected a whole number of at least 1"),
            (["--remat-chunk=0"], "--remat-chunk is 0"),
            (["--steps-per-call=7"], "--eval-every is 200, expected a multiple of --steps-per-call, 7"),
            (["--part-mib=0"], "--part-mib is 0"),
            (["--clip=inf"], "--clip is inf"),
            (["--weight-keep=0"], "--weight-keep is 0.0, expected a probability in (0, 1]"),
            (["--input-units=-1"], "--input-units is -1, expected a whole number of at least 0"),
            (["--warmup=-5"], "--warmup is -5, expected a whole number of at least 0"),
            (["--weight-decay=-1"], "--weight-decay is -1.0, expected a number of at least 0"),
            (["--average=1"], "--average is 1.0, expected a number in [0, 1)"),
            (["--tied"], "--tied is True, expected --input-units of at least 1 with it"),
            (["--skip=dense"], "--skip"),
            (["--model=lstm", "--gate-input"], "gate_input is True, but the cell 'lstm' is no HyperLSTM"),
            (["--preset=levers", "--model=lstm"], "model is 'lstm', expected one of --preset levers of base, "),
            ([f"--seed={2**32}"], "--seed is 4294967296, expected a whole number from 0"),
            ([f"--workdir={'long' * 99}"], "cannot write in longlong"),
            (["--batch=1000", "--length=1000"], "batch 1000 x length 1000 needs 1000001 characters"),
            (["--corpus=absent"], "corpus 'absent' is unknown"),
        ],
    )
    def test_values(self, tmp_path, monkeypatch, capsys, arguments, line):
        monkeypatch.chdir(tmp_path)
        assert line in refused(capsys, *arguments)
        assert list(tmp_path.iterdir()) == []  # bad input leaves no workdir behind

    @pytest.mark.parametrize(("content", "line"), [(b"", "is empty"), (b"caf\xe9 " * 99, "not UTF-8")])
    def test_text_files(self, tmp_path, capsys, content, line):
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        assert line in refused(capsys, f"--corpus={path}", f"--workdir={tmp_path / 'run'}")

    def test_penn_treebank_files(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
        folder = tmp_path / "ptb"
        folder.mkdir()
        for split in ("train", "valid", "test"):
            (folder / f"ptb.{split}.txt").write_text(" no it was n't black monday \n")
        workdir = f"--workdir={tmp_path / 'run'}"
        assert "SHA-256" in refused(capsys, "--preset=cpu", f"--data-dir={folder}", workdir)
        archive = tmp_path / "ptb.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in folder.iterdir():
                file.write(path, path.name)
        archive.write_bytes(archive.read_bytes()[:150])
        assert "damaged" in refused(capsys, "--preset=cpu", f"--data-dir={archive}", workdir)

    def test_workdirs(self, finished, corpus_file, tmp_path, capsys):
        workdir, arguments = finished
        kept = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        line = refused(capsys, *arguments, "--units=9", "--clip=2")
        assert "another configuration: units 8 -> 9, clip 1.0 -> 2.0; use the old values" in line
        assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == kept
        assert "cannot write in" in refused(capsys, *TINY, f"--corpus={corpus_file}", f"--workdir={corpus_file}/run")

    @pytest.mark.parametrize(
        ("name", "content", "line"),
        [
            ("config.json", "units: 8", "config.json cannot be read"),
            ("config.json", '{"units": {"eight": []}, "seed": "x"}', "another configuration: model 'ln_hyper_lstm'"),
            ("summary.json", "[1, 2", "summary.json cannot be read"),
            ("metrics.jsonl", '{"step": 7}\nnonsense\n{"step": 14}\n', "line 2 of"),
            ("timings.jsonl", '{"stop": 7}\n{"step": 14}\n', "line 1 of"),
        ],
    )
    def test_files_edited_into_nonsense(self, finished, tmp_path, capsys, name, content, line):
        workdir, arguments = finished
        copy = tmp_path / "run"
        shutil.copytree(workdir, copy)
        if name != "summary.json":
            (copy / "summary.json").unlink()
        (copy / name).write_text(content)
        assert line in refused(capsys, *arguments, f"--workdir={copy}")
        assert (copy / name).read_text() == content

    def test_a_second_process_in_the_workdir(self, corpus_file, tmp_path, capsys):
        arguments = [*TINY, f"--corpus={corpus_file}", f"--workdir={tmp_path}"]
        config = char_lm.training.parse(char_lm.defaults, argv=arguments)
        with char_lm.training.Workdir(tmp_path, config, char_lm.FREE).open():
            assert f"is in use by process {os.getpid()}" in refused(capsys, *arguments)


@pytest.mark.parametrize("word", ["brown", "gr\N{LATIN SMALL LETTER E WITH CIRCUMFLEX}en"])  # old symbols, a new one
def test_another_text_under_the_same_name_is_refused(corpus_file, tmp_path, capsys, word):
    text = tmp_path / "text.txt"
    text.write_bytes(corpus_file.read_bytes())
    arguments = [*TINY, f"--corpus={text}", f"--workdir={tmp_path / 'run'}", "--steps=4"]
    assert char_lm.main(arguments) == 0
    (tmp_path / "run" / "summary.json").unlink()
    capsys.readouterr()
    text.write_text(text.read_text().replace("green", word), encoding="utf-8")
    assert "has changed since this run began" in refused(capsys, *arguments)
    text.write_bytes(corpus_file.read_bytes())
    assert char_lm.main(arguments) == 0


def test_a_loss_that_is_not_finite_exits_with_1(corpus_file, tmp_path, capsys):
    arguments = [*TINY, f"--corpus={corpus_file}", f"--workdir={tmp_path}", "--learning-rate=3e38"]
    with pytest.raises(SystemExit) as stop:
        char_lm.main(arguments)
    assert stop.value.code == 1
    assert "at step" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "summary.json").exists()
