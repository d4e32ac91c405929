"""Several processes that train one model: how they find each other, and what only one of them does."""

import os
import re
import sys
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None, cluster: bool) -> bool:
    """Joins the processes of a run, once in a process and before anything else of JAX.

    Args:
        coordinator: HOST:PORT where process 0 listens.
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.
        cluster: ask SLURM, Kubernetes or the TPU pod for these three if they are None.

    Returns:
        Whether there are several processes. All but process 0 are silent from here on: their stdout goes nowhere.

    Raises:
        ValueError: some of the three are given and others not, or one makes no sense.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    if len(missing) == len(given) and not (cluster and in_cluster(os.environ)):
        return False
    if 0 < len(missing) < len(given):
        raise ValueError(f"{' and '.join(missing)} missing; a run of several processes needs all three, or a cluster")
    if coordinator is not None and num_processes is not None and process_id is not None:
        if not re.fullmatch(r"\S+:\d{1,5}", coordinator):
            raise ValueError(f"coordinator is {coordinator!r}, expected HOST:PORT, such as 10.0.0.1:8476")
        if num_processes < 1:
            raise ValueError(f"num_processes is {num_processes}, expected 1 or more")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id is {process_id}, expected 0 to {num_processes - 1}")
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator, num_processes, process_id)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    return several()


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a process was started as one of several by SLURM's srun, a Kubernetes indexed job or on a TPU pod.

    Args:
        environment: the process's variables.
    """
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks not in ("", "1") and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(environment):
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def several() -> bool:
    """Whether this process is one of several; asking starts no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return not several() or jax.process_index() == 0


def gathered(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked; all processes must ask together."""
    return np.asarray(multihost_utils.process_allgather(values)) if several() else values[None]


def agree(*flags: int) -> tuple[int, ...]:
    """The largest value that any process has of each flag; all processes must ask together."""
    return tuple(int(n) for n in gathered(np.array(flags, np.int32)).max(0))


def meet(name: str) -> None:
    """Returns when all processes have come here."""
    if several():
        multihost_utils.sync_global_devices(name)
