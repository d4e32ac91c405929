"""Disks that are full or cannot be written: one line, an exit status, and nothing lost. Limits of file sizes stand in
for full disks, as they need no rights."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import test_loop as loop
from test_experiment import Config

from hyperjax.training import Checkpoints, JsonLines, Workdir, read_lines, write_json

TESTS = Path(__file__).parent
FULL = """
import os, resource, sys, time
import test_loop as loop
from hyperjax.training import stopping
limit, at, folder = int(sys.argv[1]), int(sys.argv[2]), loop.Path(sys.argv[3])

def batches(step):
    if step == at:
        while not (folder / "checkpoints" / "10").exists():  # saved in the background
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return loop.batch_at(step)

with stopping():
    loop.run(folder, batches)
"""


def python(code, *arguments):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return loop.run(tmp_path_factory.mktemp("whole"))[0]


@pytest.mark.parametrize(("limit", "what"), [(1200, "a checkpoint in"), (16, "")])
def test_a_disk_that_fills_up_in_a_run_costs_what_was_not_saved_and_no_more(uninterrupted, tmp_path, limit, what):
    done = python(FULL, limit, 13, tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.strip() and "step/s" not in line]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("error: cannot write ")
    assert "(File too large)" in lines[0]
    if "checkpoint" in what:
        assert "the last good one is step 10" in lines[0]
    assert lines[1].startswith("to resume: python ")
    kept = Checkpoints(tmp_path / "checkpoints")
    assert kept.restore(loop.fresh_state())[1]["step"] == 10
    assert kept.notes == []
    assert loop.run(tmp_path)[0] == uninterrupted


def test_files_are_replaced_whole_or_not_at_all_on_a_full_disk(tmp_path):
    write_json(tmp_path / "s.json", {"a": 1})
    code = (
        "import resource, sys\nfrom hyperjax.training import stopping, write_json\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "with stopping():\n    write_json(sys.argv[1], {'a': 'b' * 200})\n"
    )
    done = python(code, tmp_path / "s.json")
    assert done.returncode == 1
    assert f"error: cannot write {tmp_path / 's.json'} (File too large); make room" in done.stderr
    assert json.loads((tmp_path / "s.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_a_line_that_does_not_fit_leaves_the_lines_before_it(tmp_path):
    code = (
        "import resource, sys\nfrom hyperjax.training import JsonLines\n"
        "lines = JsonLines(sys.argv[1], 0)\nlines.write(1, loss=0.5)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n"
        "try:\n    lines.write(2, loss=0.25)\nexcept OSError as error:\n    print(error.filename, error.errno)\n"
        "lines.close()\n"
    )
    done = python(code, tmp_path / "m")
    assert (done.returncode, done.stdout.split()) == (0, [str(tmp_path / "m"), "27"])
    assert read_lines(tmp_path / "m") == [{"step": 1, "loss": 0.5}]
    with JsonLines(tmp_path / "m", 1) as lines:
        lines.write(2, loss=0.25)
    assert len(read_lines(tmp_path / "m")) == 2


READ_ONLY = """
import os, sys
from test_experiment import Config, Workdir, bad_input
import hyperjax.training.experiment
if os.geteuid() == 0:
    os.setuid(65534)  # permissions do not hold for root
with bad_input(""):
    Workdir(sys.argv[1], Config()).open()
"""


def test_a_read_only_workdir_is_one_line(tmp_path):
    folder = Path(tempfile.mkdtemp())  # others may not look into tmp_path
    try:
        with Workdir(folder, Config()).open():
            pass
        for path in (*folder.iterdir(), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        done = python(READ_ONLY, folder)
        assert done.returncode == 2, done.stderr
        want = f"error: cannot write in {folder} (Permission denied); choose another --workdir\n"
        assert done.stderr == want
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
