"""What computes binary cross entropy with logits: the operator, or torch's own function."""

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn.functional import binary_cross_entropy_with_logits as torch_bce
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused_bce import fallback
from fused_bce.coverage import has_integers
from fused_bce.pointwise import PointwiseLoss


def compute_in_torch(
    input,
    target,
    weight,
    pos_weight,
    reduction,
    smoothing,
    ignore_index,
    *,
    size_average=None,
    reduce=None,
) -> Tensor:
    """Torch's own function, and around it what this package takes beyond."""
    plain = smoothing is None and ignore_index is None and reduction != "batchmean"
    if plain and not has_integers(target):
        return _torch(input, target, weight, size_average, reduce, reduction, pos_weight)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return fallback.binary_cross_entropy_with_logits(
        input, target, weight, pos_weight, reduction, smoothing, ignore_index
    )


BINARY_CROSS_ENTROPY = PointwiseLoss(
    torch.ops.fused_bce.binary_cross_entropy_with_logits.default, fallback=compute_in_torch
)


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
