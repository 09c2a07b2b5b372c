"""A call of the operator of the linear head."""

from typing import Any

import torch
from torch import Tensor

from fused_bce.dtypes import REDUCTIONS
from fused_bce.scalars import batch_size_operand, index_or_nan, smoothing_operand
from fused_bce.sparse import SparseTarget

_loss = torch.ops.fused_bce.linear_binary_cross_entropy_with_logits.default


def operator_arguments(
    input: Tensor,
    linear_weight: Tensor,
    reduction: str,
    target: Tensor | SparseTarget | None,
    label_smoothing: float = 0.0,
    ignore_index: int | float | None = None,
    chunk_bytes: int | None = None,
) -> dict[str, Any]:
    """Those that are no operands, as the operator takes them."""
    index, nan = index_or_nan(ignore_index)
    divisor = None
    if reduction == "batchmean":
        divisor = batch_size_operand(input)
    elif reduction == "mean" and nan and isinstance(target, SparseTarget):
        divisor = target.count_without_nan()
    return {
        "reduction": REDUCTIONS[reduction],
        "label_smoothing": smoothing_operand(label_smoothing, linear_weight),
        "ignore_index": index,
        "ignore_nan": nan,
        "divisor": divisor,
        "chunk_bytes": chunk_bytes or 0,
    }


def linear_loss(input, linear_weight, target, operands, arguments) -> Tensor:
    """The operator, for a target of either kind."""
    sparse = isinstance(target, SparseTarget)
    return _loss(
        input,
        linear_weight,
        operands.get("linear_bias"),
        target.indices if sparse else target,
        target.offsets if sparse else None,
        target.values if sparse else None,
        operands.get("weight"),
        operands.get("pos_weight"),
        **arguments,
    )
