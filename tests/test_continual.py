"""The output regulariser: equal to its formula, blind to what is not generated, and one compilation for all tasks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import ConvNet, Mlp

from hyperjax.hypernet import (
    MLP,
    Chunked,
    ConvTiles,
    Frozen,
    HyperNetwork,
    Learned,
    Linear,
    LowRank,
    PerTask,
    Scale,
    SeparableMLP,
)
from hyperjax.hypernet.continual import (
    continual_scores,
    output_regularizer,
    output_regularizer_from_variables,
    pad_tasks,
    remember,
)

X = np.ones((3, 5), np.float32)
GENERATORS = (
    Linear(),
    MLP(hidden=(6,)),
    SeparableMLP(hidden=(8,), groups=2),
    Chunked(chunk=20, features=6),
    Scale(),
    LowRank(rank=2),
)
MIXED = (("LayerNorm", Learned()), ("^head/", PerTask()), ("Dense_0/bias", Frozen()))


@functools.cache
def build(generator=None, rules=()):
    hyper = HyperNetwork.from_target(
        Mlp((6,), 3), X, embedding_dim=4, num_embeddings=5, generator=generator or Linear(), rules=rules
    )
    return hyper, *old_and_new(hyper, X)


def old_and_new(hyper, x):
    """Two sets of variables that share the embeddings and what is frozen, and nothing else."""
    shapes = jax.eval_shape(lambda: hyper.init(jax.random.key(0), x, task_id=0))
    rng = np.random.default_rng(0)
    old, new = (jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(s.dtype), shapes) for _ in range(2))
    return old, {**old, "params": {**new["params"], "embedding": old["params"]["embedding"]}}


def by_hand(hyper, old, new, tasks, beta, counts=lambda path: True):
    """The formula in NumPy: the squared distances of whole networks, one task after another."""
    total = 0.0
    generate = jax.jit(lambda variables, task: hyper.generate(variables, task_id=task))
    if len(hyper.targets) > 1:
        generate = jax.jit(lambda variables, task: hyper.generate(variables, task_id=task), static_argnums=1)
    for task in tasks:
        before, after = (jax.tree_util.tree_leaves_with_path(generate(v, task)) for v in (old, new))
        for (path, a), (_, b) in zip(before, after, strict=True):
            if counts(jax.tree_util.keystr(path, simple=True, separator="/")):
                total += np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return beta / len(tasks) * total


@functools.partial(jax.jit, static_argnums=0)
def regularizer(hyper, old, new, tasks, beta):
    return output_regularizer(hyper, new, remember(hyper, old, tasks), tasks, beta)


@pytest.mark.parametrize("generator", GENERATORS, ids=lambda g: type(g).__name__)
def test_it_is_the_formula_for_every_generator(generator):
    hyper, old, new = build(generator)
    tasks = pad_tasks([3, 0, 1], 4)

    @jax.jit
    def both(new):
        kept = remember(hyper, old, tasks)
        return output_regularizer(hyper, new, kept, tasks, 0.7), output_regularizer_from_variables(
            hyper, new, old, tasks, 0.7
        )

    of_weights, of_variables = both(new)
    expected = by_hand(hyper, old, new, [3, 0, 1], 0.7)
    assert expected > 0.1
    np.testing.assert_allclose(of_weights, expected, rtol=2e-5)
    np.testing.assert_allclose(of_variables, of_weights, rtol=1e-5)
    assert max(both(old)) < 1e-9


def test_it_is_the_formula_of_a_linear_head_from_its_own_weights():
    hyper, old, new = build(Linear(use_bias=False))
    H_old, H_new, e = old["params"]["generators_0"], new["params"]["generators_0"], old["params"]["embedding"]
    moved = {path: np.asarray(H_new[path] - H_old[path]) for path in H_old}
    heads = [path for path in moved if path.removesuffix(".bias") == path or path.removesuffix(".bias") not in moved]
    assert len(heads) < len(moved)  # vectors have a bias of their own
    expected = (
        0.1
        / 2
        * sum(
            np.sum((moved[path] @ e[task] + moved.get(f"{path}.bias", 0.0)) ** 2) for path in heads for task in (2, 4)
        )
    )
    eager = output_regularizer(hyper, new, remember(hyper, old, [2, 4]), [2, 4], 0.1)
    np.testing.assert_allclose(eager, expected, rtol=1e-5)
    np.testing.assert_allclose(regularizer(hyper, old, new, np.array([2, 4]), 0.1), expected, rtol=1e-5)


def test_the_gradient_reaches_the_generators_alone():
    hyper, old, new = build(Linear(), MIXED)
    tasks = pad_tasks([0, 2], 4)

    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(params, remembered, former):
        variables = {**new, "params": params}
        of_weights = output_regularizer(hyper, variables, remembered, tasks, 1.0)
        return of_weights + output_regularizer_from_variables(hyper, variables, {**old, "params": former}, tasks, 1.0)

    grads, *others = jax.jit(lambda: gradient(new["params"], remember(hyper, old, tasks), old["params"]))()
    generators = {f"generators_{i}" for i, generator in enumerate(hyper.generators) if isinstance(generator, Linear)}
    assert len(generators) == 1
    assert len(grads) == 4  # embedding, Linear, Learned, PerTask
    for name, grad in grads.items():
        assert {bool(np.any(leaf)) for leaf in jax.tree.leaves(grad)} == {name in generators}, name
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))


def test_what_is_not_generated_does_not_count():
    hyper, old, new = build(Linear(), MIXED)
    remembered = jax.eval_shape(lambda: remember(hyper, old, [0, 1]))
    assert {path: leaf.shape for leaves in remembered.values() for path, leaf in leaves.items()} == {
        "Dense_0/kernel": (2, 5, 6)
    }
    found = regularizer(hyper, old, new, np.array([0, 1]), 1.0)
    np.testing.assert_allclose(found, by_hand(hyper, old, new, [0, 1], 1.0, "Dense_0/kernel".__eq__), rtol=1e-5)
    assert found < by_hand(hyper, old, new, [0, 1], 1.0) - 0.1


def test_one_more_task_compiles_nothing():
    hyper, old, new = build(Chunked(chunk=20, features=6))
    traced = []

    @jax.jit
    @jax.value_and_grad
    def loss(params, tasks):
        traced.append(tasks)
        return output_regularizer_from_variables(hyper, {**new, "params": params}, old, tasks, 0.5)

    for n in range(5):
        value, grads = loss(new["params"], pad_tasks(range(n), 4))
        np.testing.assert_allclose(value, by_hand(hyper, old, new, range(n), 0.5) if n else 0.0, rtol=2e-5)
        assert any(np.any(leaf) for leaf in jax.tree.leaves(grads)) == (n > 0)
    assert len(traced) == 1
    assert output_regularizer_from_variables(hyper, new, old, [], 1.0) == 0


def test_heads_of_different_sizes_count_for_their_own_tasks():
    targets = [Mlp((6,), 2), Mlp((6,), 3), Mlp((6,), 2)]
    hyper = HyperNetwork.from_target(targets, X, embedding_dim=4, rules=[("LayerNorm", Learned())])
    old, new = old_and_new(hyper, X)
    for tasks in ([1], [2, 0, 1]):
        found = regularizer(hyper, old, new, pad_tasks(tasks, 3), 0.3)
        expected = by_hand(hyper, old, new, tasks, 0.3, lambda path: "LayerNorm" not in path)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_tiles_that_the_embedding_scales_count():
    images = np.ones((2, 6, 6, 3), np.float32)
    tiles = ConvTiles(tile=4, embedding=3, hidden=5)
    hyper = HyperNetwork.from_target(
        ConvNet((4,)),
        images,
        embedding_dim=4,
        num_embeddings=3,
        generator=Learned(),
        rules=[("Conv.*kernel", tiles)],
    )
    old, new = old_and_new(hyper, images)
    found = regularizer(hyper, old, new, np.array([0, 2]), 1.0)
    np.testing.assert_allclose(found, by_hand(hyper, old, new, [0, 2], 1.0, "Conv_0/kernel".__eq__), rtol=1e-5)


def test_a_traced_task_id_out_of_range_is_nan():
    hyper, old, new = build()
    for task in (5, -2):
        assert jnp.isnan(regularizer(hyper, old, new, np.array([task]), 1.0))


def test_bad_input_is_named():
    hyper, old, new = build()
    remembered = jax.tree.map(
        lambda s: jnp.zeros(s.shape), jax.eval_shape(lambda: remember(hyper, old, np.array([0, 1])))
    )
    for call, line in [
        (lambda: remember(hyper, old, [5]), r"task_ids are \[5\], expected 0 to 4, or -1 for an empty slot"),
        (lambda: remember(hyper, old, [0, -2]), r"task_ids are \[0, -2\], expected 0 to 4, or -1"),
        (lambda: remember(hyper, old, [0.5]), r"task_ids are \[0.5\], expected a vector \[M\] of whole numbers"),
        (lambda: remember(hyper, old, 3), r"task_ids are 3, expected a vector"),
        (lambda: pad_tasks(range(4), 3), "there are 4 old tasks for 3 slots; raise size"),
        (lambda: output_regularizer(hyper, new, remembered, [0], 1.0), r"remembered holds \[2\] tasks and task_ids 1"),
        (lambda: output_regularizer(hyper, new, remembered, [0, 1], -1.0), "beta is -1.0, expected"),
        (lambda: output_regularizer(hyper, new, remembered, [0, 1], np.inf), "beta is inf, expected"),
    ]:
        with pytest.raises(ValueError, match=line):
            call()
    learned, variables, _ = build(Learned())
    with pytest.raises(ValueError, match="no weights to remember"):
        remember(learned, variables, [0])
    static = HyperNetwork.from_target(Mlp(), X, embedding_dim=4, num_embeddings=0, generator=Learned())
    with pytest.raises(ValueError, match="has no table of task embeddings"):
        remember(static, {}, [0])


def test_scores_of_an_accuracy_matrix():
    matrix = np.array([[0.9, np.nan, np.nan], [0.95, 0.8, np.nan], [0.6, 0.7, 1.0]])
    found = continual_scores(matrix)
    expected = {"accuracy": 2.3 / 3, "accuracy_when_learned": 0.9, "forgetting": (0.35 + 0.1) / 2}
    assert found == pytest.approx(expected)
    assert continual_scores(np.array([[0.5]])) == {"accuracy": 0.5, "accuracy_when_learned": 0.5, "forgetting": 0.0}
    with pytest.raises(ValueError, match=r"accuracies have shape \(2, 3\), expected"):
        continual_scores(matrix[:2])
    with pytest.raises(ValueError, match="accuracies of task 1 are missing in the last row"):
        continual_scores(np.array([[0.9, np.nan], [0.9, np.nan]]))
