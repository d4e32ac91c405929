"""A hypernetwork over a mesh of devices: heads split over one axis, the batch over another, the same numbers."""

import subprocess
import sys
import textwrap


def test_heads_and_batch_over_a_mesh():
    code = """
        import jax
        jax.config.update("jax_num_cpu_devices", 4)
        import flax.linen as nn, jax.numpy as jnp, numpy as np, optax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        import hyperjax as hj

        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
        model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(8)])
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)
        optimizer = optax.sgd(0.1)
        for generator in (hj.Linear(), hj.Chunked(features=8), hj.Scale()):
            hyper = hj.HyperNetwork.from_target(model, x, embedding_dim=4, num_embeddings=8, generator=generator)
            shapes = jax.eval_shape(lambda key: hyper.init(key, x, task_id=0), jax.random.key(0))
            variables = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32), shapes)
            frozen = {name: value for name, value in variables.items() if name != "params"}

            @jax.jit
            def step(params, x, task):
                loss = lambda p: jnp.mean(hyper.apply({"params": p, **frozen}, x, task_id=task) ** 2)
                value, grads = jax.value_and_grad(loss)(params)
                updates, _ = optimizer.update(grads, optimizer.init(params))
                return optax.apply_updates(params, updates), value

            def place(leaf):  # every large leaf is split over its first axis
                split = leaf.ndim and leaf.shape[0] % 2 == 0
                return jax.device_put(leaf, NamedSharding(mesh, P("model") if split else P()))

            placed = jax.tree.map(place, variables["params"])
            assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
            for task in (3, jnp.array([0, 1, 2, 3, 4, 5, 6, 7])):
                wanted = step(variables["params"], x, task)
                got = step(placed, jax.device_put(x, NamedSharding(mesh, P("data"))), task)
                jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)
