"""Errors for what this loss takes beyond torch's."""

import sys

import torch
from torch import Tensor

_MOST_IGNORED = 2**24  # float32 holds all integers up to there


def check_label_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), not be {label_smoothing}")


def check_ignore_index(ignore_index: object, target: Tensor) -> None:
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int or None, not {ignore_index!r}")
    if not -_MOST_IGNORED < ignore_index < _MOST_IGNORED:
        raise ValueError(f"ignore_index must lie between -2**24 and 2**24, not be {ignore_index}")
    if isinstance(target, Tensor) and not _holds(target.dtype, ignore_index):
        raise ValueError(f"ignore_index {ignore_index} is no value that {target.dtype} can hold")


def _holds(dtype: torch.dtype, value: int) -> bool:
    if dtype is torch.bool:
        return value in (0, 1)
    if dtype.is_floating_point or dtype.is_complex:
        info = torch.finfo(dtype)
        odd_part = value // (value & -value) if value else 0
        return abs(odd_part) < 2 / info.eps and abs(value) <= info.max
    return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def check_targets(target: Tensor, ignore_index: int | None) -> None:
    """Raises ValueError for the first target outside [0, 1], nan included. Waits for a GPU.

    When compiled it raises RuntimeError, without the value, from an assertion in the graph.
    """
    if torch.compiler.is_compiling():
        valid = ~is_invalid(target, ignore_index).any()
        torch._assert_async(valid, "a target lies outside [0, 1]")
        return
    target = _numbers_of(target)
    invalid = is_invalid(target, ignore_index)
    if invalid.any():
        place = invalid.nonzero()[0].tolist() or ""
        raise ValueError(f"target{place} is {target[invalid][0].item()}, outside [0, 1]")


def is_invalid(target: Tensor, ignore_index: int | None) -> Tensor:
    invalid = ~((target >= 0) & (target <= 1))
    return invalid if ignore_index is None else invalid & (target != ignore_index)


def _numbers_of(target: Tensor) -> Tensor:
    """The tensor below the wrappers of torch.func, or this process's shard."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(target):
        target = functorch.get_unwrapped(target)
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(target, distributed.DTensor):
        target = target.to_local()
    return target.detach()
