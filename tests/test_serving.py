"""hyperjax.routing.serving: the same network in three forms, equal, counted and timed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax import routing

TASKS = {"b": routing.Binary(), "a": routing.MultiClass(3)}
X = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)


def half_closed(**options):
    """A network of ragged levels with random weights, of which some gates are closed and none of a task's last."""
    model = routing.SNR(((4, 3), (2, (5, 4), 3)), TASKS, towers=(3,), **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)
    for name, number in (("level_1", 0), ("towers", 1)):
        log_alpha = np.full(variables["params"][name]["log_alpha"].shape, 0.5, np.float32)
        log_alpha[..., number] = -9.0
        variables["params"][name]["log_alpha"] = jnp.asarray(log_alpha)
    return model, variables


def test_folded_gates_compute_the_same_without_gates():
    model, variables = half_closed()
    dense, folded = routing.fold_gates(model, variables)
    assert dense.gates is None
    masked, answers = model.apply(variables, X)[0], dense.apply(folded, X)[0]
    for name in TASKS:
        np.testing.assert_allclose(answers[name], masked[name], rtol=1e-5, atol=1e-5)
    assert not any("log_alpha" in leaves for leaves in folded["params"].values())
    assert np.all(np.asarray(folded["params"]["level_1"]["kernel"])[:4] == 0)  # the rows of source 0


@pytest.mark.parametrize("options", [{"connection": "aver"}, {"per": "task"}, {"per": "sample"}])
def test_gates_without_weights_of_their_own_are_not_folded(options):
    model = routing.SNR(((4, 4), (4, 4)), TASKS, **options)
    with pytest.raises(ValueError, match="expected 'trans' per connection"):
        routing.fold_gates(model, {"params": {}})


def test_the_report_counts_what_is_there():
    model, variables = half_closed()
    small = routing.compact(model, variables)
    found = routing.compare_serving(model, variables, small, X, repeats=1)
    assert (found["connections_before"], found["connections"]) == small.connections
    assert (found["params_before"], found["params"]) == small.params
    assert found["subnetworks"] == 2 + 2 - 1  # source 0 is read by nobody, nor is sub-network 1 of the second level
    # Level 0 to 5 of input, then what is left of each connection, the second layer of a kept sub-network, the outputs.
    first, second, towers, outputs = 5 * 3, 3 * 2 + 3 * 3, 2 * (2 + 3) * 3, 3 * 1 + 3 * 3
    assert found["flops_compact"] == 2 * len(X) * (first + second + towers + outputs)
    assert found["flops_masked"] >= found["flops_dense"] > found["flops_compact"]
    assert found["gap"] < 1e-5
    for form in ("masked", "dense"):
        ratio = found[f"seconds_{form}"] / found["seconds_compact"]
        assert found[f"ratio_{form}_over_compact"] == pytest.approx(ratio)
