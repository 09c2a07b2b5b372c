"""Rows and labels of sparse targets, and several targets as one, each as the fields of a
SparseTarget."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_bce.arguments import as_integer, check_integers, check_range, is_assertable, is_readable
from fused_bce.sparse_checks import Fields, is_read


def compute_offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def check_bounds(name: str, begin: int, end: int, size: int) -> tuple[int, int]:
    """As ints of Python."""
    begin, end = as_integer("begin", begin), as_integer("end", end)
    if not 0 <= begin <= end <= size:
        raise IndexError(f"{name}s {begin} to {end} are out of range for {size} {name}s")
    return begin, end


def slice_rows(target: Fields, begin: int, end: int) -> Fields:
    indices, offsets, num_labels, values = target
    offsets = offsets[begin : end + 1]
    if is_readable(offsets):
        own = slice(int(offsets[0]), int(offsets[-1]))
        values = None if values is None else values[own]
        return indices[own], offsets - own.start, num_labels, values
    # All of them, which waits for no GPU, those of the first row in front.
    places = torch.arange(indices.shape[0], device=offsets.device) + offsets[0]
    places = places % max(indices.shape[0], 1)
    values = None if values is None else values[places]
    return indices[places], offsets - offsets[0], num_labels, values


def take_rows(target: Fields, index: Tensor) -> Fields:
    indices, offsets, num_labels, values = target
    check_integers("index", index)
    if index.dim() != 1:
        raise ValueError(f"index must be a vector, not of shape {tuple(index.shape)}")
    index = index.to(offsets.device, torch.int64)
    num_rows = offsets.shape[0] - 1
    if is_readable(index):
        if index.numel():
            check_range("row", int(index.min()), int(index.max()), num_rows)
    elif is_assertable(index):
        torch._assert_async(((index >= 0) & (index < num_rows)).all(), "a row is out of range")
    lengths = offsets.diff()[index]
    taken = compute_offsets(lengths)
    starts = torch.repeat_interleave(offsets[index] - taken[:-1], lengths)
    places = starts + torch.arange(starts.shape[0], device=starts.device)
    values = None if values is None else values[places]
    return indices[places], taken, num_labels, values


def select(kept: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The entries that are kept, in their order. Where the host would have to wait for their number
    there are as many as before, those that are kept in front."""
    # The others all to one place at the end, which is left out.
    places = torch.where(kept, kept.cumsum(0) - 1, kept.numel())
    size = int(kept.sum()) if is_readable(kept) else kept.numel()
    return [t.new_zeros(t.numel() + 1).scatter(0, places, t)[:size] for t in tensors]


def slice_labels(target: Fields, begin: int, end: int) -> Fields:
    indices, offsets, _, values = target
    kept = (indices >= begin) & (indices < end) & is_read(target)
    tensors = [indices - begin] if values is None else [indices - begin, values]
    indices, *others = select(kept, *tensors)
    offsets = compute_offsets(kept)[offsets]
    return indices, offsets, end - begin, others[0] if others else None


def concatenate(targets: Sequence[Fields]) -> Fields:
    indices = torch.cat([target[0] for target in targets])
    tensors = [indices]
    dtypes = [values.dtype for *_, values in targets if values is not None]
    if dtypes:
        dtype = functools.reduce(torch.promote_types, dtypes)
        each = [
            indices.new_ones(indices.shape, dtype=dtype) if values is None else values.to(dtype)
            for indices, *_, values in targets
        ]
        tensors.append(torch.cat(each))
    indices, *others = select(torch.cat([is_read(target) for target in targets]), *tensors)
    offsets = compute_offsets(torch.cat([offsets.diff() for _, offsets, *_ in targets]))
    return indices, offsets, targets[0][2], others[0] if others else None
