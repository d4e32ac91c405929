"""Gated connections: blocks against `np.block`, gates against their closed form, and the bugs of public SNR code.

The check of each bug is a function that is also run with the bug patched in, where it has to fail.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from hyperjax.routing import gates as gates_module
from hyperjax.routing.gates import Connection, HardConcrete, scale_blocks, spans

B, T = 3, 2
SOURCES, READERS = (2, 1, 3), (1, 2)
U = np.random.default_rng(1).normal(size=(B, sum(SOURCES))).astype(np.float32)
X = np.random.default_rng(2).normal(size=(B, 4)).astype(np.float32)
LOG_ALPHA = np.array([[1.5, -1.0, 0.5], [-2.0, 0.0, 2.5]], np.float32)
SETTINGS = [(2 / 3, -0.1, 1.1), (0.5, -1.0, 2.0), (0.9, -0.1, 1.5)]  # the corners of SNR's search
N = 20_000


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def connection(**kw):
    return Connection(SOURCES, READERS, gates=HardConcrete(), **kw)


def params_of(log_alpha=LOG_ALPHA):
    kernel = draw((sum(SOURCES), sum(READERS)))
    return {"params": {"kernel": kernel, "bias": draw(sum(READERS)), "log_alpha": log_alpha}}


def fails(check, *args):
    """Whether a check fails, as it has to with a bug patched in."""
    with pytest.raises(AssertionError):
        check(*args)


@pytest.mark.parametrize(
    ("rows", "columns"), [((2, 1, 3), (1, 2)), ((2, 2, 2), (3, 3)), ((4,), (1, 2)), ((1, 2), (5,))]
)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_scale_blocks_is_np_block_and_so_is_its_gradient(rows, columns, lead):
    kernel, z = draw((sum(rows), sum(columns))), draw((*lead, len(columns), len(rows)), 1)
    weight = draw((*lead, *kernel.shape), 2)

    def blocks(z_ij):
        cut = [np.split(part, np.cumsum(columns)[:-1], 1) for part in np.split(kernel, np.cumsum(rows)[:-1], 0)]
        return np.block([[z_ij[i, j] * w for i, w in enumerate(row)] for j, row in enumerate(cut)])

    wanted = np.stack([blocks(one) for one in z.reshape(-1, *z.shape[-2:])]).reshape(*lead, *kernel.shape)
    np.testing.assert_allclose(scale_blocks(kernel, z, rows, columns), wanted, rtol=1e-6)

    by_kernel, by_z = jax.grad(lambda *a: (weight * scale_blocks(*a, rows, columns)).sum(), (0, 1))(kernel, z)
    down, right = np.repeat(np.arange(len(rows)), rows), np.repeat(np.arange(len(columns)), columns)
    spread = np.swapaxes(z, -1, -2)[..., down[:, None], right[None]]
    np.testing.assert_allclose(by_kernel, (weight * spread).reshape(-1, *kernel.shape).sum(0), rtol=1e-5, atol=1e-6)
    product = weight * kernel.reshape((1,) * len(lead) + kernel.shape)
    for i, j in itertools.product(range(len(columns)), range(len(rows))):
        block = product[..., down == j, :][..., right == i].sum((-1, -2))
        np.testing.assert_allclose(by_z[..., i, j], block, rtol=1e-4, atol=1e-5)


def test_scale_blocks_keeps_the_type_of_double_precision():
    with jax.enable_x64(True):
        for rows, columns in (((2, 1), (1, 3)), ((2, 2), (3,))):
            kernel, z = np.ones((sum(rows), sum(columns))), np.full((len(columns), len(rows)), 1 / 3)
            scaled = scale_blocks(jnp.asarray(kernel), jnp.asarray(z), rows, columns)
            assert scaled.dtype == jnp.float64
            np.testing.assert_allclose(scaled, 1 / 3, rtol=1e-15)


def test_spans():
    assert spans([2, 1, 3]) == [slice(0, 2), slice(2, 3), slice(3, 6)]
    assert spans([]) == []


@pytest.mark.parametrize(("numbers", "share"), list(zip(SETTINGS, (0.1, 0.5, 0.9), strict=True)))
def test_gates_start_with_the_open_probability_wanted(numbers, share):
    settings = HardConcrete(*numbers, open=share)
    np.testing.assert_allclose(settings.l0(settings.start()), share, rtol=1e-5)
    variables = Connection(SOURCES, READERS, gates=settings).init(jax.random.key(0), U, X, None)
    np.testing.assert_allclose(variables["params"]["log_alpha"], np.full((2, 3), settings.start()), rtol=1e-6)


def test_served_gates_are_the_closed_form():
    wanted = np.clip(special.expit(LOG_ALPHA) * (1.5 + 0.3) - 0.3, 0, 1)
    np.testing.assert_allclose(HardConcrete(gamma=-0.3, zeta=1.5).deterministic(LOG_ALPHA), wanted, rtol=1e-6)


def sampled(settings=None, log_alpha=LOG_ALPHA, n=N):
    """Gates of many keys, [n, I, J], as the module makes them."""
    module = Connection(SOURCES, READERS, gates=settings or HardConcrete())
    keys = jax.random.split(jax.random.key(7), n)
    return np.asarray(jax.vmap(lambda key: module.apply(params_of(log_alpha), U, X, key)[1])(keys))


def check_bracket(settings):
    """log alpha is inside of the bracket that is divided by beta: P(z = 0) and P(z = 1) in closed form."""
    beta, gamma, zeta = settings.beta, settings.gamma, settings.zeta
    z = sampled(settings)
    zero = special.expit(beta * np.log(-gamma / zeta) - LOG_ALPHA)
    one = special.expit(LOG_ALPHA - beta * np.log((1 - gamma) / (zeta - 1)))
    for measured, p in (((z == 0).mean(0), zero), ((z == 1).mean(0), one)):
        assert np.all(np.abs(measured - p) < 5 * np.sqrt(p * (1 - p) / N) + 1e-6), (measured, p)


@pytest.mark.parametrize("numbers", SETTINGS)
def test_bug_log_alpha_over_beta_outside_of_the_bracket(numbers, monkeypatch):
    settings = HardConcrete(*numbers)
    check_bracket(settings)

    def misprint(self, key, log_alpha):  # sigmoid(log u - log(1 - u) + log_alpha / beta)
        s = jax.nn.sigmoid(jax.random.logistic(key, log_alpha.shape) + log_alpha / self.beta)
        return jnp.clip(s * (self.zeta - self.gamma) + self.gamma, 0, 1)

    monkeypatch.setattr(HardConcrete, "sample", misprint)
    fails(check_bracket, settings)


def check_u_is_sampled():
    """Every key brings other gates; only log alpha, W and b are learned."""
    variables = connection().init(jax.random.key(0), U, X, None)
    assert set(variables["params"]) == {"kernel", "bias", "log_alpha"}
    z = sampled(log_alpha=np.zeros((2, 3), np.float32), n=50)
    assert np.all(z.std(0) > 0.1), z.std(0)


def test_bug_u_learned_instead_of_sampled(monkeypatch):
    check_u_is_sampled()
    once = jax.random.logistic(jax.random.key(0), (2, 3))
    monkeypatch.setattr(HardConcrete, "sample", lambda self, key, a: self.deterministic((once + a) / self.beta))
    fails(check_u_is_sampled)


def check_gates_are_separate():
    """A log alpha of one connection moves its gate alone, and gates are drawn independently."""
    module = connection()
    at = jax.jacobian(lambda a: module.apply(params_of(a), U, X, None)[1])(np.zeros((2, 3), np.float32))
    at = np.asarray(at).reshape(6, 6)
    assert np.all(np.diag(at) > 0.1), at
    np.testing.assert_array_equal(at * (1 - np.eye(6)), 0)
    between = np.corrcoef(sampled(log_alpha=np.zeros((2, 3), np.float32), n=5000).reshape(5000, 6).T)
    assert np.all(np.abs(between - np.eye(6)) < 5 / np.sqrt(5000)), between


def test_bug_one_alpha_per_layer(monkeypatch):
    check_gates_are_separate()
    location, sample = Connection._log_alpha, HardConcrete.sample
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "_log_alpha", lambda self, x: jnp.full((2, 3), location(self, x).mean()))
        fails(check_gates_are_separate)
    monkeypatch.setattr(HardConcrete, "sample", lambda self, key, a: jnp.full(a.shape, sample(self, key, a[0, 0])))
    fails(check_gates_are_separate)  # one u per layer


def check_a_gate_scales_a_block(key):
    """dv_i/du_j is z_ij W_ij, with one number z_ij for the whole block."""
    variables, module = params_of(), connection()
    kernel = variables["params"]["kernel"]
    _, z, _ = module.apply(variables, U, X, key)
    assert z.shape == (len(READERS), len(SOURCES))
    assert np.asarray(z).std() > 0.2
    by_u = jax.jacobian(lambda u: jnp.concatenate(module.apply(variables, u[None], X, key)[0], -1)[0])(U[0])
    for (i, at), (j, rows) in itertools.product(enumerate(spans(READERS)), enumerate(spans(SOURCES))):
        np.testing.assert_allclose(by_u[at, rows], z[i, j] * kernel[rows, at].T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["served", "sampled"])
def test_bug_a_gate_per_weight(key, monkeypatch):
    check_a_gate_scales_a_block(key)
    mask = np.random.default_rng(0).uniform(size=(sum(SOURCES), sum(READERS))).astype(np.float32)
    monkeypatch.setattr(gates_module, "scale_blocks", lambda kernel, z, rows, columns: kernel * mask)
    fails(check_a_gate_scales_a_block, key)


def check_evaluation_is_deterministic():
    """Without a key, the gates are z-hat, and the same again."""
    first, second = (connection().apply(params_of(), U, X, None)[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, np.clip(special.expit(LOG_ALPHA) * 1.2 - 0.1, 0, 1), rtol=1e-5, atol=1e-6)


def test_bug_sampling_at_evaluation(monkeypatch):
    check_evaluation_is_deterministic()
    keys = iter(jax.random.split(jax.random.key(0), 4))
    monkeypatch.setattr(HardConcrete, "deterministic", lambda self, a: self.sample(next(keys), a))
    fails(check_evaluation_is_deterministic)


def check_towers_read_their_own():
    """A tower's gates move what this tower reads, and nothing else."""
    for kind, u in (("trans", U), ("aver", U), ("trans", np.stack([U, U])), ("aver", np.stack([U, U]))):
        per = "task" if u.ndim == 3 else "connection"
        module = Connection((2, 2, 2), (3, 3), kind=kind, gates=HardConcrete(), tasks=T, to_towers=True, per=per)
        params = {"log_alpha": np.zeros((2, 3), np.float32)}
        if kind == "trans":
            params |= {"kernel": draw((6, 6)), "bias": draw(6)}

        def read(log_alpha, t, module=module, params=params, u=u):
            return module.apply({"params": params | {"log_alpha": log_alpha}}, u, X, None)[0][t].sum()

        for t in range(T):
            by_alpha = np.asarray(jax.grad(read)(params["log_alpha"], t))
            assert np.all(by_alpha[t] != 0), by_alpha
            assert np.all(by_alpha[1 - t] == 0), by_alpha


def test_bug_both_towers_reading_one_tensor(monkeypatch):
    check_towers_read_their_own()
    for name in ("_trans", "_aver"):
        method = getattr(Connection, name)
        with monkeypatch.context() as patch:
            patch.setattr(Connection, name, lambda self, u, z, method=method: [method(self, u, z)[0]] * 2)
            fails(check_towers_read_their_own)


@pytest.mark.parametrize("kind", ["trans", "aver"])
def test_without_gates_a_connection_is_one_with_open_gates(kind):
    sources = (2, 2, 2)
    open_ = Connection(sources, READERS, kind=kind, gates=HardConcrete())
    variables = open_.init(jax.random.key(0), U, X, None)
    params = dict(variables["params"])
    params["log_alpha"] = np.full((2, 3), 20.0, np.float32)
    wanted, z, _ = open_.apply({"params": params}, U, X, jax.random.key(1))
    del params["log_alpha"]
    found, *nothing = Connection(sources, READERS, kind=kind).apply({"params": params}, U, X, jax.random.key(1))
    np.testing.assert_array_equal(z, 1)
    assert nothing == [None, None]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["trans", "aver"])
@pytest.mark.parametrize("per", ["connection", "task", "sample"])
def test_rows_of_a_batch_share_their_gates_unless_they_are_per_sample(kind, per):
    module = Connection((2, 2, 2), (2, 2), kind=kind, gates=HardConcrete(), per=per, tasks=T, router=(3,))
    variables = module.init(jax.random.key(0), U, X, None)
    _, z, log_alpha = module.apply(variables, np.repeat(U[:1], B, 0), np.repeat(X[:1], B, 0), jax.random.key(5))
    assert z.shape == log_alpha.shape == {"connection": (2, 3), "task": (T, 2, 3), "sample": (B, 2, 3)}[per]
    assert len({float(one) for one in np.asarray(z).ravel() if 0 < one < 1}) > 1
    if per == "sample":  # one location for equal rows, but a sample of their own
        np.testing.assert_array_equal(log_alpha, np.repeat(np.asarray(log_alpha)[:1], B, 0))
        assert not np.array_equal(z[0], z[1])
