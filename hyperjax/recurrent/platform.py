"""One computation in two forms, of which XLA compiles the one that suits the machine; they agree to rounding.

A CPU wants few passes over memory: narrow products apart, sums inside the loop, nothing computed twice. An accelerator
wants few kernels in a time step, each of which costs microseconds however small it is, and has arithmetic to spare.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def choose(*arguments: Any, cpu: Callable, accelerator: Callable) -> Any:
    """cpu(*arguments) where this is compiled for a CPU by itself, accelerator(*arguments) anywhere else.

    CPUs that share a mesh (see `jax.set_mesh`) wait for each other in every step of a loop that sums a gradient, and so
    are better off with a form that sums it once.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return accelerator(*arguments)
    return lax.platform_dependent(*arguments, cpu=cpu, default=accelerator)


def in_two_forms(cpu: Callable, accelerator: Callable) -> Callable:
    """A function that computes `cpu` or `accelerator`, and so does its derivative.

    Differentiating `choose` itself would keep the intermediate values of both. There is no forward-mode derivative.
    """

    @jax.custom_vjp
    def run(*arguments):
        return choose(*arguments, cpu=cpu, accelerator=accelerator)

    def pull(form):
        return lambda arguments, cotangent: jax.vjp(form, *arguments)[1](cotangent)

    run.defvjp(
        lambda *arguments: (run(*arguments), arguments),
        lambda *residuals: choose(*residuals, cpu=pull(cpu), accelerator=pull(accelerator)),
    )
    return run
