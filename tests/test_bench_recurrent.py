"""experiments/bench_recurrent.py: its figures, its table, and what it refuses."""

import importlib.util
import json

import bench_recurrent as bench
import bench_recurrent_parts as parts
import jax
import jax.numpy as jnp
import pytest

from hyperjax.recurrent import FastRNN, HyperLSTM

TINY = [
    *("--units=8", "--hyper-units=4", "--embedding=2", "--features=3", "--batch=2", "--steps=3", "--repeats=1"),
    *("--memory-steps=64", "--remat-chunk=8"),
]


def test_measures_writes_and_prints(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench.main([*TINY, f"--json={path}"]) == 0
    figures = json.loads(path.read_text())
    for name in ("ours", "ours_bfloat16", "naive", "floor", "flax_lstm"):
        assert figures[f"seconds_{name}"] > 0
        assert figures[f"compile_seconds_{name}"] > 0
    for name in ("seconds_step_float32", "seconds_step_bfloat16", "counted_seconds"):
        assert figures[name] > 0
    assert figures["ratio_ours_over_floor"] == figures["seconds_ours"] / figures["seconds_floor"]
    assert 0 < figures["peak_bytes_remat"] < figures["peak_bytes_plain"]
    torch = importlib.util.find_spec("torch") is not None
    assert ("seconds_torch_lstm" in figures) == torch
    printed = capsys.readouterr().out
    assert "HyperLSTM, hyperjax" in printed
    assert "floor by counting" in printed
    assert ("not there" in printed) == (not torch or importlib.util.find_spec("labml_nn") is None)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--units=0", "--units is 0, expected a whole number of at least 1"),
        ("--hyper-units=9", "--hyper-units is 9, expected at most the --units, 8"),
        ("--json=/absent/folder/bench.json", "cannot be written"),
        ("--json=.", "cannot be written"),
        ("--unit=3", "--unit is not a field"),
        ("--steps=many", "--steps"),
    ],
)
def test_bad_input_is_one_line(argument, line, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*TINY, argument])
    assert stop.value.code == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert line in printed


COMPILED = """HloModule jit_f

%fused_add (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %add.1 = f32[2]{0} add(%p, %p)
}

%command_buffer (a: f32[2]) -> (f32[2], f32[4]) {
  %a = f32[2]{0} parameter(0)
  %one = f32[2]{0} fusion(%a), kind=kLoop, calls=%fused_add
  %two = (f32[2]{0}, s8[4]{0}) custom-call(%one, %a), custom_call_target="__cublas$gemm"
  ROOT %t = (f32[2]{0}, s8[4]{0}) tuple(%two)
}

%body.2 (s: (s32[], f32[2])) -> (s32[], f32[2]) {
  %s = (s32[], f32[2]{0}) parameter(0)
  %g = f32[2]{0} get-tuple-element(%s), index=1
  %call.1 = (f32[2]{0}, s8[4]{0}) call(%g), to_apply=%command_buffer
  %copy.1 = f32[2]{0} copy(%g)
  %many = (f32[2]{0}, f32[2]{0}, f32[2]{0}, f32[2]{0}, f32[2]{0}, /*index=5*/f32[2]{0}) fusion(%g), kind=kLoop, calls=%f
  ROOT %r = (s32[], f32[2]{0}) tuple(%g, %copy.1)
}

ENTRY %main.3 (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %w = (s32[], f32[2]{0}) while(%x), condition=%cond, body=%body.2
  ROOT %y = f32[2]{0} fusion(%w), kind=kLoop, calls=%fused_add
}
"""


def test_kernels_of_a_loop_are_those_of_its_body_and_its_command_buffers():
    assert parts.kernels_in_a_step(COMPILED) == [4]


def test_the_counted_floor_counts_each_product_once_forward_and_twice_backward():
    layer = FastRNN(HyperLSTM(8, hyper_units=4, embedding=2))
    weights = layer.bind(layer.init(jax.random.key(0), jnp.zeros((2, 1, 3)))).cell.weights(3)
    got = parts.counted_floor(weights, batch=2, steps=5, repeats=1)
    with_h = 8 * 4 * (8 + 4) + 4 * 4 * 4 + 4 * 12 * 2 + 12 * 2 * 8  # h, h_hat for its gates, for z; all z
    assert got["gflop"] * 1e9 == 2 * 5 * 2 * (3 * with_h + 2 * 3 * 4 * (8 + 4))  # no gradient goes to the input
    assert got["seconds"] >= 2 * 5 * got["launch_seconds"] > 0
