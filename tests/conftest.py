"""Settings every test runs under: rank promotion is an error, and so is every warning (pyproject.toml)."""

import os

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile much and compute little. This spares LLVM's passes; those of XLA, with its fusions and layouts, all run.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # scripts that tests start must give the same numbers, to the bit
