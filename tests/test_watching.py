"""What is seen of a run while it trains: a trace with its dearest operations, and TensorBoard."""

import gzip
import importlib.util
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import test_loop as loop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from hyperjax.training import FitConfig, Profile, lay_out, read_lines
from hyperjax.training.board import Board
from hyperjax.training.profiling import WARM_UP, Cost, _own_times, operation_names, table


def two_products(x, w):
    with jax.named_scope("small"):
        x = x @ w["small"]

    def body(x, _):
        with jax.named_scope("large"):
            return jnp.tanh(x @ w["large"]), None

    return jax.lax.scan(body, x, None, 20)[0].sum()


STEP = jax.jit(jax.value_and_grad(two_products, argnums=1))
X, W = jnp.ones((64, 256)), {"small": jnp.ones((256, 256)), "large": jnp.ones((256, 256))}


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    profile = Profile(tmp_path_factory.mktemp("profile"), 4)
    for number in range(10):
        profile.call(STEP, X, W)
        assert (profile.report is not None) == (number + 1 >= WARM_UP + 4)
    return profile


def test_the_dearest_operations_are_those_of_the_loop(profile):
    lines = profile.report.splitlines()
    assert lines[0].startswith("the 10 dearest of ")
    shares = [float(line.split("%")[0]) for line in lines[2:12]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    products = [line for line in lines[2:12] if "large/dot_general" in line]
    assert any(line.endswith(", back") for line in products)
    assert any(not line.endswith(", back") for line in products)
    assert max(float(line.split()[2]) for line in products) >= 20  # as often as the loop runs


def test_the_trace_opens_in_perfetto(profile):
    (path,) = profile.folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))
    events = events["traceEvents"] if isinstance(events, dict) else events
    assert any("dur" in event for event in events)
    assert str(path.parent) in profile.report
    assert list(path.parent.glob("*.xplane.pb"))  # and in XProf


def test_a_run_that_is_too_short_still_ends_its_trace(tmp_path):
    profile = Profile(tmp_path, 100)
    for _ in range(WARM_UP + 2):
        profile.call(STEP, X, W)
    profile.finish()
    assert "operations" in profile.report
    second = Profile(tmp_path / "none", 100)
    second.call(STEP, X, W)
    second.finish()
    assert second.report is None


def event(name, start, length, module="jit_step"):
    return SimpleNamespace(start_ns=start, duration_ns=length, stats=[("hlo_op", name), ("hlo_module", module)])


def test_an_operation_is_not_charged_for_those_within_it():
    events = [event("while", 0, 100), event("dot", 10, 30), event("dot", 50, 30), event("copy", 55, 5)]
    events += [event("add", 120, 10), event("dot", 200, 40, "jit_other"), SimpleNamespace(stats=[("thread", 3)])]
    found = list(_own_times(SimpleNamespace(events=events), "jit_step"))
    assert sorted(found) == [("add", 10), ("copy", 5), ("dot", 25), ("dot", 30), ("while", 40)]


def test_names_say_where_in_the_model():
    module, names = operation_names(STEP.lower(X, W).compile().as_text())
    assert module == "jit_two_products"
    assert {"large/dot_general", "large/dot_general, back", "small/dot_general"} <= set(names.values())


def test_the_table_is_in_shares_and_calls():
    text = table([Cost("a", 0.006, 20), Cost("b", 0.002, 2)], {"a": "Model/dot_general"}, steps=2)
    assert text.splitlines() == [
        "the 2 dearest of 2 operations, on all threads and devices together:",
        "  share   ms/call  runs/call  operation",
        "  75.0%     3.000       10.0  a: Model/dot_general",
        "  25.0%     1.000        1.0  b",
    ]


def test_a_run_that_is_profiled_is_the_same_run(tmp_path, capsys):
    for name in ("plain", "watched"):
        (tmp_path / name).mkdir()
    assert loop.run(tmp_path / "plain")[0] == loop.run(tmp_path / "watched", profile=5)[0]
    assert "dearest of" in capsys.readouterr().out
    assert list((tmp_path / "watched" / "profile").rglob("*.xplane.pb"))


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="calls is 0, expected 1 or more"):
        Profile(tmp_path, 0)
    with pytest.raises(ValueError, match="--profile is -1, expected a number of steps to record, or 0"):
        lay_out(FitConfig(profile=-1))
    with pytest.raises(ValueError, match="--max-skipped is -1, expected a whole number of at least 0"):
        lay_out(FitConfig(max_skipped=-1))


def scalars(folder):
    found = EventAccumulator(str(folder)).Reload()
    names = found.Tags()["tensors"]
    return {name: [(e.step, float(make_ndarray(e.tensor_proto))) for e in found.Tensors(name)] for name in names}


def test_tensorboard_shows_what_the_lines_say(tmp_path):
    loop.run(tmp_path)
    shown = scalars(tmp_path / "tensorboard")
    rows = read_lines(tmp_path / "m")
    for name in {name for row in rows for name in row} - {"step"}:
        wanted = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert shown[name] == wanted
    assert any(name.endswith("_per_second") for name in shown)


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    loop.run(tmp_path)
    assert not (tmp_path / "tensorboard").exists()


def test_a_board_that_cannot_be_written_is_given_up(tmp_path):
    (tmp_path / "file").touch()
    with Board(tmp_path / "file" / "board") as board:
        board.write(1, {"loss": 0.5})
        board.write(2, {"loss": 0.5})
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_is_no_number_is_not_drawn(tmp_path):
    with Board(tmp_path) as board:
        board.write(1, {"loss": 0.5, "skipped": "loss is nan"})
    assert set(scalars(tmp_path)) == {"loss"}
