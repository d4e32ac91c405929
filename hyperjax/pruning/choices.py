"""Ways to turn a router's logits into gates: drawn with a key in training, fixed without one.

`Choice` is what a network asks of them. U units along the last axis.
"""

import dataclasses
import math
import numbers
from typing import Any, Protocol, runtime_checkable

import jax

from hyperjax import estimators

Array = jax.Array


@runtime_checkable
class Choice(Protocol):
    """What a choice has to have; it must be hashable, as a frozen dataclass is."""

    @property
    def bias(self) -> float:
        """The logit to start with."""
        ...

    def gates(self, key: Array | None, logits: Array, temperature: Any = 1.0) -> Array:
        """Gates of the shape of the logits [..., U], to multiply or select with: drawn with a key, fixed without."""
        ...

    def open(self, logits: Array) -> Array:
        """0 or 1 as it is served, with the gradient of the probability to be open: what to steer to a budget."""
        ...


@dataclasses.dataclass(frozen=True)
class HardConcrete:
    """Gates in [0, 1], exactly 0 or 1 with some probability; the logits are log alpha. Temperature has no effect.

    Attributes:
        beta: temperature of its own.
        gamma: lower end of the stretch.
        zeta: upper end of the stretch.
        start: probability that a gate is open at first.

    Raises:
        ValueError: beta, gamma, zeta or start is out of range; see `hyperjax.estimators.hard_concrete_log_alpha`.

    Reference: Louizos et al., "Learning sparse neural networks through L0 regularization" (2018).
    """

    beta: float = estimators.BETA
    gamma: float = estimators.GAMMA
    zeta: float = estimators.ZETA
    start: float = 0.9

    def __post_init__(self) -> None:
        estimators.check_hard_concrete(self.beta, self.gamma, self.zeta, self.start)

    @property
    def bias(self) -> float:
        """The logit to start with."""
        with jax.ensure_compile_time_eval():  # a number, also where a network is traced
            return float(estimators.hard_concrete_log_alpha(self.start, **self._range))

    def gates(self, key: Array | None, logits: Array, temperature: Any = 1.0) -> Array:
        """Gates of the shape of the logits [..., U]: drawn with a key, fixed without."""
        if key is None:
            return estimators.hard_concrete_deterministic(logits, gamma=self.gamma, zeta=self.zeta)
        return estimators.hard_concrete(key, logits, **self._range)

    def open(self, logits: Array) -> Array:
        """1 where a gate is served open, else 0, with the gradient of the probability to be open."""
        served = estimators.hard_concrete_deterministic(logits, gamma=self.gamma, zeta=self.zeta)
        return _with_gradient(served > 0, estimators.hard_concrete_l0(logits, **self._range))

    @property
    def _range(self) -> dict[str, float]:
        return {"beta": self.beta, "gamma": self.gamma, "zeta": self.zeta}


@dataclasses.dataclass(frozen=True)
class GumbelSigmoid:
    """Gates of 0 or 1, drawn with probability sigmoid(logits), by straight-through; served: logits above 0.

    Attributes:
        hard: False leaves the samples soft in training.
        start: probability that a gate is open at first.

    Raises:
        ValueError: start is outside (0, 1).
    """

    hard: bool = True
    start: float = 0.9

    def __post_init__(self) -> None:
        _check_start(self.start)

    @property
    def bias(self) -> float:
        """The logit to start with."""
        return math.log(self.start / (1 - self.start))

    def gates(self, key: Array | None, logits: Array, temperature: Any = 1.0) -> Array:
        """Gates of the shape of the logits [..., U]: drawn with a key, fixed without."""
        if key is None:
            return estimators.threshold_mask(logits)
        return estimators.gumbel_sigmoid(key, logits, temperature, hard=self.hard)

    def open(self, logits: Array) -> Array:
        """1 where a gate is served open, else 0, with the gradient of the probability to be open."""
        return estimators.threshold_mask(logits)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Gates of 0 or 1: logits above 0, by straight-through; nothing is drawn.

    Attributes:
        start: sigmoid of the logits at first.

    Raises:
        ValueError: start is outside (0, 1).
    """

    start: float = 0.9

    def __post_init__(self) -> None:
        _check_start(self.start)

    @property
    def bias(self) -> float:
        """The logit to start with."""
        return math.log(self.start / (1 - self.start))

    def gates(self, key: Array | None, logits: Array, temperature: Any = 1.0) -> Array:
        """Gates of the shape of the logits [..., U]: drawn with a key, fixed without."""
        return estimators.threshold_mask(logits, temperature=temperature)

    def open(self, logits: Array) -> Array:
        """1 where a gate is served open, else 0, with the gradient of the probability to be open."""
        return estimators.threshold_mask(logits)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps a share of the units, at least one: the ones of the largest logits, by straight-through.

    Attributes:
        keep: share of the units in (0, 1], or their number.
        noise: scale of the logistic noise on the logits in training, times the temperature.

    Raises:
        ValueError: keep is neither a share in (0, 1] nor a number of 1 or more.
    """

    keep: float | int = 0.5
    noise: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.keep, numbers.Real) and not isinstance(self.keep, bool)
        if not number or not self.keep > 0 or (not isinstance(self.keep, numbers.Integral) and self.keep > 1):
            raise ValueError(f"keep is {self.keep!r}, expected a share in (0, 1] or a number of 1 or more")

    bias = 0.0

    def number(self, units: int) -> int:
        """How many of so many units it keeps.

        Raises:
            ValueError: more than there are.
        """
        if not isinstance(self.keep, numbers.Integral):
            return max(1, round(self.keep * units))
        if self.keep > units:
            raise ValueError(f"keep is {self.keep}, above the number of units, {units}; keep {units} or fewer")
        return int(self.keep)

    def gates(self, key: Array | None, logits: Array, temperature: Any = 1.0) -> Array:
        """Gates of the shape of the logits [..., U]: drawn with a key, fixed without."""
        k = self.number(logits.shape[-1])
        if key is not None and self.noise:
            logits = logits + self.noise * temperature * jax.random.logistic(key, logits.shape, logits.dtype)
        return estimators.top_k_mask(logits, k)

    def open(self, logits: Array) -> Array:
        """1 where a gate is served open, else 0, with the gradient of the probability to be open."""
        return estimators.top_k_mask(logits, self.number(logits.shape[-1]))


def _with_gradient(hard: Array, soft: Array) -> Array:
    return jax.lax.stop_gradient(hard.astype(soft.dtype) - soft) + soft


def _check_start(start: float) -> None:
    if not 0 < start < 1:
        raise ValueError(f"start is {start}, expected a probability inside of (0, 1)")


__all__ = ["Choice", "GumbelSigmoid", "HardConcrete", "Threshold", "TopK"]
