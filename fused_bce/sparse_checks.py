"""Errors for the fields of sparse targets."""

import torch
from torch import Tensor

from fused_bce.arguments import check_range, check_tensor, describe, is_int
from fused_bce.dtypes import TARGETS

LABELS = (torch.int32, torch.int64)
Fields = tuple[Tensor, Tensor, int, Tensor | None]  # of a SparseTarget


def check_structure(target: Fields) -> None:
    """Of all but the numbers."""
    indices, offsets, num_labels, values = target
    if not isinstance(indices, Tensor) or indices.dtype not in LABELS or indices.dim() != 1:
        raise TypeError(f"indices must be a vector of int32 or int64, not {describe(indices)}")
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64 or offsets.dim() != 1:
        raise TypeError(f"offsets must be a vector of int64, not {describe(offsets)}")
    if not is_int(num_labels):
        raise TypeError(f"num_labels must be an integer, not {num_labels!r}")
    if values is not None:
        check_tensor("values", values)
        if values.dtype not in TARGETS:
            raise TypeError(f"values must be of a dtype that a loss takes, not {values.dtype}")
    if torch.jit.is_tracing():
        return  # which would make constants of the answers, and warn
    if num_labels < 0:
        raise ValueError(f"num_labels must not be negative, as {num_labels}")
    if offsets.shape[0] == 0:
        raise ValueError("offsets must have one number more than there are rows, hence one")
    if values is not None and values.shape != indices.shape:
        raise TypeError(f"values must be as many as indices, not {describe(values)}")
    for name, t in (("offsets", offsets), ("values", values)):
        if t is not None and t.device != indices.device:
            raise RuntimeError(f"indices are on {indices.device}, but {name} on {t.device}")


def check_numbers(target: Fields) -> None:
    indices, offsets, num_labels, _ = target
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"offsets must begin with 0, not {first}")
    if not 0 <= last <= indices.shape[0]:
        raise ValueError(
            f"offsets must end with at most the number of indices, {indices.shape[0]}, not {last}"
        )
    falls = offsets.diff() < 0
    if falls.any():
        raise ValueError(f"offsets must ascend, but fall behind row {int(falls.int().argmax())}")
    if last:
        lowest, highest = indices[:last].aminmax()
        check_range("label", int(lowest), int(highest), num_labels)


def assert_numbers(target: Fields) -> None:
    indices, offsets, num_labels, _ = target
    ascend = (offsets.diff() >= 0).all() & (offsets[0] == 0)
    torch._assert_async(ascend & (offsets[-1] <= indices.shape[0]), "bad offsets")
    inside = (indices >= 0) & (indices < num_labels)
    torch._assert_async((inside | ~is_read(target)).all(), "a label is out of range")


def is_read(target: Fields) -> Tensor:
    """Which indices and values belong to a row, those in front of the last offset."""
    indices, offsets, *_ = target
    places = torch.arange(indices.shape[0], device=indices.device)
    return places < offsets[-1]
