"""experiments/bench_routing.py: its figures, its table, the networks it compares, and what it refuses."""

import json

import bench_routing as bench
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import routing

SIZES = {"features": 3, "levels": 2, "subnetworks": 2, "width": 8, "tasks": 2, "tower": 4, "batch": 5, "repeats": 1}
TINY = [*(f"--{name}={value}" for name, value in SIZES.items()), "--serving-repeats=1"]


def random_variables(model, features):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, features)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def test_measures_writes_and_prints(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench.main([*TINY, f"--json={path}"]) == 0
    figures = json.loads(path.read_text())
    for name in ("ungated", "snr", "snr_aver", "mmoe", "shared_bottom"):
        assert abs(figures[f"params_{name}"] - figures["params_ungated"]) < 0.1 * figures["params_ungated"]
        assert figures[f"flops_{name}_step"] > 2 * figures[f"flops_{name}_serve"]
        for kind in ("step", "serve"):
            speed = figures[f"flops_{name}_{kind}"] / figures[f"seconds_{name}_{kind}"]
            assert figures[f"flops_per_second_{name}_{kind}"] == pytest.approx(speed)
    assert figures["params_snr"] == figures["params_ungated"] + 2 * 2 * 2  # a gate for each connection
    assert figures["flops_dense_serve"] == figures["flops_masked_serve"] == figures["flops_ungated_serve"]
    assert figures["flops_compact_serve"] < figures["flops_dense_serve"]
    assert figures["params_compact"] < figures["params_dense"] == figures["params_ungated"]
    assert figures["share_gone"] >= figures["share_closed"] == 0.5
    for name, other, kind in [
        *(("snr", "ungated", "step"), ("mmoe", "snr", "step"), ("shared_bottom", "snr", "step")),
        *(("dense", "compact", "serve"), ("masked", "compact", "serve"), ("dense", "ungated", "serve")),
    ]:
        ratio = figures[f"seconds_{name}_{kind}"] / figures[f"seconds_{other}_{kind}"]
        assert figures[f"ratio_{name}_over_{other}"] == pytest.approx(ratio)
    printed = capsys.readouterr().out
    assert "3 inputs, 2 levels of 2 sub-networks of width 8, 2 tasks, batch 5" in printed
    assert f"takes {figures['ratio_snr_over_ungated']:.2f} times as long as one without; asked: at most 1.2" in printed
    assert f"compact, {100 * figures['share_gone']:.0f} % of the connections gone, is" in printed


def test_closed_gates_have_the_share_and_no_task_is_lost():
    config = bench.Config(**SIZES)
    model = bench.snr(config, bench.make_data(config), config.width)
    variables = bench.close_gates(model, random_variables(model, 3), 0.5, seed=1)
    gates = np.concatenate([z.ravel() for z in routing.served_gates(model, variables).values()])
    assert (gates == 0).sum() == gates.size // 2
    assert np.unique(gates[gates > 0]).size > 1
    assert not routing.lost_tasks(model, variables)


def test_networks_that_are_not_equal_are_not_timed(monkeypatch):
    config = bench.Config(**SIZES)
    ungated = bench.snr(config, bench.make_data(config), config.width, gates=None)
    monkeypatch.setattr(bench.routing, "fold_gates", lambda model, variables: (ungated, random_variables(ungated, 3)))
    with pytest.raises(AssertionError, match=r"the dense network is .* from the masked one"):
        bench.pruned(config, bench.make_data(config))


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--width=0", "--width is 0, expected a whole number of at least 1"),
        ("--serving-repeats=0", "--serving-repeats is 0, expected a whole number of at least 1"),
        ("--seed=-1", "--seed is -1, expected a whole number of at least 0"),
        ("--closed=1", "--closed is 1.0, expected a share of at least 0 and below 1"),
        ("--closed=0.99", "--closed is 0.99, which cut a task off the input in 100 draws"),
        ("--json=/absent/folder/bench.json", "cannot be written"),
        ("--json=.", "cannot be written"),
        ("--unit=3", "--unit is not a field"),
    ],
)
def test_bad_input_is_one_line(argument, line, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*TINY, argument])
    assert stop.value.code == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert line in printed
