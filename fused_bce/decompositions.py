"""The operators as ATen operations, for what cannot run them: ONNX, other backends."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_bce import _C
from fused_bce.checks import is_ignored
from fused_bce.registrations import call_composite, ops
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


def _lower_pointwise(name: str) -> Callable:
    """All operators of a loss take its arguments in the same order."""
    of = {kind: getattr(ops, f"_{name}_{kind}").default for kind in _KINDS}

    def loss(*operands, **named):
        return call_composite(of["composite"], None, None, None, None, *operands, **named)

    def grad(*operands, **named):
        return call_composite(of["differentiable_backward"], *operands, **named)

    def loss_and_grad(*operands, **named):
        value = loss(*operands, **named)
        return value, grad(torch.ones_like(value), *operands, **named)

    _table[getattr(ops, name).default] = loss
    _table[of["composite"]] = functools.partial(call_composite, of["composite"])
    _table[of["backward"]] = grad
    _table[of["with_grad"]] = loss_and_grad
    return loss


_KINDS = ("composite", "with_grad", "backward", "differentiable_backward")
_lowered = {name: _lower_pointwise(name) for name, *_ in _C.losses()}


def _logits(input, linear_weight, linear_bias, dtype: torch.dtype) -> Tensor:
    bias = None if linear_bias is None else linear_bias.to(dtype)
    return torch.nn.functional.linear(input.to(dtype), linear_weight.to(dtype), bias)


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
    logits = _logits(input, linear_weight, linear_bias, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if offsets is not None:
        rows = SparseTarget(target, offsets, linear_weight.shape[0], values)
        target = rows.to_dense_unchecked()
    if target.is_floating_point():
        wide = torch.promote_types(wide, target.dtype)
    return _lowered["binary_cross_entropy_with_logits"](
        logits, target, weight, pos_weight, reduction, wide, *extras[:4], **named
    )


@_lowers(ops._linear_binary_cross_entropy_with_grads.default)
def _linear_loss_and_grads(wanted, grad_loss, input, linear_weight, linear_bias, *rest, **named):
    operands = input, linear_weight, linear_bias, *rest
    loss = _linear_loss(*operands, **named)
    grads = call_composite(
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


@_lowers(ops._linear_topk.default)
def _linear_topk(input, linear_weight, linear_bias, k, dtype=None, chunk_bytes=0):
    # Of equal logits ONNX has the lower label first, too.
    return torch.topk(_logits(input, linear_weight, linear_bias, dtype or input.dtype), k)


@_lowers(ops._count_unignored.default)
def _count(target, ignore_index, ignore_nan=False):
    return (~_ignored(target, ignore_index, ignore_nan)).sum(dtype=torch.float64)


def _ignored(target: Tensor, ignore_index: int | None, ignore_nan: bool) -> Tensor:
    ignored = torch.zeros_like(target, dtype=torch.bool)
    if ignore_index is not None:
        ignored = ignored | is_ignored(target, ignore_index)
    return ignored | is_ignored(target, math.nan) if ignore_nan else ignored
