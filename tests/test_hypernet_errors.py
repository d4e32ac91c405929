"""Bad input of the hypernet wing: one line that names the value and the fix, before anything is compiled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import ConvNet, Mlp, function, function_params, random_variables, x

import hyperjax as hj

INPUTS = x(3, 6)


class Empty(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


def make(model=None, *inputs, **arguments):
    given = {"embedding_dim": 4, "num_embeddings": 3} | arguments
    return hj.HyperNetwork.from_target(Mlp() if model is None else model, *(inputs or (INPUTS,)), **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding_dim": 0}, "embedding_dim is 0, expected a whole number of at least 1"),
        ({"embedding_dim": 2.0}, "embedding_dim is 2.0"),
        ({"num_embeddings": -1}, "num_embeddings is -1"),
        ({"sample_block": 0}, "sample_block is 0"),
        ({"rules": [("no_such", hj.Learned())]}, "'no_such' selects none of the target's parameters: Dense_0/bias"),
        ({"rules": [("[", hj.Learned())]}, "'\\[' is no regular expression"),
        ({"rules": ["head"]}, "a rule is 'head', expected"),
        ({"rules": [("head", hj.Learned)]}, "an instance: add \\(\\)"),
        ({"generator": "linear"}, "the generator is 'linear', expected"),
        ({"generator": hj.ConvTiles()}, "has shape \\(16,\\), expected \\[height"),
        (
            {"generator": hj.SeparableMLP(hidden=(10,), groups=4)},
            "hidden has width 10, expected a multiple of groups = 4",
        ),
        ({"generator": hj.Chunked(chunk=0)}, "chunk is 0"),
        ({"generator": hj.LowRank(rank=0)}, "rank is 0"),
        ({"num_embeddings": 0}, "Linear needs an embedding, but num_embeddings is 0"),
        ({"num_embeddings": 0, "generator": hj.PerTask()}, "PerTask has no tasks"),
        ({"per_task": ("batch_stats",)}, "per_task names 'batch_stats'"),
        ({"init": jnp.zeros}, "a Linen module initializes itself"),
        ({"condition": 1.0}, "'condition' has a name that the hypernetwork uses"),
        ({"generator": hj.Linear(residual=True, use_bias=False)}, "residual=True needs use_bias=True"),
    ],
)
def test_from_target(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Empty(), {}, "the target Empty has no parameters"),
        (3, {}, "the target is int, expected a Linen module"),
        ([], {}, "there are 0 targets"),
        ([Mlp(), Mlp()], {}, "there are 2 targets for 3 tasks"),
        (function, {}, "give params=TREE or init"),
        (function, {"params": jax.eval_shape(function_params)}, "shapes without values"),
        (function, {"params": {}}, "has no parameters"),
        (
            function,
            {"params": function_params(), "rules": [("shift", hj.Linear())]},
            "shift is int32.* rule with Frozen",
        ),
        (function, {"params": {"act": jax.nn.relu}}, "hold a .* at act, expected arrays only"),
        (function, {"params": {"lam": jnp.complex64(1)}}, "complex64.* rule with Frozen\\(\\) or Learned"),
        (Mlp(), {"params": {"Dense_0": {}}}, "params has .* expected"),
    ],
)
def test_targets(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(model, **arguments)


@pytest.fixture(scope="module")
def ready():
    hyper = make()
    return hyper, random_variables(hyper, INPUTS, task_id=0)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ({}, "give task_id, 0 to 2, or z"),
        ({"task_id": 3}, "task_id is 3, expected 0 to 2, as num_embeddings is 3"),
        ({"task_id": -1}, "task_id is -1"),
        ({"task_id": np.array([0, 7, 1])}, "task_id is \\[0 7 1\\], expected 0 to 2"),
        ({"task_id": 1.0}, "task_id is 1.0, expected a whole number"),
        ({"task_id": np.zeros((2, 2), int)}, "expected a whole number, or a vector"),
        ({"task_id": True}, "expected a whole number"),
        ({"z": x(5)}, "z has shape \\(5,\\), expected \\[4\\] or \\[batch, 4\\]"),
        ({"z": x(2, 3, 4)}, "z has shape \\(2, 3, 4\\)"),
        ({"z": jnp.zeros(4, jnp.int32)}, "z is int32, expected floating"),
        ({"condition": x(4)}, "there is no encoder"),
        ({"z": x(3, 4), "task_id": np.array([0, 1])}, "batches of \\[2, 3\\]"),
        ({"z": x(2, 4)}, "has shape \\(3, 6\\), expected the leading axis 2"),
    ],
)
def test_calls(ready, which, message):
    hyper, variables = ready
    with pytest.raises(ValueError, match=message):
        hyper.apply(variables, INPUTS, **which)


def test_a_traced_task_that_is_out_of_range_is_loud(ready):
    hyper, variables = ready
    run = jax.jit(lambda task: hyper.apply(variables, INPUTS, task_id=task))
    assert jnp.isnan(run(3)).all()
    assert jnp.isnan(run(-1)).all()
    assert jnp.isfinite(run(2)).all()


def test_an_encoder_needs_its_condition_and_its_width():
    hyper = make(encoder=nn.Dense(5))
    with pytest.raises(ValueError, match="the encoder's output has shape \\(5,\\), expected \\[4\\]"):
        random_variables(hyper, INPUTS, condition=x(2))
    hyper = make(encoder=nn.Dense(4))
    with pytest.raises(ValueError, match="nothing to encode; give condition"):
        random_variables(hyper, INPUTS, task_id=0)
    with pytest.raises(ValueError, match="both given"):
        random_variables(hyper, INPUTS, z=x(4), condition=x(2))


def test_what_is_kept_per_task_needs_the_task():
    hyper = make(rules=[("head", hj.PerTask())])
    variables = random_variables(hyper, INPUTS, task_id=0)
    with pytest.raises(ValueError, match="give task_id, beside z"):
        hyper.apply(variables, INPUTS, z=x(4))
    assert hyper.apply(variables, INPUTS, z=x(4), task_id=1).shape == (3, 4)


def test_no_table(ready):
    hyper = make(encoder=nn.Dense(4))
    with pytest.raises(ValueError, match="no table of embeddings"):
        hyper.embeddings(random_variables(hyper, INPUTS, condition=x(2)))


def test_variables_that_are_not_all_there():
    hyper = make(generator=hj.Chunked(features=4))
    variables = random_variables(hyper, INPUTS, task_id=0)
    with pytest.raises(ValueError, match="variables lack some of Chunked; pass all that init returned"):
        hyper.apply({"params": variables["params"]}, INPUTS, task_id=0)
    images = x(3, 6, 6, 2)
    hyper = make(ConvNet(), images, generator=hj.Linear())
    variables = random_variables(hyper, images, task_id=0)
    with pytest.raises(ValueError, match="variables lack 'batch_stats'"):
        hyper.apply({"params": variables["params"]}, images, task_id=0)
    with pytest.raises(ValueError, match=r"a table of embeddings \(3, 4\), expected \[T, E\] = \(5, 4\)"):
        make(ConvNet(), images, num_embeddings=5).apply(variables, images, task_id=0)


def test_a_static_hypernetwork_takes_no_z():
    hyper = make(num_embeddings=0, generator=hj.Learned())
    variables = random_variables(hyper, INPUTS)
    with pytest.raises(ValueError, match="z was given to a static hypernetwork"):
        hyper.apply(variables, INPUTS, z=x(4))


def test_what_a_generator_of_one_s_own_forgets():
    class Forgetful(hj.Generator):
        shape: tuple[int, ...] | None = None

        def __call__(self, z, task_id=None, native=None):
            return {} if self.shape is None else {spec.path: jnp.zeros(self.shape) for spec in self.leaves}

    for shape, message in ((None, "made Dense_0/bias None"), ((7,), r"made Dense_0/bias \(7,\), expected")):
        hyper = make(generator=Forgetful(shape=shape))
        with pytest.raises(ValueError, match=message):
            random_variables(hyper, INPUTS, task_id=0)


def test_a_batch_of_z_needs_outputs_with_its_axis():
    model = lambda p, x: (x @ p["w"], jnp.sum(x))  # noqa: E731
    hyper = make(model, params={"w": jnp.ones((6, 2))})
    with pytest.raises(ValueError, match=r"output \[1\] is a scalar"):
        random_variables(hyper, INPUTS, z=x(3, 4))
