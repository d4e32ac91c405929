"""Runs of char_lm.py, opened again: what they were, and the parameters of their best checkpoint."""

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import char_lm
import jax

from hyperjax import training
from hyperjax.data import Corpus, load_corpus
from hyperjax.data.text import NAMES
from hyperjax.recurrent import LanguageModel


class Run(NamedTuple):
    """A run: its configuration, its text, its model, and restore() -> (its best parameters, their step)."""

    config: char_lm.Config
    corpus: Corpus
    model: LanguageModel
    restore: Callable[[], tuple[Any, int]]


def open_run(workdir: Path, data_dir: str | None = None) -> Run:
    """Opens the run in a folder, finished or not; nothing is compiled, and notes go to stderr.

    Args:
        workdir: the folder.
        data_dir: where its corpus is, if no longer where the run found it.

    Raises:
        ValueError: there is no run of char_lm.py in it, or its text is gone. `restore` raises it where there is no
            checkpoint, none that is whole, or the corpus is not the one that the run was trained on.
    """
    config = _read_config(workdir, data_dir)
    if config.corpus not in NAMES and not os.path.exists(Path(config.corpus).expanduser()):
        raise ValueError(f"the run's text {config.corpus} is not there; put it back, or go where the run was started")
    corpus = load_corpus(config.corpus, config.data_dir)
    model = char_lm.make_model(config, len(corpus.symbols))
    return Run(config, corpus, model, partial(_restore, workdir, config, model, corpus))


def tell(*lines: str) -> None:
    """Prints to stderr."""
    for line in lines:
        print(line, file=sys.stderr)


def _read_config(workdir: Path, data_dir: str | None) -> char_lm.Config:
    """The configuration of the run in a folder.

    Raises:
        ValueError: there is no run of char_lm.py in it, or none that got as far as a checkpoint.
    """
    if not os.path.isdir(workdir):
        raise ValueError(f"{workdir} is not a folder; give the --workdir of a run of char_lm.py")
    path = workdir / "config.json"
    if not os.path.exists(path):
        raise ValueError(f"{workdir} holds no run, for it has no config.json; give the --workdir of a run")
    try:
        config = training.read_config(path, char_lm.Config)
        char_lm.defaults(config.preset, config.model)
        char_lm.check(config)
    except ValueError as error:
        raise ValueError(f"{path} is not the configuration of a run of char_lm.py ({error}); restore it") from error
    return dataclasses.replace(config, data_dir=data_dir or config.data_dir)


def _restore(workdir: Path, config: char_lm.Config, model: LanguageModel, corpus: Corpus) -> tuple[Any, int]:
    """The parameters of a run's best checkpoint, and their step; nothing is compiled.

    Raises:
        ValueError: there is no checkpoint, none that is whole, or the corpus is not the one it was trained on.
    """
    create = char_lm.make_create(config, model, char_lm.make_optimizer(config, steps=1))
    like = jax.eval_shape(create, jax.random.key(0))
    with training.Checkpoints[training.TrainState](workdir / "checkpoints") as checkpoints:
        meta = checkpoints.meta()
        if meta is None:
            raise ValueError(f"{workdir} has no checkpoint yet; let the run go on until it has saved one")
        if meta.get("fingerprint") != corpus.fingerprint:
            raise ValueError(f"the text of {corpus.name} has changed since this run began; restore it, or train again")
        restored = checkpoints.restore(like)
        assert restored is not None
        state = restored[0]
        tell(*checkpoints.notes)
        if checkpoints.best is None:
            tell("no checkpoint was evaluated yet: using the newest")
        else:
            state = checkpoints.restore_best(like)
    return char_lm.evaluated(state), int(state.step)
