"""The arguments of a linear layer and the loss of its logits."""

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

    def matrices(self) -> tuple[Tensor, Tensor | SparseTarget]:
        """The input (N, F) and the target (N, C)."""
        if self.input.dim() == 2:
            return self.input, self.target
        rows, target = self.rows.flatten(0, -2), self.target
        if isinstance(target, Tensor):
            target = target.reshape(rows.shape[0], self.linear_weight.shape[0])
        return rows, target
