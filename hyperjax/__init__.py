"""hyperjax: networks whose parameters are produced by something else, in JAX."""

__version__ = "0.1.0"
