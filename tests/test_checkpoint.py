"""Checkpoints: what comes back is what was saved, and damage is noticed."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperjax.training import Checkpoints, TrainState


def make_state(seed=0, width=64):
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (width, 32)), "half": jax.random.normal(key, (7,), jnp.bfloat16)}
    return TrainState(jnp.int32(seed), params, (jnp.uint32(3), {"mu": jnp.zeros((width, 32))}), (jnp.ones((2, 5)),))


def save(directory, *steps, keep=5, values=()):
    with Checkpoints(directory, keep) as checkpoints:
        for n, step in enumerate(steps):
            checkpoints.save(step, make_state(step), {"seconds": step / 3}, values[n] if values else None)
    return checkpoints


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def data_files(directory, step):
    files = [path for path in (directory / str(step) / "state").rglob("d/*") if path.is_file()]
    assert files
    return files


def test_returns_what_was_saved_to_the_bit(tmp_path):
    save(tmp_path, 1, 2)
    state, meta = Checkpoints(tmp_path).restore(make_state(0))
    assert_same(state, make_state(2))
    assert meta == {"seconds": 2 / 3}


def test_an_abstract_state_is_enough_to_restore(tmp_path):
    save(tmp_path, 1)
    abstract = jax.eval_shape(make_state)
    assert_same(Checkpoints(tmp_path).restore(abstract)[0], make_state(1))


@pytest.mark.parametrize("part_mib", [1, 2])
def test_no_file_is_larger_than_a_part(tmp_path, part_mib):
    state = {"large": jax.random.normal(jax.random.key(0), (1100, 999)), "step": jnp.int32(3)}
    state |= {"many": [jax.random.normal(jax.random.key(n), (100 + n, 333)) for n in range(20)]}
    with Checkpoints(tmp_path, part_mib=part_mib) as checkpoints:
        checkpoints.save(3, state, {}, 1.0)
    files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert max(files) <= part_mib * 2**20 < 4.2 * 2**20 < sum(files)
    read = Checkpoints(tmp_path)
    assert_same(read.restore(jax.eval_shape(lambda: state))[0], state)
    assert_same(read.restore_best(state), state)


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "absent").restore(make_state()) is None


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        state = make_state(3)
        checkpoints.save(3, state, {})
        overwrite(state)
    assert_same(Checkpoints(tmp_path).restore(make_state())[0], make_state(3))


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = save(tmp_path, 1, 2, 3, 4, 5, 6, keep=2, values=[5.0, 3.0, 4.0, None, 3.5, None])
    assert checkpoints.steps() == [2, 5, 6]
    fresh = Checkpoints(tmp_path, 2)
    fresh.restore(make_state())
    assert fresh.best == (2, 3.0)
    assert_same(fresh.restore_best(make_state()), make_state(2))
    fresh.save(7, make_state(7), {}, 1.0)
    fresh.save(8, make_state(8), {}, 2.0)
    fresh.save(9, make_state(9), {}, 2.0)
    fresh.close()
    assert fresh.steps() == [7, 8, 9]


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_a_flipped_bit_sends_the_restore_to_the_checkpoint_before(tmp_path, position):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2)
    biggest = max(data_files(folder, 2), key=lambda path: path.stat().st_size)
    raw = bytearray(biggest.read_bytes())
    raw[int(position * len(raw))] ^= 4
    biggest.write_bytes(raw)
    checkpoints = Checkpoints(folder)
    state, _ = checkpoints.restore(make_state())
    assert_same(state, make_state(1))
    assert len(checkpoints.notes) == 1
    assert re.match(r"checkpoint 2 is damaged \(its arrays .*\): passed over$", checkpoints.notes[0])
    assert (folder / "2").is_dir()  # reading changes nothing
    with checkpoints:  # the step can be saved again
        checkpoints.save(2, make_state(2), {})
    assert (tmp_path / "damaged" / "2").is_dir()  # moved, not deleted
    assert_same(Checkpoints(folder).restore(make_state())[0], make_state(2))


def damage_metadata(folder):
    path = folder / "meta" / "metadata"
    path.write_text(path.read_text().replace('"seconds":', '"sekonds":'))


def tear_metadata(folder):
    path = folder / "meta" / "metadata"
    path.write_bytes(path.read_bytes()[:-9])


def tear_arrays(folder):
    path = max(data_files(folder.parent, int(folder.name)), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    folder.rename(folder.parent.parent / "gone")
    folder.mkdir()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own, from a reader that failed
@pytest.mark.parametrize("damage", [damage_metadata, tear_metadata, tear_arrays, empty])
def test_other_damage_is_noticed_too(tmp_path, damage):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2, 3)
    damage(folder / "3")
    damage(folder / "2") if damage is not empty else None
    checkpoints = Checkpoints(folder)
    good = 2 if damage is empty else 1
    assert_same(checkpoints.restore(make_state())[0], make_state(good))
    assert checkpoints.steps() == list(range(1, good + 1))
    assert len(checkpoints.notes) == 3 - good


def test_when_all_are_damaged_nothing_is_touched(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        damage_metadata(tmp_path / str(step))
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(2: .*; 1: .*\).*--workdir"):
        Checkpoints(tmp_path).restore(make_state())
    assert Checkpoints(tmp_path).steps() == [1, 2]


def test_other_shapes_or_dtypes_are_one_line(tmp_path):
    save(tmp_path, 1, 2)
    state = make_state()
    with pytest.raises(ValueError, match=r"checkpoint 2 has .*mu as float32\[64, 32\], this model as float32\[9, 32\]"):
        Checkpoints(tmp_path).restore(make_state(width=9))
    cast = state.replace(params={**state.params, "half": state.params["half"].astype(jnp.float32)})
    with pytest.raises(ValueError, match=r"has params/half as bfloat16\[7\], this model as float32\[7\]; [^\n]*$"):
        Checkpoints(tmp_path).restore(cast)
    with pytest.raises(ValueError, match=r"has params/half as bfloat16\[7\], this model as absent"):
        Checkpoints(tmp_path).restore(state.replace(params={"w": state.params["w"]}))


def test_a_best_checkpoint_that_went_with_the_damaged_ones_is_replaced(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1, 2, 3, keep=2, values=[3.0, 4.0, 2.0])  # saving 3 lets go of 1, until then the best
    assert sorted(path.name for path in folder.iterdir() if path.name.isdecimal()) == ["2", "3"]
    damage_metadata(folder / "3")
    with Checkpoints(folder, 2) as checkpoints:
        checkpoints.restore(make_state())
        assert checkpoints.best is None
        assert "the best checkpoint (1) is gone" in checkpoints.notes[-1]
        checkpoints.save(3, make_state(3), {}, 9.0)
        assert checkpoints.best == (3, 9.0)


def test_a_damaged_best_is_one_line(tmp_path):
    checkpoints = save(tmp_path, 1, 2, values=[1.0, 2.0])
    damage_metadata(tmp_path / "1")
    with pytest.raises(ValueError, match=r"the best checkpoint \(1\) .* damaged"):
        checkpoints.restore_best(make_state())


def test_saving_twice_changes_nothing_and_saving_the_past_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5), {})
        checkpoints.save(5, make_state(6), {})
        with pytest.raises(ValueError, match="step 4 is older than checkpoint 5"):
            checkpoints.save(4, make_state(4), {})
    assert_same(Checkpoints(tmp_path).restore(make_state())[0], make_state(5))


def test_leftovers_of_an_unfinished_save_are_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes.json").write_text(json.dumps({}))
    assert Checkpoints(tmp_path).steps() == [1]


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="keep is 0 checkpoints"):
        Checkpoints(tmp_path, 0)
    with pytest.raises(ValueError, match="part_mib is 0, expected 1 MiB or more"):
        Checkpoints(tmp_path, part_mib=0)
    with pytest.raises(ValueError, match=r"no checkpoint in .* was evaluated"):
        Checkpoints(tmp_path).restore_best(make_state())


def test_meta_is_read_without_the_arrays(tmp_path):
    assert Checkpoints(tmp_path).meta() is None
    save(tmp_path, 1, 2)
    want = Checkpoints(tmp_path).restore(make_state())[1]
    tear_arrays(tmp_path / "2")
    assert Checkpoints(tmp_path).meta() == want
    damage_metadata(tmp_path / "2")
    assert Checkpoints(tmp_path).meta() == Checkpoints(tmp_path).restore(make_state())[1] != want
    damage_metadata(tmp_path / "1")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        Checkpoints(tmp_path).meta()


def test_a_checkpoint_can_be_read_without_knowing_what_is_in_it(tmp_path):
    save(tmp_path, 1, 2, 3, values=(2.0, 1.0, 3.0))
    for best, step in ((False, 3), (True, 2)):
        raw, meta = Checkpoints(tmp_path).restore_raw(best)
        wanted = make_state(step)
        assert meta == {"seconds": step / 3}
        assert int(raw["step"]) == step
        assert sorted(raw["params"]) == ["half", "w"]
        assert_same(raw["params"], wanted.params)
        assert_same(raw["opt_state"], list(wanted.opt_state))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own, from a reader that failed
def test_what_is_damaged_is_not_read_raw_either(tmp_path):
    save(tmp_path, 1, 2, values=(2.0, 1.0))
    tear_arrays(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path)
    assert int(checkpoints.restore_raw(best=True)[0]["step"]) == 1
    assert "checkpoint 2 is damaged (its arrays" in checkpoints.notes[0]
    tear_arrays(tmp_path / "1")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        Checkpoints(tmp_path).restore_raw()
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        Checkpoints(tmp_path / "nothing").restore_raw()
