"""What computes a linear layer and the loss of its logits: the operator, or torch's layer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_bce.coverage import are_shards, log_once, why_not_linear
from fused_bce.cross_entropy import BINARY_CROSS_ENTROPY, compute_in_torch
from fused_bce.dtypes import REDUCTIONS
from fused_bce.extras import Extras
from fused_bce.linear_call import LinearCall
from fused_bce.registrations import ops
from fused_bce.scalars import batch_size_operand, index_or_nan, smoothing_operand
from fused_bce.sparse import SparseTarget

compute_loss = ops.linear_binary_cross_entropy_with_logits.default


def evaluate_linear(call: LinearCall) -> Tensor:
    """The loss of a call whose arguments were checked."""
    reason = why_not_linear(call)
    if reason is not None:
        if not torch.compiler.is_compiling():
            log_once(reason)
        return _compute_in_torch(call)
    divisor = divisor_of(call)
    if are_shards(call.input, call.linear_weight):
        from fused_bce.sharded import loss_of_shards

        return loss_of_shards(call, divisor)
    return compute_loss(*operator_arguments(call, divisor))


def divisor_of(call: LinearCall) -> Tensor | None:
    """What a mean divides by where the operator does not know it."""
    if call.reduction == "batchmean":
        return batch_size_operand(call.rows)
    target, ignores = call.target, call.ignore_index is not None
    if call.reduction == "mean" and ignores and isinstance(target, SparseTarget):
        return target.count_without_nan()
    return None


def operator_arguments(call: LinearCall, divisor: Tensor | None) -> tuple:
    """In the order of the operators' schemas."""
    call = call.flattened()
    input, target = call.input, call.target
    rows = target if isinstance(target, SparseTarget) else None
    return (
        input,
        call.linear_weight,
        call.linear_bias,
        target if rows is None else rows.indices,
        None if rows is None else rows.offsets,
        None if rows is None else rows.values,
        call.weight,
        call.pos_weight,
        REDUCTIONS[call.reduction],
        call.dtype,
        smoothing_operand(call.label_smoothing, call.linear_weight),
        *index_or_nan(call.ignore_index),
        divisor,
        call.chunk_bytes or 0,
    )


def _compute_in_torch(call: LinearCall) -> Tensor:
    batch_size, call = call.rows.size(0), call.flattened()
    input, weight, bias = call.input, call.linear_weight, call.linear_bias
    if call.dtype is not None:
        input, weight = input.to(call.dtype), weight.to(call.dtype)
        bias = None if bias is None else bias.to(call.dtype)
    extras = Extras(call.label_smoothing, call.ignore_index)

    def compute(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
        loss, weights = BINARY_CROSS_ENTROPY, (call.weight, call.pos_weight)
        return compute_in_torch(loss, logits, target, *weights, (), reduction, extras)

    logits = F.linear(input, weight, bias)
    return compute_from_logits(compute, logits, call.target, call.reduction, batch_size)


def compute_from_logits(
    compute: Callable[[Tensor, Tensor, str], Tensor],
    logits: Tensor,
    target: Tensor | SparseTarget,
    reduction: str,
    batch_size: int,
) -> Tensor:
    """The loss of logits (N, C), by a loss of dense targets."""
    if isinstance(target, SparseTarget):
        target = target.to_dense()
    # In the dtype of the target, which is that of the loss.
    wide = torch.promote_types(logits.dtype, torch.float32)
    if target.is_floating_point():
        wide = torch.promote_types(wide, target.dtype)
    target = target.to(wide).reshape(logits.shape)
    if reduction == "batchmean":
        return compute(logits, target, "sum") / batch_size
    return compute(logits, target, reduction)
