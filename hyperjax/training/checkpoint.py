"""Checkpoints by Orbax, with a digest of our own: written in the background, checked to the byte when read."""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hyperjax.training import processes
from hyperjax.training.digest import digest, digest_json, leaves
from hyperjax.training.metrics import write_text

T = TypeVar("T")


class Checkpoints(Generic[T]):
    """The checkpoints of one run: the last few, and the best.

    Orbax restores flipped bits without a word, so every checkpoint carries a digest of its arrays and of its own
    metadata, and one that does not match is not used. A run is alone in its folder (see `Workdir`); if it has several
    processes, each writes its part of the arrays, all call every method together, and any number of processes restores.

    Args:
        directory: where they are kept; need not exist.
        keep: how many of the newest to keep, beside the best.
        part_mib: no file of a checkpoint is larger than so many MiB, so that it travels where large files do not; None
            leaves the sizes to Orbax. Reading needs no such setting.

    Raises:
        ValueError: `keep` or `part_mib` is below 1.

    Attributes:
        best: step and value of the best checkpoint saved or restored so far, or None. Lower is better.
        notes: what a restore skipped and why, a sentence each.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, part_mib: int | None = None):
        if keep < 1:
            raise ValueError(f"keep is {keep} checkpoints, expected 1 or more; raise it")
        if part_mib is not None and part_mib < 1:
            raise ValueError(f"part_mib is {part_mib}, expected 1 MiB or more; raise it, or leave it out")
        self.directory, self.keep, self.part_mib = Path(directory).absolute(), keep, part_mib
        self.best: tuple[int, float] | None = None
        self.notes: list[str] = []
        self._manager: ocp.CheckpointManager | None = None
        self._damaged: list[int] = []  # steps that a restore passed over

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints on disk, without those that `restore` passed over, in rising order."""
        self.wait()
        if not self.directory.is_dir():
            return []
        return sorted(self._found() - set(self._damaged))

    def save(self, step: int, state: T, meta: dict[str, Any], value: float | None = None) -> None:
        """Saves a state in the background; a step that is already saved is left alone, but for a `value` found since.

        Args:
            step: number of updates behind the state, larger than any saved before.
            state: pytree of arrays; may be donated as soon as this returns.
            meta: what else resuming needs, as JSON.
            value: the validation value of this state, lower is better; None if it was not evaluated.

        Raises:
            ValueError: a newer checkpoint exists, which Orbax would silently keep instead of this one.
            NotSaved: this one, or the one before, cannot be written.
        """
        while self._damaged:
            self._move_aside(self._damaged.pop())
        saved = self.steps()
        if step in saved:
            if value is not None:
                self._evaluate(step, meta, value)
            return
        if saved and step < saved[-1]:
            raise ValueError(f"step {step} is older than checkpoint {saved[-1]} in {self.directory}; restore it first")
        self._note_best(step, value)
        # A copy: on CPU, NumPy shares memory with a buffer that the next step, which donates it, overwrites.
        alone = all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(state))
        copy = jax.tree.map(np.array if alone else jnp.copy, state)
        kind = "sha256" if alone else "sums"
        body = {"meta": meta, "best": self.best, "arrays": _describe(copy), kind: digest(kind, copy)}
        body = json.loads(json.dumps(body))  # a copy of its own: it is written while the caller goes on
        item = {**body, "own_sha256": digest_json(body)}
        args = ocp.args.Composite(state=self._save_args(copy), meta=ocp.args.JsonSave(item))
        with self._writing():
            if not self._open().save(step, args=args, force=True):
                raise RuntimeError(f"Orbax refused to save step {step} in {self.directory}")

    def restore(self, like: T, before: int | None = None) -> tuple[T, dict[str, Any]] | None:
        """Restores the newest checkpoint that is whole.

        Damaged ones are passed over, from the newest to the oldest. Reading changes nothing on disk; the first `save`
        after it moves them to `damaged/` beside the folder, so that the run can save those steps again.

        Args:
            like: a state (or a pytree of `jax.ShapeDtypeStruct`) with the shapes and dtypes to expect.
            before: look only at those of fewer steps.

        Returns:
            The state and the `meta` it was saved with, or None if there is no checkpoint at all.

        Raises:
            ValueError: every checkpoint is damaged, or one has other shapes or dtypes than `like`.
        """
        steps = self.steps()
        skipped: list[tuple[int, str]] = []
        for step in reversed([step for step in steps if before is None or step < before]):
            try:
                state, item = self._read(step, like)
            except Damaged as error:
                skipped.append((step, str(error)))
                continue
            self._damaged = [bad for bad, _ in skipped]
            self.notes += [f"checkpoint {bad} is damaged ({why}): passed over" for bad, why in skipped]
            self.best = tuple(item["best"]) if item["best"] else None
            if self.best and self.best[0] not in steps:
                self.notes.append(
                    f"the best checkpoint ({self.best[0]}) is gone: the next one evaluated takes its place"
                )
                self.best = None
            return state, item["meta"]
        if skipped:
            reasons = "; ".join(f"{step}: {why}" for step, why in skipped)
            raise ValueError(
                f"every checkpoint in {self.directory} is damaged ({reasons}); restore a copy, or choose another "
                "--workdir to start afresh"
            )
        return None

    def meta(self) -> dict[str, Any] | None:
        """Returns the `meta` of the newest checkpoint whose metadata are whole, without reading any array.

        Returns:
            The `meta`, or None if there is no checkpoint at all.

        Raises:
            ValueError: every checkpoint is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            with contextlib.suppress(Damaged):
                return self._read_item(step)["meta"]
        if steps:
            raise ValueError(f"every checkpoint in {self.directory} is damaged; restore a copy of one")
        return None

    def restore_best(self, like: T) -> T:
        """Restores the checkpoint with the lowest value.

        Args:
            like: as in `restore`.

        Returns:
            The state.

        Raises:
            ValueError: there is none, it is damaged, or it has other shapes or dtypes than `like`.
        """
        if self.best is None:
            raise ValueError(f"no checkpoint in {self.directory} was evaluated; evaluate before looking for the best")
        try:
            return self._read(self.best[0], like)[0]
        except Damaged as error:
            raise ValueError(
                f"the best checkpoint ({self.best[0]}) in {self.directory} is damaged ({error}); restore a copy of it"
            ) from error

    def restore_raw(self, best: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores a checkpoint without knowing what is in it: nothing has to be built first, the optimizer least.

        Args:
            best: the one with the lowest value, if any was evaluated and it is whole; else, the newest that is whole.

        Returns:
            The state as nested dicts and lists of NumPy arrays, and the `meta` it was saved with.

        Raises:
            ValueError: there is no checkpoint, or every one is damaged.
        """
        steps = self.steps()
        if best and (found := self._best_on_disk(steps)) is not None:
            steps = [*(step for step in steps if step != found), found]
        for step in reversed(steps):
            try:
                item = self._read_item(step)
                return self._read_arrays(step, item), item["meta"]
            except Damaged as error:
                self.notes.append(f"checkpoint {step} is damaged ({error}): passed over")
        if steps:
            raise ValueError(f"every checkpoint in {self.directory} is damaged; restore a copy of one")
        raise ValueError(f"there is no checkpoint in {self.directory}; let the run go on until it has saved one")

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises NotSaved if anything went wrong in the background."""
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()
            processes.meet("checkpoint")

    def close(self) -> None:
        """Waits, and releases the threads."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with self._writing():
                manager.close()

    def __enter__(self) -> "Checkpoints[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _found(self) -> set[int]:
        """Steps of the finished checkpoints on disk, those included that a save in the background has finished."""
        if not self.directory.is_dir():
            return set()
        names = [path.name for path in self.directory.iterdir() if path.is_dir() and path.name.isdecimal()]
        return {int(name) for name in names if name == str(int(name))}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what Orbax and TensorStore raise, which has no common class, into NotSaved."""
        try:
            yield
        except Exception as error:
            found = self._found() - set(self._damaged)
            last = f"the last good one is step {max(found):,}" if found else "there is none before it"
            reasons = [
                os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
            ]
            reason = next((reason for reason in reasons if reason in str(error)), _line(error))
            raise NotSaved(f"cannot write a checkpoint in {self.directory} ({reason}); {last}") from error

    def _note_best(self, step: int, value: float | None) -> None:
        if value is not None and (self.best is None or value < self.best[1]):
            self.best = (step, value)

    def _evaluate(self, step: int, meta: dict[str, Any], value: float) -> None:
        """Gives a checkpoint that was saved without a value its value and new `meta`, in one replacement of a file."""
        self._note_best(step, value)
        error: BaseException | None = None
        try:
            with self._writing():
                body = json.loads(json.dumps({**self._read_item(step), "meta": meta, "best": self.best}))
                text = json.dumps({**body, "own_sha256": digest_json(body)})
                if processes.is_main():
                    write_text(self.directory / str(step) / "meta" / "metadata", text)
        except NotSaved as caught:
            error = caught
        if any(processes.agree(error is not None)):
            raise error or NotSaved(f"process 0 cannot write in {self.directory}; see what it says")

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            logging.getLogger("absl").addFilter(_not_of_orbax)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_LatestAndBest(self), cleanup_tmp_directories=True, enable_async_checkpointing=True
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _save_args(self, state: T) -> Any:
        if self.part_mib is None:
            return ocp.args.StandardSave(state)
        # Orbax closes a file once it is past its target, which here took up to half as much again: hence the margin.
        return ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=self.part_mib * 2**20 * 5 // 8)

    def _read_item(self, step: int) -> dict[str, Any]:
        """Reads and checks the metadata of one checkpoint; raises Damaged."""
        self.wait()
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler("meta")) as reader:
            try:
                wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
                item = reader.restore(self.directory / str(step), wanted)["meta"]
                own = item.pop("own_sha256")
                intact = own == digest_json(item)
            except Exception as error:  # Orbax, TensorStore and JSON have no common exception
                raise Damaged(f"its metadata cannot be read, {_line(error)}") from error
        if not intact:
            raise Damaged("its metadata does not match their digest")
        return item

    def _read(self, step: int, like: T) -> tuple[T, dict[str, Any]]:
        """Reads and checks one checkpoint; raises Damaged, or ValueError if it does not fit `like`."""
        item = self._read_item(step)
        _compare(step, item["arrays"], _describe(like))
        # NumPy arrays: those of JAX would have to lie on the devices that they were saved from.
        host = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), like)
        return jax.tree.map(jnp.asarray, self._read_arrays(step, item, host)), item

    def _best_on_disk(self, steps: Sequence[int]) -> int | None:
        """The best checkpoint, if it is there, as the newest one that can be read knows it."""
        for step in reversed(steps):
            with contextlib.suppress(Damaged):
                best = self._read_item(step)["best"]
                return best[0] if best and best[0] in steps else None
        return None

    def _read_arrays(self, step: int, item: dict[str, Any], like: Any = None) -> Any:
        """Reads and checks the arrays of one checkpoint; raises Damaged."""
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler("state")) as reader:
            try:
                wanted = ocp.args.Composite(state=ocp.args.StandardRestore(like))
                state = reader.restore(self.directory / str(step), wanted)["state"]
                by_name = dict(leaves(state))
                whole = [by_name[name] for name in item["arrays"]]  # in the order of the digest
            except Exception as error:
                raise Damaged(f"its arrays cannot be read, {_line(error)}") from error
        kind = "sha256" if "sha256" in item else "sums"
        if digest(kind, whole) != item[kind]:
            raise Damaged("its arrays do not match their digest")
        return state

    def _move_aside(self, step: int) -> None:
        if processes.is_main():
            self._rename(step)
        processes.meet("moved aside")

    def _rename(self, step: int) -> None:
        folder = self.directory.parent / "damaged"
        folder.mkdir(exist_ok=True)
        number, target = 1, folder / str(step)
        while target.exists():
            number, target = number + 1, folder / f"{step}-{number + 1}"
        (self.directory / str(step)).rename(target)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """False for errors that Orbax logs, with a traceback from each of its threads, before it raises them."""
    return "orbax" not in record.pathname or record.levelno < logging.ERROR


class NotSaved(OSError):
    """A checkpoint cannot be written; the message says why and which one is the last good one."""


class Damaged(Exception):
    """A checkpoint that is not what was saved; the message says how that shows."""


class _LatestAndBest(preservation_policy.PreservationPolicy):
    """Keeps the newest checkpoints and the best."""

    def __init__(self, owner: Checkpoints):
        self.owner = owner

    def should_preserve(
        self,
        checkpoints: Sequence[preservation_policy.PolicyCheckpointInfo],
        *,
        context: preservation_policy.PreservationContext,
    ) -> Sequence[bool]:
        newest = {info.step for info in checkpoints[-self.owner.keep :]}
        best = self.owner.best[0] if self.owner.best else None
        return [info.step in newest or info.step == best for info in checkpoints]


def _describe(tree: Any) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves(tree)}


def _compare(step: int, saved: dict[str, list], wanted: dict[str, list]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            old, new = (f"{d[name][0]}{d[name][1]}" if name in d else "absent" for d in (saved, wanted))
            raise ValueError(
                f"checkpoint {step} has {name} as {old}, this model as {new}; run with the configuration that it was "
                "saved with, or choose another --workdir"
            )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
