"""What a model must survive: no trace of gates that are not given, dropout, 16 bits, transformations, many devices."""

import subprocess
import sys
import textwrap
from collections import Counter
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_transformer import random_variables

from hyperjax.transformer import Attention, Chosen, Config, Decoder, Gates, Rotary, rotate

B, L, H, N, V = 2, 6, 2, 4, 7
SIZES = dict(vocabulary=V, layers=2, width=8, heads=H, ffn=8, length=L)
CONFIG = Config(**SIZES)
TOKENS = np.random.default_rng(0).integers(0, V, (B, L))
VARIABLES = random_variables(Decoder(CONFIG), TOKENS)
HALF_OPEN = np.array([[1, 0], [1, 1]], np.float32)


def logits(variables=VARIABLES, gates=None, config=CONFIG, **more):
    return Decoder(config).apply(variables, TOKENS, gates=gates, **more)["logits"]


def operations(function, *args):
    """How often each primitive occurs in a function, inner functions included."""
    count = Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            count[equation.primitive.name] += 1
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
            ):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return count


def plain_decoder(params, tokens):
    """The same decoder written without the word gate."""

    def norm(x, p):
        return nn.LayerNorm(use_bias=False).apply({"params": p}, x)

    x, stack = nn.Embed(V, 8).apply({"params": params["embedding"]}, tokens), params["stack"]
    places = Rotary.of(np.arange(L)[None], 4)
    for n in range(2):
        p, h = stack[f"attention_{n}"], norm(x, stack[f"attention_norm_{n}"])
        q, k, v = (jnp.einsum("bld,dhk->blhk", h, p[name]) for name in ("query", "key", "value"))
        o = jax.nn.dot_product_attention(rotate(q, places), rotate(k, places), v, is_causal=True)
        x = x + jnp.einsum("blhk,hkd->bld", o, p["out"])
        p, h = stack[f"ffn_{n}"], norm(x, stack[f"ffn_norm_{n}"])
        x = x + jax.nn.gelu(h @ p["up"]) @ p["down"]
    return norm(x, params["norm"]) @ params["output"]["kernel"]


def test_without_gates_no_trace_of_them():
    def call(gates):
        return operations(lambda v: logits(v, gates), VARIABLES)

    plain = operations(lambda v: plain_decoder(v["params"], TOKENS), VARIABLES)
    for name in ("mul", "add", "sub", "dot_general", "select_n", "gather", "scatter-add", "exp", "tanh"):
        assert call(None)[name] == plain[name], name
    np.testing.assert_allclose(logits(), jax.jit(plain_decoder)(VARIABLES["params"], TOKENS), rtol=1e-5, atol=1e-5)
    assert call(None) == call(Gates()) == call(lambda number, x: None)
    assert call(Gates(heads=HALF_OPEN))["mul"] == call(None)["mul"] + 2

    def shapes(gates):
        return jax.eval_shape(lambda key: Decoder(CONFIG).init(key, TOKENS, gates=gates), jax.random.key(0))

    assert shapes(None) == shapes(Gates(heads=HALF_OPEN, blocks=jnp.ones((2, N)), tokens=jnp.ones((2, B, L))))


@pytest.mark.parametrize(
    "gates",
    [
        Gates(heads=jnp.ones((2, H)), blocks=jnp.ones((2, B, N)), layer=jnp.ones(2)),
        Gates(
            heads=jnp.ones((2, B, L, H)), blocks=jnp.ones((2, N)), layer=jnp.ones((2, B)), tokens=jnp.ones((2, B, L))
        ),
        Gates(tokens=Chosen(np.tile(np.arange(L), (2, B, 1)), jnp.ones((2, B, L)))),
    ],
)
def test_open_gates_change_nothing(gates):
    np.testing.assert_allclose(logits(gates=gates), logits(), rtol=1e-4, atol=1e-5)


def test_gradient_reaches_every_gate():
    shapes = dict(heads=(2, H), blocks=(2, B, N), layer=(2, B), tokens=(2, B, L))
    gates = {name: jnp.full(shape, 0.7) for name, shape in shapes.items()}

    loss = jax.jit(jax.value_and_grad(lambda gates: (logits(gates=Gates(**gates)) ** 2).mean()))
    _, found = loss(gates)
    for name, gradient in found.items():
        assert np.all(np.isfinite(gradient)), name
        assert np.all(np.abs(gradient) > 0), name
    up, down = ({name: gate + step for name, gate in gates.items()} for step in (3e-3, -3e-3))
    np.testing.assert_allclose((loss(up)[0] - loss(down)[0]) / 6e-3, sum(g.sum() for g in found.values()), rtol=0.02)


def test_closed_gates_leave_finite_gradients():
    closed = Gates(heads=jnp.zeros((2, H)), tokens=jnp.zeros((2, B, L)))
    gradient = jax.jit(jax.grad(lambda v, g: logits(v, g).sum(), (0, 1)))(VARIABLES, closed)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_dropout():
    config = Config(**{**SIZES, "dropout": 0.3})
    key = jax.random.key(1)
    np.testing.assert_array_equal(logits(config=config), logits())  # no key, no dropout
    one, same = logits(config=config, key=key), logits(config=config, key=key)
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - logits(config=config, key=jax.random.key(2))).max() > 1e-3
    wide = Config(vocabulary=V, layers=1, width=64, heads=1, ffn=8, dropout=0.3)
    tokens = np.zeros((64, 32), int)
    table = {"params": {"embedding": {"embedding": jnp.ones((V, 64))}}}
    dropped, _ = Decoder(wide).apply(table, tokens, key=key, method="embed")
    np.testing.assert_allclose((dropped == 0).mean(), 0.3, atol=0.005)
    np.testing.assert_allclose(dropped.mean(), 1, atol=0.01)
    np.testing.assert_allclose(dropped[dropped > 0], 1 / 0.7, rtol=1e-5)


def test_dropout_differs_between_layers_and_parts():
    config = Config(**{**SIZES, "dropout": 0.5, "attention_map": (0, 0), "ffn_map": (0, 0), "norm_map": (0, 0)})
    variables = random_variables(Decoder(config), TOKENS)
    out = Decoder(config).apply(variables, TOKENS, key=jax.random.key(0))
    masks, before = [], out["embedded"]
    masks.append(np.asarray(before) == 0)
    for done in out["layers"]:
        change = np.asarray(done["state"] - before)
        masks.append(np.abs(change) < 1e-6)  # where both updates were dropped: a quarter
        before = done["state"]
    assert 0.1 < masks[1].mean() < 0.4
    assert not np.array_equal(masks[1], masks[2])


def test_bfloat16():
    tokens = np.random.default_rng(5).integers(0, V, (B, L))
    half = Config(**SIZES, dtype=jnp.bfloat16)
    small = jax.tree.map(lambda leaf: leaf * 0.5, VARIABLES)
    got = Decoder(half).apply(small, tokens)
    wanted = Decoder(CONFIG).apply(small, tokens)["logits"]
    assert got["embedded"].dtype == got["layers"][1]["state"].dtype == got["layers"][0]["ffn"].dtype == jnp.bfloat16
    assert got["logits"].dtype == jnp.float32
    assert np.any(got["logits"] != got["logits"].astype(jnp.bfloat16).astype(jnp.float32))  # nor were they rounded
    assert 0 < np.abs(got["logits"] - wanted).max() < 0.05 * np.abs(wanted).max()
    assert {
        leaf.dtype
        for leaf in jax.tree.leaves(jax.eval_shape(lambda key: Decoder(half).init(key, tokens), jax.random.key(0)))
    } == {jnp.dtype("float32")}
    gates = Gates(heads=jnp.ones((2, H)), blocks=jnp.ones((2, B, N)), tokens=jnp.ones((2, B, L)), layer=jnp.ones(2))
    gated = jax.eval_shape(lambda v: Decoder(half).apply(v, tokens, gates=gates), small)
    assert gated["layers"][1]["state"].dtype == jnp.bfloat16


def test_jit_vmap_and_remat():
    one_layer, open_heads = Config(**{**SIZES, "layers": 1}), jnp.ones((1, H))
    gates, plain, remat = Gates(heads=HALF_OPEN[:1]), Decoder(one_layer), nn.remat(Decoder)(one_layer)

    def gradient(model):
        return jax.grad(lambda v, g: (model.apply(v, TOKENS, gates=g)["logits"] ** 2).mean())

    assert operations(gradient(remat), VARIABLES, gates)["remat2"]
    compare = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(compare, *(jax.jit(gradient(model))(VARIABLES, gates) for model in (remat, plain)))
    several = jax.jit(jax.vmap(lambda heads: logits(gates=Gates(heads=heads), config=one_layer)))
    wanted = [logits(gates=Gates(heads=heads), config=one_layer) for heads in (HALF_OPEN[:1], open_heads)]
    compare(several(jnp.stack([HALF_OPEN[:1], open_heads])), jnp.stack(wanted))


@pytest.mark.parametrize(("length", "kernel"), [(6, "cudnn"), (5, None)])
def test_gpus_get_the_fused_kernel_where_it_takes_the_mask(monkeypatch, length, kernel):
    monkeypatch.setattr(jax, "devices", lambda *_: [SimpleNamespace(compute_capability="9.0")])
    calls, attend = [], jax.nn.dot_product_attention

    def record(*args, implementation, mask, **more):
        calls.append((implementation, None if mask is None else mask.shape))
        return attend(*args, mask=mask, **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    module = Attention(heads=1, head_width=8, width=8, dtype=jnp.bfloat16)
    x, mask = jnp.ones((B, length, 8), jnp.bfloat16), jnp.ones((B, 1, 1, length), bool)
    variables = random_variables(module, x, (jnp.ones((B, length, 1, 8), jnp.bfloat16),) * 2)
    for given in (None, mask):
        calls.clear()
        jax.eval_shape(
            lambda m: module.apply(variables, x, module.apply(variables, x, method="keys_values"), mask=m), given
        )
        wanted = kernel if given is not None else "cudnn"
        shape = None if given is None else (B, 1, length if kernel else 1, length)
        assert calls == [(wanted, shape)]
    calls.clear()
    x = jnp.ones((B, length, 8))
    single = Attention(heads=1, head_width=8, width=8)
    jax.eval_shape(lambda: single.apply(variables, x, single.apply(variables, x, method="keys_values")))
    assert calls == [(None, None)]  # 32 bits


def test_over_two_devices():
    code = """
        import jax
        jax.config.update("jax_num_cpu_devices", 2)
        import jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from hyperjax.transformer import Config, Encoder, Gates

        model = Encoder(Config(vocabulary=7, layers=1, width=8, heads=2, ffn=8, outputs=3))
        tokens = np.arange(24).reshape(4, 6) % 7
        shapes = jax.eval_shape(lambda key: model.init(key, tokens), jax.random.key(0))
        rng = np.random.default_rng(0)
        variables = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), shapes)
        gates = Gates(heads=np.linspace(0, 1, 8, dtype=np.float32).reshape(1, 4, 2))
        step = jax.jit(jax.grad(lambda v, t, g: (model.apply(v, t, mask=t != 0, gates=g)["logits"] ** 2).mean()))
        wanted = step(variables, tokens, gates)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
        placed = Gates(heads=put(gates.heads, None, "data"))
        got = step(put(variables), put(tokens, "data"), placed)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted)
        state, _ = model.apply(put(variables), put(tokens, "data"), method="embed")  # outside a trace, too
        assert not state.sharding.is_fully_replicated
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=200)
