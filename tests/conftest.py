"""Settings every test runs under: rank promotion is an error, and so is every warning (pyproject.toml)."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))  # tests of scripts import them by name
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile much and compute little. This spares LLVM's passes, and MLIR's, through which code for fusions goes on
# CPUs by default; the passes of XLA, with its fusions and layouts, all run.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # scripts that tests start must give the same numbers, to the bit
CHEAP = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def known(flags):
    """Whether this XLA has the flags; it ends a process that gives it others."""
    code = "import jax; jax.devices('cpu')"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode == 0
    )


if "PYTEST_XDIST_WORKER" not in os.environ and known(CHEAP):  # workers inherit it
    os.environ["XLA_FLAGS"] = f"{CHEAP} {os.environ.get('XLA_FLAGS', '')}".strip()


# What takes minutes goes first, so that no process is left with it when the others have finished.
LONG = ("test_colab.py", "test_mesh.py", "test_share_layers.py", "test_dynamic_pruning.py", "test_kills.py")


def pytest_collection_modifyitems(items):
    """Sorts modules, and nothing within them."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Lets go of a module's compiled programs: thousands of them in one process exhaust its memory mappings."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def cheap_compilation(tmp_path_factory):
    """Compiles each program of a module's tests once: most of the time would go into that."""
    changes = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    changes |= {"jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
