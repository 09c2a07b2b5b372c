"""The arguments of a linear layer and the loss of its logits."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_bce.arguments import logits_dtype
from fused_bce.sparse import SparseTarget


class LinearCall(NamedTuple):
    """See :func:`fused_bce.functional.linear_binary_cross_entropy_with_logits`."""

    input: Tensor
    linear_weight: Tensor | Sequence[Tensor]  # or parts of it, blocks of labels in order
    linear_bias: Tensor | None
    target: Any  # a tensor or a SparseTarget; None where there is no loss
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0
    ignore_index: int | float | None = None
    chunk_bytes: int | None = None
    dtype: torch.dtype | None = None  # of the logits, if not that of the layer
    recompute: bool = False

    @property
    def parts(self) -> Sequence[Tensor]:
        weight = self.linear_weight
        return [weight] if isinstance(weight, Tensor) else weight

    @property
    def num_labels(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def rows(self) -> Tensor:
        """The input with a first dimension, whose size is that of the batch."""
        return self.input if self.input.dim() > 1 else self.input[None]

    def flattened(self) -> "LinearCall":
        """With the input (N, F), the target (N, C), and weights of rows (N, 1)."""
        rows, target = self.rows.flatten(0, -2), self.target
        if isinstance(target, Tensor):
            target = target.reshape(rows.shape[0], self.num_labels)
        leading = self.input.shape[:-1]
        return self._replace(
            input=rows,
            target=target,
            weight=flatten_weight(self.weight, leading),
            pos_weight=flatten_weight(self.pos_weight, leading),
        )

    def in_parts(self) -> "Iterator[LinearCall]":
        """A call for each part of the weight, with its labels; flattened. The gradients of the
        input, which autograd adds up, are in float32 or float64, so that they are rounded once."""
        call = self.flattened()
        wide = torch.promote_types(call.input.dtype, torch.float32)
        if wide != call.input.dtype:
            dtype = call.dtype or logits_dtype(call.input, self.parts[0])
            call = call._replace(input=call.input.to(wide), dtype=dtype)
        sizes = [part.shape[0] for part in self.parts]
        biases: Sequence[Tensor | None] = [None] * len(sizes)
        if call.linear_bias is not None:
            biases = call.linear_bias.split(sizes)
        begin = 0
        for part, size, bias in zip(self.parts, sizes, biases, strict=True):
            yield call._replace(
                linear_weight=part,
                linear_bias=bias,
                target=_take_labels(call.target, begin, size),
                weight=_take_weights(call.weight, begin, size),
                pos_weight=_take_weights(call.pos_weight, begin, size),
                recompute=True,
            )
            begin += size


def _take_labels(target, begin: int, size: int) -> Tensor | SparseTarget | None:
    if target is None:
        return None
    if isinstance(target, Tensor):
        return target.narrow(1, begin, size)
    # The operator passes over labels out of range.
    return target._replace(indices=target.indices - begin, num_labels=size)


def _take_weights(weight: Tensor | None, begin: int, size: int) -> Tensor | None:
    if weight is None or weight.dim() == 0 or weight.shape[-1] == 1:
        return weight
    return weight.narrow(-1, begin, size)


def flatten_weight(weight: Tensor | None, leading: torch.Size) -> Tensor | None:
    """A weight for logits of shape (*leading, C), for those of shape (N, C)."""
    if weight is None or weight.dim() < 2 or (weight.dim() == 2 and len(leading) < 2):
        return weight
    if all(size == 1 for size in weight.shape[:-1]):
        return weight.flatten(0, -2)
    if weight.dim() == 2 and weight.shape[0] == math.prod(leading):
        return weight
    return weight.expand(*leading, 1).flatten(0, -2)
