"""Pytrees as data: every leaf has a path, and comes back where it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.paramtree import count, select, structure

TREE = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}, "b": [1.5, (jnp.int32(2), None)]}


def test_flatten_and_back():
    shape = structure(TREE)
    assert [spec.path for spec in shape.specs] == ["a/bias", "a/kernel", "b/0", "b/1/0"]
    assert [spec.size for spec in shape.specs] == [3, 6, 1, 1]
    assert [spec.bytes for spec in shape.specs] == [6, 24, 4, 4]
    assert [spec.floating for spec in shape.specs] == [True, True, True, False]
    assert shape.specs[1].name == "theta.a.kernel"
    again = shape.unflatten(shape.flatten(TREE))
    assert jax.tree.structure(again) == jax.tree.structure(TREE)
    jax.tree.map(np.testing.assert_array_equal, again, TREE)
    assert structure(jax.eval_shape(lambda: TREE)).specs == shape.specs
    assert count(TREE) == 11


def test_another_structure_is_refused():
    with pytest.raises(ValueError, match="expected PyTreeDef"):
        structure(TREE).flatten({"a": 1})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two parameters have the path 'a/b'"):
        structure({"a": {"b": 1.0}, "a/b": 2.0})


def test_select():
    paths = ["a/kernel", "a/bias", "b/kernel"]
    assert select("kernel", paths) == ["a/kernel", "b/kernel"]
    assert select("^a", paths) == ["a/kernel", "a/bias"]
    assert select(lambda path: path.startswith("b"), paths) == ["b/kernel"]
    with pytest.raises(ValueError, match=r"'c' selects none of the target's parameters: a/kernel, a/bias, b/kernel$"):
        select("c", paths)
    with pytest.raises(ValueError, match=r"selects none .*, \.\.\.$"):
        select("c", [str(i) for i in range(20)])
