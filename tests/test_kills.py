"""Runs killed at random moments, saves in the background included: nothing saved is lost, no figure changes.

HYPERJAX_KILLS says how often (3 by default); the kills take as many runs as they need.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import char_lm
import jax
import pytest

from hyperjax.data import load_corpus
from hyperjax.training import Checkpoints, Workdir

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "char_lm.py"
KILLS = int(os.environ.get("HYPERJAX_KILLS", "3"))
TINY = [
    *("--model=lstm", "--units=8", "--keep=0.9", "--batch=4", "--length=16", "--eval-batch=32", "--learning-rate=0.01"),
    *("--steps=300", "--eval-every=50", "--log-every=7", "--sample-length=20", "--prime-length=10"),
    "--save-minutes=0.0001",  # so that a save is nearly always under way
]
VARYING = ("seconds", "chars_per_second")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Returns start(workdir) -> a process, which finds what another has compiled."""
    folder = tmp_path_factory.mktemp("kills")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} green bottles, and {n * n % 97} on the wall.\n" for n in range(300)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(workdir, errors=subprocess.DEVNULL):
        command = [sys.executable, str(SCRIPT), *TINY, f"--corpus={text}", f"--workdir={workdir}"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, text=True)

    return start


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """The run uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert script(folder).wait(300) == 0
    return folder


def figures(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name not in VARYING}


def finished_saves(workdir):
    folder = workdir / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()} if folder.is_dir() else {0}


def killed(start, workdir, rng):
    """Starts the run, and kills it at a random moment; returns whether it was still there, and the newest save."""
    process = start(workdir)
    before = finished_saves(workdir)
    early = rng.random() < 0.1  # before it trains
    until = time.monotonic() + 120
    while not early and process.poll() is None and finished_saves(workdir) <= before and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 4 if early else 0.8))
    seen = max(finished_saves(workdir), default=0)
    process.kill()
    assert process.wait() in (-9, 0)
    return process.returncode == -9, seen


def test_a_run_killed_at_random_moments_is_the_run_uninterrupted(script, whole, tmp_path):
    metrics, summary = (whole / "metrics.jsonl").read_bytes(), figures(whole)
    config = char_lm.Config(**json.loads((whole / "config.json").read_text()))
    corpus = load_corpus(config.corpus)
    model = char_lm.make_model(config, len(corpus.symbols))
    create = char_lm.make_create(config, model, char_lm.make_optimizer(config, steps=1))
    like = jax.eval_shape(create, jax.random.key(0))
    rng, kills, runs, during, newest = random.Random(0), 0, 1, 0, 0
    while kills < KILLS:
        workdir = tmp_path / f"run{runs}"
        hit, seen = killed(script, workdir, rng)
        folder = workdir / "checkpoints"
        during += hit and folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())
        checkpoints = Checkpoints(folder)
        restored = checkpoints.restore(like)
        assert checkpoints.notes == []  # every finished checkpoint is whole
        step = int(restored[0].step) if restored else 0
        assert step >= max(seen, newest)
        newest = step
        with Workdir(workdir, config).open():  # and no lock is left
            pass
        if hit:
            kills += 1
            continue
        assert ((workdir / "metrics.jsonl").read_bytes(), figures(workdir)) == (metrics, summary)
        runs, newest = runs + 1, 0
    workdir = tmp_path / f"run{runs}"
    if newest:
        with (workdir / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 298, "lo')  # and a line torn in the middle
    assert script(workdir).wait(300) == 0
    assert ((workdir / "metrics.jsonl").read_bytes(), figures(workdir)) == (metrics, summary)
    print(f"{kills} kills, {during} of them during a save, over {runs} runs")


def test_a_machine_that_is_taken_away_costs_nothing(script, whole, tmp_path):
    rng = random.Random(1)
    for _ in range(2):
        before = max(finished_saves(tmp_path))
        with script(tmp_path, subprocess.PIPE) as process:
            until = time.monotonic() + 120
            while max(finished_saves(tmp_path), default=0) <= before and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
            process.terminate()
            asked = time.monotonic()
            _, errors = process.communicate(timeout=60)
            assert time.monotonic() - asked < 30
        assert process.returncode == 0
        assert "SIGTERM: saved step" in errors
        assert f"to resume: python {SCRIPT} --model=lstm" in errors
        assert not (tmp_path / "summary.json").exists()
    assert script(tmp_path).wait(300) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert figures(tmp_path) == figures(whole)
