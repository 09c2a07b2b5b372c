"""The arguments of a linear layer and the loss of its logits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_bce.sparse import SparseTarget


class LinearCall(NamedTuple):
    """See :func:`fused_bce.functional.linear_binary_cross_entropy_with_logits`."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor | SparseTarget
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0
    ignore_index: int | float | None = None
    chunk_bytes: int | None = None
    dtype: torch.dtype | None = None  # of the logits, if not that of the layer

    @property
    def rows(self) -> Tensor:
        """The input with a first dimension, whose size is that of the batch."""
        return self.input if self.input.dim() > 1 else self.input[None]

    def flattened(self) -> "LinearCall":
        """With the input (N, F), the target (N, C), and weights of rows (N, 1)."""
        rows, target = self.rows.flatten(0, -2), self.target
        if isinstance(target, Tensor):
            target = target.reshape(rows.shape[0], self.linear_weight.shape[0])
        leading = self.input.shape[:-1]
        return self._replace(
            input=rows,
            target=target,
            weight=flatten_weight(self.weight, leading),
            pos_weight=flatten_weight(self.pos_weight, leading),
        )


def flatten_weight(weight: Tensor | None, leading: torch.Size) -> Tensor | None:
    """A weight for logits of shape (*leading, C), for those of shape (N, C)."""
    if weight is None or weight.dim() < 2 or (weight.dim() == 2 and len(leading) < 2):
        return weight
    if all(size == 1 for size in weight.shape[:-1]):
        return weight.flatten(0, -2)
    if weight.dim() == 2 and weight.shape[0] == math.prod(leading):
        return weight
    return weight.expand(*leading, 1).flatten(0, -2)
