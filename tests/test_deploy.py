"""A specialised network leaves the library: as plain variables, through Orbax, and as bytes for JAX alone."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from targets import ConvNet, Mlp, random_variables, x

import hyperjax as hj
from hyperjax.hypernet import export

KEY = jax.random.key(0)


def conv():
    inputs = x(3, 6, 6, 2)
    hyper = hj.HyperNetwork.from_target(ConvNet(), inputs, embedding_dim=4, num_embeddings=3, generator=hj.Chunked())
    return hyper, random_variables(hyper, inputs, task_id=0), inputs


def test_bytes_run_in_a_process_that_has_only_jax(tmp_path):
    hyper, variables, inputs = conv()
    (tmp_path / "net.bin").write_bytes(export(hyper, variables, inputs, task_id=2))
    other = x(7, 6, 6, 2)
    np.save(tmp_path / "x.npy", other)
    code = (
        "import sys, numpy as np, jax\n"
        "from jax import export\n"
        "net = export.deserialize(bytearray(open('net.bin', 'rb').read()))\n"
        "np.save('y.npy', net.call(np.load('x.npy')))\n"
        "assert not any(name.split('.')[0] in ('hyperjax', 'flax') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=120)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), hyper.apply(variables, other, task_id=2), atol=1e-5)


def test_keywords_are_fixed_and_the_batch_may_be(tmp_path):
    inputs = x(3, 6)
    hyper = hj.HyperNetwork.from_target(Mlp(), inputs, embedding_dim=4)
    variables = random_variables(hyper, inputs)
    z = x(4)
    blob = export(hyper, variables, inputs, z=z, scale=3.0, any_batch=False, platforms=("cpu",))
    again = jax.export.deserialize(bytearray(blob))
    np.testing.assert_allclose(again.call(inputs), 3.0 * hyper.apply(variables, inputs, z=z), rtol=1e-5)
    with pytest.raises(ValueError, match="Shape mismatch"):
        again.call(x(4, 6))


def test_only_one_network_is_exported():
    hyper, variables, inputs = conv()
    with pytest.raises(ValueError, match="one network"):
        export(hyper, variables, inputs, task_id=jnp.arange(3))
    with pytest.raises(ValueError, match="3 and 2 along batch, expected one length"):
        export(hyper, variables, inputs, x(2, 1), task_id=0)


def test_specialize_is_the_network():
    hyper, variables, inputs = conv()
    net = jax.jit(hyper.specialize(variables, task_id=1))
    np.testing.assert_allclose(net(inputs), hyper.apply(variables, inputs, task_id=1), atol=1e-6)


def test_orbax_brings_back_both_the_hypernetwork_and_its_product(tmp_path):
    hyper, variables, _ = conv()
    whole = hyper.materialize(variables, task_id=1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "hyper", variables)
        checkpointer.save(tmp_path / "one", whole)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "hyper", jax.tree.map(jnp.zeros_like, variables))
        one = checkpointer.restore(tmp_path / "one", jax.tree.map(jnp.zeros_like, whole))
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    jax.tree.map(np.testing.assert_array_equal, one, hyper.materialize(back, task_id=1))
