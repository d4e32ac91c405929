"""Mixed precision: what computes in what, how far answers move, and the scaling of losses in float16."""

import json

import char_lm
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from targets import random_variables

import hyperjax as hj
from hyperjax import Policy, budget, pruning, routing, sharing
from hyperjax.hypernet.image_models import ConvNet, WideResNet
from hyperjax.loss_scale import ScaledState, scale_loss
from hyperjax.recurrent import LanguageModel
from hyperjax.training import NonFinite, TrainState, averaged_params, examine, make_step, make_steps
from hyperjax.training.optimizer import average_params
from hyperjax.transformer import Config, Decoder, Encoder

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 20, (4, 10)).astype(np.int32)
X = RNG.standard_normal((8, 6)).astype(np.float32)
IMAGES = RNG.standard_normal((4, 8, 8, 1)).astype(np.float32)
SIZES = Config(20, layers=2, width=16, heads=2, ffn=32)
TASKS = {"a": routing.Regression(), "b": routing.Binary()}


def tied():
    return sharing.tie(Decoder(SIZES), sharing.layer_ties(sharing.Maps.same((0, 0))), TOKENS)


def hyper():
    net = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
    return hj.HyperNetwork.from_target(net, X, embedding_dim=4, num_embeddings=3)


CASES = {
    "hyper_lstm": (LanguageModel("ln_hyper_lstm", 20, units=16, hyper_units=8), TOKENS, {}),
    "lstm": (LanguageModel("lstm", 20, units=16), TOKENS, {}),
    "decoder": (Decoder(SIZES), TOKENS, {}),
    "encoder": (Encoder(SIZES), TOKENS, {}),
    "gated": (pruning.Gated(SIZES, blocks=4), TOKENS, {}),
    "depths": (pruning.MixtureOfDepths(SIZES, keep=0.5), TOKENS, {}),
    "tied": (tied(), TOKENS, {}),
    "mixture": (sharing.Mixture(SIZES, bases=2, prompt=4), TOKENS, {}),
    "trans": (routing.SNR(((8,) * 3, (8,) * 3), TASKS, (4,), "trans"), X, {}),
    "uneven": (routing.SNR(((8, 6), (8, 5)), TASKS, (4,), "trans"), X, {}),
    "aver": (routing.SNR(((8,) * 3, (8,) * 3), TASKS, (4,), "aver"), X, {}),
    "sample": (routing.SNR(((8,) * 3, (8,) * 3), TASKS, (4,), "trans", per="sample"), X, {}),
    "mmoe": (routing.MMoE(tasks=TASKS, experts=3, widths=(8,)), X, {}),
    "convnet": (ConvNet(features=4, kernel=3), IMAGES, {}),
    "resnet": (WideResNet(10), IMAGES, {}),
    "hypernetwork": (hyper(), X, {"task_id": 1}),
    "anyone's": (nn.Sequential([nn.Dense(16), nn.gelu, nn.Dense(3)]), X, {}),
}


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def product_dtypes(function, *arguments):
    """What goes into each product of a function, the largest product first."""
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                found.append((budget.count_flops_of(equation), {str(var.aval.dtype) for var in equation.invars}))
            for inner in budget.inner_jaxprs(equation):
                look(inner)

    look(jax.make_jaxpr(function)(*arguments).jaxpr)
    return [dtypes for _, dtypes in sorted(found, key=lambda pair: -pair[0])]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_computed_in_it_and_answers_stay_near(name, precision):
    model, x, options = CASES[name]
    variables = random_variables(model, x, **options)
    mixed = Policy.named(precision).on(model)

    def answer(net, variables):
        return net.apply(variables, x, **options)

    whole, less = answer(model, variables), jax.jit(lambda v: answer(mixed, v))(variables)
    assert jax.tree.structure(whole) == jax.tree.structure(less)
    outputs = [less.get("logits", less.get("features"))] if isinstance(less, dict) else floats(less)
    assert {leaf.dtype for leaf in outputs} == {jnp.dtype(precision if name == "encoder" else "float32")}
    first, second = (np.concatenate([np.ravel(leaf) for leaf in floats(tree)]) for tree in (whole, less))
    apart = np.abs(first - second).mean() / np.abs(first).mean()
    assert 0 < apart < {"bfloat16": 0.03, "float16": 0.004}[precision]
    dtypes = product_dtypes(lambda v: answer(mixed, v), variables)
    assert dtypes[0] == {precision}

    def loss(variables):
        return sum(jnp.mean(jnp.square(leaf)) for leaf in floats(answer(mixed, variables)))

    grads = jax.jit(jax.grad(lambda params: loss({**variables, "params": params})))(variables["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert optax.tree.norm(grads) > 0


@pytest.mark.parametrize("name", CASES)
def test_float32_is_what_it_was(name):
    model, x, options = CASES[name]
    variables = random_variables(model, x, **options)
    for a, b in zip(
        jax.tree.leaves(model.apply(variables, x, **options)),
        jax.tree.leaves(Policy.named("float32").on(model).apply(variables, x, **options)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_gates_stay_whole():
    model = routing.SNR(((8,) * 3, (8,) * 3), TASKS, (4,), "trans")
    variables = random_variables(model, X)
    key = jax.random.key(3)
    whole, less = (net.apply(variables, X, key)[1] for net in (model, Policy.named("bfloat16").on(model)))
    for level in whole["gates"]:
        np.testing.assert_array_equal(whole["gates"][level], less["gates"][level])
    assert whole["l0"] == less["l0"]


def test_statistics_of_normalisation_stay_whole():
    model = Policy.named("bfloat16").on(WideResNet(10))
    variables = model.init(jax.random.key(0), IMAGES)
    _, updates = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


def test_parameters_can_be_kept_in_less_as_well():
    policy = Policy(jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for name in ("decoder", "convnet", "hyper_lstm"):
        model, x, _ = CASES[name]
        mixed = policy.on(model)
        variables = mixed.init(jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("bfloat16")}
        assert {leaf.dtype for leaf in floats(mixed.apply(variables, x))} == {jnp.dtype("float32")}


def test_what_a_module_has_is_still_there():
    mixed = Policy.named("bfloat16").on(CASES["hypernetwork"][0])
    variables = mixed.init(jax.random.key(0), X, task_id=0)
    assert mixed.embeddings(variables).shape == (3, 4)
    with pytest.raises(AttributeError, match="nothing"):
        _ = mixed.nothing


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


def test_all_else_is_put_out_as_asked_but_for_statistics():
    mixed = Policy(compute_dtype=jnp.bfloat16, output_dtype=jnp.bfloat16).on(Normalised())
    variables = mixed.init(jax.random.key(0), X)
    output, changed = mixed.apply(variables, X, mutable=["batch_stats"])
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {jnp.dtype("float32")}


def test_modules_of_others_are_cast_whole_although_they_have_a_dtype():
    dense = Policy.named("bfloat16").on(nn.Dense(3))
    variables = dense.init(jax.random.key(0), X)
    assert dense.apply(variables, X).dtype == jnp.float32
    assert product_dtypes(dense.apply, variables, X) == [{"bfloat16"}]


def test_a_policy_that_adds_nothing_leaves_the_module():
    plain = Policy.named("float32")
    for name in ("hypernetwork", "trans", "convnet"):
        assert plain.on(CASES[name][0]) is CASES[name][0]


def test_a_clone_keeps_the_policy():
    mixed = Policy.named("bfloat16").on(CASES["convnet"][0]).clone(features=8)
    assert mixed.module.features == 8
    assert mixed.policy == Policy.named("bfloat16")


def test_parameters_in_float16_learn_at_any_scale():
    policy = Policy(jnp.float16, jnp.float16, jnp.float32)
    optimizer = scale_loss(optax.sgd(0.1), every=1)
    assert isinstance(policy.optimizer(optax.sgd(0.1)).init({"w": jnp.ones(3)}), ScaledState)
    state = TrainState.create({"w": jnp.ones(4, jnp.float16)}, optimizer)
    loss = lambda p, c, batch, key: (jnp.float32(1e-4) * (p["w"].astype(jnp.float32) * batch).sum(), (c, {}))  # noqa: E731
    step = make_step(loss, optimizer)
    for _ in range(9):
        state, metrics = step(state, jnp.ones(4), jax.random.key(0))
        assert float(metrics["grad_norm"]) == pytest.approx(2e-4, rel=1e-2)
    assert float(metrics["loss_scale"]) == 2.0**23
    assert state.params["w"].dtype == jnp.float16


def test_a_step_is_examined_with_its_scale():
    for loss, batch in ((small_loss, jnp.ones(4)), (large_loss, jnp.ones(4))):
        optimizer = Policy.named("float16").optimizer(optax.sgd(1.0))
        found = examine(loss, start(optimizer), batch, jax.random.key(0))
        _, metrics = make_step(loss, optimizer)(start(optimizer), batch, jax.random.key(0))
        np.testing.assert_array_equal(found.grad_norm, metrics["grad_norm"])
        assert bool(found.not_finite["gradient"]) == bool(metrics["overflowed"])


def test_policies_are_checked():
    with pytest.raises(ValueError, match="compute_dtype is None, expected a floating dtype"):
        Policy(compute_dtype=None)
    with pytest.raises(ValueError, match="param_dtype is float64, which JAX computes in only with jax_enable_x64"):
        Policy(param_dtype=jnp.float64)

    with pytest.raises(ValueError, match="precision is 'half', expected one of float32, bfloat16, float16"):
        Policy.named("half")
    with pytest.raises(ValueError, match="compute_dtype is 'int8', expected a floating dtype"):
        Policy(compute_dtype="int8")
    with pytest.raises(ValueError, match=r"param_dtype is 3\.5, expected a floating dtype"):
        Policy(param_dtype=3.5)
    assert Policy.named("float32").cast_to_compute({"key": jax.random.key(0), "n": 3})["n"] == 3


def small_loss(params, carry, batch, key):
    w, x = params["w"].astype(jnp.float16), batch.astype(jnp.float16)
    return jnp.float32(1e-8) * (w * x).astype(jnp.float32).sum(), (carry, {})


def large_loss(params, carry, batch, key):
    h = params["w"].astype(jnp.float16) * jnp.float16(100.0)
    return (h.astype(jnp.float32) * batch).sum(), (carry, {})


def start(optimizer):
    return TrainState.create({"w": jnp.ones(4)}, optimizer)


def test_small_gradients_vanish_without_and_not_with_a_scale():
    plain = optax.sgd(5e7)
    for optimizer, gradient in ((plain, 0.0), (Policy.named("float16").optimizer(plain), 1e-8)):
        state, metrics = make_step(small_loss, optimizer)(start(optimizer), jnp.ones(4), jax.random.key(0))
        np.testing.assert_allclose(state.params["w"], 1 - 5e7 * gradient, rtol=1e-3)
        assert float(metrics["loss"]) == pytest.approx(4e-8)
        assert float(metrics["grad_norm"]) == pytest.approx(2 * gradient, rel=1e-3)


def test_the_scale_falls_at_an_overflow_and_rises_after_a_while():
    optimizer = scale_loss(optax.sgd(1e-4, momentum=0.9), start=2.0**15, every=3)
    step, state = make_step(large_loss, optimizer), start(optimizer)
    scales, moved = [], []
    for number in range(14):
        before = np.asarray(state.params["w"])
        state, metrics = step(state, jnp.ones(4), jax.random.key(0))
        scales.append(float(metrics["loss_scale"]))
        moved.append(bool((np.asarray(state.params["w"]) != before).any()))
        assert moved[-1] == (not int(metrics["overflowed"]))
        assert int(state.step) == number + 1
        assert np.isfinite(np.asarray(jax.tree.leaves(state.opt_state.inner)[0])).all()
    # 100 times the scale is below 65,504 from 2**9 on; every third good step tries 2**10 again
    first = [2.0**n for n in range(15, 8, -1)]
    assert scales == [*first, 512, 512, 1024, 512, 512, 512, 1024]
    assert moved == [False] * 6 + [True] * 3 + [False] + [True] * 3 + [False]


def test_several_steps_a_call_scale_alike():
    optimizer = scale_loss(optax.sgd(1e-4), every=3)
    data, key = jnp.ones(4), jax.random.key(0)
    state, step = start(optimizer), make_step(large_loss, optimizer)
    for _ in range(9):
        state, _ = step(state, data, key)
    other, metrics = make_steps(large_loss, optimizer, lambda data, step: data)(start(optimizer), data, key, 9)
    np.testing.assert_allclose(state.params["w"], other.params["w"])
    assert float(state.opt_state.scale) == float(other.opt_state.scale)
    assert int(metrics["overflowed"].sum()) == 6


def test_at_the_smallest_scale_what_is_not_finite_is_an_error(tmp_path):
    optimizer = scale_loss(optax.sgd(1e-4), start=1.0)
    nan = jnp.full(4, jnp.nan)
    state, metrics = make_step(large_loss, optimizer)(start(optimizer), nan, jax.random.key(0))
    assert not int(metrics["overflowed"])
    assert not np.isfinite(metrics["grad_norm"])
    np.testing.assert_array_equal(state.params["w"], 1.0)
    _, metrics = make_step(large_loss, optimizer, non_finite="skip")(start(optimizer), nan, jax.random.key(0))
    assert int(metrics["skipped"]) == 1


def test_the_mean_of_parameters_is_found_inside():
    optimizer = scale_loss(average_params(optax.sgd(0.1), 0.9))
    state = start(optimizer)
    assert isinstance(state.opt_state, ScaledState)
    np.testing.assert_array_equal(averaged_params(state.opt_state, None)["w"], state.params["w"])


def test_scales_are_checked():
    for scale in (0.5, 3.0, 0.0):
        with pytest.raises(ValueError, match="expected a power of two of at least 1"):
            scale_loss(optax.sgd(1.0), scale)
    with pytest.raises(ValueError, match="every is 0, expected 1 step or more"):
        scale_loss(optax.sgd(1.0), every=0)


ARGUMENTS = ["--model=lstm", "--units=8", "--batch=4", "--length=16", "--steps=40", "--eval-every=20", "--log-every=10"]
ARGUMENTS += ["--sample-length=5", "--eval-batch=16"]


def test_a_run_in_float16_learns_and_resumes_to_the_bit(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} green bottles, and {n * n % 97} on the wall.\n" for n in range(300)))
    arguments = [*ARGUMENTS, f"--corpus={text}", "--dtype=float16"]
    assert char_lm.main([*arguments, f"--workdir={tmp_path / 'whole'}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(row["loss_scale"] >= 1 for row in rows if "loss" in row)
    real, calls = char_lm.make_bpc, []

    def dies(model):
        bpc = real(model)

        def once(*given):
            calls.append(1)
            if len(calls) == 2:
                raise NonFinite("a crash")
            return bpc(*given)

        return once

    monkeypatch.setattr(char_lm, "make_bpc", dies)
    with pytest.raises(SystemExit):
        char_lm.main([*arguments, f"--workdir={tmp_path / 'torn'}"])
    monkeypatch.setattr(char_lm, "make_bpc", real)
    assert char_lm.main([*arguments, f"--workdir={tmp_path / 'torn'}"]) == 0
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "torn")]
    assert files[0] == files[1]
