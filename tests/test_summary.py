"""The table of what modules cost: against counts from elsewhere, of layers alone, in loops, called twice and tied."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperjax as hj
from hyperjax import budget, paramtree, pruning, routing, sharing
from hyperjax.recurrent import LanguageModel
from hyperjax.transformer import Config, Decoder

TOKENS = np.zeros((4, 10), np.int32)
X = np.zeros((5, 6), np.float32)
SIZES = Config(20, layers=3, width=16, heads=2, ffn=32)


def by_path(summary):
    return {"/".join(row.path[1:]): row for row in summary.rows}


def test_an_mlp_is_counted_by_hand():
    found = hj.summarize(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3, use_bias=False)]), X)
    first, second = by_path(found)["layers_0"], by_path(found)["layers_2"]
    assert (first.kind, first.calls, first.total, first.unique) == ("Dense", 1, 6 * 8 + 8, 6 * 8 + 8)
    assert (first.param_bytes, first.flops) == (4 * 56, 2 * 5 * 6 * 8)
    assert (second.total, second.flops, second.written_bytes) == (24, 2 * 5 * 8 * 3, 4 * 5 * 3)
    whole = found.rows[0]
    assert (whole.total, whole.flops, found.trained) == (80, first.flops + second.flops, 80)


NETWORKS = [
    LanguageModel("ln_hyper_lstm", 20, units=16, hyper_units=8, layers=2),
    LanguageModel("hyper_rnn", 20, units=16, hyper_units=8),
    Decoder(SIZES),
    Decoder(Config(20, layers=3, width=16, heads=2, ffn=32, ffn_map=(0, 1, 0))),
    pruning.Gated(SIZES, blocks=4),
    pruning.MixtureOfDepths(SIZES, keep=0.5),
]


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: type(model).__name__)
def test_the_whole_is_what_other_counts_say(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    found = hj.summarize(model, TOKENS)
    assert found.trained == found.rows[0].unique == paramtree.count(shapes["params"])
    assert found.rows[0].flops == budget.flops(model.apply, shapes, TOKENS)
    for row in found.rows:  # a module costs no less than those in it
        inside = [other for other in found.rows if other.path[:-1] == row.path]
        assert row.flops >= sum(other.flops for other in inside)
        assert row.total >= sum(other.total for other in inside)


def test_a_loop_counts_as_often_as_it_runs():
    model = LanguageModel("lstm", 20, units=16)
    short, long = (by_path(hj.summarize(model, np.zeros((4, n), np.int32))) for n in (10, 30))
    for path in ("", "layer_0"):
        assert long[path].flops == 3 * short[path].flops
        assert long[path].total == short[path].total
    assert short["layer_0"].flops >= 10 * 2 * 4 * 16 * 4 * 16  # state times recurrent weights
    assert short["readout"].flops == 10 * 2 * 4 * 16 * 20


def test_layers_that_share_count_once_as_unique():
    plain, shared = (
        hj.summarize(Decoder(Config(20, layers=3, width=16, heads=2, ffn=32, ffn_map=each)), TOKENS)
        for each in (None, (0, 0, 0))
    )
    assert shared.rows[0].total == plain.rows[0].total == plain.rows[0].unique
    assert plain.rows[0].unique - shared.rows[0].unique == 2 * 2 * 16 * 32
    assert by_path(shared)["stack/ffn_0"].calls == 3
    assert shared.rows[0].flops == plain.rows[0].flops


def test_tied_layers_are_used_more_often_than_they_are_trained():
    model = Decoder(SIZES)
    tied = sharing.tie(model, sharing.layer_ties(sharing.Maps.same((0, 0, 0))), TOKENS)
    plain, found = hj.summarize(model, TOKENS), hj.summarize(tied, TOKENS)
    assert found.rows[0].total == plain.rows[0].total
    assert found.rows[0].unique == found.trained < plain.trained
    assert {row.path for row in found.rows} == {row.path for row in plain.rows}


def test_a_hypernetwork_shows_the_network_that_it_makes():
    net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
    hyper = hj.HyperNetwork.from_target(net, X, embedding_dim=4, num_embeddings=7)
    found = hj.summarize(hyper, X, task_id=0)
    made = by_path(found)["Sequential"]
    assert made.total == made.unique == budget.count_parameters(net, X)
    assert found.rows[0].flops > made.flops == 2 * 5 * (6 * 8 + 8 * 3)
    shapes = jax.eval_shape(lambda key: hyper.init(key, X, task_id=0), jax.random.key(0))
    assert found.trained == paramtree.count(shapes["params"]) > 4 * made.total


class Lifted(nn.Module):
    """What Flax traces more than once, or shows no parameters of."""

    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "remat twice":
            layer = nn.remat(nn.Dense)(6, name="layer")
            return layer(layer(x))
        if self.how == "two remats":
            return nn.remat(nn.Dense)(6, name="second")(nn.remat(nn.Dense)(6, name="first")(x))
        if self.how == "jit":
            return nn.jit(nn.Dense)(6, name="layer")(x)
        if self.how == "vmap":
            many = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=4, in_axes=None
            )
            return many(6, name="layer")(x)
        shared = self.how == "loop"
        collections = {"variable_broadcast": "params"} if shared else {"variable_axes": {"params": 0}}
        body = nn.scan(Step, **collections, split_rngs={"params": not shared}, length=5)
        return body(name="layer")(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(6, name="dense")(x), None


ONE = 6 * 6 + 6


@pytest.mark.parametrize(
    ("how", "total", "unique"),
    [
        ("remat twice", 2 * ONE, ONE),
        ("two remats", 2 * ONE, 2 * ONE),
        ("jit", ONE, ONE),
        ("vmap", 4 * ONE, 4 * ONE),
        ("stack", 5 * ONE, 5 * ONE),
        ("loop", ONE, ONE),  # as of a recurrent layer: its steps are not counted apart
    ],
)
def test_what_flax_lifts_counts_as_it_is_stored(how, total, unique):
    found = hj.summarize(Lifted(how), X)
    assert (found.rows[0].total, found.rows[0].unique, found.trained) == (total, unique, unique)
    times = {"remat twice": 2, "two remats": 2, "jit": 1, "vmap": 4}.get(how, 5)
    assert found.rows[0].flops == times * 2 * 5 * 6 * 6
    assert by_path(found)["first" if how == "two remats" else "layer"].calls == (2 if how == "remat twice" else 1)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(3)(x)


def test_calls_may_have_keys_and_change_statistics():
    found = hj.summarize(Noisy(), X, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    assert found.trained == found.rows[0].total == 12 + 21


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x, large):
        wide, narrow = nn.Dense(64, use_bias=False, name="wide"), nn.Dense(4, use_bias=False, name="narrow")
        if self.is_initializing():
            return wide(x), narrow(x)
        dear, cheap = (lambda m, x: wide(x).sum()), (lambda m, x: narrow(x).sum())
        return nn.cond(large, dear, cheap, self, x)


def test_of_two_branches_the_dearer_counts():
    found = by_path(hj.summarize(Branches(), X, np.array(True)))
    assert found[""].flops == found["wide"].flops == 2 * 5 * 6 * 64
    assert found["narrow"].flops == 0
    assert found["narrow"].total == 24


def test_memory_is_xlas_where_it_is_compiled():
    model = nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(512), nn.relu, nn.Dense(1)])
    small, large = (hj.summarize(model, np.zeros((n, 6), np.float32), compiled=True) for n in (8, 800))
    assert large.temporary_bytes > small.temporary_bytes > 0
    assert large.temporary_bytes >= 4 * 800 * 512
    assert f"{large.temporary_bytes / 1024:,.1f} KiB of temporary memory once compiled" in str(large)
    assert "temporary" not in str(hj.summarize(model, X))


def test_the_table_is_aligned_and_indented():
    tasks = {"a": routing.Regression()}
    text = str(hj.summarize(routing.SNR(((8,) * 3, (8,) * 3), tasks, (4,), "trans"), X)).splitlines()
    assert text[0].split() == [
        "module",
        "class",
        "calls",
        "params",
        "unique",
        "param",
        "KiB",
        "MFLOP",
        "written",
        "KiB",
    ]
    assert len({len(line) for line in text[:-1]}) == 1
    assert text[1].startswith("SNR ")
    assert any(line.startswith("  tower_a ") for line in text)
    assert any(line.startswith("    output ") for line in text)
    assert text[-1].endswith("parameters to train")


def test_given_variables_are_used_and_nothing_is_computed():
    model = nn.Dense(3)
    variables = {
        "params": {
            "kernel": jax.ShapeDtypeStruct((6, 3), jnp.bfloat16),
            "bias": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
        }
    }
    assert hj.summarize(model, X, variables=variables).rows[0].param_bytes == 2 * 21


class Unbounded(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (6, 6))
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="a while holds matrix products: how often it runs them is not known"):
        hj.summarize(Unbounded(), X)
