"""What computes a linear layer and the loss of its logits: the operator, or torch's layer."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_bce.coverage import are_shards, log_once, why_not_linear
from fused_bce.cross_entropy import BINARY_CROSS_ENTROPY, compute_in_torch
from fused_bce.dtypes import REDUCTIONS
from fused_bce.extras import Extras
from fused_bce.linear_call import LinearCall
from fused_bce.registrations import ops, whole
from fused_bce.scalars import (
    batch_size_operand,
    index_or_nan,
    scalar_operand,
    smoothing_operand,
)
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
    if len(call.parts) == 1:
        return _evaluate_part(call, divisor)
    if divisor is None and call.reduction == "mean":
        divisor = count_elements(call)
    # Each part has a node of its own. Backward takes them in the reverse order, and accumulates the
    # gradient of a leaf, and runs its hooks, before it goes on to the next node.
    losses = [_evaluate_part(part, divisor) for part in call.in_parts()]
    return functools.reduce(torch.add, losses)


def _evaluate_part(call: LinearCall, divisor: Tensor | None) -> Tensor:
    if are_shards(call.input, *call.parts):
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


def count_elements(call: LinearCall) -> Tensor:
    """What mean divides by, for each process and each part of the labels the same."""
    target = call.target
    if isinstance(target, SparseTarget) or call.ignore_index is None:
        elements = math.prod(call.input.shape[:-1]) * call.num_labels
        # Of nothing it is nan, as a divisor of 0 would count as 1.
        beside = target.offsets if isinstance(target, SparseTarget) else target
        return scalar_operand(elements if elements != 0 else math.nan, beside)
    count = whole(ops._count_unignored(target.detach(), *index_or_nan(call.ignore_index)))
    return cast(Any, count).to_local() if are_shards(count) else count


def operator_arguments(call: LinearCall, divisor: Tensor | None) -> tuple:
    """In the order of the operators' schemas."""
    call = call.flattened()
    (linear_weight,), target = call.parts, call.target
    rows = target if isinstance(target, SparseTarget) else None
    return (
        call.input,
        linear_weight,
        call.linear_bias,
        target if rows is None else rows.indices,
        None if rows is None else rows.offsets,
        None if rows is None else rows.values,
        call.weight,
        call.pos_weight,
        REDUCTIONS[call.reduction],
        call.dtype,
        smoothing_operand(call.label_smoothing, linear_weight),
        *index_or_nan(call.ignore_index),
        divisor,
        call.chunk_bytes or 0,
        call.recompute,
    )


def compute_logits(call: LinearCall) -> Tensor:
    input, bias = call.input, call.linear_bias
    weight = call.parts[0] if len(call.parts) == 1 else torch.cat([*call.parts])
    if call.dtype is not None:
        input, weight = input.to(call.dtype), weight.to(call.dtype)
        bias = None if bias is None else bias.to(call.dtype)
    return F.linear(input, weight, bias)


def _compute_in_torch(call: LinearCall) -> Tensor:
    batch_size, call = call.rows.size(0), call.flattened()
    logits = compute_logits(call)
    extras = Extras(call.label_smoothing, call.ignore_index)

    def compute(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
        loss, weights = BINARY_CROSS_ENTROPY, (call.weight, call.pos_weight)
        return compute_in_torch(loss, logits, target, *weights, (), reduction, extras)

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
