"""experiments/soak.py: it measures what it says, and fails where memory grows or something is compiled again.

HYPERJAX_SOAK_MINUTES says how long it soaks (three seconds by default); from 10 on its own limits of memory hold.
"""

import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import soak

MINUTES = float(os.environ.get("HYPERJAX_SOAK_MINUTES", "0.05"))
SMALL = ["--train-tasks=5", "--new-tasks=3", "--adapt-steps=2", "--cached=1", "--epoch=20", "--every-seconds=0.001"]


def test_a_short_soak_passes_and_leaves_its_figures(tmp_path, capsys):
    times = [f"--minutes={MINUTES}", f"--settle-minutes={min(5.0, 0.4 * MINUTES)}"]
    # In seconds, in a process that has run other tests, memory says little: here only that it is recorded.
    arguments = [*SMALL, *times, *([] if MINUTES >= 10 else ["--most-mib=1000"]), f"--workdir={tmp_path}"]
    assert soak.main(arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()]
    assert len(rows) > 1
    assert all(row["rss_mib"] > 10 and row["live_arrays"] > 0 for row in rows)
    assert summary["compilations_first_epoch"] > 5
    assert summary["compilations_after"] == 0
    assert summary["live_arrays_grown"] == 0
    assert summary["cache_hits"] == summary["cache_misses"] == 3 * summary["epochs"]
    assert summary["cache_evictions"] > 0
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert soak.main(arguments) == 0
    assert "holds a finished run" in capsys.readouterr().out


CONFIG = soak.Config(minutes=10.0, settle_minutes=5.0)
GOOD = [
    {"minutes": m, "epoch": m, "rss_mib": 400.0 + min(m, 5), "live_arrays": 9, "live_mib": 1.0, "compilations": 20}
    for m in range(11)
]


def changed(**last):
    return [*GOOD[:-1], GOOD[-1] | last]


@pytest.mark.parametrize(
    ("rows", "first", "passed"),
    [
        (GOOD, 20, True),  # what grows before it has settled does not count
        (changed(rss_mib=424.0), 20, True),
        (changed(rss_mib=426.0), 20, False),
        ([*GOOD[:8], GOOD[8] | {"rss_mib": 500.0}, *GOOD[9:]], 20, False),  # nor is a peak forgotten
        (changed(live_arrays=10), 20, False),
        (GOOD, 19, False),
    ],
)
def test_the_verdict(rows, first, passed):
    assert soak.verdict(rows, CONFIG, first)["passed"] is passed
    large = [row | {"rss_mib": 10 * row["rss_mib"]} for row in rows[:-1]] + [rows[-1] | {"rss_mib": 4100.0}]
    assert soak.verdict(large, dataclasses.replace(CONFIG, most_mib=1.0), 20)["rss_mib_allowed"] == 81.0


def test_what_is_measured_is_there():
    compilations = soak.Compilations()
    before = soak.measure(0.0, 1, compilations)
    kept = [jnp.full((1 << 20,), n, jnp.float32).block_until_ready() for n in range(20)]
    after = soak.measure(0.0, 1, compilations)
    assert after["live_arrays"] - before["live_arrays"] == len(kept)
    assert after["live_mib"] - before["live_mib"] == pytest.approx(80)
    ballast = np.ones(200 << 20, np.uint8)  # so large that it comes from the system, and goes back to it
    assert soak.measure(0.0, 1, compilations)["rss_mib"] - after["rss_mib"] > 0.9 * ballast.nbytes / 2**20 - 10


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--minutes=0", "--minutes is 0.0, expected a positive number"),
        ("--minutes=4", "--settle-minutes is 5.0, expected less than --minutes, 4.0"),
        ("--epoch=0", "--epoch is 0, expected a whole number of at least 1"),
        ("--seed=-1", "--seed is -1, expected"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, argument, line):
    with pytest.raises(SystemExit) as stop:
        soak.main([argument, f"--workdir={tmp_path / 'run'}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error
    assert not (tmp_path / "run").exists()
