"""experiments/pruning_methods.py and pruning_report.py: what is timed is what was judged, and costs are counted."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pruning_methods as methods
import pruning_report as report
import pruning_training as learning
import pytest
import text_tasks as tasks

from hyperjax import paramtree
from hyperjax.pruning import Experts, costs
from hyperjax.transformer import Config, Gates

L, PROMPT, BLOCKS = 16, 6, 4
SETTING = SimpleNamespace(data="pydoc", data_dir=None, length=L, prompt=PROMPT, batch=4, eval_windows=40)
CHARACTERS = tasks.load(SETTING, 0)
PASSAGES = tasks.load(SimpleNamespace(**{**vars(SETTING), "data": "topic", "length": 32}), 0)


def sizes(task):
    return Config(task.vocabulary, layers=2, width=16, heads=2, ffn=32, length=task.length, outputs=task.outputs)


def made(name, task, budget=0.93, seed=0):
    """A network, and parameters drawn at random, so that its routers choose now this and now that."""
    model, batch = methods.build(name, sizes(task), task, budget, 0, BLOCKS), task.batch_at(0)
    options = {} if task.causal else {"mask": batch["mask"]}
    shapes = jax.eval_shape(lambda key: model.init(key, batch["tokens"], **options), jax.random.key(0))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        place = jax.tree_util.keystr(path)
        scale = 0.0 if "threshold" in place else 3.0 if "logits" in place else 0.3
        return jnp.asarray(float("norm" in place) + scale * rng.normal(size=leaf.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def judged(model, params, batch, causal):
    """What the network returns, without a key."""
    options = {} if causal else {"mask": batch["mask"]}
    if isinstance(model, Experts):
        options["capacity"] = methods.CAPACITY
    return applied(model, params, batch["tokens"], **options)


@partial(jax.jit, static_argnums=0, static_argnames="capacity")
def applied(model, params, tokens, **options):
    return model.apply({"params": params}, tokens, **options)


def first(task):
    return next(iter(task.batches("test", report.SIZE)))[0]


def close(found, wanted):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["small", "static", "random_static", "sequence", "experts"])
def test_what_is_timed_answers_as_what_was_judged(name):
    model, params = made(name, CHARACTERS)
    batch = first(CHARACTERS)
    needed, run, saves = methods.served(name, model, {"params": params}, CHARACTERS)
    out = judged(model, params, batch, True)
    close(jax.jit(run)(needed, batch["tokens"], batch["mask"]), out["logits"])
    assert saves
    if name == "sequence":
        assert len(np.unique(out["bucket"].argmax(-1))) > 1
        alone = jax.jit(run)(needed, batch["tokens"][:1], batch["mask"][:1])
        close(alone, out["logits"][:1])
    if name.endswith("static"):
        assert paramtree.count(needed) < paramtree.count(params["model"])
    if name == "experts":
        assert 0 < np.mean(out["gates"].blocks > 0) < 1


@pytest.mark.parametrize("name", ["static", "sequence", "mod", "expert_choice"])
def test_passages_are_timed_as_they_were_judged(name):
    model, params = made(name, PASSAGES)
    batch = first(PASSAGES)
    assert not batch["mask"].all()
    needed, run, saves = methods.served(name, model, {"params": params}, PASSAGES)
    close(jax.jit(run)(needed, batch["tokens"], batch["mask"]), judged(model, params, batch, False)["logits"])
    assert saves


@pytest.mark.parametrize("name", ["dense", "layers", "token", "mod", "random_sequence", "random_mod"])
def test_gates_that_only_multiply_do_not_count_as_faster(name):
    model, params = made(name, CHARACTERS)
    needed, _, saves = methods.served(name, model, {"params": params}, CHARACTERS)
    assert needed == {"params": params["model"] if name == "dense" else params}
    assert not saves


@pytest.mark.parametrize("name", ["dense", "static", "layers", "mod"])
def test_decoding_answers_as_what_was_judged(name):
    model, params = made(name, CHARACTERS)
    tokens = first(CHARACTERS)["tokens"]
    needed, run = report.decoder(name, model, {"params": params}, CHARACTERS)
    out = judged(model, params, {"tokens": tokens}, True)
    close(jax.jit(run)(needed, tokens[:1]), out["logits"][0])
    if name in ("layers", "mod"):
        assert 0 < np.mean(out["gates"].tokens[:, 0] > 0) < 1


@pytest.mark.parametrize("name", ["sequence", "token", "experts", "random_mod", "random_static", "random_sequence"])
def test_nothing_else_decodes(name):
    model = methods.build(name, sizes(CHARACTERS), CHARACTERS, 0.93, 0, BLOCKS)
    assert report.decoder(name, model, {"params": {}}, CHARACTERS) is None


def by_hand(name, gates, config):
    """Operations of each window that gates [layers, B, L, ..] leave of a decoder, position by position."""
    whole = costs(config, L)
    heads, blocks, layers = (gates.get(kind) for kind in ("heads", "blocks", "layers"))
    if name == "experts":  # every place is computed, taken or not
        model = methods.build(name, config, CHARACTERS, 0.93, 0, BLOCKS)
        blocks = np.full_like(blocks, model.places((report.SIZE, L), methods.CAPACITY) / (report.SIZE * L))
    shape = next(iter(gates.values())).shape[1:3]
    total = np.full(shape[0], whole.fixed)
    for l in range(config.layers):
        there = np.ones(shape) if layers is None else layers[l, ..., 0]
        queries = (whole.heads[l] if heads is None else heads[l].sum(-1)) * there
        keys = whole.heads[l] * there if name in ("layers", "token") else queries
        units = whole.units[l] * (1 if blocks is None else blocks[l].mean(-1)) * there
        each = there * whole.layer[l] + (queries + keys) / 2 * whole.attention[l] + units * whole.unit[l]
        total += each.mean(-1) + queries.mean(-1) * there.mean(-1) * whole.scores[l]
    return total


@pytest.mark.parametrize("name", ["static", "sequence", "layers", "token", "mod", "experts"])
def test_operations_are_counted_window_by_window(name):
    model, params = made(name, CHARACTERS)
    dense = sizes(CHARACTERS)
    found = report.make_evaluate(name, model, CHARACTERS, dense)(params, "test")
    parts = list(CHARACTERS.batches("test", report.SIZE))
    outs = [(judged(model, params, batch, True), count) for batch, count in parts]
    gates = [
        {kind: np.asarray(gate) for kind, gate in report.expanded(out["gates"], (report.SIZE, L)).items()}
        for out, _ in outs
    ]
    router = {key: value for key, value in params.items() if key != "model"}
    seen = {"static": 0, "sequence": 1}.get(name, L)
    wanted = np.concatenate([by_hand(name, each, dense)[:count] for each, (_, count) in zip(gates, outs, strict=True)])
    wanted += 2 * paramtree.count(router) * seen
    assert len(found.flops) == SETTING.eval_windows
    np.testing.assert_allclose(found.flops, wanted / L, rtol=1e-5)
    assert found.share == pytest.approx(wanted.mean() / costs(dense, L).total, rel=1e-5)
    figures = [
        CHARACTERS.figures(out["logits"], batch)[:count] for (out, count), (batch, _) in zip(outs, parts, strict=True)
    ]
    assert found.quality == pytest.approx(np.concatenate(figures).mean(), rel=1e-5)
    if name in ("sequence", "layers", "mod"):
        assert np.ptp(found.flops) > 0
    kinds = {"static": {"heads", "blocks"}, "sequence": {"heads", "blocks"}, "token": {"heads", "blocks"}}
    kinds |= {"experts": {"blocks"}}
    assert found.openness.keys() == kinds.get(name, {"layers"})
    for kind, part in found.openness.items():
        assert part.shape == (5, 2, {"heads": 2, "blocks": BLOCKS, "layers": 1}[kind])
        groups = np.concatenate([CHARACTERS.group_of(batch)[:count] for batch, count in parts])
        opened = np.concatenate([each[kind][:, :count] for each, (_, count) in zip(gates, outs, strict=True)], 1)
        for group in np.unique(groups):
            np.testing.assert_allclose(part[group], opened[:, groups == group].mean(1), atol=1e-5)


def test_short_passages_cost_less():
    model, params = made("mod", PASSAGES, 0.7)
    dense = sizes(PASSAGES)
    found = report.make_evaluate("mod", model, PASSAGES, dense)(params, "test")
    other, weights = made("dense", PASSAGES)
    plain = report.make_evaluate("dense", other, PASSAGES, dense)(weights, "test")
    batches = [(batch["mask"][:count].sum(-1), batch) for batch, count in PASSAGES.batches("test", 32)]
    lengths = np.concatenate([lengths for lengths, _ in batches])
    whole = np.array([costs(dense, int(n), causal=False).total for n in lengths])
    np.testing.assert_allclose(plain.flops, whole / lengths, rtol=0.01)  # the output's part is not in proportion
    assert plain.share == 1
    assert found.share == pytest.approx((found.flops * lengths).sum() / whole.sum(), rel=0.01)
    assert found.share == pytest.approx(0.7, abs=0.1)  # for real lengths, not for padding
    assert found.share < 1
    assert found.openness["layers"].shape == (len(PASSAGES.groups), 2, 1)


@pytest.mark.parametrize(
    ("name", "task"),
    [("static", CHARACTERS), ("token", CHARACTERS), ("static", PASSAGES), ("sequence", PASSAGES)],
    ids=lambda value: getattr(value, "unit", value),
)
def test_what_is_steered_is_what_an_evaluation_counts(name, task):
    model, params = made(name, task)
    batch, dense = task.batch_at(3), sizes(task)

    def steered(params):
        out = judged(model, params, batch, task.causal)
        return learning.served_share(name, model, out, params, batch, task, dense), out["gates"]

    share, gates = steered(params)
    found, whole = report.operations(name, model, gates, batch["mask"], task, dense)
    wanted = found.sum() / whole.sum() + methods.router_share(params, dense, task, name)
    assert share == pytest.approx(float(wanted), rel=1e-5)
    slope = jax.grad(lambda params: steered(params)[0])(params)
    assert any(np.any(leaf) for part, tree in slope.items() if part != "model" for leaf in jax.tree.leaves(tree))


def test_static_gates_move_until_they_are_near_the_budget():
    config = SimpleNamespace(
        **vars(SETTING), **{"layers": 2, "width": 16, "heads": 2, "ffn": 32, "dropout": 0.0, "steps": 10},
        **{"settle": 0.5, "penalty": "lagrangian", "distill": 0.0},
    )  # fmt: skip
    model, params = made("static", CHARACTERS)
    share = float(learning.static_share(model, params, sizes(CHARACTERS), CHARACTERS))
    assert share == pytest.approx(float(judged(model, params, first(CHARACTERS), True)["share"]))
    multipliers = learning.pruning.Multipliers(jnp.float32(3), jnp.float32(1))
    tree = {"network": params, "multipliers": multipliers}

    @partial(jax.jit, static_argnums=(0,))
    def slopes(budget, step):
        loss = learning.make_loss(config, "static", model, CHARACTERS, budget)
        return jax.grad(lambda tree: loss(tree, {"step": step}, CHARACTERS.batch_at(0), jax.random.key(0))[0])(tree)

    for budget, step, moves in (
        (share, 4, True),
        (share, 5, False),
        (share * 1.005, 9, False),
        (share * 0.97, 9, True),
    ):
        found = slopes(budget, step)["network"]
        assert np.any(found["routers_blocks"]["logits"]) == moves
        assert np.any(found["routers_heads"]["logits"]) == (step < 5)
        assert np.any(found["model"]["output"]["kernel"])


@pytest.mark.parametrize("name", ["static", "sequence", "layers", "token", "mod"])
def test_compute_by_position_averages_to_the_share(name):
    model, params = made(name, CHARACTERS)
    tokens = first(CHARACTERS)["tokens"]
    found = report.compute_by_position(model, params, tokens, CHARACTERS, sizes(CHARACTERS))
    share = judged(model, params, {"tokens": tokens}, True)["share"]
    assert found.shape == tokens.shape
    np.testing.assert_allclose(found.mean(-1), np.broadcast_to(share, len(tokens)), rtol=1e-5)
    if name == "sequence":
        np.testing.assert_allclose(found[:, :PROMPT], 1, rtol=1e-6)
    if name in ("layers", "token", "mod"):
        assert np.ptp(found, -1).max() > 0.05


def test_gates_of_any_axes_are_spread_over_positions():
    for gate in (np.array([[1.0, 0.0, 0.5]] * 2), np.ones((2, 4, 3)), np.ones((2, 4, 5, 3))):
        found = report.expanded(Gates(heads=gate), (4, 5))["heads"]
        assert found.shape == (2, 4, 5, 3)
        axes = gate.reshape(2, *(1,) * (4 - gate.ndim), *gate.shape[1:]) if gate.ndim == 2 else gate
        axes = axes[:, :, None] if gate.ndim == 3 else axes
        np.testing.assert_array_equal(found, np.broadcast_to(axes > 0, (2, 4, 5, 3)))
    for gates in (Gates(layer=np.array([1.0, 0.0])), Gates(layer=np.array([[1.0] * 4, [0.0] * 4]))):
        found = report.expanded(gates, (4, 5))
        assert (found.keys(), found["layers"].shape) == ({"layers"}, (2, 4, 5, 1))
        assert found["layers"][0].all()
        assert not found["layers"][1].any()


def test_small_networks_of_every_budget():
    task = SimpleNamespace(usual_length=64, causal=True)
    dense = Config(97, layers=3, width=64, heads=4, ffn=256, length=64)
    whole = costs(dense, 64).total
    for budget in (0.25, 0.4, 0.6, 0.8, 1.0):
        for fit in (methods.narrower, methods.thinner):
            small = fit(dense, budget, task)
            assert costs(small, 64).total == pytest.approx(budget * whole, rel=0.02)
            assert small.layers == 3
        assert methods.thinner(dense, budget, task).width == 64
    assert methods.narrower(dense, 1.0, task) == dense


def test_times_are_medians_of_turns(monkeypatch):
    of_seed = {0: 1.0, 1: 10.0}
    whats = {"ms_b1": [3.0, 1.0, 2.0], "ms_b32": [8.0], "decode_ms": [L * 1.0, L * 2.0, L * 4.0]}
    seconds = {
        ("dense", what, seed): [factor * each for each in whole]
        for what, whole in whats.items()
        for seed, factor in of_seed.items()
    }
    compiling: list[str] = []

    def timed(runs, repeats):
        assert (runs.keys(), repeats) == (seconds.keys(), 7)
        first, other = (jax.block_until_ready(runs["dense", "decode_ms", seed]()) for seed in of_seed)
        assert np.abs(first - other).max() > 0.01  # the seeds share a program, not parameters
        for run in runs.values():
            jax.block_until_ready(run())
        return {key: seconds[key] for key in runs}

    def counted(function, *arguments):
        compiling.append("")
        return jax.jit(function).lower(*arguments).compile()

    monkeypatch.setattr(report, "in_turn", timed)
    monkeypatch.setattr(report, "compiled", counted)
    trained = [
        report.Trained(name, name, seed, *made(name, CHARACTERS, seed=seed), None)
        for name, seeds in (("dense", (0, 1)), ("token", (0,)))
        for seed in seeds
    ]
    found = report.measure(trained, CHARACTERS, 7)
    one, other = 2e3 / report.SINGLES, 2e4 / report.SINGLES
    assert found["dense"] == {
        "ms_b1": [one, other],
        "ms_b32": [8e3, 8e4],
        "decode_ms": [2e3, 2e4],
        "tokens_per_second": [32 * L / 8, pytest.approx(32 * L / 80)],
    }
    assert found["token"] == {}
    assert len(compiling) == 3  # for two seeds
