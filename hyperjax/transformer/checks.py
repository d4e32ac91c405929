"""What calls refuse, in one line and before anything is compiled. Values are read where they are known: not in a trace.

B samples, L positions, H heads, F hidden units, N blocks, k chosen positions, C capacity, S positions of a cache.
"""

from typing import Any

import jax
import numpy as np

from hyperjax.transformer.gates import Chosen, Dispatch, Gates


def known(value: Any) -> np.ndarray | None:
    """The value as a NumPy array; None while it is traced, or lies on other hosts."""
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(value)


def check_tokens(tokens: Any, vocabulary: int) -> None:
    """Refuses what is not [B, L] of whole numbers from 0 to vocabulary - 1, L of 1 or more."""
    shape, dtype = getattr(tokens, "shape", None), getattr(tokens, "dtype", type(tokens).__name__)
    if shape is None or len(shape) != 2 or shape[1] < 1 or not np.issubdtype(dtype, np.integer):
        raise ValueError(
            f"tokens have shape {shape} and type {dtype}, expected an array of whole numbers [batch, length], "
            "at least 1 long"
        )
    values = known(tokens)
    if values is not None and values.size and not 0 <= values.min() <= values.max() < vocabulary:
        raise ValueError(
            f"tokens run from {values.min()} to {values.max()}, expected numbers from 0 to {vocabulary - 1}; "
            "a vocabulary of another size was meant, or padding, which needs a number of its own and a mask"
        )


def check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    """Refuses what is not a mask of that shape."""
    found, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", type(mask).__name__)
    if found != shape or dtype != np.bool_:
        raise ValueError(f"{name} has shape {found} and type {dtype}, expected bool {shape}, False for padding")


def check_memory(memory: Any, mask: Any, batch: int, width: int) -> None:
    """Refuses an encoder's features that are not [B, S, D], or whose mask does not fit."""
    shape = getattr(memory, "shape", None)
    if shape is None or len(shape) != 3 or shape[0] != batch or shape[2] != width:
        raise ValueError(f"memory has shape {shape}, expected [{batch}, length, {width}], features of an encoder")
    if mask is not None:
        check_mask("memory_mask", mask, shape[:2])


def check_cache(cache: Any, layers: int, batch: int, length: int) -> None:
    """Refuses a cache of another model or batch, or one that the next `length` positions do not fit in."""
    if len(cache.layers) != layers:
        raise ValueError(f"the cache has {len(cache.layers)} layers and the model {layers}; initialize_cache makes one")
    present = [held.present.shape for held in cache.layers if held is not None]
    if not present:
        return
    held, size = present[0]
    if held != batch:
        raise ValueError(f"the cache holds {held} samples and the tokens have {batch}; give initialize_cache the batch")
    at = known(cache.used)
    used = 0 if at is None else int(at)
    if used + length > size:
        raise ValueError(
            f"the cache has {size} positions, of which {used} are used, and {length} more come; "
            "give initialize_cache a larger size"
        )


def check_stacked(gates: Any, layers: int) -> None:
    """Refuses gates of all layers that are no `Gates`, or without a leading axis of layers."""
    if not isinstance(gates, Gates):
        raise ValueError(f"gates are {type(gates).__name__}, expected Gates, a function that returns them, or None")
    for name, gate in vars(gates).items():
        for array in gate if isinstance(gate, Chosen | Dispatch) else (gate,):
            shape = getattr(array, "shape", None)
            if array is not None and (not shape or shape[0] != layers):
                found = f"is {type(array).__name__}" if shape is None else f"has shape {shape}"
                raise ValueError(f"gates.{name} {found}, expected an array with a leading axis of {layers} layers")


def check_gates(gates: Any, batch: int, length: int, heads: int, cross: int | None, hidden: int) -> None:
    """Refuses gates of one layer that do not fit it: of a part with 0 units any do, with `cross` None none of it."""
    if not isinstance(gates, Gates):
        raise ValueError(f"the gates of a layer are {type(gates).__name__}, expected Gates or None")
    if gates.cross is not None and cross is None:
        raise ValueError("gates.cross is given, expected none: this model attends to no encoder")
    leading: list[tuple[int, ...]] = [(), (batch,), (batch, length)]
    if heads:
        _check_shape("heads", gates.heads, [(*axes, heads) for axes in leading])
    if cross:
        _check_shape("cross", gates.cross, [(*axes, cross) for axes in leading])
    _check_shape("layer", gates.layer, leading[:2], scalar=True)
    if isinstance(gates.tokens, Chosen):
        _check_chosen(gates.tokens, batch, length)
    else:
        _check_shape("tokens", gates.tokens, [(batch, length)])
    if not hidden or gates.blocks is None:
        return
    if isinstance(gates.blocks, Dispatch):
        _check_dispatch(gates.blocks)
        blocks = gates.blocks.index.shape[0]
    else:
        blocks = (getattr(gates.blocks, "shape", None) or (1,))[-1]
        _check_shape("blocks", gates.blocks, [(*axes, blocks) for axes in leading])
    if blocks < 1 or hidden % blocks:
        raise ValueError(f"{blocks} blocks do not divide the {hidden} hidden units; choose a divisor")


def _check_shape(name: str, gate: Any, shapes: list[tuple[int, ...]], scalar: bool = False) -> None:
    if gate is None or (scalar and isinstance(gate, float | int)):
        return
    shape = getattr(gate, "shape", None)
    if shape not in shapes:
        found = f"is {type(gate).__name__}" if shape is None else f"has shape {shape}"
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"gates.{name} of a layer {found}, expected an array of shape {expected}")


def _check_chosen(plan: Chosen, batch: int, length: int) -> None:
    shape, dtype = plan.index.shape, plan.index.dtype
    if len(shape) != 2 or shape[0] != batch or not 1 <= shape[1] <= length or not np.issubdtype(dtype, np.integer):
        raise ValueError(
            f"chosen positions have shape {shape} and type {dtype}, expected whole numbers [{batch}, 1 to {length}]"
        )
    if plan.weight.shape != shape:
        raise ValueError(f"weights of chosen positions have shape {plan.weight.shape}, expected {shape}")
    index = known(plan.index)
    if index is not None and index.size and ((np.diff(index) <= 0).any() or index.min() < 0 or index.max() >= length):
        raise ValueError(f"chosen positions are {index.tolist()}, expected rising numbers from 0 to {length - 1}")


def _check_dispatch(plan: Dispatch) -> None:
    shape, dtype = plan.index.shape, plan.index.dtype
    if len(shape) != 2 or not np.issubdtype(dtype, np.integer) or plan.weight.shape != shape:
        raise ValueError(
            f"a dispatch has index {shape} of {dtype} and weight {plan.weight.shape}, expected whole numbers "
            "[blocks, capacity] and as many weights"
        )
