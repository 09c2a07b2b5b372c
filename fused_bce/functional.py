"""The loss as a function."""

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn.functional import binary_cross_entropy_with_logits as torch_bce
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_bce.dispatch import are_shards, log_once, why_not_fused

_UNSHARDED = (Tensor, torch.nn.Parameter)
_loss = torch.ops.fused_bce.binary_cross_entropy_with_logits.default

__all__ = ["binary_cross_entropy_with_logits"]


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy between logits and targets: a drop-in for
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`, computed with its gradient in one
    pass over memory.

    Args:
        input: logits, any shape, float16, bfloat16, float32 or float64.
        target: the same shape, any of these dtypes, usually in [0, 1] (not checked).
        weight: rescales each element's loss; broadcasts into the shape of the logits.
        size_average, reduce: deprecated, see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        pos_weight: weight of positive targets; broadcasts into the shape of the logits.

    Returns:
        One number, or the shape of the logits for ``"none"``; in the dtype of the target, under
        autocast float32 (float64 for a float64 target).

    Raises:
        What torch's function raises: ValueError for an unknown reduction and for different sizes,
        RuntimeError for weights that do not broadcast or that require a gradient.

    What the kernel does not cover is left to torch's function: see
    :func:`fused_bce.why_not_fused`.

    Example:
        >>> input = torch.randn(3, 2, requires_grad=True)
        >>> loss = binary_cross_entropy_with_logits(input, torch.ones(3, 2))
        >>> loss.backward()
    """
    if not torch.jit.is_scripting():
        return _fused_or_torch(input, target, weight, size_average, reduce, reduction, pos_weight)
    return torch_bce(input, target, weight, size_average, reduce, reduction, pos_weight)


def _fused_or_torch(input, target, weight, size_average, reduce, reduction, pos_weight):
    legacy = size_average is not None or reduce is not None
    reason = why_not_fused(input, target, weight, pos_weight)
    if reason is not None or (legacy and torch.compiler.is_compiling()):
        if not torch.compiler.is_compiling():
            log_once(reason)
        return _torch(input, target, weight, size_average, reduce, reduction, pos_weight)
    if legacy:
        reduction_enum = _reduction.legacy_get_enum(size_average, reduce)
    else:
        reduction_enum = _reduction.get_enum(reduction)
    if type(input) in _UNSHARDED or not are_shards(input) or input.numel() == 0:
        return _loss(input, target, weight, pos_weight, reduction_enum)
    # Each process adds its shard's part of the mean over the whole.
    divisor = torch.full((), input.numel(), dtype=torch.float64, device=input.device)
    return _loss(input, target, weight, pos_weight, reduction_enum, divisor=divisor)


def _torch(input, target, weight, size_average, reduce, reduction, pos_weight):
    if not has_torch_function_variadic(input, target, weight, pos_weight):
        return torch_bce(input, target, weight, size_average, reduce, reduction, pos_weight)
    # Under patch() torch's function would present itself to the override as ours.
    return handle_torch_function(
        torch_bce,
        (input, target, weight, pos_weight),
        input,
        target,
        weight=weight,
        size_average=size_average,
        reduce=reduce,
        reduction=reduction,
        pos_weight=pos_weight,
    )
