"""The scaling script: what it counts against what parallel training must exchange and share out, and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scaling

SCRIPT = Path(scaling.__file__)
SMALL = ["--width", "64", "--length", "32", "--batch", "16"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A Transformer on one device, on two, on four that split its parameters, and, not run, on sixteen."""
    folder = tmp_path_factory.mktemp("scaling") / "run"
    meshes = ["data=1", "data=2", "data=2,model=2", "data=16"]
    options = [*SMALL, "--model", "transformer", "--meshes", *meshes, "--run-up-to", "4", "--link-gb", "1", "100"]
    command = [sys.executable, SCRIPT, "--workdir", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "scaling.png").stat().st_size > 10_000
    assert "not run" in done.stdout
    return dict(zip(meshes, json.loads((folder / "scaling.json").read_text()), strict=True))


def test_one_device_sends_nothing_and_two_their_gradients(rows):
    params = rows["data=1"]["state_mib"] / 3  # beside Adam's two moments
    assert rows["data=1"]["sent_mib"] == rows["data=1"]["exchanges"] == 0
    assert rows["data=2"]["all-reduce_mib"] == pytest.approx(params, rel=0.01)
    assert rows["data=16"]["all-reduce_mib"] == pytest.approx(2 * 15 / 16 * params, rel=0.01)
    assert rows["data=2,model=2"]["all-gather_mib"] > 0.4 * params


def test_devices_share_the_work_and_along_model_the_state(rows):
    for mesh, devices in (("data=2", 2), ("data=2,model=2", 4), ("data=16", 16)):
        assert rows[mesh]["gflop"] * devices == pytest.approx(rows["data=1"]["gflop"], rel=0.1)
    assert rows["data=16"]["state_mib"] == pytest.approx(rows["data=1"]["state_mib"])
    assert rows["data=2,model=2"]["state_mib"] < 0.6 * rows["data=1"]["state_mib"]


def test_the_loss_is_that_of_one_device_where_it_was_run(rows):
    assert rows["data=2,model=2"]["loss"] == pytest.approx(rows["data=1"]["loss"], rel=1e-5)
    assert "loss" not in rows["data=16"]


def test_the_predicted_time_is_that_of_products_and_links(rows):
    row = rows["data=2"]
    want = row["gflop"] / 10 + 1e3 * row["sent_mib"] * 2**20 / 1e9 + row["exchanges"] * 0.01
    assert row["ms_at_1"] == pytest.approx(want)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--model", "lstm"], "--model is lstm, expected one of language_model, hypernetwork, snr, transformer"),
        (["--meshes", "data=3"], "--batch is 16, expected a multiple of the 3 devices of data=3"),
        (["--meshes", "data=x"], "mesh is 'data=x', expected devices along axes"),
        (["--meshes", "data=128", "--batch", "128"], "128 devices are needed"),
        (["--width", "30"], "--width is 30, expected a multiple of 4"),
        (["--link-gb", "0"], "--tflops and --link-gb is 0.0, expected positive numbers"),
        (["--mesh", "data=2"], "--mesh is not a field of this experiment; did you mean --meshes?"),
    ],
)
def test_bad_input_is_one_line(options, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        scaling.main(["--workdir", str(tmp_path / "run"), *SMALL, *options])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {line}")
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
