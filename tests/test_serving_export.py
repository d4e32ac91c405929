"""Exported functions: what they compute in a process that has JAX alone, at sizes that they were not exported with."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import random_variables

import hyperjax as hj
from hyperjax import hypernet, pruning, routing
from hyperjax.recurrent import LanguageModel
from hyperjax.serving import export
from hyperjax.transformer import Config, Decoder

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 20, (2, 6)).astype(np.int32)


def language_model():
    """A HyperLSTM's step and its whole sequence."""
    model = LanguageModel("ln_hyper_lstm", 20, units=16, hyper_units=8)
    variables = random_variables(model, TOKENS)

    def sequence(tokens, carry):
        out = model.apply(variables, tokens, carry)
        return out["logits"], out["carry"]

    def step(token, carry):
        logits, carry = sequence(token[:, None], carry)
        return logits[:, 0], carry

    carry = model.initialize_carry(2)
    other = jax.tree.map(lambda c: RNG.standard_normal((5, *c.shape[1:])).astype(np.float32), carry)
    text = RNG.integers(0, 20, (5, 9)).astype(np.int32)
    yield "step", export(step, TOKENS[:, 0], carry), step, (text[:, 0], other)
    yield (
        "sequence",
        export(sequence, TOKENS, carry, free=[("batch", "length"), ("batch",)]),
        sequence,
        (text, other),
    )


def hypernetwork():
    """A hypernetwork specialised to a task."""
    model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), np.ones((2, 4), np.float32)
    hyper = hj.HyperNetwork.from_target(model, x, embedding_dim=4, num_embeddings=3)
    variables = random_variables(hyper, x, task_id=0)
    other = RNG.standard_normal((5, 4)).astype(np.float32)
    run = lambda x: hyper.apply(variables, x, task_id=2)  # noqa: E731
    yield "hypernetwork", hypernet.export(hyper, variables, x, task_id=2), run, (other,)


def snr():
    """A compacted SNR network."""
    tasks = {"a": routing.Regression(), "b": routing.Binary()}
    model, x = routing.SNR(((8,) * 3, (8,) * 3), tasks, (4,), "trans"), np.ones((2, 6), np.float32)
    variables = random_variables(model, x)
    small = routing.compact(model, variables)
    other = RNG.standard_normal((5, 6)).astype(np.float32)
    run = lambda x: model.apply(variables, x)[0]  # noqa: E731
    yield "snr", export(lambda x: small.model.apply(small.variables, x)[0], x), run, (other,)


def transformer():
    """A compacted Transformer."""
    config = Config(20, layers=2, width=16, heads=2, ffn=16, positions="rotary")
    choice = pruning.HardConcrete()
    model = pruning.Gated(config, prune=("heads", "blocks"), per="static", choice=choice, blocks=4)
    variables = random_variables(model, TOKENS)
    small = pruning.compact(model, variables)
    exported = export(lambda tokens: small.model.apply(small.variables, tokens)["logits"], TOKENS)
    run = lambda tokens: model.apply(variables, tokens)["logits"]  # noqa: E731
    yield "transformer", exported, run, (RNG.integers(0, 20, (5, 6)).astype(np.int32),)


FRESH = """
import pickle, sys
import jax, numpy as np
for name, arguments in pickle.load(open("inputs", "rb")).items():
    run = jax.export.deserialize(bytearray(open(name, "rb").read())).call
    np.savez(name + ".npz", *jax.tree.leaves(run(*arguments)))
assert not {name.split(".")[0] for name in sys.modules} & {"hyperjax", "flax", "optax", "orbax"}
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By name: what a process without this library computes, and what the library does."""
    import pickle

    folder, inputs, wanted = tmp_path_factory.mktemp("exported"), {}, {}
    for make in (language_model, hypernetwork, snr, transformer):
        for name, exported, run, arguments in make():
            (folder / name).write_bytes(exported)
            inputs[name], wanted[name] = arguments, jax.tree.leaves(jax.jit(run)(*arguments))
    (folder / "inputs").write_bytes(pickle.dumps(inputs))
    subprocess.run([sys.executable, "-I", "-c", FRESH], cwd=folder, check=True, timeout=300)
    got = {name: list(np.load(folder / f"{name}.npz").values()) for name in inputs}
    return {name: (got[name], wanted[name]) for name in inputs}


@pytest.mark.parametrize("name", ["step", "sequence", "hypernetwork", "snr", "transformer"])
def test_a_process_with_jax_alone_computes_the_same(outcomes, name):
    got, wanted = outcomes[name]
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1.0, float(np.abs(b).max())))


def test_all_lengths_may_be_fixed():
    run = jax.export.deserialize(bytearray(export(jnp.sin, np.ones((2, 3), np.float32), free=()))).call
    np.testing.assert_allclose(run(np.ones((2, 3), np.float32)), np.sin(1), rtol=1e-6)
    with pytest.raises(ValueError, match="Shape mismatch"):
        run(np.ones((3, 3), np.float32))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_length_of_a_transformer_may_be_free(positions):
    model = Decoder(Config(20, layers=2, width=16, heads=2, ffn=16, positions=positions, length=30))
    variables = random_variables(model, TOKENS)
    exported = export(
        lambda tokens: model.apply(variables, tokens)["logits"],
        TOKENS,
        free=("batch", "length"),
        most={"length": 30},
    )
    run = jax.export.deserialize(bytearray(exported)).call
    for shape in ((1, 30), (5, 1)):
        tokens = RNG.integers(0, 20, shape).astype(np.int32)
        wanted = np.asarray(model.apply(variables, tokens)["logits"])
        np.testing.assert_allclose(run(tokens), wanted, rtol=0, atol=1e-6 * max(1.0, float(np.abs(wanted).max())))


def test_it_runs_on_the_platforms_asked_for_and_no_other():
    exported = jax.export.deserialize(bytearray(export(jnp.sin, np.ones(2, np.float32), platforms=("cpu", "tpu"))))
    assert exported.platforms == ("cpu", "tpu")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"platforms": ("gpu",)}, "platform 'gpu' is unknown, expected some of cpu, cuda, tpu, rocm"),
        ({"platforms": ()}, "platforms are empty"),
        (
            {"free": ("batch", "length", "more")},
            r"an input has shape \(2, 3\), too few axes for free batch, length, more",
        ),
        ({"free": ("batch", "length")}, "inputs have 3 and 4 along length, expected one length; or name it apart"),
        ({"most": {"length": 9}}, "most has 'length', which is no free axis, expected some of batch"),
        ({"free": [("batch",)]}, "free names the axes of 1 examples, but there are 2"),
    ],
)
def test_refuses_before_it_traces(options, line):
    def function(a, b):
        raise AssertionError("traced")

    with pytest.raises(ValueError, match=line):
        export(function, np.ones((2, 3)), np.ones((2, 4)), **options)
