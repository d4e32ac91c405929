"""The cache of generated weights: never stale, bounded, and the same from several threads."""

import functools
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperjax.hypernet import Frozen, HyperNetwork, Learned, PerTask
from hyperjax.hypernet import cache as cache_module
from hyperjax.hypernet.cache import WeightCache

E, T = 4, 3
X = jnp.ones((2, 3))


@functools.cache
def network():
    hyper = HyperNetwork.from_target(nn.Dense(2), X, embedding_dim=E, num_embeddings=T)
    return hyper, start(hyper, X)


def start(hyper, x):
    """Variables of random numbers, which need no compilation."""
    task_id = 0 if hyper.num_embeddings else None
    shapes = jax.eval_shape(lambda key: hyper.init(key, x, task_id=task_id), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape), jnp.float32), shapes)


@functools.cache
def compiled():
    return WeightCache(network()[0])._jitted


def tiny(generate=None, **options):
    """A cache of the tiny network, with one compiled function for all or `generate(variables, task_id, z)` instead."""
    cache = WeightCache(network()[0], **options)
    cache._jitted = compiled()
    if generate:
        cache._jitted = lambda variables, task, z, static: generate(variables, task, z)
    return cache


def moved(variables, by):
    return jax.tree.map(lambda leaf: leaf + by, variables)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def run_together(count, function):
    """Runs function(i) in threads that start at once; returns results, or the exceptions raised."""
    barrier = threading.Barrier(count)

    def run(i):
        barrier.wait()
        try:
            return function(i)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def waiting_in(cache):
    """A list that grows by one for each thread that begins to wait for another."""
    waiting, wait = [], cache._wait
    cache._wait = lambda *args: (waiting.append(None), wait(*args))[1]
    return waiting


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 10 seconds"
        time.sleep(0.001)


@pytest.mark.parametrize("target", [nn.Dense(2), [nn.Dense(2), nn.Dense(3)]], ids=["one target", "a target a task"])
def test_weights_are_those_of_generate(target):
    hyper = HyperNetwork.from_target(target, X, embedding_dim=E, num_embeddings=2, rules=[("bias", PerTask())])
    variables = start(hyper, X)
    cache = WeightCache(hyper)
    generate = jax.jit(hyper.generate, static_argnames="task_id")
    z = jnp.array([0.5, -1.0, 0.25, 2.0])  # on the grid
    asked = [dict(task_id=0), dict(task_id=1, z=z)]
    size = 0
    for how in asked:
        weights = cache.get(variables, **how)
        same(weights, generate(variables, **how))
        again = cache.get(variables, **how)
        assert all(a is b for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(again), strict=True))
        size += sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    stats = cache.stats()
    assert (stats.misses, stats.hits, stats.entries, stats.bytes) == (2, 2, 2, size)


def test_a_static_hypernetwork_has_one_entry_and_a_single_task_needs_no_id():
    for tasks, ids in ((0, [None, None]), (1, [None, 0, np.int64(0)])):
        options = dict(embedding_dim=1, num_embeddings=tasks, generator=Learned())
        hyper = HyperNetwork.from_target(nn.Dense(2), X, **options)
        variables = start(hyper, X)
        cache = WeightCache(hyper)
        for task_id in ids:
            same(cache.get(variables, task_id=task_id), hyper.generate(variables))
        assert (cache.stats().entries, cache.stats().misses) == (1, 1)


def test_a_hit_is_the_same_arrays_in_containers_of_the_callers_own():
    hyper, variables = network()
    cache = tiny()
    first = cache.get(variables, task_id=1)
    kernel = first.pop("kernel")
    first["bias"] = None
    again = cache.get(variables, task_id=np.int32(1))
    assert again["kernel"] is kernel
    same(again, hyper.generate(variables, task_id=1))


@given(
    z=st.lists(st.floats(-50, 50, width=32), min_size=E, max_size=E),
    step=st.lists(st.floats(-0.49, 0.49), min_size=E, max_size=E),
    resolution=st.sampled_from([1e-3, 0.1, 0.25, 3.0]),
)
@settings(max_examples=100, deadline=None)
def test_weights_are_of_the_grid_point_and_not_of_the_z_that_came_first(z, step, resolution):
    variables = network()[1]
    cache = tiny(lambda variables, task, z: {"z": jnp.asarray(z)}, resolution=resolution)
    z = np.float32(z)
    point = np.asarray(cache.get(variables, z=z)["z"])
    rounding = 2 * np.spacing(np.abs(z).max() + resolution)
    assert np.abs(point - z).max() <= resolution / 2 + rounding
    near = np.float32(point + np.float64(step) * (resolution - 4 * rounding))
    np.testing.assert_array_equal(cache.get(variables, z=near)["z"], point)
    np.testing.assert_array_equal(cache.get(variables, z=jnp.asarray(point))["z"], point)
    assert cache.stats().entries == 1
    other = cache.get(variables, z=point + np.float32(resolution))["z"]
    np.testing.assert_allclose(other, point + resolution, rtol=1e-6, atol=1e-6)
    assert cache.stats().entries == 2


def test_other_variables_are_never_answered_with_old_weights():
    hyper, variables = network()
    cache = tiny()
    head = moved(variables["params"]["generators_0"], 0.5)
    table = variables["params"]["embedding"].at[0].add(1.0)
    versions = [
        variables,
        {**variables, "params": {**variables["params"], "embedding": table}},
        {**variables, "params": {**variables["params"], "generators_0": head}},
        moved(variables, 0.0),  # equal, but another
    ]
    for _ in range(2):
        for version in versions:
            same(cache.get(version, task_id=0), hyper.generate(version, task_id=0))
    assert (cache.stats().misses, cache.stats().hits) == (4, 4)
    same_arrays = jax.tree.map(lambda leaf: leaf, variables)  # containers do not count
    cache.get(same_arrays, task_id=0)
    assert cache.stats().hits == 5


def test_swapped_leaves_of_equal_shape_are_other_variables():
    cache = tiny(lambda variables, task, z: {"w": variables["a"] - variables["b"]})
    a, b = jnp.ones(2), jnp.zeros(2)
    for _ in range(2):
        assert float(cache.get({"a": a, "b": b}, task_id=0)["w"][0]) == 1
        assert float(cache.get({"a": b, "b": a}, task_id=0)["w"][0]) == -1
        assert float(cache.get({"a": a, "b": a}, task_id=0)["w"][0]) == 0


def test_arrays_that_take_the_place_of_dead_ones_are_other_variables(monkeypatch):
    cache = tiny(lambda variables, task, z: {"w": variables["a"] + 0.0})
    for i in range(100):
        if i == 50:  # from here on, every array has the id of those before it
            monkeypatch.setattr(cache_module, "id", lambda leaf: 7, raising=False)
        variables = {"a": jnp.full(1, i)}
        assert float(cache.get(variables, task_id=0)["w"][0]) == i
        assert float(cache.get(variables, task_id=0)["w"][0]) == i
        del variables
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.entries) == (100, 100, 0)


def test_a_donated_step_leaves_nothing_of_the_old_variables():
    hyper, variables = network()
    variables = moved(variables, 0.0)
    cache = tiny()
    step = jax.jit(lambda v: jax.tree.map(lambda leaf: 0.9 * leaf, v), donate_argnums=0)
    for _ in range(3):
        for task in range(T):
            same(cache.get(variables, task_id=task), hyper.generate(variables, task_id=task))
        old, variables = variables, step(variables)
        with pytest.raises(ValueError, match="donated array at params/embedding; give what the donating step"):
            cache.get(old, task_id=0)
    cache.get(variables, task_id=0)
    stats = cache.stats()
    assert (stats.entries, stats.evictions, stats.misses) == (1, 0, 10)


def test_weights_outlive_donated_variables_even_where_they_are_learned_directly():
    hyper = HyperNetwork.from_target(
        nn.Dense(2), X, embedding_dim=E, num_embeddings=T, rules=[("bias", Learned()), ("kernel", Frozen())]
    )
    variables = start(hyper, X)
    weights = WeightCache(hyper).get(variables, task_id=0)
    kept = jax.tree.map(np.array, weights)
    jax.tree.map(lambda leaf: leaf.delete(), variables)
    same(weights, kept)


def test_the_cache_keeps_no_variables_alive():
    variables = network()[1]
    cache = tiny()
    own = moved(variables, 1.0)
    cache.get(own, task_id=0)
    watched = [weakref.ref(leaf) for leaf in jax.tree.leaves(own)]
    assert cache.stats().entries == 1
    del own
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    assert (cache.stats().entries, cache.stats().bytes) == (0, 0)


def test_weights_that_a_caller_donated_are_generated_again():
    hyper, variables = network()
    cache = tiny()
    cache.get(variables, task_id=2)["kernel"].delete()
    for _ in range(2):
        same(cache.get(variables, task_id=2), hyper.generate(variables, task_id=2))
    stats = cache.stats()
    assert (stats.misses, stats.hits, stats.entries) == (2, 1, 1)


@given(
    calls=st.lists(st.tuples(st.integers(0, T - 1), st.integers(0, 3)), max_size=60),
    sizes=st.lists(st.integers(1, 9), min_size=T, max_size=T),
    room=st.integers(4, 40),
)
@settings(max_examples=60, deadline=None)
def test_the_one_used_longest_ago_goes_first(calls, sizes, room):
    """Against a list in order of use, with entries of several sizes and four versions that take turns.

    What is larger than the bound is returned, and not kept.
    """
    cache = tiny(lambda variables, task, z: {"w": jnp.asarray(np.zeros(sizes[task], np.int8))}, max_bytes=room)
    versions = [{"a": jnp.zeros(1)} for _ in range(4)]
    kept, hits, evictions = [], 0, 0
    for number, (task, version) in enumerate(calls, 1):
        assert len(cache.get(versions[version], task_id=task)["w"]) == sizes[task]
        if (task, version) in kept:
            hits += 1
            kept.remove((task, version))
            kept.append((task, version))
        elif sizes[task] <= room:
            kept.append((task, version))
            while sum(sizes[t] for t, _ in kept) > room:
                kept.pop(0)
                evictions += 1
        stats = cache.stats()
        assert stats.bytes == sum(sizes[t] for t, _ in kept) <= room
        assert (stats.hits, stats.misses) == (hits, number - hits)
        assert (stats.entries, stats.evictions) == (len(kept), evictions)


def test_dead_weights_go_before_live_ones():
    cache = tiny(lambda variables, task, z: {"w": jnp.zeros(1)}, max_bytes=8)
    live, dead = {"a": jnp.zeros(1)}, {"a": jnp.zeros(1)}
    cache.get(live, task_id=0)
    cache.get(dead, task_id=0)
    del dead
    gc.collect()
    cache.get(live, task_id=1)
    cache.get(live, task_id=0)
    assert (cache.stats().hits, cache.stats().evictions, cache.stats().entries) == (1, 0, 2)


def test_threads_that_miss_the_same_weights_generate_them_once():
    hyper, variables = network()
    cache, count = tiny(), 8
    real, made, waiting = cache._jitted, [], waiting_in(cache)

    def slow(*args):
        made.append(threading.get_ident())
        wait_until(lambda: len(waiting) == count - 1)
        return real(*args)

    cache._jitted = slow
    results = run_together(count, lambda i: cache.get(variables, task_id=1))
    assert len(made) == 1
    assert len({id(weights["kernel"]) for weights in results}) == 1
    same(results[0], hyper.generate(variables, task_id=1))
    stats = cache.stats()
    assert (stats.misses, stats.hits, stats.entries) == (1, count - 1, 1)


def test_an_exception_reaches_all_who_wait_and_leaves_nothing():
    hyper, variables = network()
    cache, count = tiny(), 5
    real, made, waiting = cache._jitted, [], waiting_in(cache)

    def broken(*args):
        made.append(threading.get_ident())
        wait_until(lambda: len(waiting) == count - 1)
        raise RuntimeError("no memory")

    cache._jitted = broken
    errors = run_together(count, lambda i: cache.get(variables, task_id=1))
    assert [(type(error), str(error)) for error in errors] == [(RuntimeError, "no memory")] * count
    stats = cache.stats()
    assert (stats.misses, stats.hits, stats.entries, stats.bytes, cache._pending) == (count, 0, 0, 0, {})
    assert len(made) == 1
    cache._jitted = real
    same(cache.get(variables, task_id=1), hyper.generate(variables, task_id=1))
    assert cache.stats().entries == 1


def test_generation_holds_no_lock():
    """Two generations meet inside, while a third thread is answered from the table."""
    variables, meet = network()[1], threading.Barrier(3, timeout=10)

    def generate(variables, task, z):
        if task:
            meet.wait()
        return {"w": jnp.full(1, task)}

    cache = tiny(generate)
    cache.get(variables, task_id=0)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(cache.get, variables, task_id=task) for task in (1, 2)]
        wait_until(lambda: meet.n_waiting == 2)
        assert int(cache.get(variables, task_id=0)["w"][0]) == 0
        assert cache.stats().hits == 1
        meet.wait()
        assert [int(call.result(10)["w"][0]) for call in calls] == [1, 2]


def test_what_was_begun_before_clear_is_not_kept():
    variables, meet = network()[1], threading.Barrier(2, timeout=10)

    def generate(variables, task, z):
        meet.wait()
        meet.wait()
        return {"w": jnp.ones(1)}

    cache = tiny(generate)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(cache.get, variables, task_id=0)
        meet.wait()
        cache.clear()
        meet.wait()
        assert float(call.result(10)["w"][0]) == 1
    assert not cache._entries
    cache._jitted = compiled()
    cache.get(variables, task_id=0)
    assert cache.stats().entries == 1


def test_threads_with_variables_of_their_own_never_see_one_anothers_weights():
    hyper, variables = network()
    cache = tiny(max_bytes=5 * 4 * (3 * 2 + 2))  # room for 5 of the 4 x 3 in use
    own = [moved(variables, 0.1 * i) for i in range(4)]
    expected = [[np.asarray(hyper.generate(v, task_id=t)["kernel"]) for t in range(T)] for v in own]

    def work(i):
        rng = np.random.default_rng(i)
        mine = own[i]
        for n in range(150):
            task = int(rng.integers(T))
            if n % 50 == 49:  # the same values as new arrays
                mine = jax.tree.map(jnp.copy, mine)
            made = cache.get(mine, task_id=task)["kernel"]
            np.testing.assert_allclose(made, expected[i][task], rtol=1e-5, atol=1e-6)
        return n

    assert run_together(4, work) == [149] * 4
    stats = cache.stats()
    assert stats.hits + stats.misses == 600
    assert stats.hits > 0
    assert stats.evictions > 0
    assert stats.bytes <= cache.max_bytes
    assert cache._pending == {}


def test_statistics_account_for_the_time_in_get():
    _, variables = network()

    def generate(variables, task, z):
        time.sleep(0.02)
        return {"w": jnp.ones(1)}

    cache = tiny(generate)
    assert (cache.stats().generate_share, cache.stats().total_seconds) == (0.0, 0.0)
    start = time.perf_counter()
    for _ in range(5):
        for task in range(2):
            cache.get(variables, task_id=task)
    elapsed = time.perf_counter() - start
    stats = cache.stats()
    assert (stats.misses, stats.hits) == (2, 8)
    assert 0.04 <= stats.generate_seconds < stats.total_seconds <= elapsed
    assert stats.generate_share == stats.generate_seconds / stats.total_seconds
    cache.clear()
    assert cache.stats() == type(stats)()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(task_id=3), "task_id is 3, expected 0 to 2"),
        (dict(task_id=[0, 1]), r"task_id has shape \(2,\), expected one whole number"),
        (dict(task_id=True), "task_id is True, expected a whole number"),
        (dict(z=jnp.ones((2, E))), rf"z has shape \(2, {E}\), expected \[{E}\]; ask for one embedding"),
        (dict(z=jnp.ones(E + 1)), rf"z has shape \({E + 1},\), expected \[{E}\]"),
        (dict(z=jnp.array([0.0, jnp.nan, 1.0, 1.0])), "z has nan among its numbers, expected finite"),
        (dict(), "nothing says which weights to generate; give task_id, 0 to 2, or z"),
    ],
)
def test_bad_requests_are_refused_in_one_line(how, message):
    variables = network()[1]
    cache = tiny()
    with pytest.raises(ValueError, match=message) as error:
        cache.get(variables, **how)
    assert "\n" not in str(error.value)
    assert cache._pending == {}


def test_variables_that_could_change_unseen_are_refused():
    hyper, variables = network()
    cache = tiny()
    mutable = jax.tree.map(np.array, variables)
    with pytest.raises(ValueError, match=r"a ndarray at params/embedding, which may change unseen; convert once"):
        cache.get(mutable, task_id=0)
    converted = jax.tree.map(jnp.array, mutable)
    same(cache.get(converted, task_id=0), hyper.generate(variables, task_id=0))


def test_asking_inside_jit_is_refused():
    variables = network()[1]
    cache = tiny()
    for function, value in (
        (lambda v: cache.get(v, task_id=0), variables),
        (lambda t: cache.get(variables, task_id=t), 0),
        (lambda z: cache.get(variables, z=z), jnp.ones(E)),
    ):
        with pytest.raises(ValueError, match=r"asked inside jit.*use hyper\.generate there"):
            jax.jit(function)(value)


@pytest.mark.parametrize(
    ("hyper", "options", "message"),
    [
        (None, dict(max_bytes=0), "max_bytes is 0, expected a whole number of at least 1"),
        (None, dict(max_bytes=1e9), "max_bytes is 1000000000.0, expected a whole number"),
        (None, dict(resolution=0), "resolution is 0, expected a number above 0"),
        (None, dict(resolution=float("nan")), "resolution is nan"),
        (None, dict(resolution=float("inf")), "resolution is inf"),
        (nn.Dense(2), {}, "hyper is Dense, expected a HyperNetwork"),
    ],
)
def test_caches_that_cannot_be_are_refused(hyper, options, message):
    with pytest.raises(ValueError, match=message):
        WeightCache(hyper or network()[0], **options)
