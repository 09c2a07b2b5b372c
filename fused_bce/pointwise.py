"""A call of any pointwise loss: its checks, whether the kernels cover it, what computes it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_bce.checks import check_ignore_index_of_rows, check_target_values
from fused_bce.coverage import log_once, why_not_dense
from fused_bce.dtypes import number_of_reduction
from fused_bce.scalars import (
    batch_size_operand,
    divisor_operand,
    index_or_nan,
    smoothing_operand,
)
from fused_bce.sparse import SparseTarget, as_sparse


class Extras(NamedTuple):
    """What every loss takes beyond torch's: see functional.binary_cross_entropy_with_logits."""

    label_smoothing: float = 0.0
    ignore_index: int | float | None = None
    validate_targets: bool = False
    recompute: bool = False


class PointwiseLoss(NamedTuple):
    """What computes a loss."""

    # Takes logits, target, weight, the loss's own arguments, and what all losses take.
    operator: Callable[..., Tensor]
    # Computes calls that the kernels do not cover: takes logits, target, weight, the loss's own
    # arguments, the name of the reduction, the smoothing as a tensor, and ignore_index.
    fallback: Callable[..., Tensor]


def evaluate(
    loss: PointwiseLoss,
    input: Tensor,
    target: Tensor | SparseTarget,
    weight: Tensor | None,
    own: tuple,
    reduction: str,
    extras: Extras,
    *,
    pos_weight: Tensor | None = None,
    why_not: str | None = None,
) -> Tensor:
    """The loss of a call, whose arguments are checked here.

    Args:
        own: the loss's own arguments, in the order of its operator.
        pos_weight: among them, for the decision whether the kernels cover the call.
        why_not: a reason of the loss's own why they do not.
    """
    label_smoothing, ignore_index, validate_targets, recompute = extras
    if isinstance(target, SparseTarget):
        target = _make_dense(target, ignore_index)
    reason = why_not_dense(input, target, weight, pos_weight)
    if reason is not None and isinstance(sparse := as_sparse(target), SparseTarget):
        target = _make_dense(sparse, ignore_index)
        reason = why_not_dense(input, target, weight, pos_weight)
    ignore_index = check_target_values(target, ignore_index, validate_targets)
    smoothing = smoothing_operand(label_smoothing, input)
    reason = reason or why_not
    if reason is not None:
        if not torch.compiler.is_compiling():
            log_once(reason)
        return loss.fallback(input, target, weight, *own, reduction, smoothing, ignore_index)
    number = number_of_reduction(reduction)
    if reduction == "batchmean":
        divisor: Tensor | None = batch_size_operand(input)
    else:
        divisor = divisor_operand(input, target, weight, pos_weight, number, ignore_index)
    if smoothing is None and ignore_index is None and divisor is None and not recompute:
        # What a call leaves out need not be parsed.
        return loss.operator(input, target, weight, *own, number)
    return loss.operator(
        input,
        target,
        weight,
        *own,
        number,
        None,
        smoothing,
        *index_or_nan(ignore_index),
        divisor,
        recompute,
    )


def _make_dense(target: SparseTarget, ignore_index: int | float | None) -> Tensor:
    check_ignore_index_of_rows(ignore_index, target)
    return target.to_dense()
