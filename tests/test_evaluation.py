"""Evaluation: one number, whatever the batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.data import evaluation_windows
from hyperjax.training import make_evaluate

VOCABULARY, UNITS = 7, 12


def params(memory):
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "in": jax.random.normal(keys[0], (VOCABULARY, UNITS)),
        "loop": memory * jnp.linalg.qr(jax.random.normal(keys[1], (UNITS, UNITS)))[0],
        "out": 2 * jax.random.normal(keys[2], (UNITS, VOCABULARY)),
    }


def predict(p, inputs, carry):
    def step(h, x):
        h = jnp.tanh(jax.nn.one_hot(x, VOCABULARY) @ p["in"] + h @ p["loop"])
        return h, h @ p["out"]

    carry, logits = jax.lax.scan(step, carry[0], inputs.T)
    return logits.transpose(1, 0, 2), (carry,)


def reference(p, ids):
    """The definition, in float64: one character after the other."""
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    h, nats = np.zeros(UNITS), 0.0
    for before, now in zip([-1, *ids[:-1]], ids, strict=True):
        h = np.tanh((p["in"][before] if before >= 0 else 0) + h @ p["loop"])
        logits = h @ p["out"]
        nats += np.log(np.exp(logits - logits[now]).sum())
    return nats / len(ids) / np.log(2)


@pytest.mark.parametrize("memory", [0.5, 1.0])
@pytest.mark.parametrize(("batch", "length"), [(1, 50), (2, 16), (5, 10), (16, 7), (64, 100)])
def test_equals_the_definition_at_any_batch_size(batch, length, memory):
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 403)
    p = params(memory)
    windows = evaluation_windows(ids, batch, length)
    streams = windows["inputs"].shape[1]
    result = make_evaluate(predict)(p, (jnp.zeros((streams, UNITS)),), windows)
    assert result.characters == len(ids)
    assert result.bpc == pytest.approx(reference(p, ids), abs=1e-5)
    assert result.passes <= streams


def test_the_streams_do_need_one_anothers_state():
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 403)
    windows, p = evaluation_windows(ids, 16, 7), params(1.0)
    logits, nats, carry = None, 0.0, (jnp.zeros((16, UNITS)),)
    for inputs, targets, mask in zip(windows["inputs"], windows["targets"], windows["mask"], strict=True):
        logits, carry = predict(p, inputs, carry)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        nats += float((losses * mask).sum())
    assert abs(nats / len(ids) / np.log(2) - reference(p, ids)) > 1e-3


def test_bad_windows_are_refused():
    evaluate = make_evaluate(predict)
    windows = evaluation_windows(np.arange(40) % VOCABULARY, 4, 5)
    with pytest.raises(ValueError, match="the windows have 4 streams"):
        evaluate(params(0.5), (jnp.zeros((3, UNITS)),), windows)
    mask = windows["mask"].copy()
    mask[0, 2, 1] = False
    with pytest.raises(ValueError, match="all padding after"):
        evaluate(params(0.5), (jnp.zeros((4, UNITS)),), {**windows, "mask": mask})
