"""Timing: compiled ahead with donation, and in turn."""

import jax
import jax.numpy as jnp
import pytest

from hyperjax.timing import compiled, in_turn


def test_compiled_donates_what_it_is_told_to_and_takes_nothing_else():
    x, y = jnp.arange(3.0), jnp.ones(3)
    call = compiled(lambda x, y: x + y, x, y, donate=(0,))
    assert call(x, y).tolist() == [1, 2, 3]
    assert x.is_deleted()
    assert not y.is_deleted()
    with pytest.raises(TypeError):
        call(jnp.arange(4.0), jnp.ones(4))


def test_runs_take_turns_of_one_untimed_and_two_timed_runs(monkeypatch):
    order, waited = [], []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == list("aaabbb") * 2
    assert len(waited) == len(order)
    assert list(seconds) == ["a", "b"]
    assert all(len(times) == 4 and min(times) >= 0 for times in seconds.values())
