"""experiments/bench_hypernet.py: its figures, its tables, what it leaves out, and what it refuses."""

import json

import bench_hypernet as bench
import bench_hypernet_peers as peers
import jax
import pytest

from hyperjax.paramtree import count

TINY = [
    *("--batch=6", "--embedding=3", "--repeats=1", "--depth=1", "--width=4", "--peers"),
    *("--layers", "7", "5", "--memory-layers", "50", "40", "--generators", "linear"),
]


def test_measures_writes_and_prints(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench.main([*TINY, f"--json={path}", "--targets", "80leaf"]) == 0
    figures = json.loads(path.read_text())
    for name in ("plain", "linear"):
        assert 0 < figures[f"min_seconds_{name}_step_80leaf"] <= figures[f"seconds_{name}_step_80leaf"]
    plain, allowed = figures["seconds_plain_gradient_80leaf"], figures["seconds_linear_products_80leaf"]
    assert figures["seconds_linear_generate_80leaf"] > 0
    ratio = figures["seconds_linear_step_80leaf"] / figures["seconds_plain_step_80leaf"]
    assert figures["ratio_linear_over_plain_80leaf"] == pytest.approx(ratio)
    ratio = figures["seconds_linear_gradient_80leaf"] / (1.5 * plain + allowed)
    assert figures["ratio_linear_gradient_over_allowed_80leaf"] == pytest.approx(ratio)
    printed = capsys.readouterr().out
    assert "MLP of 2 leaves: 20 parameters, batch 6, z 3" in printed
    assert "of what is allowed" in printed
    assert "left out" not in printed


def test_memory_and_per_sample_weights(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench.main([*TINY, f"--json={path}", "--targets", "25m", "per_sample", "--generators", "scale"]) == 0
    figures = json.loads(path.read_text())
    assert figures["bytes_target_25m"] == 4 * (50 * 40 + 40)
    for name in ("chunked_25m", "chunked_25m_remat"):
        assert figures[f"peak_bytes_{name}"] > 0
        ratio = figures[f"peak_bytes_{name}"] / figures["bytes_target_25m"]
        assert figures[f"ratio_peak_{name}_over_target"] == pytest.approx(ratio)
    assert figures["seconds_scale_factored_per_sample"] > 0
    assert 0 < figures["peak_bytes_scale_factored_per_sample"] < figures["peak_bytes_scale_vmap_per_sample"]
    assert "one set of weights for each of 6 samples, MLP 7-5" in capsys.readouterr().out


def test_what_is_too_large_or_not_there_is_left_out_in_one_line(monkeypatch):
    def broken(target, label):
        raise RuntimeError("two\nlines")

    def absent(target, label):
        import no_such_library  # noqa: F401

    monkeypatch.setattr(bench, "ours", lambda target, name=None: f"made {name}")
    monkeypatch.setattr(
        peers, "PEERS", {"a": ("A", broken, 0.0), "b": ("B", absent, 0.0), "c": ("C", pytest.fail, 1.0)}
    )
    config = bench.Config(image_batch=1, peers=("a", "b", "c"))
    target = bench.make_target(config, "wrn")
    assert 2.2e6 < target.size < 2.3e6
    found = dict(bench.candidates(target, config))
    assert found.pop("a") == "A: RuntimeError: two lines"
    assert found.pop("b") == "B: No module named 'no_such_library'; pip install -e '.[bench]'"
    large = "left out: a head of 574 MB, --max-head-mb is 400"
    assert found.pop("c") == f"C {large}"
    assert (found.pop("linear"), found.pop("mlp")) == (f"Linear {large}", f"MLP {large}")
    names = ("plain", "separable_mlp", "chunked", "scale", "low_rank", "conv_tiles")
    assert found == {name: f"made {None if name == 'plain' else name}" for name in names}


def test_conv_tiles_draw_the_kernels_of_the_groups():
    target = bench.make_target(bench.Config(image_depth=10, image_width=1, image_batch=1), "wrn")
    hyper = bench.hypernetwork(target, "conv_tiles")
    shapes = jax.eval_shape(hyper.init, jax.random.key(0), target.x)
    made = jax.eval_shape(hyper.generate, shapes)
    assert count(made) == target.size
    assert count(shapes["params"]) != target.size


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--depth=0"], "--depth is 0, expected whole numbers of at least 1"),
        (["--layers", "5", "0"], "--layers is (5, 0), expected whole numbers of at least 1"),
        (["--layers", "5"], "--layers and --memory-layers need at least two widths each"),
        (["--image-depth=12"], "--image-depth is 12, expected 6 n + 4"),
        (["--targets", "mlp4"], "--targets has 'mlp4', expected some of mlp3, 80leaf, wrn, 25m, per_sample"),
        (["--generators", "Linear"], "--generators has 'Linear', expected some of linear, mlp"),
        (["--json=/absent/folder/bench.json"], "cannot be written"),
        (["--json=."], "cannot be written"),
        (["--unit=3"], "--unit is not a field"),
    ],
)
def test_bad_input_is_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*TINY, *arguments])
    assert stop.value.code == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert line in printed
