"""Settings every test runs under: rank promotion is an error, and so is every warning (pyproject.toml)."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
