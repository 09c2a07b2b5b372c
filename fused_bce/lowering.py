"""The operators in those of torch (aten), for what cannot run them: ONNX, other backends."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_bce.dtypes import MEAN, NONE
from fused_bce.reference import (
    is_ignored,
    loss_of_kept,
    sigmoid_focal_losses,
    sum_of,
    with_floats,
)
from fused_bce.registrations import ops
from fused_bce.sparse import SparseTarget

_table: dict = {}


def decomposition_table() -> dict[torch._ops.OpOverload, Callable]:
    """Decompositions of this package's operators into torch's.

    For an exported program they are added to torch's own, also before torch.onnx.export takes it.
    (Given a model, it needs none: no operator of ours is traced there.)

    Example:
        >>> import torch
        >>> import fused_bce
        >>> from torch.export import default_decompositions, export
        >>> program = export(fused_bce.BCEWithLogitsLoss(), (torch.zeros(3), torch.ones(3)))
        >>> table = default_decompositions()
        >>> table.update(fused_bce.decomposition_table())
        >>> program = program.run_decompositions(table)
    """
    return dict(_table)


def _lowers(op: torch._ops.OpOverload) -> Callable:
    """Not registered with torch: where the environment sets CI, its compiler would then refuse to
    keep the operator."""

    def register(function: Callable) -> Callable:
        _table[op] = function
        return function

    return register


@_lowers(ops.binary_cross_entropy_with_logits.default)
def _loss(
    logits,
    target,
    weight=None,
    pos_weight=None,
    reduction=1,
    dtype=None,
    label_smoothing=None,
    ignore_index=None,
    ignore_nan=False,
    divisor=None,
    recompute=False,
):
    def losses_of(logits, target, ignored):
        return loss_of_kept(logits, target, ignored, weight, pos_weight)

    return _reduced(
        losses_of,
        logits,
        target,
        reduction,
        dtype or with_floats(target, logits).dtype,
        label_smoothing,
        ignore_index,
        ignore_nan,
        divisor,
    )


def _reduced(
    losses_of,
    logits,
    target,
    reduction,
    dtype,
    label_smoothing,
    ignore_index,
    ignore_nan,
    divisor,
):
    """What is the same for every loss around the losses of its elements."""
    ignored = _ignored(target, ignore_index, ignore_nan)
    target = with_floats(target, logits)
    logits, target = (t.to(torch.promote_types(t.dtype, dtype)) for t in (logits, target))
    if label_smoothing is not None:
        target = (target * (1 - label_smoothing) + label_smoothing / 2).to(target.dtype)
    losses = losses_of(logits, target, ignored)
    if reduction == NONE:
        return losses.to(dtype)
    total = sum_of(losses)
    if reduction == MEAN:
        count = (~ignored).sum() if divisor is None else divisor
        total = total / count.masked_fill(count == 0, 1)
    return total.to(dtype)


@_lowers(ops._binary_cross_entropy_with_logits_backward.default)
def _grad(*operands, **named):
    return _composite(
        ops._binary_cross_entropy_with_logits_differentiable_backward.default, *operands, **named
    )


def _composite(op, *operands, **named):
    """The formula stands in csrc/derivatives.cpp. Its kernel is called past the dispatcher, since
    torch.export keeps operators that are made of others."""
    return op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *operands, **named)


@_lowers(ops._binary_cross_entropy_with_logits_with_grad.default)
def _loss_and_grad(*operands, **named):
    loss = _loss(*operands, **named)
    return loss, _grad(torch.ones_like(loss), *operands, **named)


@_lowers(ops.sigmoid_focal_loss.default)
def _focal_loss(
    logits,
    target,
    weight=None,
    alpha=0.25,
    gamma=2.0,
    gamma_neg=2.0,
    reduction=1,
    dtype=None,
    label_smoothing=None,
    ignore_index=None,
    ignore_nan=False,
    divisor=None,
    recompute=False,
):
    def losses_of(logits, target, ignored):
        losses = sigmoid_focal_losses(
            logits.masked_fill(ignored, 0),
            target.masked_fill(ignored, 0),
            None if alpha == -1 else alpha,
            gamma,
            None if gamma_neg == gamma else gamma_neg,
        )
        losses = losses if weight is None else losses * weight
        return losses.masked_fill(ignored, 0)

    dtype = dtype or torch.promote_types(logits.dtype, target.dtype)
    return _reduced(
        losses_of,
        logits,
        target,
        reduction,
        dtype,
        label_smoothing,
        ignore_index,
        ignore_nan,
        divisor,
    )


@_lowers(ops._sigmoid_focal_loss_backward.default)
def _focal_grad(*operands, **named):
    return _composite(ops._sigmoid_focal_loss_differentiable_backward.default, *operands, **named)


@_lowers(ops._sigmoid_focal_loss_with_grad.default)
def _focal_loss_and_grad(*operands, **named):
    loss = _focal_loss(*operands, **named)
    return loss, _focal_grad(torch.ones_like(loss), *operands, **named)


@_lowers(ops.linear_binary_cross_entropy_with_logits.default)
def _linear_loss(
    input,
    linear_weight,
    linear_bias,
    target,
    offsets=None,
    values=None,
    weight=None,
    pos_weight=None,
    reduction=1,
    dtype=None,
    *extras,
    chunk_bytes=0,
    **named,
):
    dtype = dtype or input.dtype
    bias = None if linear_bias is None else linear_bias.to(dtype)
    logits = torch.nn.functional.linear(input.to(dtype), linear_weight.to(dtype), bias)
    wide = torch.promote_types(dtype, torch.float32)
    if offsets is not None:
        rows = SparseTarget(target, offsets, linear_weight.shape[0], values)
        target = rows.to_dense_unchecked()
    if target.is_floating_point():
        wide = torch.promote_types(wide, target.dtype)
    return _loss(logits, target, weight, pos_weight, reduction, wide, *extras[:4], **named)


@_lowers(ops._linear_binary_cross_entropy_with_grads.default)
def _linear_loss_and_grads(wanted, grad_loss, input, linear_weight, linear_bias, *rest, **named):
    operands = input, linear_weight, linear_bias, *rest
    loss = _linear_loss(*operands, **named)
    grads = _composite(
        ops._linear_binary_cross_entropy_differentiable_backward.default,
        wanted,
        torch.ones_like(loss) if grad_loss is None else grad_loss,
        *operands,
        **named,
    )
    wide = torch.promote_types(named.get("dtype") or input.dtype, torch.float32)
    dtypes = wide, linear_weight.dtype, wide
    return loss, *(
        grad.to(dtype) if is_wanted else input.new_empty(0, dtype=dtype)
        for grad, is_wanted, dtype in zip(grads, wanted, dtypes, strict=True)
    )


@_lowers(ops._count_unignored.default)
def _count(target, ignore_index, ignore_nan=False):
    return (~_ignored(target, ignore_index, ignore_nan)).sum(dtype=torch.float64)


def _ignored(target: Tensor, ignore_index: int | None, ignore_nan: bool) -> Tensor:
    ignored = torch.zeros_like(target, dtype=torch.bool)
    if ignore_index is not None:
        ignored = ignored | is_ignored(target, ignore_index)
    return ignored | is_ignored(target, math.nan) if ignore_nan else ignored
