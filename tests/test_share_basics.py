"""experiments/share_basics.py: what a run leaves, what is tied, resuming, graphs from files, bad input."""

import json

import basics_cases as cases
import basics_graphs as graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import share_basics as script

from hyperjax import sharing, training

TINY = ["--steps=3", "--batch=8", "--repeats=1"]


pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert script.main([*TINY, f"--workdir={workdir}"]) == 0
    return workdir


def test_a_run_leaves_what_it_should(finished):
    summary = json.loads((finished / "summary.json").read_text())
    needed = "params params_unique seconds device jax_version git_commit seed"
    assert set(needed.split()) <= summary.keys()
    for name, variants in cases.VARIANTS.items():
        unit = "bpc" if name == "embedding" else "accuracy"
        for variant in variants:
            own = {key: summary[f"{name}_{variant}_{key}"] for key in ("params_unique", "params_bytes")}
            adam, peak = (summary[f"{name}_{variant}_{key}_bytes"] for key in ("optimizer", "peak"))
            assert own["params_bytes"] == 4 * own["params_unique"]
            assert 8 * own["params_unique"] <= adam <= 8 * own["params_unique"] + 8
            assert peak > own["params_bytes"] + adam
            assert 0 <= summary[f"{name}_{variant}_{unit}_mean"] < 9
            assert summary[f"{name}_{variant}_ms_per_step"] > 0
        assert summary[f"{name}_{variants[-2]}_params_unique"] < summary[f"{name}_{variants[-1]}_params_unique"]
        between = {variant for variant in variants if f"{name}_{variant}_cosine_mean" in summary}
        assert between == (set() if name == "student" else {"tied"})  # a teacher that lends gets no gradient back
        assert all(-1.001 <= summary[f"{name}_{variant}_cosine_mean"] <= 1.001 for variant in between)
    assert summary["conv_untied_params_unique"] - summary["conv_tied_params_unique"] == 2 * (9 * 16 * 16 + 16)
    assert summary["student_own_params_unique"] - summary["student_borrowing_params_unique"] == 9 * 4 + 4 + 9 * 4 * 8
    rows = training.read_lines(finished / "metrics.jsonl")
    wanted = [(name, variant) for name, variants in cases.VARIANTS.items() for variant in variants]
    assert [(row["case"], row["variant"]) for row in rows] == wanted
    assert (finished / "basics.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_after_the_last_network(finished, tmp_path, monkeypatch, capsys):
    command, done, fit = [*TINY, "--cases", "conv", "graph", f"--workdir={tmp_path}"], [], script.fit

    def stop_at_the_third(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args[-1])
        return fit(*args)

    with monkeypatch.context() as patched:
        patched.setattr(script, "fit", stop_at_the_third)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            script.main(command)
    assert script.main(command) == 0
    assert "resuming after 2 networks" in capsys.readouterr().out
    rows = {row["case"] + row["variant"]: row for row in training.read_lines(tmp_path / "metrics.jsonl")}
    whole = {row["case"] + row["variant"]: row for row in training.read_lines(finished / "metrics.jsonl")}
    for name in ("convtied", "convuntied", "graphtied", "graphuntied"):
        assert {k: v for k, v in rows[name].items() if k != "step"} == {
            k: v for k, v in whole[name].items() if k != "step"
        }
    assert script.main(command) == 0
    assert "holds a finished run; choose another --workdir" in capsys.readouterr().out


def test_a_student_has_its_teachers_channels_and_moves_none():
    config, case = script.Config(steps=4, batch=8), cases.student(8, 0)
    net, params = script.fit(config, case, "borrowing", 0, "student")
    full = net.expand(params)
    np.testing.assert_array_equal(full["student_0"]["kernel"][..., :4], full["teacher_0"]["kernel"][..., :4])
    np.testing.assert_array_equal(full["student_1"]["kernel"][:, :, :4, :8], full["teacher_1"]["kernel"][:, :, :4, :8])
    other, teacher = (script.fit(config, case, variant, 0, "student")[1] for variant in ("own", "teacher"))
    for name in ("teacher_0", "teacher_1", "teacher_head"):
        jax.tree.map(np.testing.assert_array_equal, params[name], teacher[name])
        jax.tree.map(np.testing.assert_array_equal, other[name], teacher[name])
    assert set(params["student_1"]["kernel"]) == {"rest_2", "rest_3"}


@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_what_is_shared_has_its_own_rate_tied_or_not(variant):
    config, case = script.Config(), cases.tasks(8, 0)
    net = sharing.tie(case.module, case.variants[variant].ties, case.example)
    params = net.fit(script.start(case, 0))
    if variant == "tied":
        assert script.groups(case, variant, net, params) == net.labels(params)
    step, state = script.make_step(config, case, variant, net, params)
    before = jax.tree.map(np.array, params)  # the step takes the memory of its arguments
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), step(params, state, case.batch_at(0))[0], before)
    assert ("conv_shuffled" in moved) == (variant == "untied")
    for name, each in moved.items():  # Adam's first step is the rate
        rate = config.private_rate if name.startswith("head") else config.shared_rate
        assert max(jax.tree.leaves(each)) == pytest.approx(rate, rel=1e-2)


def test_other_cases_have_one_rate():
    config, case = script.Config(learning_rate=2e-3), cases.graph(8, 0)
    net = sharing.tie(case.module, case.variants["tied"].ties, case.example)
    params = net.fit(script.start(case, 0))
    step, state = script.make_step(config, case, "tied", net, params)
    before = jax.tree.map(np.array, params)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), step(params, state, case.batch_at(0))[0], before)
    assert max(jax.tree.leaves(moved)) == pytest.approx(2e-3, rel=1e-2)
    assert max(jax.tree.leaves(moved["layer_0"])) == pytest.approx(2e-3, rel=1e-2)


def test_the_karate_club():
    club = graphs.karate(0)
    assert len(club.edges) == 78
    degree = np.bincount(club.edges.ravel(), minlength=34)
    assert (degree[0], degree[33], degree[32], degree[11]) == (16, 17, 12, 1)
    assert len({tuple(edge) for edge in club.edges.tolist()}) == 78
    assert club.labels.sum() == 17
    a = club.normalized()
    np.testing.assert_allclose(a, a.T)
    assert np.linalg.eigvalsh(a).max() == pytest.approx(1, abs=1e-5)


def test_weights_of_a_graph_apply_to_another():
    case = cases.graph(8, 0)
    net, params = script.fit(script.Config(steps=2), case, "tied", 0, "graph")
    edges = np.array([[0, 1], [1, 2], [3, 4]])
    other = graphs.Graph(edges, np.ones((5, 16), np.float32), np.zeros(5, np.int32), np.ones(5, bool))
    assert net.apply({"params": params}, (other.normalized(), other.features)).shape == (5, 2)


def arrays(**changes):
    rng = np.random.default_rng(0)
    found = {"edges": rng.integers(0, 12, (30, 2)), "features": rng.normal(size=(12, 5)), "labels": np.arange(12) % 3}
    return {name: value for name, value in (found | changes).items() if value is not None}


def test_graphs_are_read_from_files(tmp_path):
    np.savez(tmp_path / "graph.npz", **arrays())
    read = graphs.read_graph(tmp_path / "graph.npz")
    assert (read.train.sum(), read.features.dtype, len(read.edges)) == (6, np.float32, 30)
    np.savez(tmp_path / "graph.npz", **arrays(train_mask=np.arange(12) < 5))
    assert graphs.read_graph(tmp_path / "graph.npz").train.sum() == 5
    content = "p1\t0\t1\tB\np2\t1\t0\tA\np3\t1\t1\tB\np4\t0\t0\tA\n"
    (tmp_path / "cora.content").write_text(content)
    (tmp_path / "cora.cites").write_text("p1\tp2\np3\tp1\nabsent\tp1\n")
    read = graphs.read_graph(tmp_path / "cora.content")
    assert read.edges.tolist() == [[0, 1], [2, 0]]
    assert read.labels.tolist() == [1, 0, 1, 0]
    assert read.features.tolist() == [[0, 1], [1, 0], [1, 1], [0, 0]]
    command = [*TINY, "--cases", "graph", f"--data-file={tmp_path / 'cora.content'}", f"--workdir={tmp_path / 'run'}"]
    assert script.main(command) == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"edges": None}, "lacks edges, expected edges, features and labels"),
        ({"edges": np.array([[0, 12]])}, "has edges from node 0 to 12, expected 0 to 11"),
        ({"edges": np.zeros((3, 3), int)}, "has edges (3, 3) of int64, expected [edges, 2]"),
        ({"labels": np.arange(11)}, "has features (12, 5) and labels (11,) of int64"),
        ({"labels": np.linspace(0, 1, 12)}, "labels (12,) of float64"),
        ({"features": np.full((12, 5), np.nan)}, "features that are not finite"),
        ({"features": np.full((12, 5), 1e300)}, "features that are not finite in float32"),
        ({"features": np.full((12, 5), "x")}, "has features (12, 5) of <U1, expected at least one real number"),
        ({"features": np.zeros((12, 0))}, "has features (12, 0) of float64"),
        ({"labels": np.zeros(12, int)}, "has labels from 0 to 0, expected two classes or more"),
        ({"labels": np.arange(12) * 10**6}, "has labels from 0 to 11000000, expected two classes or more"),
        ({"edges": np.zeros((0, 2), int)}, "has no edges between its nodes"),
        ({"train_mask": np.ones(12, bool)}, "has a train_mask (12,) of bool, expected bool [12], some True, some not"),
        ({"train_mask": np.ones(12)}, "has a train_mask (12,) of float64"),
    ],
)
def test_bad_graphs_are_one_line(tmp_path, capsys, changes, line):
    np.savez(tmp_path / "graph.npz", **arrays(**changes))
    assert_refused(["--cases", "graph", f"--data-file={tmp_path / 'graph.npz'}"], tmp_path / "run", line, capsys)


def test_bad_files_are_one_line(tmp_path, capsys):
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "whole.npz", **arrays())
    changed = bytearray((tmp_path / "whole.npz").read_bytes())
    changed[150] ^= 255
    for damaged in (b"", (tmp_path / "array.npy").read_bytes(), bytes(changed), bytes(changed[:-60])):
        (tmp_path / "b.npz").write_bytes(damaged)
        assert_refused(["--cases", "graph", f"--data-file={tmp_path / 'b.npz'}"], tmp_path / "run", "no whole", capsys)
    for name, text, line in (
        ("a.npz", "no zip", "is no whole npz"),
        ("a.content", "p1\t0\tA\n", "expected an .npz, or a .content with a.cites beside it"),
        ("a.txt", "text", "expected an .npz, or a .content"),
    ):
        (tmp_path / name).write_text(text)
        assert_refused(["--cases", "graph", f"--data-file={tmp_path / name}"], tmp_path / "run", line, capsys)
    (tmp_path / "a.cites").write_text("p1 p1 p1\n")
    path = tmp_path / "a.content"
    assert_refused(["--cases", "graph", f"--data-file={path}"], tmp_path / "run", "has a line without two ids", capsys)
    (tmp_path / "a.cites").write_text("p1 p2\n")
    for text, line in (
        ("p1\tx\tA\n", "a feature that is no number"),
        ("p1\t0\tA\np2\tA\n", "lines of several lengths"),
        ("p1\t0\tA\np1\t1\tB\n", "has 2 lines and 1 ids"),
        ("p1\t0\tcaf\udce9\np2\t1\tB\n", "is no text in UTF-8 (byte 8)"),
    ):
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        assert_refused(["--cases", "graph", f"--data-file={path}"], tmp_path / "run", line, capsys)
    path.write_text("p1\t0\tA\np2\t1\tB\np3\t1\tB\n")
    (tmp_path / "a.cites").write_text("q1 q2\n")
    assert_refused(["--cases", "graph", f"--data-file={path}"], tmp_path / "run", "has no edges between", capsys)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--preset=paper"], "--preset is paper, expected quick or cpu"),
        (["--cases", "mlp"], "--cases is ('mlp',), expected some of conv, lstm"),
        (["--cases", "conv", "conv"], "expected each once"),
        (["--steps=0"], "--steps is 0, expected 1 or more"),
        (["--shared-rate=nan"], "--shared-rate is nan, expected a positive number"),
        (["--seed=-1"], "--seed is -1, expected a whole number from 0"),
        (["--cases", "graph", "--data-file=absent.npz"], "--data-file is absent.npz, expected a file"),
        (["--cases", "conv", "--data-file=absent.npz"], "expected none without the case graph"),
        (["--case", "conv"], "did you mean --cases?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, line):
    assert_refused(arguments, tmp_path / "run", line, capsys)


def assert_refused(arguments, workdir, line, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main([*TINY, f"--workdir={workdir}", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error
    assert not workdir.exists()
