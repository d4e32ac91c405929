"""experiments/bench_pruning.py: its figures, its table, the decisions it sets by hand, and what it refuses."""

import json

import bench_pruning as bench
import bench_pruning_parts as parts
import bench_pruning_paths as paths
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import pruning
from hyperjax.transformer import Decoder

SIZES = {"vocabulary": 7, "layers": 2, "width": 8, "heads": 4, "ffn": 16, "blocks": 4, "prompt": 2, "train_batch": 2}
LISTS = {"percent": (50,), "batches": (1,), "lengths": (6,)}
CONFIG = bench.Config(**SIZES, **LISTS, decoded=4, repeats=1)
TINY = [
    *(f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()),
    *(part for name, values in LISTS.items() for part in (f"--{name}", *map(str, values))),
    *("--decoded=4", "--repeats=1"),
]


def test_measures_writes_and_prints(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert bench.main([*TINY, f"--json={file}"]) == 0
    figures, printed = json.loads(file.read_text()), capsys.readouterr().out
    decoder = ["compact_50", "masked_50", "experts_50", "experts_50_c2", "bucket_50", "native_bucket_50", "token"]
    encoder = ["bucket_encoder_50", "native_bucket_encoder_50", "mod", "mod_50"]
    for dense, names in (
        ("dense_b1", [f"{name}_b1" for name in decoder]),
        ("dense_encoder_b1", [f"{name}_b1" for name in encoder]),
        ("decode_dense_b1", ["decode_compact_50_b1", "decode_skip_50_b1"]),
        ("dense_step", ["masked_step", "mod_step", "experts_50_step", "experts_50_c2_step"]),
    ):
        for name in names:
            if dense in ("decode_dense_b1", "dense_step"):  # the others are timed with each family anew
                speedup = figures[f"seconds_{dense}"] / figures[f"seconds_{name}"]
                assert figures[f"speedup_{name}"] == pytest.approx(speedup)
            assert 0 < figures[f"min_seconds_{name}"] <= figures[f"seconds_{name}"]
    for kind in ("bucket_50", "bucket_encoder_50"):
        ratio = figures[f"seconds_{kind}_b1"] / figures[f"seconds_native_{kind}_b1"]
        assert figures[f"ratio_{kind}_over_native_b1"] == pytest.approx(ratio)
    ratios = [figures[f"ratio_{kind}_over_native_b1"] for kind in ("bucket_50", "bucket_encoder_50")]
    assert figures["ratio_bucket_over_native"] == pytest.approx(np.mean(ratios))
    assert figures["max_ratio_bucket_over_native"] == max(ratios)
    step = figures["seconds_mod_step"] / figures["seconds_dense_step"]
    assert figures["ratio_mod_step_over_dense"] == pytest.approx(step)
    routers = [f"router_share_{kind}_b1" for kind in ("sequence", "token", "mod", "experts")]
    assert figures["router_share"] == max(figures[name] for name in routers)
    assert figures["router_share_mod_b1"] == pytest.approx(figures["seconds_router_mod_b1"] / figures["seconds_mod_b1"])

    assert figures["share_decode_skip_50_b1"] < 0.7  # two layers of four tokens each skip two of them
    assert figures["xla_share_masked_50_b1"] >= 1 > figures["share_masked_50_b1"]
    for name in ("compact_50", "native_bucket_50", "native_bucket_encoder_50", "decode_compact_50"):
        assert figures[f"xla_share_{name}_b1"] == pytest.approx(figures[f"share_{name}_b1"], abs=0.05)
    assert "2 layers of width 8, 4 heads, 16 hidden units" in printed
    assert f"a step of Mixture-of-Depths takes {figures['ratio_mod_step_over_dense']:.2f} times" in printed
    slow = {name.removeprefix("speedup_") for name, value in figures.items() if "speedup_" in name and value < 1}
    (line,) = (line for line in printed.splitlines() if line.startswith("slower than dense: "))
    assert set(line.removeprefix("slower than dense: ").split(", ")) == (slow or {"none"})
    assert sum(row.endswith("  slower than dense") for row in printed.splitlines()) == len(slow)


def test_keys_and_variants_by_batch_and_length():
    config = bench.Config()
    assert bench.all_variants(config, 1, 128)
    assert bench.all_variants(config, 32, 128)
    assert not bench.all_variants(config, 8, 128)
    assert not bench.all_variants(config, 32, 512)
    assert [bench.turns(config, positions) for positions in (64, 128, 512, 128 * 16**2 * 4)] == [16, 16, 8, 1]


def test_speedups_are_within_a_family(monkeypatch):
    rounds = iter([{"dense": [4.0, 6.0], "half": [2.0, 3.0]}, {"dense": [1.0, 1.0], "slow": [2.0, 2.0], "part": [3.0]}])
    timed = []
    monkeypatch.setattr(bench, "in_turn", lambda runs, repeats: timed.append((list(runs), repeats)) or next(rounds))
    dense = paths.Path("", "", lambda: None, 1.0, 8.0, 0.5)
    half = dense._replace(against="dense", share=0.5, flops=2.0, compiling=0.0)
    slow, part = half._replace(flops=None), dense._replace(share=None, flops=None, tokens=10)
    figures = bench.timed([{"dense": dense, "half": half}, {"slow": slow, "part": part}], "_b8_l512", 2)
    assert timed == [(["dense", "half"], 2), (["dense", "slow", "part"], 2)]
    assert figures == {
        **{"seconds_dense_b8_l512": 2.5, "min_seconds_dense_b8_l512": 1.0, "compile_seconds_dense_b8_l512": 0.5},
        **{"seconds_half_b8_l512": 2.5, "min_seconds_half_b8_l512": 2.0, "speedup_half_b8_l512": 2.0},
        **{"share_half_b8_l512": 0.5, "xla_share_half_b8_l512": 0.25},
        **{"seconds_slow_b8_l512": 2.0, "min_seconds_slow_b8_l512": 2.0, "speedup_slow_b8_l512": 0.5},
        **{"share_slow_b8_l512": 0.5, "seconds_part_b8_l512": 0.3, "min_seconds_part_b8_l512": 0.3},
        "compile_seconds_part_b8_l512": 0.5,
    }


def test_gates_closed_by_hand_keep_the_percentage_and_compact_is_equal():
    tokens = bench.tokens_of(CONFIG, 2, 6)
    model, params = paths.closed_by_hand(bench.setting_of(CONFIG), 25, tokens)
    out = model.apply({"params": params}, tokens)
    for gates in (out["gates"].heads, out["gates"].blocks):
        np.testing.assert_array_equal((gates > 0).sum(-1), [1, 1])
    small = pruning.compact(model, {"params": params})
    np.testing.assert_allclose(small.model.apply(small.variables, tokens)["logits"], out["logits"], atol=1e-5)


@pytest.mark.parametrize("percent", [25, 75])
def test_decoding_skips_the_percentage_of_the_layers(percent):
    setting, tokens = bench.setting_of(CONFIG), jnp.asarray([[3, 0, 6, 2]])  # equal ones would be skipped together
    model = pruning.MixtureOfDepths(setting.shape, every=1)
    (params,) = parts.skip(model, paths.random_params(model, tokens, 0), tokens, (percent,))
    cache = Decoder(setting.shape).initialize_cache(1, 4)
    logits, taken = parts.skipping(model)(params, tokens.T[..., None], cache)
    np.testing.assert_array_equal(taken.sum(0), [4 * (100 - percent) / 100] * 2)
    whole = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(logits[:, 0], whole["logits"][0], atol=1e-5)


def test_a_bucket_that_was_not_meant_is_not_timed(monkeypatch):
    class Wrong(pruning.BucketServer):
        def __call__(self, variables, tokens, mask=None):
            return {**super().__call__(variables, tokens, mask), "bucket": jnp.ones((), jnp.int32)}

    monkeypatch.setattr(paths.pruning, "BucketServer", Wrong)
    with pytest.raises(AssertionError, match="bucket 1 was served, expected number 0"):
        paths.bucket_paths(bench.setting_of(CONFIG), bench.tokens_of(CONFIG, 1, 6), (), causal=False)


def test_parameters_drawn_are_those_of_init():
    tokens = bench.tokens_of(CONFIG, 1, 6)
    model = pruning.MixtureOfDepths(bench.setting_of(CONFIG).shape)
    params = paths.random_params(model, tokens, 0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    assert (params["model"]["norm"]["scale"] == 1).all()
    assert (params["routers_1"]["bias"] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--width=0"], "--width is 0, expected a whole number of at least 1"),
        (["--seed=-1"], "--seed is -1, expected a whole number of at least 0"),
        (["--batches", "1", "0"], "--batches is 0, expected a whole number of at least 1"),
        (["--batches", "1", "1"], "--batches is (1, 1), expected one number or more, each once"),
        (["--percent", "25"], "--percent is (25,), expected rising numbers from 1 to 99 with 50 among them"),
        (["--percent", "45", "50"], "--heads is 4, of which (45, 50) % are [2, 2], expected different numbers below"),
        (["--lengths", "2"], "--lengths is (2,), expected more than the 2 tokens of --prompt"),
        (["--layers=1"], "--layers is 1, expected 2 or more"),
        (["--decoded=7"], "--decoded is 7, expected at most 6"),
        (["--blocks=3"], "blocks is 3, which does not divide the feed-forward width 16"),
        (["--heads=3"], "heads is 3, which does not divide the width 8"),
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
