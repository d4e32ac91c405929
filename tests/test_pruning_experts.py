"""Experts, chosen positions and distillation against plain NumPy and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import random_variables

from hyperjax.pruning import Experts, Gated, MixtureOfDepths, distillation
from hyperjax.pruning.experts import balance_loss, choose_blocks, choose_tokens, dispatch, places, z_loss
from hyperjax.transformer import Config, Decoder, Encoder, Gates

B, L, V, N, K = 2, 6, 7, 4, 2
C = Config(vocabulary=V, layers=2, width=8, heads=2, ffn=8, outputs=5)
RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, V, (B, L))
MASK = np.arange(L) < np.array([[6], [4]])
LOGITS = RNG.normal(size=(B, L, N)).astype(np.float32)
KEY = jax.random.key(0)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.mark.parametrize(("causal", "routing"), [(True, "token"), (False, "token"), (False, "expert")])
def test_room_for_all_is_the_exact_form(causal, routing):
    model = Experts(C, causal=causal, blocks=N, keep=K, routing=routing)
    variables, options = random_variables(model, TEXT), {} if causal else {"mask": MASK}
    run = jax.jit(lambda v, capacity: model.apply(v, TEXT, capacity=capacity, **options), static_argnums=1)
    exact, roomy, tight = (run(variables, capacity) for capacity in (None, 4.0, 0.5))
    np.testing.assert_allclose(roomy["logits"], exact["logits"], rtol=0, atol=1e-5 * np.abs(exact["logits"]).max())
    assert roomy["dropped"] == exact["dropped"] == 0
    if routing == "expert":  # blocks that choose have a place for what they chose
        assert tight["dropped"] == 0
        np.testing.assert_allclose(tight["logits"], exact["logits"], rtol=1e-5, atol=1e-5)
    else:
        assert tight["dropped"] > 0
        assert np.abs(tight["logits"] - exact["logits"]).max() > 1e-3
        assert (tight["share"] < exact["share"]).all()
    trained = jax.jit(lambda v: model.clone(capacity=0.5).apply(v, TEXT, KEY, **options))(variables)
    np.testing.assert_allclose(trained["logits"], tight["logits"], rtol=1e-5, atol=1e-5)  # with a key, its own capacity
    assert set(exact["losses"]) == ({"balance", "z"} if routing == "token" else {"z"})


def test_tokens_choose_blocks():
    gates = np.asarray(choose_blocks(LOGITS, K, MASK))
    for b, t in np.ndindex(B, L):
        best = np.argsort(-LOGITS[b, t])[:K]
        wanted = np.zeros(N)
        wanted[best] = K * softmax(LOGITS[b, t, best]) * MASK[b, t]
        np.testing.assert_allclose(gates[b, t], wanted, rtol=1e-5)
    np.testing.assert_allclose(choose_blocks(LOGITS * 0, N), 1, rtol=1e-6)  # all of them, equal: the plain network


def test_blocks_choose_exactly_their_share():
    gates = np.asarray(choose_tokens(LOGITS, K))
    count = K * L // N
    np.testing.assert_array_equal((gates > 0).sum(1), count)  # of each sequence, whatever stands beside it
    weight = N * softmax(LOGITS)
    for b, n in np.ndindex(B, N):
        wanted = np.where(weight[b, :, n] >= np.sort(weight[b, :, n])[-count], weight[b, :, n], 0)
        np.testing.assert_allclose(gates[b, :, n], wanted, rtol=1e-5)
    padded = np.asarray(choose_tokens(LOGITS, K, MASK))
    assert not padded[~MASK].any()
    counts = np.maximum(1, np.round(K * MASK.sum(1) / N))  # of the positions that are there
    np.testing.assert_array_equal((padded > 0).sum(1), np.broadcast_to(counts[:, None], (B, N)))
    short = int(MASK[1].sum())
    alone = np.asarray(choose_tokens(LOGITS[1:, :short], K))
    np.testing.assert_allclose(padded[1:, :short], alone, rtol=1e-6)  # padding and neighbours change nothing


def test_places_and_what_is_dropped():
    assert places((B, L, N), K, 1.0) == 6
    assert places((B, L, N), K, 0.1) == 4  # at least
    assert places((B, L, N), K, 9.0) == B * L  # at most
    gates = np.zeros((2, 3, 2), np.float32)
    gates[:, :, 0] = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]  # all want the first block
    gates[1, 1, 1] = 0.7
    plan, dropped = dispatch(gates, 4)
    np.testing.assert_array_equal(plan.index[0], [0, 3, 1, 4])  # b L + t: both first positions, then both second ones
    np.testing.assert_allclose(plan.weight[0], [0.1, 0.4, 0.2, 0.5])
    assert (plan.index[1][0], plan.weight[1][0]) == (4, np.float32(0.7))
    assert not plan.weight[1][1:].any()
    assert dropped == pytest.approx(2 / 7)


def test_balance_and_z_losses():
    for mask in (None, MASK):
        there = np.ones((B, L), bool) if mask is None else mask
        gates = choose_blocks(LOGITS, K, mask)
        f = (np.asarray(gates)[there] > 0).mean(0) / K
        wanted = N**2 * np.mean(f * softmax(LOGITS)[there].mean(0))
        assert balance_loss(LOGITS, gates, mask) == pytest.approx(float(wanted), rel=1e-5)
        square = np.log(np.exp(LOGITS).sum(-1))[there] ** 2
        assert z_loss(LOGITS, mask) == pytest.approx(square.mean(), rel=1e-5)
    one = np.zeros((B, L, N), np.float32) + np.float32([60, 0, 0, 0])
    assert balance_loss(one, choose_blocks(one, 1)) == pytest.approx(N)  # all to one block
    even = np.eye(N, dtype=np.float32)[np.arange(B * L) % N].reshape(B, L, N)
    assert balance_loss(even, choose_blocks(even, 1)) == pytest.approx(1)
    assert z_loss(np.full((1, 1, N), -np.log(N))) == pytest.approx(0, abs=1e-6)
    gradient = jax.grad(lambda logits: balance_loss(logits, choose_blocks(logits, 1)))(0.1 * one)
    assert np.all(gradient[..., 0] > 0)  # away from the crowd
    assert np.all(gradient[..., 1:] < 0)


def test_losses_and_routers_of_a_step():
    model = Experts(C, blocks=N, keep=K)
    variables = random_variables(model, TEXT)

    def loss(v):
        out = model.apply(v, TEXT, KEY)
        return jnp.square(out["logits"]).mean(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(variables)
    for layer in range(2):
        kernel = gradient["params"][f"routers_{layer}"]["kernel"]
        assert np.any(kernel)
        assert np.all(np.isfinite(kernel))
    np.testing.assert_array_equal((out["gates"].blocks > 0).sum(-1), K)
    assert out["losses"]["balance"] >= 0.5


@pytest.mark.parametrize("causal", [True, False])
def test_gathered_positions_are_the_masked_form(causal):
    model = MixtureOfDepths(C, causal=causal, keep=0.4)
    variables, mask = random_variables(model, TEXT), None if causal else MASK
    out = jax.jit(lambda v: model.apply(v, TEXT, KEY, mask=mask))(variables)
    np.testing.assert_array_equal(out["gates"].tokens.sum(-1), [[6, 6], [3, 3]])  # ceil(0.4 * 6) in the second layer
    scores, _ = model.apply(variables, 1, out["layers"][0]["state"], None, mask, method="_scores")
    third = np.sort(np.asarray(scores), -1)[:, -3, None]
    chosen = np.float32(scores >= third)
    np.testing.assert_array_equal(out["gates"].tokens[1], chosen)
    tokens = np.stack([np.ones((B, L), np.float32), chosen * jax.nn.sigmoid(scores)])
    options = {} if causal else {"mask": mask}
    masked = (Decoder if causal else Encoder)(C).apply(
        {"params": variables["params"]["model"]}, TEXT, gates=Gates(tokens=tokens), **options
    )
    np.testing.assert_allclose(out["logits"], masked["logits"], rtol=0, atol=1e-5 * np.abs(masked["logits"]).max())
    if causal:  # the predictor learns who was chosen, its threshold how many, and nothing else
        _, predicted = model.apply(variables, 1, out["layers"][0]["state"], None, None, method="_scores")
        gap = predicted - variables["params"]["threshold_1"]
        quantile = np.where(gap > 0, 0.6 * gap, -0.4 * gap).mean()  # least where a share of 0.4 is above
        wanted = (jax.nn.softplus(predicted) - chosen * predicted).mean() + quantile
        assert out["losses"]["predictor"] == pytest.approx(float(wanted), rel=1e-5)
        gradient = jax.jit(jax.grad(lambda v: model.apply(v, TEXT, KEY)["losses"]["predictor"]))(variables)["params"]
        moved = {name for name, part in gradient.items() if any(np.any(leaf) for leaf in jax.tree.leaves(part))}
        assert moved == {"predictors_1", "threshold_1"}
        assert gradient["threshold_1"] == pytest.approx(float(0.4 - (gap > 0).mean()), abs=1e-6)


def test_how_many_positions_are_chosen():
    for keep, length, k in ((0.125, 512, 64), (0.07, 100, 7), (0.125, 3, 1), (1.0, 9, 9), (0.3, 10, 3), (0.125, 9, 2)):
        assert MixtureOfDepths(C, keep=keep).chosen(length) == k


def test_distillation():
    student, teacher = LOGITS[0], LOGITS[1]
    for temperature in (1.0, 3.0):
        p, q = softmax(teacher / temperature), softmax(student / temperature)
        wanted = temperature**2 * (p * np.log(p / q)).sum(-1)
        found, back = jax.vjp(lambda s, t, by=temperature: distillation(s, t, by), student, teacher)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
        of_student, of_teacher = back(np.ones(L, np.float32))
        np.testing.assert_allclose(of_student, temperature * (q - p), rtol=1e-4, atol=1e-6)
        assert not np.any(of_teacher)
        np.testing.assert_allclose(distillation(teacher + 3, teacher, temperature), 0, atol=1e-5)
    hot = distillation(student, teacher, 50.0)  # in the limit, half of the squared distance of centred logits
    centred = (student - student.mean(-1, keepdims=True)) - (teacher - teacher.mean(-1, keepdims=True))
    np.testing.assert_allclose(hot, np.square(centred).mean(-1) / 2, rtol=0.1, atol=0.01)


def test_it_runs_in_half_precision():
    half = dataclasses.replace(C, dtype=jnp.bfloat16)
    model = Gated(half, per="token", blocks=N)
    out = jax.jit(model.apply)(random_variables(model, TEXT), TEXT, KEY)
    assert out["share"].dtype == out["logits"].dtype == out["gates"].heads.dtype == jnp.float32
    assert np.all(np.isfinite(out["logits"]))
