"""Devices in a mesh: the same numbers on 1 and 8 devices, in 1, 2 and 4 processes; what is split, what is refused."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from hyperjax.training import Checkpoints, Devices, Layout, TrainState, lay_out, make_mesh
from hyperjax.training.digest import digest
from hyperjax.training.mesh import AXES, mesh_shape
from hyperjax.training.processes import in_cluster

CASES = ("language_model", "hypernetwork", "snr", "transformer")
WORKER = Path(__file__).with_name("mesh_worker.py")


def start(folder, steps, devices, *options, variables=()):
    environment = {**os.environ, **dict(variables), "XLA_FLAGS": flags(devices)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
    environment |= {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, WORKER, folder, str(steps), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def flags(devices):
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


def together(folder, steps, devices, mesh, number):
    """Runs the worker in several processes that are told where to find each other."""
    shared = ("--mesh", mesh, "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(number))
    finish([start(folder, steps, devices, *shared, "--process-id", str(n)) for n in range(number)])


def as_slurm(folder, steps, devices, mesh, number):
    """Runs the worker in several processes that SLURM's variables tell of each other, as srun sets them."""
    port = free_port(range(61440, 65536))  # JAX makes it from the job's number
    variables = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    variables |= {"SLURM_NTASKS": str(number)}
    own = [variables | dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(n)) for n in range(number)]
    finish([start(folder, steps, devices, "--mesh", mesh, variables=each) for each in own])


def free_port(among=(0,)):
    for port in among:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    raise OSError(f"no port is free of {among}")


def finish(processes):
    for process in processes:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-3000:]


def losses(folder, case):
    rows = [json.loads(line) for line in (folder / case / "metrics.jsonl").read_text().splitlines()]
    return np.array([[row["step"], row["loss"], row["grad_norm"]] for row in rows if "loss" in row])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six steps on one device; on eight; and by turns in four processes, in two with two devices each, and in one."""
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in ("one", "eight", "several")}
    finish([start(folders["one"], 6, 1), start(folders["eight"], 6, 8, "--mesh", "data=4,model=2")])
    together(folders["several"], 2, 1, "data=2,model=2", 4)
    as_slurm(folders["several"], 4, 2, "data=4", 2)
    finish([start(folders["several"], 6, 1)])
    return folders


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["eight", "several"])
def test_a_batch_gives_the_losses_of_one_device(runs, name, case):
    got, want = (losses(runs[each], case) for each in (name, "one"))
    np.testing.assert_array_equal(got[:, 0], np.arange(1, 7))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_who_saved_a_checkpoint_shows_in_its_digest(runs, case):
    """So several processes did write what the others, and then one alone, went on from."""
    checkpoints = Checkpoints(runs["several"] / case / "checkpoints")
    kinds = [next(kind for kind in ("sums", "sha256") if kind in checkpoints._read_item(step)) for step in (4, 6)]
    assert kinds == ["sums", "sha256"]


@pytest.fixture
def layout():
    """One device as a mesh of one: where leaves would lie is the same."""
    return Layout(make_mesh("data=1"), 4)


def test_what_is_split():
    """Rows over all devices; large parameters, with the optimizer's state, along their longest axis that divides."""
    layout = Layout(make_mesh("data=1"), 4, at_least=8)
    params = {"large": jnp.zeros((2, 8)), "small": jnp.zeros(7), "scalar": jnp.zeros(())}
    state = TrainState.create(params, optax.adam(0.1), {"h": jnp.zeros((4, 3)), "teacher": jnp.zeros((8, 3))})
    found = layout.shardings(state)
    specs = {name: sharding.spec for name, sharding in found.params.items()}
    assert specs == {"large": PartitionSpec(None, "model"), "small": PartitionSpec(), "scalar": PartitionSpec()}
    adam = found.opt_state[0]
    assert adam.mu["large"].spec == adam.nu["large"].spec == PartitionSpec(None, "model")
    assert adam.count.spec == found.step.spec == PartitionSpec()
    assert found.carry["h"].spec == PartitionSpec(AXES)
    assert found.carry["teacher"].spec == PartitionSpec("model")


def test_a_placed_state_comes_back(layout):
    state = TrainState.create({"w": jnp.arange(6.0).reshape(2, 3)}, optax.adam(0.1), jnp.ones((4, 2)))
    placed = layout.place(state)
    assert placed.params["w"].sharding.mesh.axis_names == AXES
    for a, b in zip(jax.tree.leaves(layout.local(placed)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    batch = layout.join({"x": np.ones((4, 2)), "reset": np.bool_(True), "task": 3})
    assert batch["task"] == 3
    assert batch["x"].sharding.spec == PartitionSpec(AXES)
    assert batch["reset"].sharding.spec == PartitionSpec()


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.bool_, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 5)])
def test_a_digest_sees_every_change(dtype, shape):
    array = np.asarray(np.random.default_rng(0).integers(0, 2, shape)).astype(dtype)
    for kind in ("sha256", "sums"):
        want = digest(kind, {"a": array})
        assert digest(kind, {"a": array.copy()}) == want
        for place in np.ndindex(shape):
            changed = array.copy()
            changed[place] = 1 - changed[place]
            assert digest(kind, {"a": changed}) != want


def test_the_digest_of_sums_sees_elements_that_change_places():
    array = np.arange(1000, dtype=np.float32).reshape(10, 100)
    assert digest("sums", [array]) != digest("sums", [array[::-1].copy()])
    assert digest("sums", [array]) != digest("sums", [array.T.copy()])
    assert digest("sums", [array, array + 1]) != digest("sums", [array + 1, array])


@pytest.mark.parametrize(
    ("text", "shape"),
    [("data=4,model=2", (4, 2)), ("model=2,data=4", (4, 2)), ("data=3", (3, 1)), (" model=5 ", (1, 5))],
)
def test_reads_a_mesh(text, shape):
    assert tuple(mesh_shape(text).values()) == shape


@pytest.mark.parametrize(
    "text", ["", "4", "data", "data=", "data=0", "data=-1", "data=2,data=2", "rows=2", "data=2;model=2", "data=1e3"]
)
def test_refuses_what_is_no_mesh(text):
    with pytest.raises(ValueError, match="expected devices along axes, such as data=4"):
        mesh_shape(text)


def test_refuses_devices_that_are_not_there_and_rows_that_cannot_be_split():
    with pytest.raises(ValueError, match=r"mesh is 'data=999', 999 devices, but there (is|are) \d"):
        make_mesh("data=999")
    with pytest.raises(ValueError, match=r"expected devices along axes"):
        lay_out(Devices(mesh="data=two"), batch=3)


def test_a_script_says_in_a_line_what_cannot_be_laid_out(tmp_path):
    script = WORKER.parents[1] / "experiments" / "char_lm.py"
    environment = {**os.environ, "XLA_FLAGS": flags(4)}
    for mesh, batch, line in (
        ("data=4", "6", "error: batch is 6, expected a multiple of the 4 devices of the mesh; change either\n"),
        ("data=8", "8", "error: mesh is 'data=8', 8 devices, but there are 4; change --mesh"),
    ):
        command = [sys.executable, script, "--mesh", mesh, "--batch", batch, "--workdir", tmp_path / "run"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.startswith(line)
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"coordinator": "a:1"}, "--num-processes and --process-id missing"),
        ({"process_id": 0, "num_processes": 2}, "--coordinator missing"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "coordinator is 'host', expected HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "num_processes is 0, expected 1 or more"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id is 2, expected 0 to 1"),
    ],
)
def test_refuses_processes_that_cannot_meet(fields, line):
    with pytest.raises(ValueError, match=line):
        lay_out(Devices(mesh="data=2", **fields), batch=2)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, False),  # a shell within an allocation, not a step of it
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True),
    ],
)
def test_tells_a_cluster_from_a_single_process(environment, found):
    assert in_cluster(environment) is found


def test_metrics_of_a_run_are_kept_by_one_process_alone(runs):
    """The folder of a run of several processes holds what that of one holds: nothing of the others is left in it."""
    names = [{path.name for path in (runs[name] / "snr").iterdir()} for name in ("one", "several")]
    assert names[0] == names[1]
    assert json.loads((runs["several"] / "snr" / "config.json").read_text())["mesh"] == "data=2,model=2"
